"""The rewards of a run on real rows: what they are told, how they add up, and one line for whatever is wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_server import fault, verdict

from cuma_ds.config import RunConfig
from cuma_ds.data import PreparedData, load_data
from cuma_ds.data.rendering import Renderer
from cuma_ds.errors import ConfigError
from cuma_ds.judge import JudgeDown
from cuma_ds.recipe import make_config
from cuma_ds.training.rollout import verifiable
from cuma_ds.training.rollout.answers import Answers
from cuma_ds.training.rollout.callables import RewardError
from cuma_ds.training.rollout.rewards import Rewards

OPINIONS = Path(__file__).parents[2] / "data" / "opinions.jsonl"
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day"},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well, and you?"},
]
_numbers = itertools.count()


def config(**sections: dict) -> RunConfig:
    values = {
        "model": {"path": "none"},
        "profiles": {"encoder": "none"},
        "data": {"source": "jsonl", "path": str(OPINIONS)},
        "training": {"objective": "grpo"},
        "rollout": {"max_new_tokens": 10},
    }
    return make_config(
        {section: {**values.get(section, {}), **sections.get(section, {})} for section in values | sections}
    )


def rows(folder: Path, key: str, *lines: dict) -> dict:
    """A file of one person's rows for each line, as the section data."""
    file = folder / f"{key}.jsonl"
    people = [{"profile": {"country": "Ghana", "age": 20 + age}, **line} for line in lines for age in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in people))
    return {"path": str(file), "kind": key}


@pytest.fixture
def make(tokenizer, tmp_path) -> Callable[..., tuple[Rewards, PreparedData]]:
    def go(kind: str = "choice", **sections: dict) -> tuple[Rewards, PreparedData]:
        lines = {
            "chat": {"messages": TALK},
            "preference": {"prompt": TALK[:3], "chosen": "Fine, thank you", "rejected": "Go away"},
        }
        if kind != "choice":
            sections["data"] = rows(tmp_path, kind, lines[kind])
        recipe = config(**sections)
        data = load_data(recipe.data)
        return Rewards(recipe, data, Renderer.of(tokenizer, recipe.data)), data

    return go


@pytest.fixture
def module(tmp_path, monkeypatch) -> Callable[[str], str]:
    """Write a module into the folder that the run is started from; its name."""
    monkeypatch.chdir(tmp_path)

    def write(code: str) -> str:
        name = f"rewards_of_mine_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


def asked(data: PreparedData, number: int, *texts: str) -> Answers:
    row = data.splits["train"][number]
    lengths = tuple(len(text) for text in texts)
    return Answers(number, row, texts, lengths, (False,) * len(texts))


def mine(spec: str, **grpo: object) -> dict[str, dict]:
    return {"grpo": {"rewards": [spec], **grpo}}


def test_named_rewards_stand_side_by_side_with_what_is_only_logged(make) -> None:
    rewards, data = make(grpo={"rewards": ["answer", "log_score", "survey"], "group_size": 4})
    answers = [asked(data, number, "A", "B", "C", "who knows") for number in range(3)]
    found = rewards(answers)
    assert rewards.names == ("answer", "log_score", "survey", "no_option", "survey_match")
    assert rewards.weights == (1.0, 1.0, 1.0, 0.0, 0.0)
    assert found.shape == (12, 5)
    for place, one in enumerate(answers):
        own, counts = found[4 * place : 4 * place + 4], np.array(one.row["counts"], dtype=float)
        options = [option if option is not None and option < len(counts) else None for option in (0, 1, 2, None)]
        shares = [0.0 if option is None else counts[option] / counts.sum() for option in options]
        np.testing.assert_allclose(own[:, 0], shares)
        np.testing.assert_allclose(own[:, 2], verifiable.energy_shares(options, counts, nominal=False))
        np.testing.assert_allclose(own[:, 3], [option is None for option in options])
        np.testing.assert_allclose(own[:, 4], verifiable.match(options, counts, nominal=False))


def test_letters_are_read_as_they_were_shown(make) -> None:
    rewards, data = make(data={"option_order": "reversed"})
    row = data.splits["train"][0]
    shares = np.array(row["counts"]) / sum(row["counts"])
    letters = "ABC"[: len(shares)]
    np.testing.assert_allclose(rewards([asked(data, 0, *letters)])[:, 0], shares[::-1])


def test_length_is_a_reward_of_its_own_and_missing_where_all_are(make, module) -> None:
    name = module("def none_for_short(prompts, completions, profiles, **columns):\n"
                  "    return [None if len(text) < 2 else 1.0 for text in completions]\n")  # fmt: skip
    rewards, data = make(**mine(f"{name}:none_for_short", length_penalty=0.5, reward_weights=[2.0]))
    assert rewards.names == (f"{name}.none_for_short", "length", "no_option", "survey_match")
    assert rewards.weights == (2.0, -0.5, 0.0, 0.0)
    found = rewards([asked(data, 0, "A", "B. Indeed")])
    assert np.isnan(found[0]).all(), "no reward, so that its length counts for nothing, either"
    np.testing.assert_allclose(found[1, :3], [1.0, 0.9, 0.0])


