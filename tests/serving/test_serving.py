"""The server: everybody gets their own answer in one batch, over real HTTP, under OpenAI's own client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from asking import COUNTRIES, PEOPLE, ask, served, until
from hypothesis import given
from hypothesis import strategies as st
from ranks import ROOT, environment, free_port
from run_folder import lively, make_run, next_logits

from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.errors import ConfigError, ModelError
from cuma_ds.inference.open import open_run
from cuma_ds.inference.running import ModelForward, RunningBatch
from cuma_ds.inference.sampling import Sampler, Sampling, next_tokens
from cuma_ds.inference.talk import Talker
from cuma_ds.inference.text import TextStream
from cuma_ds.serving.logs import JsonFormatter
from cuma_ds.serving.patience import Patience
from cuma_ds.serving.scheduler import Job, Limits, Piece, Scheduler, scheduler_of

QUESTIONS = [
    "Can people be trusted?",
    "What is a good life?",
    "Hi",
    "How important is religion in your life, all in all?",
]
PEOPLE += [f"Somebody who grew up in {country} and likes the sea." for country in COUNTRIES]
SECRET = "Zanzibarian"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "opinions", tiny_llama, tiny_encoder, {})[0]


@pytest.fixture(scope="module")
def talker(run) -> Talker:
    return Talker(open_run(run), Sampling())


def alone(talker: Talker, text: str, profile: Any, new_tokens: int = 12) -> list[int]:
    """Greedy tokens of one person alone: one whole forward per token, no cache, no batch, no padding."""
    message = [{"role": "user", "content": text}]
    ids = talker.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True)["input_ids"]
    start = len(ids)
    while len(ids) - start < new_tokens and (len(ids) == start or ids[-1] != talker.tokenizer.eos_token_id):
        logits = next_logits(talker.opened, ids, profile)
        best, second = logits.topk(2).values.tolist()
        assert best - second > 1e-4, "a tie would make this comparison a matter of rounding; choose another seed"
        ids.append(int(logits.argmax()))
    return ids[start:]


def words(talker: Talker, tokens: list[int]) -> str:
    return talker.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def server(talker) -> Iterator[tuple[openai.OpenAI, Scheduler]]:
    with served(talker) as both:
        yield both


@contextlib.contextmanager
def gated(monkeypatch: pytest.MonkeyPatch, talker: Talker) -> Iterator[threading.Semaphore]:
    """The model computes one forward per permit; what waits goes on at the end."""
    permits, forward = threading.Semaphore(0), talker.opened.model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        permits.acquire()
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(talker.opened.model, "forward", slow)
        try:
            yield permits
        finally:
            permits.release(10_000)


def test_64_concurrent_requests_of_16_people_get_the_answers_they_get_alone(run, talker, tmp_path) -> None:
    """The launcher in its own process, half of the requests streamed, with a key. Logs hold no profile or message."""
    key = tmp_path / "key"
    key.write_text("open-sesame\n")
    expected = {
        (q, p): words(talker, alone(talker, text, who))
        for q, text in enumerate(QUESTIONS)
        for p, who in enumerate(PEOPLE)
    }
    assert len({expected[1, p] for p in range(16)}) >= 12, "profiles must matter for this test to mean something"
    command = [
        sys.executable,
        "launchers/serve.py",
        "--run",
        str(run),
        "--port",
        "0",
        "--max-batch",
        "24",
        "--api-key-file",
        str(key),
    ]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()
        assert address[:2] == ["opinions", "at"], Path(log.name).read_text()

        async def one(client: openai.AsyncOpenAI, question: int, person: int) -> str:
            stream = (question + person) % 2 == 1
            answer = await client.chat.completions.create(
                model="opinions", messages=[{"role": "user", "content": QUESTIONS[question]}], temperature=0,
                max_tokens=12, stream=stream, extra_body={"profile": PEOPLE[person]},
            )  # fmt: skip
            if not stream:
                return answer.choices[0].message.content
            return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

        async def everybody() -> list[str]:
            async with openai.AsyncOpenAI(base_url=address[2], api_key="open-sesame", max_retries=0) as client:
                return await asyncio.gather(*(one(client, *who) for who in order))

        order = random.Random(0).sample(sorted(expected), 64)
        answers = asyncio.run(everybody())
        assert dict(zip(order, answers, strict=True)) == expected
        with (
            openai.OpenAI(base_url=address[2], api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
    finally:
        process.terminate()
        process.communicate(timeout=60)
        log.close()
    text = Path(log.name).read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    finished = [row for row in rows if row.get("status") == 200]
    assert len(finished) == 64
    assert all(
        row["completion_tokens"] <= 12 and row["prompt_tokens"] > 5 and row["finish"] in ("stop", "length")
        for row in finished
    )
    for secret in (*COUNTRIES, *QUESTIONS[:2], "sea", "sesame", *filter(None, expected.values())):
        assert secret not in text or len(secret) < 4, secret


def test_a_stream_says_what_the_whole_answer_says(server, talker) -> None:
    client, _ = server
    tokens = alone(talker, QUESTIONS[1], PEOPLE[2])
    whole = ask(client, QUESTIONS[1], PEOPLE[2])
    assert whole.choices[0].message.content == words(talker, tokens)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    prompt = talker.renderer.encode_prompt([{"role": "user", "content": QUESTIONS[1]}], "")
    assert whole.usage.prompt_tokens == len(prompt)
    chunks = list(ask(client, QUESTIONS[1], PEOPLE[2], stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_conversations_with_system_prompts_and_parts_are_those_of_the_chat_template(server, talker) -> None:
    client, _ = server
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "What now?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = talker.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    first = int(next_logits(talker.opened, ids, PEOPLE[1]).argmax())
    parts = [{"type": "text", "text": "What"}, {"type": "text", "text": " now?"}]
    for variant in (
        messages,
        [{"role": "developer", "content": "Be kind."}, *messages[1:3], {"role": "user", "content": parts}],
    ):
        found = ask(client, profile=PEOPLE[1], messages=variant, max_tokens=1)
        assert found.usage.prompt_tokens == len(ids)
        assert found.choices[0].message.content == words(talker, [first])


def test_answers_end_at_end_tokens_and_at_stop_strings(talker) -> None:
    tokens = alone(talker, QUESTIONS[1], PEOPLE[2])
    text = words(talker, tokens)
    cut = next(index for index in range(4, 12) if tokens[index] not in tokens[:index])
    with served(talker, ends=[tokens[cut]]) as (client, _):
        ended = ask(client, QUESTIONS[1], PEOPLE[2])
        assert ended.choices[0].finish_reason == "stop"
        assert ended.usage.completion_tokens == cut + 1
        stop = text[2:5]
        stopped = ask(client, QUESTIONS[1], PEOPLE[2], stop=["never", stop])
        assert stopped.choices[0].finish_reason == "stop"
        assert stopped.choices[0].message.content == text[: text.index(stop)]
        streamed = ask(client, QUESTIONS[1], PEOPLE[2], stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text[: text.index(stop)]


def test_sampling_is_repeatable_by_its_seed_whoever_else_is_in_the_batch(server) -> None:
    client, _ = server
    sampled = {"temperature": 1.3, "top_p": 0.9}
    one = ask(client, seed=1, **sampled).choices[0].message.content
    others = [ask(client, text, who, stream=True, max_tokens=60) for text in QUESTIONS for who in PEOPLE[:2]]
    again = ask(client, seed=1, **sampled).choices[0].message.content
    for other in others:
        other.close()
    assert one == again
    assert len({ask(client, seed=seed, **sampled).choices[0].message.content for seed in range(6)}) > 3
    assert len({ask(client, temperature=1.3).choices[0].message.content for _ in range(6)}) > 3, (
        "without a seed, answers differ"
    )


def test_samples_are_drawn_as_a_plain_loop_draws_them() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 17, generator=generator) * 2
    temperatures = [0.0 if row % 5 == 0 else 0.3 + row / 100 for row in range(200)]
    tops = [1.0 if row % 3 == 0 else 0.2 + row / 300 for row in range(200)]
    found = next_tokens(logits, [Sampler(temperatures[row], tops[row], row) for row in range(200)])
    for row in range(200):
        scores = logits[row].double().numpy()
        if not temperatures[row]:
            assert found[row] == int(scores.argmax())
            continue
        weights = np.exp((scores - scores.max()) / temperatures[row])
        weights /= weights.sum()
        kept, mass = [], 0.0
        for token in np.argsort(-weights, kind="stable"):
            if mass >= tops[row]:
                break
            kept.append(int(token))
            mass += weights[token]
        target, cumulated = Sampler(temperatures[row], tops[row], row).draw() * mass, 0.0
        for token in kept:
            cumulated += weights[token]
            if cumulated > target:
                break
        assert found[row] == token, row


def test_numbers_that_float32_cannot_hold_hurt_nobody() -> None:
    """Temperatures and top-p positive in double precision only, and a row of NaN, change no other row."""
    logits = torch.randn(5, 17, generator=torch.Generator().manual_seed(0)) * 20
    good = [Sampler(0.7, 0.9, row) for row in range(2)]
    expected = next_tokens(logits[:2], [Sampler(0.7, 0.9, row) for row in range(2)])
    odd = [Sampler(1e-300, 1.0), Sampler(1.0, 1e-300), Sampler(1.0, 1.0)]
    logits[4] = float("nan")
    found = next_tokens(logits, [*good, *odd])
    assert found[:2] == expected
    assert found[2:4] == logits[2:4].argmax(dim=-1).tolist()
    assert 0 <= found[4] < 17


FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": 8}, "gemma2": {"sliding_window": 8, "head_dim": 8}, "gpt2": {},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_join_and_leave_between_any_two_steps(family) -> None:
    """Logits of every sequence equal those of one whole forward, with full and with sliding attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    if family == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **FAMILIES[family]))
    targets = ("c_attn",) if family == "gpt2" else ("q_proj", "v_proj")
    model = lively(
        inject_adapters(base, CumaConfig(num_experts=4, top_k=2, lora_r=2, profile_dim=6, target_modules=targets))
    )
    chance = random.Random(1)
    profiles = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    batch, running, started = RunningBatch(ModelForward(model), 0), [], 0

    def check(numbers: list[int], ids: list[list[int]], logits_BV: torch.Tensor) -> None:
        for number, sequence, found_V in zip(numbers, ids, logits_BV, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([sequence]), profile_embeddings=profiles[number : number + 1]).logits[
                    0, -1
                ]
            torch.testing.assert_close(found_V, expected, rtol=1e-4, atol=1e-4)

    for _ in range(25):
        if started < 30 and chance.random() < 0.5:
            new = [
                [chance.randrange(1, 64) for _ in range(chance.randrange(1, 20))] for _ in range(chance.randrange(1, 4))
            ]
            numbers = list(range(started, started + len(new)))
            check(numbers, new, batch.join(new, profiles[numbers]))
            running += list(zip(numbers, new, strict=True))
            started += len(new)
        if running:
            for _, ids in running:
                ids.append(chance.randrange(1, 64))
            logits = batch.step([ids[-1] for _, ids in running])
            check([number for number, _ in running], [ids for _, ids in running], logits)
            rows = [row for row in range(len(running)) if chance.random() < 0.8]
            batch.keep(rows)
            running = [running[row] for row in rows]
            assert len(batch) == len(running)
            assert batch.length == max((len(ids) for _, ids in running), default=0)
    assert started > 20


