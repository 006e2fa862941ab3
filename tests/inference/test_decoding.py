"""One model gives one answer at temperature 0, however it is asked and whatever its folder says about sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from asking import ask, served
from models import save_disagreeing
from run_folder import make_run, next_logits
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cuma_ds.config import ModelSection
from cuma_ds.data.rendering import Renderer
from cuma_ds.evaluation.generation import answers
from cuma_ds.evaluation.subject import run_subject, subject
from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.inference.decoding import settle_generation, settled_generation
from cuma_ds.inference.open import open_export, open_model, open_run
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker
from cuma_ds.parallel.backbone import load_backbone

QUESTIONS = [
    "Can people be trusted?",
    "What is a good life?",
    "Hi",
    "Why?",
    "How important is religion in your life?",
    "And now?",
]
NORWAY = {"country": "Norway", "age": 38}
ENDS = {2, 3, 4, 5}
LONGEST = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    folder = tmp_path_factory.mktemp("disagreeing")
    return make_run(folder / "runs" / "opinions", save_disagreeing(folder / "model", tiny_llama), tiny_encoder, {})[0]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    with pytest.warns(UserWarning, match=r"not used: .*repetition_penalty 1\.5"):
        return write_hf(read_run(run), tmp_path_factory.mktemp("exports") / "hf", merged=True)


@pytest.fixture(scope="module")
def expected(run) -> dict[str, list[int]]:
    """The most probable token after each whole forward, until one that ends an answer."""
    opened = open_run(run)
    tokenizer = opened.renderer.tokenizer
    found = {}
    for question in QUESTIONS:
        ids = prompt(tokenizer, question)
        start = len(ids)
        while len(ids) - start < LONGEST and (len(ids) == start or ids[-1] not in ENDS):
            logits = next_logits(opened, ids, NORWAY)
            best, second = logits.topk(2).values.tolist()
            assert best - second > 1e-4, "a tie would make this comparison a matter of rounding; choose another seed"
            ids.append(int(logits.argmax()))
        found[question] = ids[start:]
    ends = [tokens[-1] for tokens in found.values() if len(tokens) < LONGEST]
    assert set(ends) >= {3, 5}, (
        "answers must end at the template's and at the tokenizer's token for this test to mean something"
    )
    assert any(len(set(tokens)) < len(tokens) for tokens in found.values()), "a penalty on repetition must matter"
    return found


def prompt(tokenizer, question: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True
    )["input_ids"]


def words(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_talking_and_serving(run, expected, launch) -> None:
    opened = open_run(run)
    tokenizer = opened.renderer.tokenizer
    with pytest.warns(UserWarning, match="repetition_penalty"):
        talker = Talker(opened, Sampling(max_new_tokens=LONGEST))
    assert set(talker.end_ids) == ENDS
    for question, tokens in expected.items():
        assert talker.answers([{"role": "user", "content": question}], [NORWAY]) == [words(tokenizer, tokens).strip()]
    with served(talker) as (client, _):
        for question, tokens in expected.items():
            answer = ask(client, question, NORWAY, max_tokens=LONGEST)
            assert answer.choices[0].message.content == words(tokenizer, tokens)
            assert answer.usage.completion_tokens == len(tokens)
            assert answer.choices[0].finish_reason == ("length" if len(tokens) == LONGEST else "stop")
    who = ["--profile", json.dumps(NORWAY), "--max-new-tokens", str(LONGEST)]
    done = launch("generate", "--run", str(run), *who, "--prompt", QUESTIONS[0])
    assert done.out.strip() == words(tokenizer, expected[QUESTIONS[0]]).strip()
    assert done.err.count("\n") == 1
    assert "repetition_penalty 1.5, no_repeat_ngram_size 2" in done.err


def test_evaluating_a_run_and_its_export(run, exported, expected) -> None:
    for asked in (run_subject(run), subject(open_export(exported), run / "data")):
        prompts = [prompt(asked.renderer.tokenizer, question) for question in QUESTIONS]
        profiles = asked.reader([NORWAY] * len(prompts))
        found = answers(asked, prompts, profiles, Sampling(max_new_tokens=LONGEST))
        assert found == [words(asked.renderer.tokenizer, expected[question]).strip() for question in QUESTIONS]


def test_an_exported_model_alone_and_in_a_padded_batch(exported, expected) -> None:
    """Plain ``generate`` of transformers, told nothing but the prompts and how long answers may be."""
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for question, tokens in expected.items():
        inputs = torch.tensor([prompt(tokenizer, question)])
        found = model.generate(inputs, profiles=[NORWAY], max_new_tokens=LONGEST)[0, inputs.shape[1] :].tolist()
        assert found == tokens
    rows = [prompt(tokenizer, question) for question in QUESTIONS]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    found = model.generate(**batch, profiles=[NORWAY], max_new_tokens=LONGEST)[
        :, batch["input_ids"].shape[1] :
    ].tolist()
    for row, tokens in zip(found, expected.values(), strict=True):
        assert row[: len(tokens)] == tokens
        assert set(row[len(tokens) :]) <= {0}


def test_exports_without_generation_settings_still_load(exported, expected, tmp_path) -> None:
    import shutil

    old = Path(shutil.copytree(exported, tmp_path / "old"))
    (old / "generation_config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(old, trust_remote_code=True)
    assert model.generation_config.repetition_penalty == 1.5  # as released
    tokenizer = AutoTokenizer.from_pretrained(old)
    with pytest.warns(UserWarning, match="repetition_penalty"):
        talker = Talker(open_export(old), Sampling(max_new_tokens=LONGEST))
    assert talker.answers([{"role": "user", "content": QUESTIONS[0]}], [NORWAY]) == [
        words(tokenizer, expected[QUESTIONS[0]]).strip()
    ]


def test_a_bare_model_and_one_in_peft_are_settled_too(run, tmp_path, expected) -> None:
    from peft import LoraConfig, get_peft_model

    place = open_run(run).config.model.path
    renderer = Renderer(AutoTokenizer.from_pretrained(place), 512)
    ids = torch.tensor([prompt(renderer.tokenizer, QUESTIONS[0])])
    bare = load_backbone(ModelSection(path=place, dtype="float32"))
    with torch.no_grad():
        first = int(bare(ids).logits[0, -1].argmax())
    peft = get_peft_model(
        load_backbone(ModelSection(path=place, dtype="float32")), LoraConfig(target_modules=["q_proj"])
    ).eval()
    for model in (bare, peft):
        with pytest.warns(UserWarning, match="repetition_penalty"):
            assert set(settle_generation(model, renderer)) == ENDS
        tokens = [model.generate(input_ids=ids, max_new_tokens=LONGEST)[0, ids.shape[1] :].tolist() for _ in range(2)]
        assert tokens[0] == tokens[1]
        assert tokens[0][0] == first
    assert open_model(place).model.generation_config.repetition_penalty == 1.5


@pytest.mark.parametrize(
    ("turn", "marker"),
    [("%s<|im_end|>\n", 5), ("%s </s>", 2), ("%s\n", None), ("%s</s><|im_end|>", 2), ("", None)],
)
def test_the_token_that_ends_a_turn_is_the_one_the_template_writes_behind_answers(turn, marker, tokenizer) -> None:
    header = "{{ m['role'] }}: "
    written = turn % "{{ m['content'] }}" if turn else "{{ raise_exception('no') }}"
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.eos_token, tokenizer.chat_template = (
        None,
        f"{{% for m in messages %}}{header}{written}{{% endfor %}}{prompt}",
    )
    settled = settled_generation(GenerationConfig(), None, Renderer(tokenizer, 100))
    assert settled.eos_token_id == (None if marker is None else [marker])