def test_a_completion_keeps_the_rewards_that_it_has(make, module) -> None:
    name = module("def never(prompts, completions, profiles, **columns):\n    return [None] * len(completions)\n")
    rewards, data = make(grpo={"rewards": ["answer", f"{name}:never"]})
    found = rewards([asked(data, 0, "A", "B")])
    assert not np.isnan(found[:, 0]).any()
    assert np.isnan(found[:, 1]).all()
    assert not np.isnan(found[:, 2:]).any()


def test_a_rank_without_completions_calls_nobody(make, module) -> None:
    name = module("def f(prompts, completions, profiles, **columns):\n    1 / 0\n")
    rewards, _ = make(**mine(f"{name}:f"))
    assert rewards([]).shape == (0, 3)


TELLING = """
heard = {}
def listen(prompts, completions, profiles, **columns):
    heard.update(prompts=prompts, completions=completions, profiles=profiles, **columns)
    completions.clear()  # what a reward does to its arguments is its own affair
    return [0] * len(prompts)
def again(prompts, completions, profiles, **columns):
    return [len(text) for text in completions]
"""


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("choice", {"question_id", "question", "options", "counts", "scale", "option"}),
        ("chat", {"answer"}),
        ("preference", {"chosen", "rejected"}),
    ],
)
def test_a_reward_is_told_everything_of_each_completion(make, module, kind: str, columns: set[str]) -> None:
    import sys

    name = module(TELLING)
    rewards, data = make(kind, grpo={"rewards": [f"{name}:listen", f"{name}:again"], "group_size": 2})
    answers = [asked(data, 0, "A", "BB"), asked(data, 1, "CCC", "")]
    found = rewards(answers)
    heard = sys.modules[name].heard
    assert set(heard) == {"prompts", "completions", "profiles", "group", "completion_tokens", *columns}
    assert heard["completion_tokens"] == [1, 2, 3, 0]
    assert heard["profiles"] == [data.profiles[one.row["profile"]] for one in answers for _ in range(2)]
    assert heard["group"] == [one.row["group"] for one in answers for _ in range(2)]
    assert found[:, 1].tolist() == [1, 2, 3, 0], "the second reward has lists of its own"
    if kind == "choice":
        prompts = heard["prompts"]
        for one, shown in zip(answers, prompts[::2], strict=True):
            lines = [f"{letter}. {option}" for letter, option in zip("ABC", one.row["options"], strict=False)]
            assert shown[0]["content"].splitlines()[:-1] == [one.row["question"], *lines]
        assert prompts[::2] == prompts[1::2]
        assert heard["option"] == [0, None, None, None]
        assert heard["counts"] == [one.row["counts"] for one in answers for _ in range(2)]
    else:
        prompts = [TALK[:3]] * 4
        expected = {"answer": "Well, and you?", "chosen": "Fine, thank you", "rejected": "Go away"}
        assert {column: heard[column] for column in columns} == {column: [expected[column]] * 4 for column in columns}
    assert heard["prompts"] == prompts


