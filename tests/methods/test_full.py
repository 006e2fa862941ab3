"""Full fine-tuning equals a plain loop over transformers' own model, on any number of ranks and at any ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pairs import LearnedPairs
from rivals import by_hand, rival, run_and_resume, stored_run
from single_process import Learned
from small_runs import assert_same_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cuma_ds.errors import ConfigError
from cuma_ds.evaluation.run import evaluate, evaluate_run
from cuma_ds.evaluation.subject import subject
from cuma_ds.export.plain import write_plain
from cuma_ds.inference.open import open_model, open_run
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.recipe import load_config

FULL = {"method": "full"}


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory, tiny_llama) -> Path:
    """The tiny Llama with one matrix as its embedding and as its head."""
    folder = tmp_path_factory.mktemp("models") / "tied-llama"
    config = AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def trained_by_hand(path: Path, learns: type[Learned]):
    config = load_config(path)
    return by_hand(config, AutoModelForCausalLM.from_pretrained(config.model.path), learns)


@pytest.mark.multirank
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_full_is_a_plain_loop(objective, tmp_path, tied_llama) -> None:
    stages = {1: ("zero1", "zero3"), 2: ("zero1", "zero2", "zero3")}
    paths = run_and_resume(tmp_path, tied_llama, FULL, objective, stages)
    expected = trained_by_hand(paths[0], {"sft": Learned, "dpo": LearnedPairs}[objective])
    assert expected.losses[-1] != pytest.approx(expected.losses[0], rel=0.05)
    for path in paths:
        assert_same_training(path, expected)


@pytest.fixture
def moved(tied_llama) -> torch.nn.Module:
    """The model after some training."""
    model = AutoModelForCausalLM.from_pretrained(tied_llama).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def folder(moved, tmp_path, tied_llama) -> Path:
    """Its run folder."""
    return stored_run(rival(tmp_path, tied_llama, "full", FULL), dict(moved.named_parameters()))


IDS = torch.tensor([[1, 20, 30, 40, 50]])


@torch.no_grad()
def test_a_run_holds_the_trained_model_and_the_one_before(folder, moved, tied_llama) -> None:
    opened, bare = open_run(folder), AutoModelForCausalLM.from_pretrained(tied_llama)
    trained = opened.model(IDS).logits
    torch.testing.assert_close(trained, moved(IDS).logits)
    with opened.untrained():
        torch.testing.assert_close(opened.model(IDS).logits, bare(IDS).logits)
    assert torch.equal(opened.model(IDS).logits, trained)
    assert (trained - bare(IDS).logits).abs().max() > 0.1


def test_its_report_compares_with_the_bare_model(folder, tmp_path, tied_llama) -> None:
    rows = evaluate_run(folder).splits["test"].rows
    bare = evaluate(
        subject(open_model(str(tied_llama), ["data.max_length=256", "model.dtype=float32"]), folder / "data"),
        tmp_path / "bare",
    )
    assert rows["before"].emd_questions == pytest.approx(bare.splits["test"].rows["before"].emd_questions)
    assert rows["trained"].emd_questions != pytest.approx(rows["before"].emd_questions)


@torch.no_grad()
def test_its_export_is_a_model_of_transformers(folder, moved, tmp_path) -> None:
    out = write_plain(folder, tmp_path / "exported")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(IDS).logits, moved(IDS).logits)
    assert AutoTokenizer.from_pretrained(out).encode("Yes.")
    assert "method full" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapters": {"num_experts": 8}}, "method 'full' does not read num_experts, but num_experts: 8"),
        ({"adapters": {"lora_r": 64}}, "method 'full' does not read lora_r"),
        ({"adapters": {"gradient_mask": "dominant"}}, "method 'full' does not read gradient_mask"),
        ({"parallel": {"ep_size": 2}}, "ep_size is 2, which does not divide adapters.num_experts 1"),
        ({"training": {"objective": "dpo"}, "dpo": {"reference": "base"}}, "full trains away; use reference: start"),
        ({"parallel": {"deepspeed_config": "zero2_sharded_backbone"}}, "use zero3, which shards everything"),
    ],
)
def test_what_full_cannot_be_is_one_line(sections, message, tmp_path, tied_llama) -> None:
    adapters = FULL | sections.pop("adapters", {})
    with pytest.raises(ConfigError, match=message) as raised:
        read_deepspeed_config(load_config(rival(tmp_path, tied_llama, "bad", adapters, **sections)), 1, 1, 1)
    assert "\n" not in str(raised.value)