def test_models_without_a_key_value_cache_are_refused_before_anybody_asks(talker) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    base = MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0)
    )
    model = inject_adapters(base, CumaConfig(num_experts=2, top_k=1, target_modules=("in_proj",), method="mixlora"))
    with pytest.raises(ModelError, match="cannot be served in batches"):
        Scheduler(ModelForward(model.eval()), [1], 0, Limits()).check()


@given(st.text(alphabet="abcx", max_size=30), st.lists(st.text(alphabet="abx", min_size=1, max_size=4), max_size=3))
def test_a_stream_holds_back_stop_strings_and_nothing_else(text, stops) -> None:
    from conftest import character_tokenizer

    tokenizer = character_tokenizer()
    stream, pieces = TextStream(tokenizer, stops), []
    for position, token in enumerate(tokenizer(text, add_special_tokens=False)["input_ids"], start=1):
        pieces.append(stream.add(token))
        if stream.stopped:
            break
        held = text[len("".join(pieces)) : position]
        assert not held or any(stop != held and stop.startswith(held) for stop in stops), (
            "only the beginning of a stop string waits"
        )
    pieces.append(stream.finish())
    whole = "".join(pieces)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    if not ends:
        assert whole == text
    else:  # the stop string whose last character came first
        end = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert (
            whole
            == text[: min(text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == end)]
        )