def test_numbers_of_any_kind_are_numbers(make, module) -> None:
    name = module("import numpy, torch\n"
                  "def f(prompts, completions, profiles, **columns):\n"
                  "    return (1, True, numpy.float32(0.5), torch.tensor(2.0), None)\n"
                  "def g(prompts, completions, profiles, **columns):\n    return numpy.arange(5.0)\n"
                  "def h(prompts, completions, profiles, **columns):\n    return torch.arange(5)\n"
                  "class Callable:\n    def __call__(self, prompts, completions, profiles, **columns):\n"
                  "        return [7] * 5\n"
                  "it = Callable()\n")  # fmt: skip
    rewards, data = make(grpo={"rewards": [f"{name}:{one}" for one in ("f", "g", "h", "it")]})
    found = rewards([asked(data, 0, *"ABCDE")])[:, :4]
    expected = np.array([[1, 1, 0.5, 2, np.nan], range(5), range(5), [7] * 5]).T
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("[0.5, float('nan'), 1]", "returned 'nan' for completion 1 of 3"),
        ("[0.5, 1, float('-inf')]", "returned '-inf' for completion 2 of 3"),
        ("['0.5', 1, 1]", "returned '0.5' for completion 0 of 3"),
        ("[1, [1], 1]", r"returned '\[1\]' for completion 1 of 3"),
        ("[1, 1j, 1]", "returned '1j' for completion 1 of 3"),
        ("[1, 1]", "returned 2 entries for 3 completions"),
        ("[1, 1, 1, 1]", "returned 4 entries for 3 completions"),
        ("[]", "returned 0 entries for 3 completions"),
        ("None", "returned NoneType; a list"),
        ("3.0", "returned float; a list"),
        ("'abc'", "returned str; a list"),
        ("{0: 1, 1: 1, 2: 1}", "returned dict; a list"),
        ("(value for value in [1, 1, 1])", "returned generator; a list"),
        ("1 / 0", r"raised ZeroDivisionError: division by zero \(rewards_of_mine_\d+\.py:2\)"),
        ("columns['nothing']", r"raised KeyError: 'nothing' \(rewards_of_mine_\d+\.py:2\)"),
        ("exit(3)", r"raised SystemExit: 3 \(rewards_of_mine_\d+\.py:2\)"),
    ],
)
def test_what_is_no_reward_is_one_line(make, module, returned: str, said: str) -> None:
    name = module(f"def f(prompts, completions, profiles, **columns):\n    return {returned}\n")
    rewards, data = make(**mine(f"{name}:f"))
    with pytest.raises(RewardError, match=f"^reward {name}:f {said}") as raised:
        rewards([asked(data, 0, "A", "B", "C")])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("code", "spec", "said"),
    [
        (None, "no_such_module:f", "there is no module no_such_module in the current folder or the environment"),
        ("import no_such_thing", "{}:f", r"there is no module no_such_thing \(for {}\)"),
        ("1 / 0", "{}:f", "importing {} failed: ZeroDivisionError: division by zero"),
        ("def f(:", "{}:f", "importing {} failed: SyntaxError"),
        ("def brevity(prompts, completions, profiles, **columns): ...", "{}:brevty", "has no 'brevty'.*'brevity'"),
        ("f = 3", "{}:f", "is int, not callable"),
        ("async def f(prompts, completions, profiles, **columns): ...", "{}:f", "is a coroutine"),
        ("def f(prompts, completions): ...", "{}:f", r"has signature \(prompts, completions\), expected"),
        ("def f(prompts, completions, profiles): ...", "{}:f", "has signature .* got an unexpected keyword argument"),
        ("def f(prompts, completions, profiles, mood, **columns): ...", "{}:f", "missing a required argument: 'mood'"),
        (None, "anwser", "there is no reward 'anwser'.*did you mean 'answer'.*answer, log_score, survey, judge"),
    ],
)
def test_a_reward_that_cannot_be_used_is_one_line_at_start(make, module, code, spec, said) -> None:
    name = "" if code is None else module(code)
    with pytest.raises(ConfigError, match=f"^grpo.rewards: .*{said.format(name)}") as raised:
        make(**mine(spec.format(name)))
    assert "\n" not in str(raised.value)


def test_a_reward_of_ones_own_may_name_the_columns_it_needs(make, module) -> None:
    name = module("def f(prompts, completions, profiles, option, counts, **columns):\n    return [1] * len(option)\n")
    rewards, data = make(**mine(f"{name}:f"))
    assert rewards([asked(data, 0, "A")])[0, 0] == 1


@pytest.mark.parametrize(
    ("kind", "reward", "fitting"), [("chat", "answer", "judge"), ("preference", "survey", "answer, judge")]
)
def test_a_reward_that_does_not_know_the_right_answer_is_one_line(make, kind, reward, fitting) -> None:
    with pytest.raises(ConfigError, match=f"reward '{reward}' is for data of kind choice.*; it can have {fitting}, or"):
        make(kind, **mine(reward))


def test_combinations_that_cannot_work(make) -> None:
    with pytest.raises(ConfigError, match="names 'answer' twice"):
        make(grpo={"rewards": ["answer", "survey", "answer"]})
    with pytest.raises(ConfigError, match=r"grpo.group_size is 2, but reward 'survey' .* at least 3"):
        make(**mine("survey", group_size=2))


def test_a_scale_that_moves_the_optimum_is_said(make) -> None:
    said: list[str] = []
    make(**mine("survey", scale_rewards="batch"))[0].check(said.append)
    make(**mine("answer", scale_rewards="group"))[0].check(said.append)
    assert said == []
    make(**mine("survey", scale_rewards="group"))[0].check(said.append)
    assert len(said) == 1
    assert "batch or none do not" in said[0]


