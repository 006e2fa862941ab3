"""The judge over real HTTP: a scripted server with every fault, both orders, the cache, and what counts as a result."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from judge_server import BAD, GOOD, Reply, fault, judge_server, prefers_good, verdict
from ranks import free_port

from cuma_ds.errors import ConfigError
from cuma_ds.judge.calls import Judge, JudgeDown, JudgeSettings, read_verdict
from cuma_ds.judge.pairs import Pair, compare, judge_messages, probe, scores


def pairs(count: int, swap: Callable[[int], bool] = lambda _: False) -> list[Pair]:
    """Requests of ``count`` people; ours is the good answer unless ``swap`` says otherwise."""
    found = []
    for number in range(count):
        ours, base = (BAD, GOOD) if swap(number) else (GOOD, BAD)
        found.append(
            Pair(f"Person {number}.", [{"role": "user", "content": f"Question {number}?"}], ours, base, number)
        )
    return found


def judge(server: SimpleNamespace, tmp_path: Path, **changes: Any) -> Judge:
    known = {"url": server.url, "model": "m", "retries": 2, "cache_dir": tmp_path / "cache"}
    return Judge(JudgeSettings(**{**known, **changes}))


def test_every_pair_is_asked_in_both_orders_and_better_answers_win(server, tmp_path) -> None:
    told: list[tuple[int, int]] = []
    found = compare(pairs(6, swap=lambda number: number == 2), judge(server, tmp_path), lambda *at: told.append(at))
    assert found.results == ["win", "win", "loss", "win", "win", "win"]
    assert found.win_rate == pytest.approx(5 / 6)
    assert (found.disagreed, found.failures) == (0, {})
    assert found.first == (6, 12), "an unbiased judge prefers the first answer half of the time"
    assert told[-1] == (12, 12)
    prompts = [call["messages"][-1]["content"] for call in server.calls]
    assert len(prompts) == len(set(prompts)) == 12
    assert all(f"About the person: Person {number}." in "".join(prompts) for number in range(6))
    assert all(call["model"] == "m" and call["temperature"] == 0 for call in server.calls)


def test_a_judge_that_always_prefers_the_first_gives_ties(server, tmp_path) -> None:
    server.script = lambda *_: verdict("A")
    found = compare(pairs(3), judge(server, tmp_path))
    assert found.results == ["tie"] * 3
    assert (found.disagreed, found.first, found.win_rate) == (3, (6, 6), 0.5)


def test_ties_are_ties(server, tmp_path) -> None:
    server.script = lambda *_: verdict("Tie.")
    found = compare(pairs(2), judge(server, tmp_path))
    assert found.results == ["tie", "tie"]
    assert (found.disagreed, found.first) == (0, (0, 0))


def test_a_verdict_nobody_can_read_is_no_result_and_is_asked_again(server, tmp_path) -> None:
    server.script = lambda prompt, _: (
        verdict("I like both of them") if "Question 1?" in prompt else prefers_good(prompt, 0)
    )
    found = compare(pairs(3), judge(server, tmp_path))
    assert found.results == ["win", "unreadable", "win"]
    assert found.win_rate == 1.0
    server.script = prefers_good
    again = compare(pairs(3), judge(server, tmp_path))
    assert again.results == ["win"] * 3
    assert again.cached == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_call_that_fails_twice_succeeds_at_the_third_try(server, tmp_path, status) -> None:
    seen: dict[str, int] = {}

    def script(prompt: str, _: int) -> Reply:
        seen[prompt] = seen.get(prompt, 0) + 1
        return fault(status) if seen[prompt] < 3 else prefers_good(prompt, 0)

    server.script = script
    found = compare(pairs(2), judge(server, tmp_path))
    assert found.results == ["win", "win"]
    assert set(seen.values()) == {3}


@pytest.mark.parametrize("status", [429, 500, 400])
def test_calls_that_keep_failing_are_counted_apart(server, tmp_path, status) -> None:
    server.script = lambda prompt, _: fault(status) if "Question 0?" in prompt else prefers_good(prompt, 0)
    found = compare(pairs(3), judge(server, tmp_path))
    assert found.results == ["failed", "win", "win"]
    assert found.failures == {f"status {status}": 2}
    assert found.win_rate == 1.0
    again = compare(pairs(3), judge(server, tmp_path))
    assert again.cached == 4, "a failure is never remembered"


def test_a_judge_that_hangs_times_out(server, tmp_path) -> None:
    release = threading.Event()

    def script(prompt: str, _: int) -> Reply:
        if "Question 0?" in prompt:
            release.wait(20)
        return prefers_good(prompt, 0)

    server.script = script
    try:
        found = compare(pairs(2), judge(server, tmp_path, timeout=0.3, retries=0))
    finally:
        release.set()
    assert found.results == ["failed", "win"]
    assert found.failures == {"APITimeoutError": 2}


def test_nobody_at_the_address(tmp_path) -> None:
    nowhere = SimpleNamespace(url="http://127.0.0.1:9/v1")
    found = compare(pairs(1), judge(nowhere, tmp_path, retries=0))
    assert found.results == ["failed"]
    assert found.failures == {"APIConnectionError": 2}
    assert found.win_rate is None


@pytest.mark.parametrize(
    "reply",
    [
        (200, {"Content-Type": "text/html"}, b"<html>It works!</html>"),
        (200, {"Content-Type": "application/json"}, b'{"choices": ['),
        (200, {"Content-Type": "application/json"}, b'{"choices": []}'),
        (200, {"Content-Type": "application/json"}, b"[1, 2]"),
        (200, {"Content-Type": "application/json"}, b'{"choices": [{"message": null}]}'),
        verdict(None),
    ],
)
def test_nonsense_is_a_failure(server, tmp_path, reply) -> None:
    server.script = lambda *_: reply
    found = compare(pairs(1), judge(server, tmp_path, retries=0))
    assert found.results == ["failed"]
    assert sum(found.failures.values()) == 2


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses the key"), (403, "refuses the key"), (404, "knows no model 'm'")]
)
def test_a_wrong_key_or_model_stops_at_once(server, tmp_path, status, message) -> None:
    server.script = lambda *_: fault(status)
    with pytest.raises(ConfigError, match=message):
        compare(pairs(2), judge(server, tmp_path))


def test_the_key_comes_from_the_environment(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", "secret-1")
    compare(pairs(1), judge(server, tmp_path, key_variable="MY_JUDGE_KEY"))
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret-1"}


def test_no_more_calls_at_a_time_than_asked_for(server, tmp_path) -> None:
    together = threading.Barrier(3)

    def script(prompt: str, _: int) -> Reply:
        together.wait(10)  # three calls are there at once, and a fourth would show in ``most``
        return prefers_good(prompt, 0)

    server.script = script
    found = compare(pairs(6), judge(server, tmp_path, concurrency=3))
    assert found.results == ["win"] * 6
    assert server.most == 3


def test_known_verdicts_cost_no_call_and_hold_no_text(server, tmp_path) -> None:
    first = compare(pairs(3), judge(server, tmp_path))
    file = tmp_path / "cache" / "verdicts-2.jsonl"
    with file.open("a") as lines:
        lines.write('["cut off')
    calls = len(server.calls)
    second = compare(pairs(3), judge(server, tmp_path))
    assert (len(server.calls), second.cached, second.results) == (calls, 6, first.results)
    text = file.read_text()
    # Not "bad": a hash may hold these three letters.
    assert not any(word in text for word in ("Person", "Question", "good"))
    third = compare(pairs(3), judge(server, tmp_path, model="other"))
    assert third.cached == 0


def test_two_judges_of_one_name_do_not_share_verdicts(server, tmp_path) -> None:
    compare(pairs(2), judge(server, tmp_path))
    with judge_server() as other:
        other.script = lambda *_: verdict("tie")
        found = compare(pairs(2), judge(other, tmp_path))
        assert (found.cached, found.results) == (0, ["tie", "tie"])
        assert compare(pairs(2), judge(other, tmp_path, url=other.url + "/")).cached == 4
    assert compare(pairs(2), judge(server, tmp_path)).results == ["win", "win"]


def test_verdicts_of_an_earlier_release_are_not_used_and_that_is_said_once(server, tmp_path) -> None:
    """Its keys did not hold the address: [model, max_tokens, messages]."""
    (tmp_path / "cache").mkdir()
    lines = []
    for swapped in (False, True):
        content = json.dumps(["m", 256, judge_messages(pairs(1)[0], swapped)], ensure_ascii=False)
        lines.append(json.dumps([hashlib.sha256(content.encode()).hexdigest(), "tie"]))
    (tmp_path / "cache" / "verdicts.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="verdicts.jsonl are not used: they do not say at which address"):
        found = compare(pairs(1), judge(server, tmp_path))
    assert (found.cached, found.results) == (0, ["win"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(pairs(1), judge(server, tmp_path)).cached == 2


def refuses(*names: str) -> Callable[[str, int], Reply]:
    """A judge that takes none of these arguments, in the words of OpenAI's servers, and says which one it met first."""

    def script(prompt: str, number: int) -> Reply:
        sent = script.server.calls[number - 1]
        for name in names:
            if name in sent:
                error = {
                    "message": f"Unsupported parameter: '{name}'.",
                    "type": "invalid_request_error",
                    "param": name,
                    "code": "unsupported",
                }
                return 400, {"Content-Type": "application/json"}, json.dumps({"error": error}).encode()
        return prefers_good(prompt, number)

    return script