def test_characters_of_several_tokens_come_whole() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "Grüße an 日本 😀!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("�" in piece for piece in pieces)
    broken = TextStream(tokenizer)
    assert "".join(broken.add(token) for token in ids[:3]) + broken.finish() == tokenizer.decode(ids[:3])


def test_full_queues_refuse_and_cancelled_streams_make_room(talker, monkeypatch) -> None:
    with served(talker, Limits(max_batch=1, max_queue=1)) as (client, scheduler), gated(monkeypatch, talker) as permits:
        stream = ask(client, max_tokens=100, stream=True)
        until(lambda: scheduler.load() == (0, 0))
        waiting = threading.Thread(target=lambda: results.append(ask(client, "Hi", PEOPLE[1])))
        results: list[Any] = []
        waiting.start()
        until(lambda: scheduler.load()[1] == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client)
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.type == "rate_limit_error"
        permits.release(3)
        chunks = iter(stream)
        next(chunks)
        (running,) = scheduler._decoder.running[:1] or [None]
        stream.close()
        until(lambda: running is None or running.cancelled)
        permits.release(1000)
        waiting.join()
        assert results[0].choices[0].message.content == words(talker, alone(talker, "Hi", PEOPLE[1]))
        until(lambda: scheduler.load() == (0, 0))
        assert running is None or len(running.tokens) < 20


