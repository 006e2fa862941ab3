"""Prompts that do not fit are refused or left out before anything is learned or judged; nothing of a question is ever
cut.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import character_tokenizer
from ranks import run
from run_folder import make_run
from small_runs import recipe

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data
from cuma_ds.data.lengths import Reading, fitting
from cuma_ds.data.rendering import Renderer
from cuma_ds.errors import ConfigError, DataError
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.run import Evaluator, evaluate_run
from cuma_ds.evaluation.subject import run_subject
from cuma_ds.learned_settings import learned_settings
from cuma_ds.recipe import load_config, load_started
from cuma_ds.runs import Run
from cuma_ds.training.inputs import check_prompts

PEOPLE = 24


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def choices(tmp_path) -> Path:
    """Three questions of different length asked of people whose profiles differ in length too."""
    rows = [
        {
            "profile": {"country": ["Norway", "Peru", "Ghana"][person % 3], "town": "x" * (3 * person)},
            "question": f"Question {number}{' and so on' * 4 * number}?",
            "options": ["Yes", "No"],
            "answer": (person + number) % 2,
            "question_id": f"q{number}",
            "person_id": f"p{person}",
        }
        for person in range(PEOPLE)
        for number in range(3)
    ]
    return write(tmp_path / "choices.jsonl", rows)


@pytest.fixture
def chats(tmp_path) -> Path:
    def turns(words: list[str]) -> list[dict]:
        return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(words)]

    rows = [
        {
            "profile": {"country": ["Norway", "Peru", "Ghana"][person % 3]},
            "messages": turns(["Hi" * 30, "Hello", "And then?", "Long." * (1 + 2 * person)]),
            "person_id": f"p{person}",
        }
        for person in range(PEOPLE)
    ]
    return write(tmp_path / "chats.jsonl", rows)


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Either answer may be the longer one; an early turn can be dropped."""
    early = [{"role": "user", "content": "Hi" * 30}, {"role": "assistant", "content": "Hello"}]
    rows = [
        {
            "profile": {"country": ["Norway", "Peru", "Ghana"][person % 3]},
            "prompt": [*early, {"role": "user", "content": "And then?"}],
            "chosen": "Long." * (1 + 2 * person),
            "rejected": "Longer." * (PEOPLE - person),
            "person_id": f"p{person}",
        }
        for person in range(PEOPLE)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


def section(path: Path, **changes) -> DataSection:
    return DataSection(**({"path": str(path), "heldout_fraction": 0.0, "test_fraction": 0.3} | changes))


def lengths(data: PreparedData, split: str, renderer: Renderer) -> list[int]:
    """Tokens of every row, encoded one by one by a renderer that fits everything."""
    found = []
    for row in data.splits[split]:
        sentence = data.sentences[row["profile"]]
        if "messages" in row:
            # The last turn with its question: what cannot be dropped.
            found.append(len(renderer.encode_chat(row["messages"][2:], sentence)[0]))
        elif "prompt" in row:
            answers = [row["chosen"], row["rejected"]]
            found.append(max(len(ids) for ids, _ in renderer.encode_answers(row["prompt"][2:], answers, sentence)))
        else:
            found.append(len(renderer.encode_choice(row["question"], row["options"], sentence)))
    return found


@pytest.mark.parametrize("in_prompt", [False, True])
@pytest.mark.parametrize("kind", ["choices", "chats", "pairs"])
def test_exactly_the_rows_that_do_not_fit_are_named_or_left_out(kind, in_prompt, request) -> None:
    path = request.getfixturevalue(kind)
    tokenizer = character_tokenizer()
    data = load_data(section(path))
    expected = lengths(data, "train", Renderer(tokenizer, 10_000, in_prompt))
    for limit in (min(expected) + 1, int(np.median(expected)), max(expected) - 1):
        renderer = Renderer(tokenizer, limit, in_prompt)
        long = [number for number, tokens in enumerate(expected) if tokens > limit]
        with pytest.raises(DataError) as refused:
            fitting(data, Reading(renderer), section(path), ["train"], lambda needed: f"raise it to {needed}")
        message = str(refused.value)
        assert f"{len(long)} of {len(expected)} rows of split train (row {', '.join(map(str, long[:3]))}" in message
        assert f"the longest has {max(expected)} tokens" in message
        assert message.endswith(f"raise it to {max(expected)}")
        assert "\n" not in message
        left = fitting(data, Reading(renderer), section(path, on_long_prompt="skip"), ["train"], str)
        kept = [row for number, row in enumerate(data.splits["train"].to_list()) if number not in long]
        assert left.splits["train"].to_list() == kept
        assert left.manifest["skipped"] == {"examples longer than max_length": len(long)}
        sizes = left.manifest["splits"]["train"]
        assert sizes["examples"] == len(kept)
        assert sizes["people"] == len({person for row in kept for person in row["people"]})
        assert sizes["profiles"] == len({row["profile"] for row in kept})
    assert fitting(data, Reading(Renderer(tokenizer, max(expected), in_prompt)), section(path), ["train"], str) is data


def test_when_nothing_fits_skipping_is_refused_too(choices) -> None:
    data = load_data(section(choices))
    with pytest.raises(DataError, match="nothing is left for training: too long to be read whole"):
        fitting(
            data, Reading(Renderer(character_tokenizer(), 20)), section(choices, on_long_prompt="skip"), ["train"], str
        )


def test_a_row_that_cannot_be_rendered_is_named(choices) -> None:
    template = "{% if 'Question 2' in messages[-1]['content'] %}{{ raise_exception('never') }}{% endif %}x"
    data = load_data(section(choices))
    with pytest.raises(DataError.__base__, match=r"row \d+ of split train: .*refuses a conversation: never"):
        fitting(data, Reading(Renderer(character_tokenizer(template), 500)), section(choices), ["train"], str)


@pytest.mark.multirank
def test_a_run_with_long_prompts_is_refused_and_the_corrected_recipe_starts_under_the_same_name(
    tmp_path, choices, tiny_llama, tiny_encoder
) -> None:
    data = {"path": str(choices), "max_length": 140, "heldout_fraction": 0.0}
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "long", data=data, training={"steps": 2, "warmup_steps": 0})
    for code, output in run(2, ["launchers/train.py", "--config", str(path)]):
        assert code == 2, output[-2000:]
    code, output = run(1, ["launchers/train.py", "--config", str(path)])[0]
    assert code == 2
    assert "rows of split train (row " in output
    assert "raise data.max_length to 155" in output
    assert "data.on_long_prompt: skip" in output
    assert not (tmp_path / "runs" / "long").exists()
    code, output = run(1, ["launchers/train.py", "--config", str(path), "--set", "data.on_long_prompt=skip"])[0]
    assert code == 0, output[-2000:]
    assert "left out: too long to be read whole" in output
    kept = PreparedData.load(tmp_path / "runs" / "long" / "data")
    assert kept.manifest["skipped"]["examples longer than max_length"] > 0
    assert {row["question_id"] for name in ("train", "test") for row in kept.splits[name]} == {"q0", "q1"}
    code, output = run(
        1, ["launchers/train.py", "--config", str(path), "--set", "data.on_long_prompt=skip", "training.steps=3"]
    )[0]
    assert code == 0, output[-2000:]
    assert "resuming" in output
    config = load_config(path, ["run.name=longer", "data.max_length=1000"])
    with pytest.raises(ConfigError, match=r"data\.max_length is 1000, but .* reads at most 512 tokens; lower it"):
        check_prompts(load_data(config.data), config, started=False)


