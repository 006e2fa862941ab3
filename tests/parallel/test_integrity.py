"""Changed bits, exchanged files and other models: noticed by everything that reads a run, in one line."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import TRAIN, all_tensors, one_line
from ranks import run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import recipe

from cuma_ds.config import RunConfig
from cuma_ds.errors import CheckpointError, CumaError
from cuma_ds.evaluation.subject import run_subject
from cuma_ds.export.hf import read_run
from cuma_ds.export.lora import write_lora
from cuma_ds.inference.open import open_run
from cuma_ds.learned_settings import learned_settings
from cuma_ds.parallel.stored import check_checkpoint, find_checkpoint, newest_whole, read_state
from cuma_ds.profiles import ProfileTable
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run
from cuma_ds.training.inputs import prepare_run

pytestmark = pytest.mark.multirank
SHARDED = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
FILES = ["experts-0-of-2.safetensors", "experts-1-of-2.safetensors", "shared.safetensors", "state.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    """The recipe of a run of four steps on two ranks, with checkpoints of step 2 and 4."""
    path = recipe(
        tmp_path_factory.mktemp("trained"), tiny_llama, tiny_encoder, "run", parallel=SHARDED, checkpoint={"every": 2},
        training={"steps": 4, "warmup_steps": 0, "schedule": "constant"},
    )  # fmt: skip
    assert [code for code, _ in run(2, [TRAIN, "--config", str(path)])] == [0, 0]
    return path


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> RunConfig:
    """A copy of that run that may be damaged."""
    config = load_config(trained, [f"run.output_dir={tmp_path}"])
    shutil.copytree(load_config(trained).run_dir, config.run_dir)
    return config


def resume(config: RunConfig) -> None:
    """What training does before it loads anything."""
    prepare_run(config)
    run = Run(config.run_dir)
    folder, _ = newest_whole(run.checkpoints)
    check_checkpoint(folder, run.known_fingerprints(config), run.identity())


READERS: dict[str, Callable[[RunConfig], object]] = {
    "train": resume,
    "evaluate": lambda config: run_subject(config.run_dir),
    "export": lambda config: read_run(config.run_dir),
    "export as LoRA": lambda config: write_lora(
        config.run_dir, [{"country": "Norway"}], config.run_dir.parent / "lora"
    ),
    "generate and serve": lambda config: open_run(config.run_dir),
}


def complaint(read: Callable[[RunConfig], object], config: RunConfig) -> str:
    """The one line that a reader says, as an error or a warning; empty if it says nothing."""
    said = ""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            read(config)
        except CumaError as error:
            said = str(error)
    shutil.rmtree(config.run_dir.parent / "lora", ignore_errors=True)
    assert "\n" not in said
    return said or " ".join(str(warning.message) for warning in told if str(config.run_dir) in str(warning.message))


def test_whole_checkpoints_are_read_without_a_word(copied) -> None:
    for name, read in READERS.items():
        assert complaint(read, copied) == "", name


def flips(folder: Path, number: int) -> list[tuple[Path, int, int]]:
    """Seeded places: file, byte and bit; every file comes about as often as any other."""
    generator = random.Random(41)
    files = [*(folder / name for name in FILES), folder.with_name("latest")]
    found = [(files[place % len(files)], generator.random(), generator.randrange(8)) for place in range(number)]
    return [(file, int(share * file.stat().st_size), bit) for file, share, bit in found]


def test_one_flipped_bit_anywhere_or_a_file_of_another_step_is_noticed_by_every_reader(copied) -> None:
    folder = find_checkpoint(Run(copied.run_dir).checkpoints)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    unnoticed = []
    for file, place, bit in flips(folder, 40):
        content = bytearray(file.read_bytes())
        content[place] ^= 1 << bit
        whole = file.read_bytes()
        file.write_bytes(bytes(content))
        unnoticed += [(name, file.name, place, bit) for name, read in READERS.items() if not complaint(read, copied)]
        file.write_bytes(whole)
    for name in FILES:
        whole = (folder / name).read_bytes()
        other = (folder.with_name("step-2") / name).read_bytes()
        assert len(whole) == len(other)
        (folder / name).write_bytes(other)
        for reader, read in READERS.items():
            said = complaint(read, copied)
            assert name in said, (reader, name, said)
            assert "step-4" in said, said
            assert "step-2 is used instead" in said, said
        (folder / name).write_bytes(whole)
    assert unnoticed == []


def test_every_key_of_the_state_is_protected(copied) -> None:
    """Edited by hand, also where the hash beside it is taken away."""
    file = find_checkpoint(Run(copied.run_dir).checkpoints) / "state.json"
    state = json.loads(file.read_text())
    assert {
        "step",
        "optimizer_steps",
        "fingerprint",
        "identity",
        "written_by",
        "num_experts",
        "files",
        "sha256",
        "sealed",
    } <= state.keys()
    for key in state:
        for changed in (
            {**state, key: 3 if state[key] != 3 else 5},
            {name: value for name, value in state.items() if name != key},
        ):
            file.write_text(json.dumps(changed))
            with pytest.raises(CheckpointError, match=r"state\.json|step-4|format"):
                read_state(file.parent)
    file.write_text(json.dumps(state))  # another layout of the same content
    assert read_state(file.parent)["step"] == 4


def test_on_two_ranks_a_flipped_bit_is_said_and_the_run_goes_on_from_the_checkpoint_before(
    copied, trained, tmp_path
) -> None:
    """The damaged checkpoint stays beside, and what the run learns is what it would have learned."""
    expected = all_tensors(find_checkpoint(Run(load_config(trained).run_dir).checkpoints))
    config = tmp_path / "again.yaml"
    config.write_text(copied.to_yaml())
    experts = find_checkpoint(Run(copied.run_dir).checkpoints) / "experts-1-of-2.safetensors"
    content = bytearray(experts.read_bytes())
    content[len(content) // 2] ^= 16
    experts.write_bytes(bytes(content))
    # Ranks of tests are silent about warnings.
    with pytest.warns(
        UserWarning, match=r"experts-1-of-2.safetensors has changed since it was written; step-2 is used"
    ):
        newest_whole(Run(copied.run_dir).checkpoints)
    results = run(2, [TRAIN, "--config", str(config)])
    assert [code for code, _ in results] == [0, 0], results
    assert "after step 2" in results[0][1]
    checkpoints = Run(copied.run_dir).checkpoints
    names = {folder.name for folder in checkpoints.iterdir()}
    assert names == {"step-2", "step-4", "step-4.damaged", "latest"}
    again = all_tensors(find_checkpoint(checkpoints))
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_where_no_checkpoint_is_whole_nothing_is_trained_anew(copied, tmp_path) -> None:
    config = tmp_path / "again.yaml"
    config.write_text(copied.to_yaml())
    for folder in Run(copied.run_dir).checkpoints.glob("step-*"):
        (folder / "shared.safetensors").unlink()
    command = [TRAIN, "--config", str(config), "--set", "training.steps=5"]
    one_line(run(2, command), "step-4 is incomplete: shared.safetensors is missing")
    shutil.rmtree(Run(copied.run_dir).checkpoints)
    one_line(run(2, command), "says that step 4 was reached", "holds no checkpoint")


def test_profiles_and_prepared_data_are_checked_too(copied) -> None:
    for name in (
        "profiles.safetensors",
        "data/manifest.json",
        "data/train.arrow",
        "data/profiles.jsonl",
        "identity.json",
    ):
        file = copied.run_dir / name
        whole = file.read_bytes()
        for place in (len(whole) // 3, len(whole) // 2, len(whole) - 20):
            content = bytearray(whole)
            content[place] ^= 1
            file.write_bytes(bytes(content))
            for reader, read in READERS.items():
                assert (name == "identity.json" and reader != "train") or complaint(read, copied), (name, reader, place)
        file.write_bytes(whole)


def test_profiles_or_data_of_another_run_are_refused(copied, tmp_path) -> None:
    file = copied.run_dir / "profiles.safetensors"
    table = ProfileTable.load(file)
    ProfileTable(table.sentences, table.embeddings.flip(0), table.fingerprint).save(file)
    for reader, read in READERS.items():
        assert "profiles.safetensors is not what this run was trained with" in complaint(read, copied), reader


def as_released(config: RunConfig) -> None:
    """The run as release 0.1.0 would have left it: no hashes anywhere, folders known by name."""
    old = hashlib.sha256(json.dumps(learned_settings(config, names=True), sort_keys=True).encode()).hexdigest()
    (config.run_dir / "identity.json").unlink()
    for file in config.run_dir.glob("checkpoints/*/state.json"):
        state = json.loads(file.read_text())
        for key in ("sha256", "sealed", "identity"):
            del state[key]
        file.write_text(json.dumps(state | {"fingerprint": old}))
    manifest = json.loads((config.run_dir / "data" / "manifest.json").read_text())
    del manifest["sealed"]
    (config.run_dir / "data" / "manifest.json").write_text(json.dumps(manifest))
    table = load_file(config.run_dir / "profiles.safetensors")
    with safe_open(config.run_dir / "profiles.safetensors", framework="pt") as opened:
        fingerprint = opened.metadata()["fingerprint"]
    save_file(
        table, config.run_dir / "profiles.safetensors", {"format": "cuma-profile-table-1", "fingerprint": fingerprint}
    )


def test_a_run_of_release_0_1_0_is_read_and_one_line_says_what_cannot_be_checked(copied, tmp_path) -> None:
    as_released(copied)
    for name, read in READERS.items():
        if name != "train":
            said = complaint(read, copied)
            assert said.count("its content cannot be checked") == 1, (name, said)
    assert "taken as they are now and checked from here on" in complaint(resume, copied)
    assert "taken as they are now" not in complaint(resume, copied)
    config = tmp_path / "again.yaml"
    config.write_text(copied.to_yaml())
    results = run(2, [TRAIN, "--config", str(config), "--set", "training.steps=6"])
    assert [code for code, _ in results] == [0, 0], results
    assert "after step 4" in results[0][1]
    assert complaint(READERS["evaluate"], copied) == ""
    assert read_state(find_checkpoint(Run(copied.run_dir).checkpoints))["step"] == 6


def test_latest_that_names_another_checkpoint_is_said_and_the_newest_is_used(copied) -> None:
    shutil.rmtree(find_checkpoint(Run(copied.run_dir).checkpoints, 4))
    assert "names step-4, but the newest checkpoint there is step-2" in complaint(resume, copied)
    (copied.run_dir / "checkpoints" / "latest").write_text("step-2\nand more")
    assert "latest is damaged: it does not name a checkpoint; the newest is step-2" in complaint(resume, copied)
