"""Asking a model as somebody: the words, the bars, the table and the chat that people see."""

from __future__ import annotations

import re

import pytest
import torch
from run_folder import make_run, next_logits

from cuma_ds.errors import ConfigError
from cuma_ds.evaluation.choice import predict_choices
from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.inference.open import open_export, open_run
from cuma_ds.inference.sampling import Sampler, Sampling
from cuma_ds.inference.talk import Talker, experts_of

NORWAY, GHANA = '{"country": "Norway", "age": 38}', '{"country": "Ghana"}'
ASK = ["--prompt", "Can people be trusted?"]
SHORT = ["--max-new-tokens", "9"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder):
    return make_run(tmp_path_factory.mktemp("runs") / "opinions", tiny_llama, tiny_encoder, {})


@pytest.fixture(scope="module")
def talker(run) -> Talker:
    return Talker(open_run(run[0]), Sampling(max_new_tokens=9))


def expected_answer(talker: Talker, text: str, profile, new_tokens: int = 9) -> str:
    """Greedy decoding written out: one whole forward per token, no cache, no batch."""
    ids = talker.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    start = len(ids)
    for _ in range(new_tokens):
        token = int(next_logits(talker.opened, ids, profile).argmax())
        ids.append(token)
        if token == talker.tokenizer.eos_token_id:
            break
    return talker.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_the_command_prints_the_answer_of_whoever_asks_from_a_run_and_from_its_export(
    tmp_path, run, talker, launch
) -> None:
    exported = write_hf(read_run(run[0]), tmp_path / "hf", merged=True)
    answers = {}
    for who, fields in ((NORWAY, {"country": "Norway", "age": 38}), (GHANA, {"country": "Ghana"})):
        answers[who] = expected_answer(talker, ASK[1], fields)
        for place in (["--run", str(run[0])], ["--export", str(exported)]):
            done = launch("generate", *place, "--profile", who, *ASK, *SHORT)
            assert done.code == 0
            assert done.out.strip() == answers[who]
    assert answers[NORWAY] != answers[GHANA], "profiles must matter for this test to mean something"


def test_streaming_writes_piece_by_piece_what_the_answer_is(talker) -> None:
    pieces: list[str] = []
    (answer,) = talker.answers(
        [{"role": "user", "content": ASK[1]}], [{"country": "Ghana"}], write=lambda _, piece: pieces.append(piece)
    )
    assert "".join(pieces).strip() == answer == expected_answer(talker, ASK[1], {"country": "Ghana"})


def test_several_people_in_one_batch_get_the_answers_they_get_alone(talker) -> None:
    people = [{"country": "Norway"}, {"country": "Ghana"}, "Somebody who likes the sea."]
    messages = [{"role": "user", "content": ASK[1]}]
    together = talker.answers(messages, people)
    assert together == [talker.answers(messages, [person])[0] for person in people]
    gates = talker.gates(messages, people)
    assert gates.shape == (3, len(talker.router_names), 4)
    torch.testing.assert_close(gates[1], talker.gates(messages, people[1:2])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(gates.shape[:2]), rtol=1e-4, atol=1e-4)


def test_choices_are_those_of_evaluation(run, talker) -> None:
    from cuma_ds.data.batch import encode_example
    from cuma_ds.data.prepared import PreparedData
    from cuma_ds.recipe import load_config

    folder, trained, table = run
    config, data = load_config(folder / "config.yaml"), PreparedData.load(folder / "data")
    for row in list(data.splits["train"])[:4]:
        example = encode_example(row, talker.renderer, data.sentences, config.data)
        (expected,) = predict_choices(trained, [example], table.embeddings, 1, 0).probabilities
        (found,) = talker.choose(row["question"], row["options"], [data.profiles[row["profile"]]["fields"]])
        assert found == pytest.approx(list(expected), abs=1e-5)


def test_bars_are_as_long_as_the_probabilities(run, talker, launch) -> None:
    options = ["Very", "[bold]Rather[/bold]", "Not"]
    done = launch("generate", "--run", str(run[0]), "--profile", NORWAY, *ASK, "--options", *options)
    assert done.code == 0
    (expected,) = talker.choose(ASK[1], options, [{"country": "Norway", "age": 38}])
    lines = done.out.strip().splitlines()
    assert len(lines) == 3
    for line, option, probability in zip(lines, options, expected, strict=True):
        assert line.startswith(option)
        assert line.rstrip().endswith(f"{probability:.1%}")
        assert abs(line.count("█") - 40 * probability) <= 1