def test_an_abandoned_request_frees_its_place(talker, monkeypatch) -> None:
    with served(talker, Limits(max_batch=1)) as (client, scheduler), gated(monkeypatch, talker) as permits:
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.3), max_tokens=100)
        permits.release(1)
        until(lambda: scheduler.load() == (0, 0))
        permits.release(1000)
        assert ask(client).choices[0].finish_reason


REFUSED = {
    "model": ({"model": "gpt-4"}, openai.NotFoundError, "model", "this server has 'opinions'"),
    "no-profile": ({"profile": None}, openai.BadRequestError, "profile", "answers by who is asking"),
    "empty-profile": ({"profile": {"country": ""}}, openai.BadRequestError, "profile", "no field with an answer"),
    "list-profile": ({"profile": [1]}, openai.BadRequestError, "profile", "expected a sentence"),
    "no-messages": ({"messages": []}, openai.BadRequestError, "messages", "at least 1 item"),
    "role": (
        {"messages": [{"role": "tool", "content": "x"}]},
        openai.BadRequestError,
        "messages.0.role",
        "'system', 'developer'",
    ),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        openai.BadRequestError,
        "messages.0.content.0.type",
        "text",
    ),
    "long-prompt": ({"text": "x" * 300}, openai.BadRequestError, "messages", "this server takes 200 with the answer"),
    "long-answer": ({"max_tokens": 101}, openai.BadRequestError, "max_tokens", "allows up to 100"),
    "no-room": (
        {"text": "x" * 100, "max_tokens": 100},
        openai.BadRequestError,
        "max_tokens",
        "this server takes 200 together",
    ),
    "no-tokens": ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "greater than or equal to 1"),
    "temperature": ({"temperature": 3}, openai.BadRequestError, "temperature", "less than or equal to 2"),
    "top-p": ({"top_p": 0}, openai.BadRequestError, "top_p", "greater than 0"),
    "several": ({"n": 2}, openai.BadRequestError, "n", "allowed: 1, or leave it out"),
    "stops": ({"stop": ["a"] * 5}, openai.BadRequestError, "stop", "at most 4"),
    "seed": ({"seed": 2**70}, openai.BadRequestError, "seed", "less than"),
    "penalty": ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty", "allowed: 0, or leave it out"),
    "unknown": ({"extra_body": {"best_of": 3}}, openai.BadRequestError, "best_of", "is no parameter of this server"),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        openai.BadRequestError,
        "tools",
        "allowed: [], or leave it out",
    ),
    "tool-choice": ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", 'allowed: "none" or "auto"'),
    "json": (
        {"response_format": {"type": "json_object"}},
        openai.BadRequestError,
        "response_format",
        'allowed: {"type": "text"}',
    ),
    "bias": ({"logit_bias": {"5": 10}}, openai.BadRequestError, "logit_bias", "allowed: {}"),
    "store": ({"store": True}, openai.BadRequestError, "store", "allowed: false"),
    "null-messages": ({"messages": None}, openai.BadRequestError, "messages", "Field required"),
    "calls": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        openai.BadRequestError,
        "messages.0.tool_calls",
        "allowed: []",
    ),
    "null-content": (
        {"messages": [{"role": "assistant", "content": None}]},
        openai.BadRequestError,
        "messages.0.content",
        "Field required",
    ),
    "refusal": (
        {"messages": [{"role": "assistant", "content": "x", "refusal": "No."}]},
        openai.BadRequestError,
        "messages.0.refusal",
        "is no parameter",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_in_openais_format(name, server) -> None:
    options, error, param, part = REFUSED[name]
    client, scheduler = server
    with pytest.raises(error) as refused:
        ask(client, **options)
    assert part in refused.value.message
    assert param is None or refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert scheduler.load() == (0, 0)


def test_what_clients_write_out_without_meaning_anything_changes_nothing(server) -> None:
    """Messages dumped as OpenAI's client has them, and requests with every optional field, as LangChain writes them."""
    client, _ = server
    turns = [{"role": "user", "content": "Hi"}]
    plain = ask(client, messages=turns)
    dumped = plain.choices[0].message.model_dump()
    assert None in dumped.values()
    assert "refusal" in dumped
    said = [
        *turns,
        {"role": "assistant", "content": plain.choices[0].message.content},
        {"role": "user", "content": "And now?"},
    ]
    expected = ask(client, messages=said).choices[0].message.content
    told = {"audio": None, "annotations": [], "tool_calls": [], "function_call": None, "refusal": None, "name": "ann"}
    user = {
        "role": "user",
        "name": "bob",
        "content": [{"type": "text", "text": "And", "annotations": None}, {"type": "text", "text": " now?"}],
    }
    for answer in (dumped, plain.choices[0].message, {**said[1], **told}):
        assert ask(client, messages=[*turns, answer, user]).choices[0].message.content == expected
    empty = {
        "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"},
        "logit_bias": {}, "n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0,
        "service_tier": "auto", "store": False, "user": "ann", "metadata": {"a": "b"}, "modalities": ["text"],
        "stream_options": {"include_usage": False, "include_obfuscation": False}, "top_logprobs": 0,
        "functions": [], "function_call": "auto", "safety_identifier": "x", "prompt_cache_key": "y",
    }  # fmt: skip
    nulls = dict.fromkeys(
        [*empty, "stop", "seed", "max_completion_tokens", "top_p", "stream", "reasoning_effort", "web_search_options"]
    )
    for written in (empty, nulls):
        assert ask(client, messages=said, extra_body=written).choices[0].message.content == expected
        body = {
            "model": "opinions",
            "messages": said,
            "profile": PEOPLE[0],
            "max_tokens": 12,
            "temperature": 0,
            **written,
        }
        status, found = raw(
            client, "POST", "/v1/chat/completions", json.dumps(body).encode(), **{"Content-Type": "application/json"}
        )
        assert (status, found["choices"][0]["message"]["content"]) == (200, expected)
    assert ask(client, messages=said, temperature=None, extra_body={"temperature": None}).choices[0].finish_reason