@pytest.mark.parametrize("names", [("max_tokens",), ("temperature",), ("max_tokens", "temperature")])
def test_a_judge_is_asked_again_without_what_it_refuses(server, tmp_path, names) -> None:
    server.script = refuses(*names)
    server.script.server = server
    with pytest.warns(UserWarning, match="refuses") as told:
        found = compare(pairs(4), judge(server, tmp_path, concurrency=1))
    assert [str(note.message).split(";")[0] for note in told] == [
        f"the judge m at {server.url} refuses {name}" for name in names
    ]
    assert (found.results, found.failures, found.refused) == (["win"] * 4, {}, names)
    # Remembered: one refused call for each argument, and none afterwards.
    assert len(server.calls) == 8 + len(names)
    last = server.calls[-1]
    assert ("temperature" in last) == ("temperature" not in names)
    assert last["max_completion_tokens" if "max_tokens" in names else "max_tokens"] == 256


def test_a_judge_that_refuses_anything_else_is_asked_once(server, tmp_path) -> None:
    server.script = refuses("messages")
    server.script.server = server
    found = compare(pairs(1), judge(server, tmp_path))
    assert (found.results, found.failures, found.refused) == (["failed"], {"status 400": 2}, ())
    assert len(server.calls) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"), (" b.\n", "B"), ("**B**", "B"), ("Answer A", "A"), ("TIE", "tie"), ("[[B]]", "B"), ("[[C]]", "tie"),
        ("<think>A is longer, but B</think>\nB", "B"), ("Because it is kinder: [[A]]", "A"),
        ("", "unreadable"), ("A or B", "unreadable"), ("[[A]] no, [[B]]", "unreadable"), ("Both", "unreadable"), ("C",
        "unreadable"),
        ("A is better", "unreadable"),
    ],
)  # fmt: skip
def test_verdicts_are_read_strictly(text: str, expected: str) -> None:
    assert read_verdict(text) == expected


