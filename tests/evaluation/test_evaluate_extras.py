"""What else can be judged: exports, PEFT adapters and bare models, generated answers, and interference of gradients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_server import verdict
from peft import LoraConfig, PeftModel, get_peft_model
from run_folder import OPINIONS, content, lively, make_run
from transformers import AutoModelForCausalLM

from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.config import ModelSection
from cuma_ds.data.batch import EncodedExample
from cuma_ds.errors import CheckpointError, ConfigError, ModelError
from cuma_ds.evaluation.generation import Generation, answers, sample_requests
from cuma_ds.evaluation.gradients import Interference, averaged, cosines, group_gradients, truncate
from cuma_ds.evaluation.metrics import distinct
from cuma_ds.evaluation.run import evaluate
from cuma_ds.evaluation.subject import run_subject, subject
from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.inference.open import open_export, open_model, open_peft
from cuma_ds.inference.sampling import Sampling
from cuma_ds.judge import JudgeSettings
from cuma_ds.parallel.backbone import load_backbone

CHATS = OPINIONS.with_name("chats.jsonl")
FEW = ["evaluation.min_answers=2", "evaluation.bootstrap=20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    settings = {"min_answers": 2, "bootstrap": 20}
    return make_run(tmp_path_factory.mktemp("runs") / "opinions", tiny_llama, tiny_encoder, {}, evaluation=settings)[0]


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    settings = {"min_answers": 1, "bootstrap": 20}
    folder = tmp_path_factory.mktemp("runs") / "chats"
    return make_run(folder, tiny_llama, tiny_encoder, {}, source=CHATS, evaluation=settings)[0]


def rows(report) -> dict:
    return {split: part["rows"] for split, part in content(report)["splits"].items()}


def numbers(report, row: str) -> dict[str, float]:
    return {key: value for key, value in rows(report)["test"][row].items() if key != "interval"}


def test_an_export_is_judged_as_the_run_it_came_from(run, tmp_path, tiny_encoder) -> None:
    write_hf(read_run(run), tmp_path / "exported")
    # The prepared folder inside the run is the same split of the same people.
    exported = subject(open_export(tmp_path / "exported", encoder=str(tiny_encoder), overrides=FEW), run / "data")
    there, here = evaluate(exported, tmp_path / "there"), evaluate(run_subject(run), tmp_path / "here")
    assert list(rows(there)["test"]) == list(rows(here)["test"])
    for row in rows(here)["test"]:
        assert numbers(there, row) == pytest.approx(numbers(here, row), abs=1e-5)
    assert (content(there)["run"], content(there)["checkpoint"]) == ("exported", "export")


def test_a_run_on_other_data(run, tmp_path) -> None:
    lines = [json.loads(line) for line in OPINIONS.read_text().splitlines()]
    (tmp_path / "half.jsonl").write_text("\n".join(json.dumps(line) for line in lines[::2]))
    report = evaluate(run_subject(run, data=tmp_path / "half.jsonl"), tmp_path / "out")
    assert (
        0
        < content(report)["splits"]["test"]["answers"]
        < content(evaluate(run_subject(run), tmp_path / "own"))["splits"]["test"]["answers"]
    )


def test_a_peft_adapter_is_judged_before_and_after(run, tmp_path, tiny_llama) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    opened = open_peft(tmp_path / "adapter", base=str(tiny_llama), overrides=[*FEW, "model.dtype=float32"])
    assert isinstance(opened.model, PeftModel)
    report = evaluate(subject(opened, run / "data"), tmp_path / "out")
    bare = evaluate(
        subject(open_model(str(tiny_llama), [*FEW, "model.dtype=float32"]), run / "data"), tmp_path / "bare"
    )
    assert list(rows(report)["test"]) == ["collapse", "oracle", "before", "trained"]
    assert numbers(report, "before") == pytest.approx(numbers(bare, "before"), abs=1e-5)
    assert numbers(report, "trained")["emd"] != pytest.approx(numbers(report, "before")["emd"], abs=1e-4)


def test_a_bare_model_has_one_row_of_its_own(run, tmp_path, tiny_llama) -> None:
    report = evaluate(
        subject(open_model(str(tiny_llama), [*FEW, "model.dtype=float32"]), run / "data"), tmp_path / "out"
    )
    trained = evaluate(run_subject(run), tmp_path / "run")
    assert list(rows(report)["test"]) == ["collapse", "oracle", "before"]
    assert content(report)["main"] == "before"
    assert numbers(report, "before") == pytest.approx(numbers(trained, "before"), abs=1e-5)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| **the model as it is** |" in text
    assert "backbone before training" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --run, --export, --adapter, --model"),
        (["--run", "a", "--model", "b"], "2 were given"),
        (["--model", "a", "--data", "b"], "--model needs --out"),
        (["--export", "a", "--out", "b"], "--export needs --data"),
        (["--run", "a", "--base", "b"], "--base belongs to --export and --adapter"),
        (["--run", "a", "--step", "3", "3"], "--step 3 3 names one checkpoint twice"),
        (["--run", "a", "--generate", "0"], "--generate is 0"),
        (["--run", "a", "--judge-url", "http://x/v1"], "--judge-url and --judge-model belong together"),
        (["--run", "a", "--judge-url", "http://x/v1", "--judge-model", "m"], "needs --generate"),
        (["--run", "a", "--generate", "2", "--judge-url", "x", "--judge-model", "m"], "'x' is no address"),
        (["--model", "a", "--data", "nowhere.jsonl", "--out", "b"], "does not exist"),
    ],
)
def test_wrong_combinations_are_one_line(launch, arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = launch("evaluate", *arguments)
    assert done.code == 2
    assert message in done.err.splitlines()[-1]


def test_data_that_is_missing_and_folders_of_another_kind(run, tmp_path, tiny_llama) -> None:
    with pytest.raises(CheckpointError, match="no PEFT adapter"):
        open_peft(tmp_path)
    write_hf(read_run(run), tmp_path / "exported")
    with pytest.raises(CheckpointError, match="--export"):
        open_peft(tmp_path / "exported")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(ModelError, match="does not load"):
        open_peft(tmp_path / "adapter", base=str(tiny_llama))


# --- generated answers


def test_answers_equal_single_unpadded_generations(chat_run) -> None:
    asked = run_subject(chat_run)
    requests = sample_requests(asked.data.splits["test"], 5)
    prompts = [asked.renderer.encode_prompt(request.messages, "") for request in requests]
    profiles = asked.embeddings_NP[[request.profile for request in requests]]
    found = answers(asked, prompts, profiles, Sampling(max_new_tokens=6))
    for row, (prompt, text) in enumerate(zip(prompts, found, strict=True)):
        tokens = asked.model.generate(
            input_ids=torch.tensor([prompt]), profile_embeddings=profiles[[row]], max_new_tokens=6, do_sample=False
        )
        assert text == asked.renderer.tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip()


def test_requests_end_before_the_last_answer_and_know_who_asks(chat_run) -> None:
    split = run_subject(chat_run).data.splits["test"]
    requests = sample_requests(split, 1000)
    assert len(requests) == len(split)
    for request, row in zip(requests, split, strict=True):
        assert list(request.messages) == [dict(message) for message in row["messages"][: len(request.messages)]]
        assert row["messages"][len(request.messages)]["role"] == "assistant"
        assert (request.profile, [request.person]) == (row["profile"], row["people"])
    assert sample_requests(split, 2) == sample_requests(split, 2)
    assert len(sample_requests(split, 2)) == 2


def test_a_report_with_answers_and_a_judge_over_http(chat_run, tmp_path, server, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server.script = lambda *_: verdict("A")
    report = evaluate(
        run_subject(chat_run), tmp_path / "out", extras=[Generation(3, Sampling(8), JudgeSettings(server.url, "m"))]
    )
    section = content(report)["generation"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == section["requests"] == 3
    for row in ("before", "trained"):
        expected = distinct([line[row] for line in lines], 1)
        assert section["rows"][row]["distinct_1"] == (
            pytest.approx(expected, abs=1e-6) if expected == expected else None
        )
    assert (section["judge"]["tie"], section["judge"]["disagreed"]) == (3, 3)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Win rate of the trained model against its backbone, by m: **50.0%" in text
    profiles = run_subject(chat_run).data.sentences
    assert not any(sentence in (tmp_path / "out" / "answers.jsonl").read_text() for sentence in profiles)


def test_answers_need_conversations_and_gradients_need_questions(run, chat_run, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--generate needs data of kind chat"):
        evaluate(run_subject(run), tmp_path / "a", extras=[Generation(2, Sampling(4))])
    with pytest.raises(ConfigError, match="--gradients needs data of kind choice"):
        evaluate(run_subject(chat_run), tmp_path / "b", extras=[Interference()])


# --- interference of gradients


def examples(count: int, seed: int) -> list[EncodedExample]:
    rng = np.random.default_rng(seed)
    found = []
    for profile in range(count):
        ids = [int(token) for token in rng.integers(6, 100, size=int(rng.integers(4, 9)))]
        found.append(EncodedExample(ids, [len(ids) - 1] * 3, [10, 11, 12], list(rng.dirichlet(np.ones(3))), profile))
    return found


@pytest.fixture
def model(tiny_llama):
    config = CumaConfig(num_experts=4, top_k=2, lora_r=2, target_modules=("q_proj", "v_proj"), profile_dim=16)
    return lively(inject_adapters(load_backbone(ModelSection(path=str(tiny_llama), dtype="float32")), config))


def test_gradients_equal_single_unpadded_backward_passes(model) -> None:
    embeddings = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    groups = [examples(3, 0), examples(5, 1)]
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = group_gradients(model, groups, embeddings, batch_size=2, pad_id=0)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    experts = [parameter for name, parameter in model.adapter_parameters() if ".experts." in name]
    for row, group in zip(found, groups, strict=True):
        loss = torch.zeros(())
        for example in group:
            logits = model(
                input_ids=torch.tensor([example.input_ids]), profile_embeddings=embeddings[[example.profile]]
            ).logits[0, -1]
            logp = logits.log_softmax(dim=-1)[example.target_token]
            loss = loss - (logp * torch.tensor(example.target_weight)).sum() / len(group)
        own = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, experts)])
        torch.testing.assert_close(row, own, rtol=1e-3, atol=1e-5)
    cosine = float(found[0] @ found[1] / found[0].norm() / found[1].norm())
    np.testing.assert_allclose(cosines(found), [[1, cosine], [cosine, 1]], atol=1e-4)


def test_experts_that_share_no_token_do_not_interfere(model) -> None:
    """Routers that look at the profile alone and send two groups to different experts: the gradients are orthogonal."""
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if name.endswith("router.weight_h"):
                parameter.zero_()
            elif ".router." in name:
                parameter.zero_()[:2, 0] = 10.0
                parameter[2:, 1] = 10.0
    embeddings = torch.eye(16)[:2]
    groups = [examples(1, 0), [EncodedExample(**{**vars(examples(1, 1)[0]), "profile": 1})]]
    found = cosines(group_gradients(model, groups, embeddings, 4, 0))
    np.testing.assert_allclose(found, np.eye(2), atol=1e-6)


def test_the_dense_adapter_is_the_best_of_its_rank_and_the_mixture_comes_back(model) -> None:
    embeddings, group = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), examples(3, 0)
    before = group_gradients(model, [group], embeddings, 4, 0)
    with averaged(model, group, embeddings, 4, 0, rank=4) as dense:
        ranks = {layer.experts.lora_a.shape[1] for _, layer in dense.adapted_layers()}
        assert ranks == {4}
        assert group_gradients(dense, [group], None, 4, 0).abs().sum() > 0
    torch.testing.assert_close(group_gradients(model, [group], embeddings, 4, 0), before)
    a, b = torch.randn(6, 9), torch.randn(7, 6)
    small_a, small_b = truncate(a, b, 3)
    u, s, v = np.linalg.svd((b @ a).numpy())
    np.testing.assert_allclose((small_b @ small_a).numpy(), (u[:, :3] * s[:3]) @ v[:3], atol=1e-4)


def test_a_report_with_gradients(run, tmp_path) -> None:
    report = evaluate(run_subject(run), tmp_path / "out", extras=[Interference(groups=3)])
    section = content(report)["gradients"]
    assert len(section["groups"]) == 3
    assert list(section["rows"]) == ["dense LoRA, rank 4", "CuMA, top 2 of 4"]
    for row in section["rows"].values():
        matrix = np.array(row["cosines"])
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-5)
        assert row["conflicting"] == pytest.approx(np.mean(matrix[~np.eye(3, dtype=bool)] < 0))
    assert "gradients.png" in report.pictures
    assert "## Gradient interference" in (tmp_path / "out" / "report.md").read_text()