def raw(
    client: openai.OpenAI, method: str, path: str, content: bytes = b"", **headers: str
) -> tuple[int, dict[str, Any]]:
    import http.client

    assert client.base_url.port is not None
    connection = http.client.HTTPConnection("127.0.0.1", client.base_url.port, timeout=60)
    connection.request(method, path, content, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read() or b"{}")


HALF = b'{"model": "opinions", "%s": "a \\ud83d", "messages": [{"role": "user", "content": "a \\ud83d"}]}'


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 15_000, b"[]", b"\xff", b'{"model": NaN}', HALF % b"profile", HALF % b"x"]
)
def test_broken_json_and_broken_text_are_refused(server, content) -> None:
    status, body = raw(server[0], "POST", "/v1/chat/completions", content, **{"Content-Type": "application/json"})
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"


def test_large_bodies_are_refused_whether_announced_or_in_pieces(server) -> None:
    client, _ = server
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, "x" * 30_000)
    assert refused.value.status_code == 413
    assert "larger than 20000 bytes" in refused.value.message
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as wire:  # nobody says how long it will be
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += "Transfer-Encoding: chunked\r\n\r\n"
        wire.sendall(head.encode() + b"7000\r\n" + b"x" * 0x7000 + b"\r\n")
        assert b" 413 " in wire.recv(100)