@pytest.mark.parametrize("changes", [{"url": "localhost:8000"}, {"concurrency": 0}, {"timeout": 0}, {"retries": -1}])
def test_settings_that_cannot_work(changes) -> None:
    with pytest.raises(ConfigError):
        JudgeSettings(**{"url": "http://x/v1", "model": "m", **changes})


@contextmanager
def transformers_serve(model: Path, log: Path) -> Iterator[str]:
    """``transformers serve`` with one model on a free port; its address."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32"], stdout=output, stderr=output, env=quiet
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_a_real_model_is_understood_as_it_speaks(embedded_models, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_folder, _ = embedded_models
    asked = pairs(2)
    with transformers_serve(model_folder, tmp_path / "log") as url:
        patient = {"model": str(model_folder), "timeout": 120.0, "max_tokens": 4, "concurrency": 2}
        found = compare(asked, judge(SimpleNamespace(url=url), tmp_path, **patient))
        again = compare(asked, judge(SimpleNamespace(url=url), tmp_path, **patient))
    assert found.failures == {}

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    verdicts = []
    for pair in asked:
        for swapped in (False, True):
            prompt = tokenizer.apply_chat_template(
                judge_messages(pair, swapped), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False)
            verdicts.append(
                read_verdict(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
            )
    for result, spoken in zip(found.results, zip(verdicts[::2], verdicts[1::2], strict=True), strict=True):
        expected = {("A", "B"): "win", ("B", "A"): "loss"}.get(
            spoken, "unreadable" if "unreadable" in spoken else "tie"
        )
        assert result == expected
    assert (again.results, again.cached) == (found.results, sum(verdict != "unreadable" for verdict in verdicts))


def about(*words: str) -> Callable[[str], bool]:
    return lambda prompt: any(word in prompt for word in words)


def test_scores_are_the_mean_of_both_orders(server, tmp_path) -> None:
    """Ours is A in the first order. Question 0: won twice. 1: lost twice. 2: won, then a tie. 3: the first both times.
    4: a tie twice. 5: one verdict of two cannot be read.
    """
    said = {0: "AB", 1: "BA", 2: ["A", "tie"], 3: "AA", 4: ["tie", "tie"], 5: ["A", "who knows"]}

    def script(prompt: str, _: int) -> Reply:
        number = next(number for number in said if f"Question {number}?" in prompt)
        return verdict(said[number][0 if prompt.index(GOOD) < prompt.index(BAD) else 1])

    server.script = script
    assert scores(pairs(6), judge(server, tmp_path)) == [1.0, 0.0, 0.75, 0.5, 0.5, None]


def test_a_single_failed_call_gives_no_score_and_the_rest_have_one(server, tmp_path) -> None:
    server.script = lambda prompt, _: fault(500) if "Question 1?" in prompt else prefers_good(prompt, 0)
    assert scores(pairs(3), judge(server, tmp_path)) == [1.0, None, 1.0]


@pytest.mark.parametrize(("status", "concurrency"), [(429, 1), (500, 1), (503, 8)])
def test_a_judge_that_goes_down_is_given_up_after_a_few_calls(server, tmp_path, status, concurrency) -> None:
    """It answers twelve calls and none after that. Every call is tried three times."""
    server.script = lambda prompt, number: prefers_good(prompt, 0) if number <= 12 else fault(status)
    asked = judge(server, tmp_path, concurrency=concurrency)
    with pytest.raises(JudgeDown, match=rf"the judge m at {server.url} does not answer: .* status {status}\)") as down:
        scores(pairs(100), asked)
    assert "\n" not in str(down.value)
    assert len(server.calls) <= 12 + 3 * max(concurrency, 3) * 2, "bounded"
    calls = len(server.calls)
    server.script = prefers_good
    assert scores(pairs(100), asked) == [1.0] * 100
    if concurrency == 1:  # else an answer may be on its way when the others give up
        assert calls == 12 + 3 * 3
        assert len(server.calls) == calls + 200 - 12, "what was judged before is not lost"


def test_a_small_batch_is_enough_to_see_that_a_judge_is_down(tmp_path) -> None:
    nowhere = SimpleNamespace(url="http://127.0.0.1:9/v1")
    with pytest.raises(JudgeDown, match=r"2 of 2 calls went unanswered with 0 retries each \(2 x APIConnectionError\)"):
        scores(pairs(1), judge(nowhere, tmp_path, retries=0))


def test_half_of_the_calls_may_fail(server, tmp_path) -> None:
    server.script = lambda prompt, _: fault(500) if about("Question 0?", "Question 1?")(prompt) else verdict("tie")
    assert scores(pairs(4), judge(server, tmp_path, concurrency=100)) == [None, None, 0.5, 0.5]
    server.script = lambda prompt, _: verdict("tie") if about("Question 0?")(prompt) else fault(500)
    with pytest.raises(JudgeDown, match="4 of 6 calls"):
        scores(pairs(3), judge(server, tmp_path, concurrency=100, model="other"))


def test_calls_that_are_refused_for_their_content_are_no_outage(server, tmp_path) -> None:
    """A conversation that is too long for the judge fails with all of its completions."""
    server.script = lambda *_: fault(400)
    assert scores(pairs(8), judge(server, tmp_path, concurrency=2)) == [None] * 8


def test_a_probe_asks_every_time_and_leaves_nothing_behind(server, tmp_path) -> None:
    server.script = lambda *_: verdict("A")
    asked = judge(server, tmp_path)
    assert probe(asked)
    assert probe(asked)
    assert len(server.calls) == 2
    assert not (tmp_path / "cache").exists()
    server.script = lambda *_: verdict("Let me think")
    assert not probe(asked)


def test_a_probe_finds_a_judge_that_is_down_or_answers_nonsense(server, tmp_path) -> None:
    nowhere = SimpleNamespace(url="http://127.0.0.1:9/v1")
    with pytest.raises(JudgeDown, match="1 of 1 calls went unanswered"):
        probe(judge(nowhere, tmp_path, retries=0))
    server.script = lambda *_: (200, {"Content-Type": "text/html"}, b"<html>It works!</html>")
    with pytest.raises(ConfigError, match="gave no verdict on a first pair of answers: no chat completion"):
        probe(judge(server, tmp_path))


def test_what_a_judge_refuses_is_remembered_from_batch_to_batch(server, tmp_path) -> None:
    server.script = refuses("temperature")
    server.script.server = server
    asked = judge(server, tmp_path, concurrency=1)
    with pytest.warns(UserWarning, match="refuses temperature"):
        scores(pairs(1), asked)
    assert len(server.calls) == 3
    scores(pairs(2), asked)
    assert len(server.calls) == 5


def test_equal_pairs_are_asked_once_and_told_the_same(server, tmp_path) -> None:
    """Two equal completions of one prompt must not differ in reward, also where the judge would change its mind."""
    server.script = lambda _, number: verdict("AB"[number % 2])
    twice = judge(server, tmp_path, concurrency=1)
    found = scores(pairs(1) * 3, twice)
    assert len(server.calls) == 2
    assert found == [found[0]] * 3
    assert scores(pairs(1), twice) == found[:1]