@pytest.fixture
def judged(make, server, tmp_path, monkeypatch) -> Callable[[str], tuple[Rewards, PreparedData]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def go(kind: str, **changes: object) -> tuple[Rewards, PreparedData]:
        return make(kind, grpo={"rewards": ["judge"]}, judge={"url": server.url, "model": "m", "retries": 1, **changes})

    return go


def script(*verdicts: str) -> Callable:
    """By the number in the completion ("answer 0"): what the judge says where it stands first, and where second."""

    def say(prompt: str, _: int):
        first, second = prompt.split("Answer A:\n")[1].split("Answer B:\n")
        place = 0 if first.startswith("answer") else 1
        number = int((first, second)[place].split()[1])
        return verdict(verdicts[number].split()[place])

    return say


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_a_judge_compares_with_the_persons_own_preferred_answer_in_both_orders(judged, server, kind) -> None:
    rewards, data = judged(kind)
    server.script = script("A B", "B A", "A A", "A tie", "A neither")
    found = rewards([asked(data, 0, *(f"answer {number}" for number in range(5)))])
    np.testing.assert_array_equal(found, np.array([[1, 0, 0.5, 0.75, np.nan]]).T)
    own = {"chat": "Well, and you?", "preference": "Fine, thank you"}[kind]
    for call in server.calls:
        told = call["messages"][-1]["content"]
        assert f"About the person: {data.sentences[data.splits['train'][0]['profile']]}" in told
        assert "User: Hello\nAssistant: Good day\nUser: How are you?\n" in told
        assert own in told
    calls = len(server.calls)
    again, _ = judged(kind)
    server.script = script(*["tie tie"] * 5)
    found = again([asked(data, 0, "answer 0", "answer 4")])
    np.testing.assert_array_equal(found, [[1.0], [0.75]], "known verdicts stay; the one nobody could read is a tie now")
    assert len(server.calls) == calls + 1


def test_a_judge_that_is_down_at_start_is_one_line(judged, server) -> None:
    rewards, _ = judged("chat", url="http://127.0.0.1:9/v1")
    with pytest.raises(JudgeDown, match=r"the judge m at http://127.0.0.1:9/v1 does not answer: 1 of 1 calls"):
        rewards.check(print)
    rewards, _ = judged("chat")
    server.script = lambda *_: fault(401)
    with pytest.raises(ConfigError, match="refuses the key in OPENAI_API_KEY"):
        rewards.check(print)


def test_a_judge_whose_first_verdict_cannot_be_read_is_said(judged, server) -> None:
    said: list[str] = []
    rewards, _ = judged("chat")
    server.script = lambda *_: verdict("B")
    rewards.check(said.append)
    assert said == []
    server.script = lambda *_: verdict("Let me think about this")
    rewards.check(said.append)
    assert len(said) == 1
    assert "judge.max_tokens" in said[0]


@pytest.mark.parametrize("status", [500, 401, 404])
def test_a_judge_that_goes_down_in_the_middle_is_an_error_of_its_own(judged, server, status) -> None:
    rewards, data = judged("chat")
    server.script = script("A B", "A B")
    rewards([asked(data, 0, "answer 0")])
    server.script = lambda *_: fault(status)
    with pytest.raises(JudgeDown) as raised:
        rewards([asked(data, 0, "answer 0", "answer 1")])
    assert "\n" not in str(raised.value)
    server.script = script("A B", "A B")
    np.testing.assert_array_equal(rewards([asked(data, 0, "answer 0", "answer 1")]), [[1.0], [1.0]])


def test_single_failed_calls_leave_their_completion_out(judged, server) -> None:
    rewards, data = judged("preference")
    fine = script("A B", "B A", "A B")
    server.script = lambda prompt, number: fault(500) if "answer 1" in prompt else fine(prompt, number)
    found = rewards([asked(data, 0, "answer 0", "answer 1", "answer 2")])
    np.testing.assert_array_equal(found, np.array([[1.0, np.nan, 1.0]]).T)


def test_rewards_and_advantages_go_together(make) -> None:
    """From texts to advantages, by hand."""
    from cuma_ds.parallel.topology import Topology
    from cuma_ds.training.rollout.advantage import Advantages

    section = {"rewards": ["answer"], "group_size": 3, "length_penalty": 0.1, "scale_rewards": "none"}
    rewards, data = make(grpo=section)
    answers = [asked(data, number, "A", "B", "B.") for number in range(2)]
    alone = Topology(world=1, rank=0, local_rank=0, device=torch.device("cpu"))
    made = Advantages(config(grpo=section).grpo, rewards.names, rewards.weights, None, alone)
    found = made(rewards(answers), np.array([0, 0, 0, 1, 1, 1]))
    expected = []
    for one in answers:
        counts = np.array(one.row["counts"], dtype=float) / sum(one.row["counts"])
        own = np.array([counts[0] - 0.01, counts[1] - 0.01, counts[1] - 0.02])
        expected += (own - own.mean()).tolist()
    np.testing.assert_allclose(found.advantage_M, expected, atol=1e-12)
    assert {"rewards/answer/mean", "rewards/length/mean", "rewards/no_option/mean"} <= set(found.numbers)
