"""Methods that train nothing leave a run folder like others, which asks the model as it is, each in its own way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_recipes
from rivals import rival
from small_runs import DATA
from transformers import AutoTokenizer

from cuma_ds.data import load_data
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.shots import Shots
from cuma_ds.errors import ConfigError, CumaError
from cuma_ds.evaluation.report.model import read_report
from cuma_ds.evaluation.run import evaluate, evaluate_run
from cuma_ds.evaluation.subject import run_subject, subject
from cuma_ds.export.plain import check_format
from cuma_ds.inference.open import open_model
from cuma_ds.parallel.stored import find_checkpoint, read_adapters, read_state
from cuma_ds.recipe import load_config, make_config
from cuma_ds.runs import Run
from cuma_ds.training.inputs import prepare_run

PERSONA = ["data.profile_in_prompt=true"]


def trained(folder: Path, tiny_llama: Path, method: str, **sections: dict) -> Path:
    """The run folder of a method, made by the command that makes all others."""
    sections = {"data": {"max_length": 400}, "evaluation": {"min_answers": 2}, **sections}
    path = rival(folder, tiny_llama, method, {"method": method}, **sections)
    run_recipes(1, [path])
    run_recipes(1, [path])  # and again, which changes nothing
    return load_config(path).run_dir


@pytest.mark.multirank
@pytest.mark.parametrize(("method", "overrides"), [("vanilla", []), ("persona", PERSONA)])
def test_its_report_is_that_of_the_model_as_it_is(method, overrides, tmp_path, tiny_llama) -> None:
    folder = trained(tmp_path, tiny_llama, method)
    run = Run.open(folder)
    checkpoint = find_checkpoint(run.checkpoints)
    assert (checkpoint.name, read_state(checkpoint)["step"], read_adapters(checkpoint)) == ("step-0", 0, {})
    assert run.config().data.profile_in_prompt == (method == "persona")
    report = evaluate_run(folder)
    about = [*overrides, "data.max_length=400", "model.dtype=float32", "evaluation.min_answers=2"]
    bare = evaluate(subject(open_model(str(tiny_llama), about), folder / "data"), tmp_path / "bare")
    assert (report.run, report.checkpoint, report.main) == (method, "step-0", "before")
    assert report.splits == bare.splits
    assert read_report(run.report_folder) is not None


@pytest.mark.multirank
def test_few_shot_asks_the_question_last_behind_answers_of_the_same_country(tmp_path, tiny_llama) -> None:
    data, evaluation = {"max_length": 500, "heldout_fraction": 0.2}, {"min_answers": 2, "few_shot": 2}
    folder = trained(tmp_path, tiny_llama, "few_shot", data=data, evaluation=evaluation)
    with pytest.warns(UserWarning, match="of split heldout are of groups without training answers; they are asked"):
        asked = run_subject(folder)
    data, tokenizer = asked.data, asked.renderer.tokenizer
    given = {(row["group"], row["question"], tuple(row["options"]), answer) for row in data.splits["train"]
             for answer, count in enumerate(row["counts"]) if count}  # fmt: skip
    seen = set()
    for row in data.splits["test"]:
        text = tokenizer.decode(asked.renderer.encode_choice(row["question"], row["options"], ""))
        assert text.count("<|im_start|>user") == 1  # nobody without a profile has a group
        sentence = data.sentences[row["profile"]]
        ids = asked.renderer.encode_choice(row["question"], row["options"], sentence)
        turns = tokenizer.decode(ids).split("<|im_start|>user\n")[1:]
        assert turns[-1].startswith(row["question"])
        assert turns[-1].endswith("<|im_start|>assistant\n")
        assert sentence not in tokenizer.decode(ids)
        for turn in turns[:-1]:
            question, said = turn.split("<|im_end|>\n<|im_start|>assistant\n")
            chosen = "ABCDEFGHIJ".index(said[0])
            options = tuple(line[3:] for line in question.split("\n")[1:-1])
            assert (row["group"], question.split("\n")[0], options, chosen) in given
            seen.add(said[0])
        assert len(turns) > 1
    assert len(seen) > 1
    few = evaluate_run(folder).splits["test"].rows["before"]
    vanilla = evaluate(
        subject(open_model(str(tiny_llama), ["data.max_length=500", "model.dtype=float32"]), folder / "data"),
        tmp_path / "bare",
    )
    assert few.emd_questions != pytest.approx(vanilla.splits["test"].rows["before"].emd_questions)
    for row in data.splits["heldout"]:
        ids = asked.renderer.encode_choice(row["question"], row["options"], data.sentences[row["profile"]])
        assert tokenizer.decode(ids).count("<|im_start|>user") == 1


def choice_data():
    config = make_config({"model": {"path": "m"}, "adapters": {"method": "few_shot"}, "data": {"path": str(DATA)}})
    return load_data(config.data, config.profiles.template)


def test_examples_are_drawn_by_seed_profile_and_question_alone_each_answer_once() -> None:
    data = choice_data()
    row = data.splits["train"][0]
    sentence, question = data.sentences[row["profile"]], row["question"]
    shots = Shots(data, 3, seed=1)
    assert shots(sentence, question) == Shots(data, 3, seed=1)(sentence, question)
    others = [Shots(data, 3, seed=2)(sentence, question), shots(sentence, "Another?")]
    assert any(other != shots(sentence, question) for other in others)
    group = [one for one in data.splits["train"] if one["group"] == row["group"]]
    everything = sorted(
        (one["question"], tuple(one["options"]), answer)
        for one in group for answer, count in enumerate(one["counts"]) for _ in range(count)
    )  # fmt: skip
    assert sorted(map(tuple, Shots(data, 10_000, seed=1)(sentence, question))) == everything


def test_examples_are_drawn_in_proportion_to_answers() -> None:
    data = choice_data()
    row = data.splits["train"][0]
    sentence = data.sentences[row["profile"]]
    group = [one for one in data.splits["train"] if one["group"] == row["group"]]
    total = sum(sum(one["counts"]) for one in group)
    counts: dict[tuple, int] = {}
    for seed in range(1500):
        (shot,) = Shots(data, 1, seed)(sentence, "?")
        counts[shot.question, shot.chosen] = counts.get((shot.question, shot.chosen), 0) + 1
    for one in group:
        for answer, count in enumerate(one["counts"]):
            expected = sum(other["counts"][answer] for other in group if other["question"] == one["question"]) / total
            assert counts.get((one["question"], answer), 0) / 1500 == pytest.approx(expected, abs=0.05)
            assert count == 0 or expected > 0


def test_examples_show_their_letter_in_the_order_of_the_options(tiny_llama) -> None:
    data = choice_data()
    row = data.splits["train"][0]
    sentence, tokenizer = data.sentences[row["profile"]], AutoTokenizer.from_pretrained(tiny_llama)
    shots = Shots(data, 2, 0)
    renderer = Renderer(tokenizer, 1000).with_shots(shots)
    for one, shown in ((renderer, lambda options: options), (renderer.with_options_reversed(), lambda o: o[::-1])):
        text = tokenizer.decode(one.encode_choice(row["question"], row["options"], sentence))
        for shot in shots(sentence, row["question"]):
            letter = "ABCDEFGHIJ"[shown(shot.options).index(shot.options[shot.chosen])]
            lines = [f"{name}. {option}" for name, option in zip("ABCDEFGHIJ", shown(shot.options), strict=False)]
            assert "\n".join([shot.question, *lines]) in text
            assert f"<|im_start|>assistant\n{letter}<|im_end|>" in text


def test_prompts_that_examples_make_too_long_are_named_before_there_is_a_folder(tmp_path, tiny_llama) -> None:
    path = rival(tmp_path, tiny_llama, "long", {"method": "few_shot"}, data={"max_length": 256})
    config = load_config(path)
    prepare_run(config.model_copy(update={"adapters": config.adapters.model_copy(update={"method": "vanilla"})}))
    path = rival(tmp_path, tiny_llama, "longer", {"method": "few_shot"}, data={"max_length": 256})
    config = load_config(path)
    with pytest.raises(CumaError, match="too long to be read whole"):
        prepare_run(config)
    assert not config.run_dir.exists()


def test_few_shot_needs_choice_questions(tmp_path, tiny_llama) -> None:
    file = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    lines = [{"profile": {"country": "Chile"}, "person_id": str(n), "messages": messages} for n in range(12)]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    config = load_config(rival(tmp_path, tiny_llama, "chats", {"method": "few_shot"}, data={"path": str(file)}))
    with pytest.raises(ConfigError, match="few_shot asks choice questions, but the data is of kind chat"):
        prepare_run(config)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapters": {"method": "persona"}, "data": {"profile_in_prompt": False}}, "is adapters.method vanilla, not"),
        ({"adapters": {"method": "vanilla"}, "data": {"profile_in_prompt": True}}, "is adapters.method persona, not"),
        ({"adapters": {"method": "persona"}, "model": {"init_from": "run"}}, "persona asks the model as it is; leave"),
        ({"adapters": {"method": "few_shot", "lora_r": 2}}, "method 'few_shot' does not read lora_r"),
        ({"adapters": {"method": "few_shot"}, "evaluation": {"few_shot": 0}}, "few_shot"),
    ],
)
def test_what_cannot_be_is_one_line(sections, message) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make_config({**sections, "model": {"path": "m", **sections.get("model", {})}})
    assert "\n" not in str(raised.value)


@pytest.mark.multirank
def test_there_is_nothing_to_export(tmp_path, tiny_llama) -> None:
    folder = trained(tmp_path, tiny_llama, "vanilla")
    with pytest.raises(ConfigError, match="a run of method vanilla trains nothing, so there is nothing to export"):
        check_format(folder, "hf")