def test_compare_shows_answers_side_by_side_with_the_experts_used(run, talker, launch, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    done = launch("generate", "--run", str(run[0]), "--profile", NORWAY, "--profile", GHANA, "--compare", *ASK, *SHORT)
    assert done.code == 0
    for fields in ({"country": "Norway", "age": 38}, {"country": "Ghana"}):
        for word in expected_answer(talker, ASK[1], fields).split():
            assert word in done.out
    assert "profile 1" in done.out
    assert "profile 2" in done.out
    gates = talker.gates(
        [{"role": "user", "content": ASK[1]}], [{"country": "Norway", "age": 38}, {"country": "Ghana"}]
    )
    same = float(torch.minimum(gates[0], gates[1]).sum(-1).mean())
    assert re.search(rf"same routing as the first\s*│\s*100%\s*│\s*{same:.0%}", done.out)
    done = launch(
        "generate",
        "--run",
        str(run[0]),
        "--profile",
        NORWAY,
        "--profile",
        GHANA,
        "--compare",
        *ASK,
        "--options",
        "Yes",
        "No",
    )
    (row,) = [line for line in done.out.splitlines() if line.startswith("│ Yes")]
    shares = [float(share) for share in re.findall(r"([\d.]+)%", row)]
    chosen = talker.choose(ASK[1], ["Yes", "No"], [{"country": "Norway", "age": 38}, {"country": "Ghana"}])
    assert shares == pytest.approx([100 * row[0] for row in chosen], abs=0.06)


def test_experts_are_named_where_people_differ_most() -> None:
    gates = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.5, 0.5, 0.0], [0.25, 0.0, 0.75]]])
    assert experts_of(gates, ["first", "second"], rows=1) == [
        ("second", ["0 (100%)", "2 (75%), 0 (25%)"]),
        ("same routing as the first", ["100%", "62%"]),
    ]


def test_a_chat_switches_people_keeps_the_conversation_and_survives_mistakes(run, talker, launch) -> None:
    typed = ["hi", f"/profile {GHANA}", "hi", "ho", "/profile 1", "hi", "/choose Yes? | a | b"]
    typed += ["/nonsense", "/profile {", "/profile 9", "/quit"]
    done = launch("generate", "--run", str(run[0]), "--profile", NORWAY, *SHORT, stdin="\n".join(typed) + "\n")
    assert done.code == 0
    norway, ghana = {"country": "Norway", "age": 38}, {"country": "Ghana"}
    hi = {"role": "user", "content": "hi"}
    (first,) = talker.answers([hi], [norway])
    (second,) = talker.answers([hi], [ghana])
    (third,) = talker.answers(
        [hi, {"role": "assistant", "content": second}, {"role": "user", "content": "ho"}], [ghana]
    )
    said = [line.removeprefix("> ").strip() for line in done.out.splitlines()]
    places = [said.index(first), said.index(second), said.index(third)]
    assert places == sorted(places)
    assert said.count(first) == 2
    assert "there is no command /nonsense" in done.out
    assert "broken JSON" in done.out
    assert "there is no profile 9; the command line gave 1" in done.out
    (yes, no) = talker.choose("Yes?", ["a", "b"], [norway])[0]
    assert f"{yes:.1%}" in done.out
    assert f"{no:.1%}" in done.out


def test_a_chat_asks_who_it_is_talking_to(run, launch) -> None:
    done = launch("generate", "--run", str(run[0]), *SHORT, stdin="hi\n")
    assert done.code == 0
    assert "Say who you are" in done.out
    assert "error: this model answers by who is asking" in done.out


def test_unknown_fields_are_one_line_of_warning(run, launch) -> None:
    done = launch("generate", "--run", str(run[0]), "--profile", '{"contry": "Norway"}', *ASK, *SHORT)
    assert done.code == 0
    assert done.err.startswith("warning: the profile field 'contry' is unknown to this model (did you mean 'country'?)")
    assert done.err.count("\n") == 1


def test_models_without_profiles_answer_without_and_refuse_them(tmp_path, tiny_llama, tiny_encoder, launch) -> None:
    folder, _, _ = make_run(
        tmp_path / "runs" / "lora",
        tiny_llama,
        tiny_encoder,
        {"method": "lora", "num_experts": 1, "top_k": 1, "balance_weight": 0.0},
    )
    assert launch("generate", "--run", str(folder), *ASK, *SHORT).code == 0
    done = launch("generate", "--run", str(folder), "--profile", NORWAY, *ASK, *SHORT)
    assert done.code == 2
    assert "takes none" in done.err


