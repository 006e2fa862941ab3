"""People whose prompts differ in length get the answers they get alone, whatever a model knows positions by."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, PADDED_AT_START, random_model, save_family
from run_folder import lively, make_run
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.errors import ModelError
from cuma_ds.evaluation.generation import answers
from cuma_ds.evaluation.subject import run_subject
from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.inference.open import open_run
from cuma_ds.inference.running import ModelForward, RunningBatch
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker
from cuma_ds.serving.scheduler import Limits, Scheduler

PROMPTS = [[9, 10, 11, 12, 13], list(range(20, 50)), [60], list(range(70, 80))]
PROFILES = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


def adapted(base: Any, target: str, profile_dim: int = 6) -> CumaModel:
    method = {} if profile_dim else {"method": "mixlora"}
    return lively(
        inject_adapters(
            base,
            CumaConfig(num_experts=4, top_k=2, lora_r=2, profile_dim=profile_dim, target_modules=(target,), **method),
        )
    )


@pytest.fixture(params=PADDED_AT_START)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family) -> CumaModel:
    return adapted(random_model(family), FAMILIES[family].linear)


def padded(side: str = "left") -> dict[str, Tensor]:
    longest = max(map(len, PROMPTS))
    ids, mask = (
        torch.zeros(len(PROMPTS), longest, dtype=torch.long),
        torch.zeros(len(PROMPTS), longest, dtype=torch.long),
    )
    for row, prompt in enumerate(PROMPTS):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def alone(model: CumaModel, row: int, ids: list[int]) -> Tensor:
    """Logits [V] after one whole forward of one unpadded sequence."""
    return model(torch.tensor([ids]), profile_embeddings=PROFILES[row : row + 1]).logits[0, -1]


def test_a_forward_with_a_padded_batch_and_its_mask(model) -> None:
    with torch.no_grad():
        left = model(**padded(), profile_embeddings=PROFILES).logits
        right = model(**padded("right"), profile_embeddings=PROFILES).logits
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(left[row, -1], alone(model, row, prompt), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(right[row, len(prompt) - 1], alone(model, row, prompt), rtol=1e-4, atol=1e-4)


def test_a_padded_batch_goes_on_from_its_cache(model) -> None:
    batch = padded()
    with torch.no_grad():
        cache = model(**batch, profile_embeddings=PROFILES, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        found = model(
            torch.full((4, 1), 77), attention_mask=mask, past_key_values=cache, profile_embeddings=PROFILES
        ).logits[:, -1]
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(found[row], alone(model, row, [*prompt, 77]), rtol=1e-4, atol=1e-4)


def test_generating_from_a_padded_batch(model) -> None:
    batch = padded()
    found = model.generate(
        **batch, profile_embeddings=PROFILES, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(alone(model, row, ids).argmax()))
        assert found[row, batch["input_ids"].shape[1] :].tolist() == ids[len(prompt) :]


def test_the_running_batch(model) -> None:
    """Prompts join one after another, and one leaves, with a step after each."""
    batch, running = RunningBatch(ModelForward(model), 0), []

    def check(rows: list[int], logits_BV: Tensor) -> None:
        for row, found_V in zip(rows, logits_BV, strict=True):
            torch.testing.assert_close(found_V, alone(model, row, sequences[row]), rtol=1e-4, atol=1e-4)

    sequences = [list(prompt) for prompt in PROMPTS]
    for new in ([0], [1, 2], [3]):
        check(new, batch.join([sequences[row] for row in new], PROFILES[new]))
        running += new
        if new == [3]:
            batch.keep([0, 2, 3])
            running.remove(1)
        for token in (5, 6):
            for row in running:
                sequences[row].append(token + row)
            check(running, batch.step([sequences[row][-1] for row in running]))


QUESTIONS = ["Hi", "How important is religion in your life?", "Can people be trusted?"]
PEOPLE = [{"country": "Norway"}, {"country": "Ghana"}, "Somebody who has always lived beside a large and quiet lake."]


@pytest.fixture(scope="module", params=["gpt2", "opt", "bloom"])
def run(request, tmp_path_factory, tiny_encoder) -> Path:
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    adapters = {"target_modules": [FAMILIES[family].linear]}
    eager = {"attention": "eager"}  # BLOOM has no other
    return make_run(
        folder / "runs" / "opinions", save_family(folder / "model", family), tiny_encoder, adapters, model=eager
    )[0]


def test_people_side_by_side_answer_and_choose_as_alone(run) -> None:
    talker = Talker(open_run(run), Sampling(max_new_tokens=6))
    # Prompts of a person's own length.
    talker.renderer.encode_prompt = lambda messages, sentence: talker.tokenizer(
        f"{sentence[:30]} {messages[0]['content']}"
    )["input_ids"]
    talker.renderer.encode_choice = lambda question, options, sentence: talker.tokenizer(f"{sentence[:30]} {question}")[
        "input_ids"
    ]
    messages = [{"role": "user", "content": "Hi"}]
    together = talker.choose("Hi", ["Yes", "No"], PEOPLE)
    assert together != [together[0]] * 3
    for person, found in zip(PEOPLE, together, strict=True):
        assert found == pytest.approx(talker.choose("Hi", ["Yes", "No"], [person])[0], abs=1e-5)
    assert talker.answers(messages, PEOPLE) == [talker.answers(messages, [person])[0] for person in PEOPLE]
    gates = talker.gates(messages, PEOPLE)
    for person, found in zip(PEOPLE, gates, strict=True):
        torch.testing.assert_close(found, talker.gates(messages, [person])[0], rtol=1e-4, atol=1e-5)


def test_evaluation_generates_in_batches_as_alone(run) -> None:
    subject = run_subject(run)
    prompts = [subject.renderer.tokenizer(question)["input_ids"] for question in QUESTIONS]
    profiles = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(max_new_tokens=6)
    together = answers(subject, prompts, profiles, sampling)
    alone = [answers(subject, [prompt], profiles[[row]], sampling) for row, prompt in enumerate(prompts)]
    assert together == [answer for (answer,) in alone]


def test_an_exported_model_called_with_a_padded_batch_and_its_mask(run, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_hf(read_run(run), tmp_path / "hf"), trust_remote_code=True)
    with torch.no_grad():
        found = model(**padded(), profiles=[*PEOPLE, PEOPLE[0]]).logits[:, -1]
        for row, prompt in enumerate(PROMPTS):
            expected = model(torch.tensor([prompt]), profiles=[[*PEOPLE, PEOPLE[0]][row]]).logits[0, -1]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


class WithoutPositions(GPT2LMHeadModel):
    """Absolute positions that no caller can set, as in some models that bring their own code."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, logits_to_keep=0, **options):
        known = {"use_cache": options.get("use_cache"), "logits_to_keep": logits_to_keep}
        return super().forward(input_ids, past_key_values, attention_mask=attention_mask, **known)