def test_a_run_of_the_first_release_goes_on_only_if_it_cut_nothing(tmp_path, choices, tiny_llama, tiny_encoder) -> None:
    config = load_config(
        recipe(tmp_path, tiny_llama, tiny_encoder, "old", data={"path": str(choices), "max_length": 140})
    )
    data = load_data(config.data)
    with pytest.raises(
        DataError, match=r"release 0\.1\.0 cut them; start a new run \(run\.name\) with data\.max_length 155, or"
    ):
        check_prompts(data, config, started=True)
    enough = load_config(tmp_path / "old.yaml", ["data.max_length=400"])
    assert check_prompts(data, enough, started=True).splits is data.splits


def test_evaluation_refuses_or_leaves_out_and_says_how(tmp_path, choices, tiny_llama, tiny_encoder) -> None:
    folder, *_ = make_run(
        tmp_path / "runs" / "asked", tiny_llama, tiny_encoder, {}, source=choices, data={"heldout_fraction": 0.0}
    )
    with pytest.raises(
        DataError, match=r"rows of split test .*; evaluate with --set data\.max_length=155, or leave them out with"
    ):
        evaluate_run(folder, overrides=["data.max_length=140"])
    report = evaluate_run(
        folder, overrides=["data.max_length=140", "data.on_long_prompt=skip", "evaluation.min_answers=1"]
    )
    assert set(report.splits) == {"test"}