def test_sampling_is_repeatable_by_its_seed(run, launch) -> None:
    sample = ["--temperature", "1.5", "--top-p", "0.95"]
    one, again, other = (
        launch("generate", "--run", str(run[0]), "--profile", NORWAY, *ASK, *SHORT, *sample, "--seed", seed).out
        for seed in ("1", "1", "2")
    )
    assert one == again != other


def test_the_system_prompt_and_the_profile_in_it_are_those_of_training(tmp_path, tiny_llama, tiny_encoder) -> None:
    written = {"source": "jsonl", "profile_in_prompt": True, "system_prompt": "Be kind."}
    folder, _, _ = make_run(tmp_path / "runs" / "told", tiny_llama, tiny_encoder, {}, data=written)
    talker = Talker(open_export(write_hf(read_run(folder), tmp_path / "hf")), Sampling())
    text = talker.tokenizer.decode(
        talker.renderer.encode_prompt([{"role": "user", "content": "Hello"}], "Country: Ghana.")
    )
    assert text.index("Country: Ghana.") < text.index("Be kind.") < text.index("Hello")


MISTAKES = {
    "both": (["--run", "RUN", "--export", "RUN"], "one of --run"),
    "neither": ([], "one of --run"),
    "step-of-export": (["--export", "RUN", "--step", "3"], "--step belongs to --run"),
    "no-run": (["--run", "/no/such", *ASK], "is no run folder"),
    "not-an-export": (["--export", "RUN", *ASK], "is no exported model"),
    "one-option": (["--run", "RUN", *ASK, "--options", "Yes"], "at least two options"),
    "options-without-prompt": (["--run", "RUN", "--options", "Yes", "No"], "--options needs --prompt"),
    "compare-one": (["--run", "RUN", *ASK, "--compare", "--profile", NORWAY], "at least two --profile"),
    "empty-prompt": (["--run", "RUN", "--prompt", " "], "--prompt is empty"),
    "nobody": (["--run", "RUN", *ASK], "give a --profile"),
    "empty-profile": (["--run", "RUN", *ASK, "--profile", '{"country": ""}'], "no field with an answer"),
    "list-profile": (["--run", "RUN", *ASK, "--profile", "[1]"], "--profile is a JSON list"),
    "broken-profile": (["--run", "RUN", *ASK, "--profile", '{"country": Atlantis}'], "--profile is broken JSON"),
    "no-tokens": (["--run", "RUN", *ASK, "--profile", NORWAY, "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    "too-many-tokens": (["--run", "RUN", *ASK, "--profile", NORWAY, "--max-new-tokens", "9999"], "leaves no room"),
    "bytes": (
        ["--run", "RUN", "--prompt", "a \udcff", "--profile", NORWAY],
        "--prompt holds characters that are no Unicode text",
    ),
    "bytes-in-options": (
        ["--run", "RUN", *ASK, "--options", "Yes", "\udcff", "--profile", NORWAY],
        "--options holds characters",
    ),
    "bytes-in-profile": (["--run", "RUN", *ASK, "--profile", "a \udcff"], "--profile holds characters"),
    "half-a-pair": (["--run", "RUN", *ASK, "--profile", '{"country": "\\ud83d"}'], "--profile holds characters"),
    "long-prompt": (
        ["--run", "RUN", "--prompt", "x" * 600, "--profile", NORWAY],
        "tokens; with --max-new-tokens 128 this model reads 384",
    ),
    "top-p": (["--run", "RUN", *ASK, "--profile", NORWAY, "--top-p", "0"], "top-p in (0, 1]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(mistake, run, launch) -> None:
    arguments, part = MISTAKES[mistake]
    done = launch("generate", *(str(run[0]) if argument == "RUN" else argument for argument in arguments))
    assert done.code == 2
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("error: ")
    assert part in done.err
    assert "Atlantis" not in done.err


def test_terminals_without_utf8_show_question_marks(run, launch, monkeypatch) -> None:
    import io
    import sys

    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    done = launch("generate", "--run", str(run[0]), "--profile", NORWAY, *ASK, "--options", "Très", "Non")
    assert done.code == 0
    sys.stdout.flush()
    assert b"Tr?s" in screen.getvalue()


def test_sampling_checks_its_numbers() -> None:
    with pytest.raises(ConfigError, match="--temperature -1"):
        Sampling(temperature=-1)
    for odd in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="--temperature"):
            Sampling(temperature=odd)
    assert Sampler(0.7).temperature == 0.7
    assert Sampler(1e-300).temperature == 0.0