HALVES = {
    "nothing": b"",
    "head": b"GET /v1/models HTTP/1.1\r\nHost: x\r\n",
    "body": b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b'Content-Length: 100\r\n\r\n{"model":',
    "second": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTT",
}


@pytest.mark.parametrize("half", HALVES)
def test_half_sent_requests_are_closed_and_slow_answers_are_not(half, talker, monkeypatch) -> None:
    monkeypatch.setattr(Patience, "seconds", 0.5)
    with served(talker) as (client, _):
        with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=20) as wire:
            wire.sendall(HALVES[half])
            said, begun = b"", time.monotonic()
            while piece := wire.recv(1000):
                said += piece
            assert time.monotonic() - begun < 10
        assert said.startswith(b"HTTP/1.1 200 " if half == "second" else b"HTTP/1.1 408 ")
        with gated(monkeypatch, talker) as permits:
            stream = ask(client, stream=True)
            time.sleep(1)
            permits.release(1000)
            assert list(stream)[-1].choices[0].finish_reason


def test_models_health_and_unknown_paths(server) -> None:
    client, _ = server
    assert [model.id for model in client.models.list()] == ["opinions"]
    assert client.models.retrieve("opinions").id == "opinions"
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
        client.models.retrieve("other")
    assert raw(client, "GET", "/health") == (200, {"status": "ok", "running": 0, "waiting": 0})
    status, body = raw(client, "GET", "/v1/nothing")
    assert (status, body["error"]["type"]) == (404, "invalid_request_error")
    assert raw(client, "GET", "/v1/chat/completions")[0] == 405


