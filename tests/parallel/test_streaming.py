"""Sharded models, read slice by slice from safetensors, are the models that from_pretrained loads whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import ROOT, run
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from cuma_ds.config import ModelSection
from cuma_ds.errors import ModelError
from cuma_ds.parallel.backbone import load_backbone
from cuma_ds.parallel.streaming import NotStreamable, plan_streaming

sys.path.insert(0, str(ROOT / "benchmarks"))
import sharded_load

pytestmark = pytest.mark.multirank
SIZES = {
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def save(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, files: int = 1) -> Path:
    """A random model of this configuration with biases and norms that are not all zero or one, in so many files."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    size = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    model.to(dtype).save_pretrained(folder, max_shard_size=-(-size // files) + 1 if files > 1 else "1GB")
    assert len(list(folder.glob("*.safetensors"))) >= files
    return folder


def rewrite(folder: Path, change) -> Path:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("families")
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    odd = {"rope_parameters": {**rope, "original_max_position_embeddings": 16}}
    gemma = {**SIZES, "head_dim": 6}
    tied = LlamaConfig(**SIZES, tie_word_embeddings=True)

    def both_keys(scale: float):
        return lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * scale}

    def without_prefix(tensors: dict) -> dict:
        return {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}

    folders = {
        "llama": (save(root / "llama", LlamaConfig(**SIZES, attention_bias=True, **odd)), "float32"),
        "llama-tied-in-3-files": (save(root / "llama-3", tied, files=3), "float32"),
        "llama-to-bfloat16": (save(root / "llama-half", LlamaConfig(**SIZES), torch.float32), "bfloat16"),
        "llama-both-tied-keys": (rewrite(save(root / "both", tied), both_keys(1.0)), "float32"),
        "llama-tied-keys-that-differ": (rewrite(save(root / "differ", tied), both_keys(2.0)), "float32"),
        "qwen2": (save(root / "qwen2", Qwen2Config(**SIZES, tie_word_embeddings=True)), "bfloat16"),
        "qwen3-in-2-files": (
            save(root / "qwen3", Qwen3Config(**SIZES, head_dim=8), torch.bfloat16, files=2),
            "bfloat16",
        ),
        "mistral-from-float16": (
            save(root / "mistral", MistralConfig(**SIZES, sliding_window=4), torch.float16),
            "float32",
        ),
        "gemma": (save(root / "gemma", GemmaConfig(**gemma)), "bfloat16"),
        "gemma2": (save(root / "gemma2", Gemma2Config(**gemma, sliding_window=4)), "float32"),
        "gemma3": (save(root / "gemma3", Gemma3TextConfig(**gemma, sliding_window=4)), "bfloat16"),
        "gpt2-without-prefix": (
            rewrite(
                save(root / "gpt2", GPT2Config(vocab_size=99, n_embd=24, n_layer=2, n_head=4, n_positions=64)),
                without_prefix,
            ),
            "float32",
        ),
        "mixtral": (save(root / "mixtral", MixtralConfig(**SIZES, num_local_experts=4)), "float32"),
    }
    pickled = root / "pickled"
    AutoModelForCausalLM.from_config(tied).save_pretrained(pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    folders["pickled"] = (pickled, "float32")
    cases = [(name, str(folder), dtype) for name, (folder, dtype) in folders.items()]
    large = root / "large"
    large.mkdir()
    sharded_load.write_model(large, "0.25GB")
    results = run(
        2, [str(Path(__file__).parents[1] / "helpers" / "compare_loads.py"), json.dumps(cases), str(large)], fresh=True
    )
    assert [code for code, _ in results] == [0, 0], "\n".join(results[0][1].splitlines()[-40:])
    lines = [json.loads(line[5:]) for line in results[0][1].splitlines() if line.startswith("seen ")]
    assert [line["name"] for line in lines] == ["large", *folders, "refused"]
    return {line["name"]: line for line in lines}


FALLBACK = {"mixtral": "transformers converts", "pickled": "no safetensors"}


@pytest.mark.parametrize(
    "name",
    [
        "llama", "llama-tied-in-3-files", "llama-to-bfloat16", "llama-both-tied-keys", "llama-tied-keys-that-differ",
        "qwen2", "qwen3-in-2-files", "mistral-from-float16", "gemma", "gemma2", "gemma3", "gpt2-without-prefix",
        "mixtral", "pickled",
    ],
)  # fmt: skip
def test_two_ranks_hold_the_model_that_from_pretrained_loads(name, seen) -> None:
    one = seen[name]
    assert one["varied"] > 0.05
    assert one["same_names"]
    assert one["same_buffers"]
    assert one["same_logits"]
    assert one["same_generation"]
    assert one["share"] < 0.51
    assert len(one["reasons"]) == (name in FALLBACK)
    assert all(FALLBACK[name] in reason for reason in one["reasons"])


def test_a_rank_never_holds_more_than_its_shard_and_one_layer_while_loading(seen) -> None:
    sizes = [2 * shape.numel() for shape in sharded_load.shapes_of("0.25GB")[1].values()]
    assert sum(sizes) > 250e6
    for rank in seen["large"]["ranks"]:
        assert rank["shard"] <= sum(sizes) / 2 * 1.02
        # The interpreter's own allocations while loading are worth some megabytes; the whole model would be 270.
        assert rank["peak"] - rank["before"] < rank["shard"] + 1.5 * max(sizes) + 40e6


def test_machines_with_different_copies_of_a_model_are_refused(seen) -> None:
    assert "holds other weights for rank 1 than for rank 0" in seen["refused"]["error"]


def test_missing_weights_are_an_error_and_never_random(tmp_path) -> None:
    folder = save(tmp_path / "torn", LlamaConfig(**SIZES))
    rewrite(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if "layers.1.mlp" not in key})
    section = ModelSection(path=str(folder), dtype="float32")
    with pytest.raises(
        ModelError, match=r"holds no weights for model\.layers\.1\.mlp\.down_proj\.weight \(3 missing\)"
    ):
        load_backbone(section)
    with pytest.raises(NotStreamable, match=r"no weights for model\.layers\.1\.mlp"):
        plan_streaming(section)
