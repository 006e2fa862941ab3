"""Ranks embed the profiles of a run together; a killed start goes on where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import TRAIN
from ranks import run
from small_runs import recipe

from cuma_ds.profiles import ProfileEncoder, ProfileTable
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

pytestmark = pytest.mark.multirank
HELPER = str(Path(__file__).parents[1] / "helpers" / "with_fault.py")
PEOPLE = 1100
ADD = "cuma_ds.profiles.embedding:EmbeddingStore.add"


@pytest.fixture
def make(tmp_path, tiny_llama, tiny_encoder):
    """Write a recipe of one step on people who are all different, with an encoder of its own."""
    answers = tmp_path / "answers.jsonl"
    with answers.open("w") as file:
        for person in range(PEOPLE):
            profile = {"age": 18 + person % 70, "note": "x" * (person % 11) + str(person)}
            row = {"profile": profile, "question": "Tea?", "options": ["Yes", "No"], "answer": person % 2}
            file.write(json.dumps({**row, "person_id": str(person)}) + "\n")

    def go(name: str) -> Path:
        encoder = tmp_path / f"encoder-{name}"
        shutil.copytree(tiny_encoder, encoder)
        return recipe(
            tmp_path, tiny_llama, encoder, name,
            data={"path": str(answers), "heldout_fraction": 0.0}, training={"steps": 1, "warmup_steps": 0},
            profiles={"encoder": str(encoder), "cache_dir": str(tmp_path / f"cache-{name}")},
        )  # fmt: skip

    return go


def start(path: Path, world: int, fault: dict | None = None) -> list[tuple[int | None, str]]:
    return run(world, [TRAIN if fault is None else HELPER, *([json.dumps(fault), TRAIN] if fault else []),
                       "--config", str(path)])  # fmt: skip


def table_of(path: Path) -> ProfileTable:
    trained = Run(load_config(path).run_dir)
    assert not trained.embedded.exists()
    assert [place for place in trained.folder.iterdir() if place.name.startswith(".")] == []
    return ProfileTable.load(trained.profiles_file)


def test_ranks_and_a_kill_leave_no_trace_in_the_bits(make) -> None:
    alone, together, killed = (make(name) for name in ("alone", "together", "killed"))
    assert [code for code, _ in start(alone, 1)] == [0]
    results = start(together, 2)
    assert [code for code, _ in results] == [0, 0], results
    assert f"embedding {PEOPLE:,} of {PEOPLE:,} profiles" in results[0][1]
    expected = table_of(alone)
    assert len(expected.sentences) == PEOPLE
    assert torch.equal(table_of(together).embeddings, expected.embeddings)

    start(killed, 2, {"function": ADD, "rank": 1, "call": 2, "do": "SIGKILL"})
    trained = Run(load_config(killed).run_dir)
    kept = sorted(trained.embedded.rglob("*.safetensors"))
    assert kept
    assert not trained.profiles_file.exists()
    content = bytearray(kept[0].read_bytes())
    content[-100] ^= 1
    kept[0].write_bytes(content)
    results = start(killed, 2)
    assert [code for code, _ in results] == [0, 0], results
    assert f"embedding {PEOPLE:,} of {PEOPLE:,} profiles" not in results[0][1]
    assert f"of {PEOPLE:,} profiles" in results[0][1]
    assert torch.equal(table_of(killed).embeddings, expected.embeddings)


def test_what_another_encoder_made_is_not_taken(make) -> None:
    """Its weights change between the kill and the next start."""
    path = make("changed")
    start(path, 2, {"function": ADD, "rank": 0, "call": 3, "do": "SIGKILL"})
    config = load_config(path)
    assert any(Run(config.run_dir).embedded.rglob("*.safetensors"))
    weights = Path(config.profiles.encoder) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    results = start(path, 2)
    assert [code for code, _ in results] == [0, 0], results
    assert f"embedding {PEOPLE:,} of {PEOPLE:,} profiles" in results[0][1]
    table, encoder = table_of(path), ProfileEncoder(config.profiles.encoder)
    assert table.fingerprint == encoder.fingerprint
    torch.testing.assert_close(table.embeddings[:9], encoder(table.sentences[:9]), rtol=0, atol=1e-6)


def test_a_rank_without_the_encoder_is_no_help_and_no_hindrance(make) -> None:
    """On another machine the folder may be missing."""
    alone, path = make("alone"), make("missing")
    assert [code for code, _ in start(alone, 1)] == [0]
    fault = {"function": "cuma_ds.profiles.settings:encoder_of", "rank": 1, "do": "raise", "error": "ModelError"}
    results = start(path, 2, fault)
    assert [code for code, _ in results] == [0, 0], results
    assert torch.equal(table_of(path).embeddings, table_of(alone).embeddings)