def test_average_asks_in_both_orders_and_takes_the_mean(tmp_path, tiny_llama, tiny_encoder) -> None:
    folder, *_ = make_run(tmp_path / "runs" / "both", tiny_llama, tiny_encoder, {})
    found = {}
    for order in ("fixed", "reversed", "average"):
        evaluator = Evaluator(run_subject(folder, overrides=[f"data.option_order={order}"]), tmp_path)
        examples = ChoiceExamples.of(evaluator.subject.data.splits["test"])
        found[order] = evaluator._choices("test", examples)["trained"]
    row = evaluator.subject.data.splits["test"][0]
    sentence = evaluator.subject.data.sentences[row["profile"]]
    turned = Renderer(evaluator.subject.renderer.tokenizer, 500).encode_choice(
        row["question"], row["options"][::-1], sentence
    )
    with torch.no_grad():
        who = evaluator.subject.embeddings_NP[[row["profile"]]]
        logits = evaluator.subject.model(input_ids=torch.tensor([turned]), profile_embeddings=who).logits[0, -1]
    letters = Renderer(evaluator.subject.renderer.tokenizer, 500).letter_ids(len(row["options"]))
    expected = logits[letters].softmax(0).numpy()[::-1]
    np.testing.assert_allclose(found["reversed"].probabilities[0], expected, atol=1e-5)
    for fixed, other, both in zip(
        *(found[order].probabilities for order in ("fixed", "reversed", "average")), strict=True
    ):
        np.testing.assert_allclose(both, (fixed + other) / 2, atol=1e-12)
        assert np.abs(fixed - other).max() > 1e-4
    np.testing.assert_allclose(
        found["average"].letter_mass_M, (found["fixed"].letter_mass_M + found["reversed"].letter_mass_M) / 2
    )


def test_training_shows_one_order_only(tmp_path, tiny_llama, tiny_encoder) -> None:
    config = load_config(recipe(tmp_path, tiny_llama, tiny_encoder, "both", data={"option_order": "average"}))
    with pytest.raises(ConfigError, match="average is for evaluation; train with fixed or reversed"):
        check_prompts(load_data(config.data), config, started=False)


def test_runs_of_the_first_release_keep_their_prompts(tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "old")
    config = load_config(path)
    assert config.data.prompt_style == "letters"
    written = yaml.safe_load(config.to_yaml())
    for key in ("prompt_style", "option_order", "on_long_prompt"):
        del written["data"][key]
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(written))
    assert load_started(config.run_dir / "config.yaml").data.prompt_style == "metadata"
    assert load_started(config.run_dir / "config.yaml", ["data.prompt_style=letters"]).data.prompt_style == "letters"
    resumed = Run(config.run_dir).as_started(config)
    assert resumed.data.prompt_style == "metadata"
    assert not {"data.prompt_style", "data.option_order", "data.on_long_prompt"} & set(learned_settings(resumed))