def test_keys_open_everything_and_health_needs_none(talker) -> None:
    with served(talker, api_key="söme key") as (client, _):
        assert raw(client, "GET", "/health")[0] == 200
        for right in ("Bearer söme key", "bearer söme key", "BEARER   söme key  "):
            assert raw(client, "GET", "/v1/models", Authorization=right.encode().decode("latin-1"))[0] == 200
        for wrong in (
            "",
            "Bearer",
            "Bearer other",
            "söme key",
            "Basic söme key",
            "Bearer söme",
            "Bearer söme key x",
            "Bearersöme key",
        ):
            status, body = raw(
                client, "GET", "/v1/models", **({"Authorization": wrong.encode().decode("latin-1")} if wrong else {})
            )
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("content", "key"),
    [(b"a-key\n", "a-key"), (b"\xef\xbb\xbfa-key\r\n", "a-key"), (b"\n  s\xc3\xb6me key \n\n", "söme key"),
     (b"one\ntwo\n", "holds 2 lines of text"), (b"\xef\xbb\xbf\n", "is empty"),
     ("a-key".encode("utf-16"), "is no UTF-8 text")],
)  # fmt: skip
def test_key_files_as_editors_write_them(content, key, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launchers"))
    import serve

    (tmp_path / "key").write_bytes(content)
    if " " in key and key != "söme key":
        with pytest.raises(ConfigError, match=key):
            serve._api_key(str(tmp_path / "key"))
    else:
        assert serve._api_key(str(tmp_path / "key")) == key
    monkeypatch.setenv("CUMA_API_KEY", " a-key\n")
    assert serve._api_key(None) == "a-key"


def test_unknown_profile_fields_are_told_to_the_client(server) -> None:
    client, _ = server
    answer = ask(client, profile={"country": "Norway", "contry": "Ghana"})
    assert "did you mean 'country'?" in answer.warnings[0]
    assert not hasattr(ask(client, profile={"country": "Norway"}), "warnings")
    chunks = list(ask(client, profile={"contry": "Norway"}, stream=True))
    assert "'contry' is unknown" in chunks[0].warnings[0]


def test_a_prompt_that_cannot_be_read_fails_alone(talker, monkeypatch) -> None:
    """Its neighbours, those that joined with it and those that were running, get the answers they get alone."""
    expected = {person: words(talker, alone(talker, "Hi", PEOPLE[person])) for person in range(4)}
    forward = talker.opened.model.forward

    def picky(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] > 1 and (kwargs["input_ids"] == 101).any():
            raise RuntimeError("this token has no row")
        return forward(*args, **kwargs)

    with served(talker) as (client, scheduler), monkeypatch.context() as patch:
        patch.setattr(talker.opened.model, "forward", picky)
        results: dict[Any, Any] = {}

        def go(who: Any, text: str) -> None:
            try:
                results[who] = (
                    ask(client, text, PEOPLE[who] if isinstance(who, int) else PEOPLE[0]).choices[0].message.content
                )
            except openai.InternalServerError as error:
                results[who] = error

        threads = [threading.Thread(target=go, args=(who, "Hi")) for who in range(4)]
        threads += [
            threading.Thread(target=go, args=(f"bad {number}", f"{number} {talker.tokenizer.decode([101])}"))
            for number in range(2)
        ]
        with scheduler._changed:  # so that they join together
            for thread in threads:
                thread.start()
            time.sleep(0.5)
        for thread in threads:
            thread.join()
    assert {who: results[who] for who in range(4)} == expected
    assert all(isinstance(results[f"bad {number}"], openai.InternalServerError) for number in range(2))


def test_a_token_without_an_embedding_is_refused_before_it_meets_others(talker, monkeypatch) -> None:
    encode = talker.renderer.encode_prompt
    monkeypatch.setattr(talker.renderer, "encode_prompt", lambda *who: [*encode(*who), 128])
    with served(talker) as (client, _), pytest.raises(openai.BadRequestError, match="embeddings for 128 tokens only"):
        ask(client)
    with pytest.raises(ModelError, match="holds token 128"):
        talker.answers([{"role": "user", "content": "Hi"}], PEOPLE[:1])


class Lines(logging.Handler):
    """What the server's log would say."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def log() -> Iterator[list[str]]:
    handler, logger = Lines(), logging.getLogger("cuma_ds.serving")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_failing_forward_fails_its_requests_alone_and_says_nothing_about_them(talker, monkeypatch, log) -> None:
    with served(talker) as (client, scheduler):
        with monkeypatch.context() as patch:
            patch.setattr(
                talker.opened.model,
                "forward",
                lambda **_: (_ for _ in ()).throw(RuntimeError(f"no memory for {SECRET}")),
            )
            with pytest.raises(openai.InternalServerError) as failed:
                ask(client, f"I am {SECRET}", {"country": SECRET})
            assert failed.value.body["code"] == "internal_error"
            assert SECRET not in str(failed.value)
            with pytest.raises(openai.APIError, match="failed to answer"):
                list(ask(client, f"I am {SECRET}", {"country": SECRET}, stream=True))
        with pytest.raises(openai.BadRequestError):
            ask(client, SECRET, {SECRET: ""})
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(SECRET)
        assert raw(client, "GET", f"/{SECRET}?{SECRET}")[0] == 404
        assert ask(client).choices[0].finish_reason == "length"
        assert scheduler.alive
    rows = [json.loads(line) for line in log]
    statuses = Counter(row["status"] for row in rows if row["event"] == "request")
    assert Counter([200, 200, 400, 404, 404, 500]) <= statuses  # a request that another test gave up may be told late
    assert {row["error"] for row in rows if row["event"] == "prompt failed"} == {"RuntimeError"}
    assert SECRET not in "".join(log)


def test_models_without_profiles_serve_without(tmp_path, tiny_llama, tiny_encoder) -> None:
    lora = {"method": "lora", "num_experts": 1, "top_k": 1, "balance_weight": 0.0}
    folder, trained, _ = make_run(tmp_path / "runs" / "lora", tiny_llama, tiny_encoder, lora)
    talker = Talker(open_run(folder), Sampling())
    with served(talker) as (client, _):
        ids = talker.renderer.encode_prompt([{"role": "user", "content": "Hi"}], "")
        with torch.no_grad():
            first = int(trained(torch.tensor([ids])).logits[0, -1].argmax())
        assert ask(client, profile=None, max_tokens=1).choices[0].message.content == words(talker, [first])
        with pytest.raises(openai.BadRequestError, match="takes none"):
            ask(client)


def test_a_cancelled_job_is_never_begun(talker) -> None:
    scheduler = scheduler_of(talker, Limits(), [5])
    pieces: list[Piece] = []
    jobs = [
        Job([1, 2, 3], "A person.", Sampling(3), TextStream(talker.tokenizer), pieces.append),
        Job([4, 2, 3], "A person.", Sampling(3), TextStream(talker.tokenizer), lambda _: done.set()),
    ]
    done = threading.Event()
    jobs[0].cancel()
    for job in jobs:
        scheduler.submit(job)
    scheduler.start()
    assert done.wait(60)
    scheduler.stop()
    assert not scheduler.alive
    assert not pieces
    assert not jobs[0].tokens


MISTAKES = {
    "both": (["--run", "RUN", "--export", "RUN"], "one of --run"),
    "neither": ([], "serve takes one of --run"),
    "no-run": (["--run", "/no/such"], "is no run folder"),
    "not-an-export": (["--export", "RUN"], "is no exported model"),
    "encoder-of-run": (["--run", "RUN", "--encoder", "RUN"], "belong to --export"),
    "batch": (["--run", "RUN", "--max-batch", "0"], "--max-batch is 0; at least 1"),
    "length": (["--run", "RUN", "--max-length", "513"], "looks back 512 tokens"),
    "room": (["--run", "RUN", "--max-length", "20", "--max-tokens", "20"], "leaves no room"),
    "no-key": (["--run", "RUN", "--api-key-file", "/no/such"], "--api-key-file /no/such cannot be read: No such file"),
    "empty-key": (["--run", "RUN", "--api-key-file", "/dev/null"], "is empty"),
    "host": (["--run", "RUN", "--host", "192.0.2.1"], "cannot listen on --host 192.0.2.1"),
    "port": (["--run", "RUN", "--port", "70000"], "cannot listen on"),
    "device": (["--run", "RUN", "--device", "abacus"], "--device abacus cannot be used"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(mistake, run, launch) -> None:
    arguments, part = MISTAKES[mistake]
    port = [] if "--port" in arguments else ["--port", "0"]
    done = launch("serve", *(str(run) if argument == "RUN" else argument for argument in arguments), *port)
    assert done.code == 2
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("error: ")
    assert part in done.err


def test_a_taken_port_is_one_line(run, launch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        done = launch("serve", "--run", str(run), "--port", str(taken.getsockname()[1]))
    assert done.code == 2
    assert "Address already in use" in done.err