class Forgetful(WithoutPositions):
    """Looks at the last token alone once it has a cache."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **known):
        shown = (
            attention_mask
            if past_key_values is None or past_key_values.get_seq_length() == 0
            else torch.zeros_like(attention_mask)
        )
        return super().forward(input_ids, shown, past_key_values, **known)


class WithoutCache(WithoutPositions):
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **known):
        return super().forward(input_ids, attention_mask, None, **known)


def as_class(kind: type) -> CumaModel:
    base = random_model("gpt2")
    base.__class__ = kind
    return adapted(base, "c_attn", profile_dim=0)


def test_the_server_measures_whether_a_model_can_answer_in_batches() -> None:
    adapters = adapted(random_model("gpt2"), "c_attn", profile_dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = Scheduler(ModelForward(adapters), [1], 0, Limits(max_batch=8))
        scheduler.check()
    assert scheduler.limits.max_batch == 8
    scheduler = Scheduler(ModelForward(as_class(WithoutPositions)), [1], 0, Limits(max_batch=8, max_queue=9))
    with pytest.warns(UserWarning, match="one at a time"):
        scheduler.check()
    assert scheduler.limits == Limits(max_batch=1, max_queue=9)
    for kind, message in ((Forgetful, "continues a prompt differently"), (WithoutCache, "cannot be served in batches")):
        with pytest.raises(ModelError, match=message):
            Scheduler(ModelForward(as_class(kind)), [1], 0, Limits()).check()
