"""Words of profiles stand in the data of a run and nowhere else: not in logs, metrics, reports, exports or pictures."""

from __future__ import annotations

import json
import logging
import warnings

import openai
import pytest
from asking import ask, served
from canaries import CANARY, SMALL, found_in, write_answers
from commands import TRAIN
from matplotlib.figure import Figure
from matplotlib.text import Text
from ranks import run
from small_runs import recipe

from cuma_ds.inference.open import open_run
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker
from cuma_ds.recipe import load_config

WHO = {"country": SMALL, "age": 35, "nickname": "Qanari7bird"}


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """All words of all pictures that are saved."""
    words: list[str] = []
    save = Figure.savefig

    def noted(self: Figure, *args: object, **options: object) -> None:
        words.extend(text.get_text() for text in self.findobj(Text))
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    return words


@pytest.mark.parametrize("world", [1, 2])
def test_words_of_profiles_stand_in_the_data_alone(
    world, tmp_path, tiny_llama, tiny_encoder, launch, drawn, caplog
) -> None:
    caplog.set_level(logging.DEBUG)
    home = tmp_path / "all"
    home.mkdir()
    answers = write_answers(tmp_path / "answers.jsonl")
    path = recipe(
        home, tiny_llama, tiny_encoder, "birds",
        data={"path": str(answers), "test_fraction": 0.5, "heldout_fraction": 0.3},
        training={"group_field": "country", "steps": 3}, telemetry={"tensorboard": True},
        evaluation={"min_answers": 8, "min_subgroup": 2, "bootstrap": 20},
    )  # fmt: skip
    folder = load_config(path).run_dir
    said = [output for code, output in run(world, [TRAIN, "--config", str(path)]) if code == 0]
    assert len(said) == world
    who = json.dumps(WHO)
    commands = [
        ("prepare_data", "jsonl", "--root", str(answers), "--out", str(tmp_path / "prepared")),
        ("evaluate", "--run", str(folder)),
        ("status", str(folder), "--verify"),
        ("export", "--run", str(folder), "--format", "hf", "--out", str(home / "hf")),
        ("export", "--run", str(folder), "--format", "lora", "--profile", who, "--calibration", "4",
         "--out", str(home / "lora")),
        ("generate", "--run", str(folder), "--profile", who, "--prompt", "Hi", "--max-new-tokens", "4"),
    ]  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name, *arguments in commands:
            done = launch(name, *arguments)
            assert done.code == 0, done.err
            said += [done.out.replace(str(tmp_path), ""), done.err]
        with served(Talker(open_run(folder), Sampling())) as (client, _):
            ask(client, "Hi", WHO)
            with pytest.raises(openai.BadRequestError) as refused:
                ask(client, CANARY, {CANARY: ""})
    said += [str(one.message) for one in told] + [record.getMessage() for record in caplog.records] + drawn
    assert not [text for text in said if CANARY in text.lower()]
    assert CANARY in str(refused.value), "the client alone is told what it sent"
    data = folder / "data"
    assert found_in([home], [data, folder / "profiles.safetensors"]) == []
    assert found_in([data]), "or this test sees nothing"
    assert any("Norway" in text for text in drawn)
