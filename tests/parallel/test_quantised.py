"""A frozen backbone in 8 or 4 bits, on one process."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import recipe
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.config import ModelSection, RunConfig
from cuma_ds.errors import ConfigError, ModelError
from cuma_ds.learned_settings import first_difference
from cuma_ds.parallel import quantised
from cuma_ds.parallel.backbone import check_quantisation, full_bytes, load_backbone
from cuma_ds.parallel.destination import Destination
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.parallel.quantised import QuantisedLinear, pack, unpack
from cuma_ds.recipe import load_config, make_config

bnb = pytest.importorskip("bitsandbytes")
KINDS = ["nf4", "int8"]
CPU = torch.device("cpu")


def made(linear: nn.Linear, kind: str) -> QuantisedLinear:
    """A quantised copy of a linear."""
    flat = linear.weight.detach().flatten()
    return Destination.whole(CPU, kind).quantised(linear, lambda start, end, out: out.copy_(flat[start:end]))


def linear_of(out_features: int, in_features: int, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(out_features)
    return nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 24), (7, 30), (128, 96)])
def test_nf4_answers_to_the_last_bit_as_the_4_bit_linear_of_bitsandbytes(shape, dtype) -> None:
    linear = linear_of(*shape, dtype)
    theirs = bnb.nn.Linear4bit(shape[1], shape[0], compute_dtype=dtype, compress_statistics=False, quant_type="nf4")
    options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": False, "blocksize": 64}
    theirs.weight = bnb.nn.Params4bit(linear.weight.data.clone(), **options)
    theirs.bias = nn.Parameter(linear.bias.clone(), requires_grad=False)
    theirs.to("cpu")
    ours = made(linear, "nf4")
    found = []
    for layer in (ours, theirs):
        x = torch.randn(3, 5, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.ones_like(y))
        found.append((y.detach(), x.grad))
    assert found[0][0].dtype == dtype
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], linear(x)), "nothing was quantised"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 24), (7, 30)])
def test_int8_is_127_even_steps_of_the_largest_of_64_numbers(shape, dtype) -> None:
    linear = linear_of(*shape, dtype)
    x = torch.randn(5, shape[1]).to(dtype)
    code = bnb.functional.create_linear_map(signed=True)
    packed, state = bnb.functional.quantize_blockwise(linear.weight.data, code=code, blocksize=64)
    theirs = bnb.functional.dequantize_blockwise(packed, state)
    assert torch.equal(made(linear, "int8")(x), F.linear(x, theirs, linear.bias))
    flat = linear.weight.double().flatten().numpy()
    blocks = [flat[start : start + 64] for start in range(0, len(flat), 64)]
    step = np.concatenate([np.full(len(block), np.abs(block).max() / 127) for block in blocks])
    error = np.abs(theirs.double().flatten().numpy() - flat)
    # The library looks up which step is nearest in a table, which is wrong very near the middle between two.
    rounding = {torch.float32: 0.005, torch.bfloat16: 0.005 + 2**-8 * 127}[dtype]
    assert (error <= step * (0.5 + rounding)).all()
    assert error.max() > step.min() / 4


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_packed_as_the_whole(kind) -> None:
    linear = linear_of(14, 30, torch.float32)  # 420 numbers, so that the last of 7 blocks is cut short
    flat, whole = linear.weight.detach().flatten(), made(linear, kind)
    parts = []
    for rank in range(4):
        layer = QuantisedLinear(linear, kind, 4)
        sizes = {layer.weight.shape: layer.weight.dtype, layer.scales.shape: layer.scales.dtype}

        def part(like: nn.Parameter, sizes: dict = sizes) -> nn.Parameter:
            return nn.Parameter(torch.empty(like.numel() // 4, dtype=sizes[like.shape]), requires_grad=False)

        one = Destination(part, rank, 4, CPU, kind)
        parts.append(one.quantised(linear, lambda start, end, out: out.copy_(flat[start:end])))
    packed = torch.cat([layer.weight for layer in parts])
    scales = torch.cat([layer.scales for layer in parts])
    assert len(scales) == 8
    assert torch.equal(unpack(packed, scales, whole.packing), unpack(whole.weight, whole.scales, whole.packing))


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_that_is_loaded_holds_the_packed_weights_of_its_linears(kind, tiny_llama) -> None:
    section = {"path": str(tiny_llama), "dtype": "bfloat16"}
    plain = load_backbone(ModelSection(**section), CPU)
    packed = load_backbone(ModelSection(**section, quantisation=kind), CPU)
    layers = {name: one for name, one in packed.named_modules() if isinstance(one, QuantisedLinear)}
    assert len(layers) == 2 * 7
    numbers = 0
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight
        again, scales = pack(weight.detach().flatten(), kind)
        assert torch.equal(layer.weight, again)
        assert torch.equal(layer.scales, scales)
        numbers += weight.numel()
    held = sum(p.numel() * p.element_size() for layer in layers.values() for p in layer.parameters())
    assert held <= {"nf4": 0.30, "int8": 0.55}[kind] * 2 * numbers
    rest = {name: p for name, p in packed.named_parameters() if name.rpartition(".")[0] not in layers}
    assert sorted({name.split(".")[-2] for name in rest}) == [
        "embed_tokens", "input_layernorm", "lm_head", "norm", "post_attention_layernorm"
    ]  # fmt: skip
    for name, parameter in rest.items():
        assert torch.equal(parameter, plain.get_parameter(name))
    assert full_bytes(packed) == held + sum(2 * p.numel() for p in rest.values())
    assert not any(p.requires_grad for p in packed.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_cannot_be_streamed_is_quantised_alike(kind, tiny_llama, tmp_path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_llama, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    models = [
        load_backbone(ModelSection(path=str(path), dtype="float32", quantisation=kind), CPU)
        for path in (tiny_llama, pickled)
    ]
    states = [model.state_dict() for model in models]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def saved_by(section: dict, kind: str) -> tuple[list[Tensor], int]:
    """What a forward with adapters keeps for the backward pass beside parameters, and numbers of the largest weight."""
    torch.manual_seed(0)
    base = load_backbone(ModelSection(**section, quantisation=kind), CPU)
    model = inject_adapters(base, CumaConfig(num_experts=4, top_k=2, lora_r=4, profile_dim=8))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.arange(6, 15)[None]
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), profile_embeddings=torch.randn(1, 8))
    out.logits.float().sum().backward()
    return list(kept.values()), max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_activations_hold_no_unpacked_weights(kind, tiny_llama) -> None:
    section = {"path": str(tiny_llama), "dtype": "bfloat16"}
    plain, _ = saved_by(section, "none")
    packed, largest = saved_by(section, kind)
    size = [sum(t.untyped_storage().nbytes() for t in tensors) for tensors in (packed, plain)]
    assert size[0] <= size[1]
    assert all(tensor.untyped_storage().nbytes() < 2 * largest for tensor in packed)


def test_weights_that_are_no_linears_are_named(tmp_path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "mixtral")
    gpt2 = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    for name, weight in {"mixtral": "experts", "gpt2": "transformer.h.0.mlp.c_fc.weight of shape (16, 64)"}.items():
        section = ModelSection(path=str(tmp_path / name), quantisation="nf4")
        for check in (check_quantisation, load_backbone):
            with pytest.raises(ModelError, match=r"model\.quantisation: nf4 takes the weights of linear") as error:
                check(section)
            assert weight in str(error.value)


def test_a_base_that_is_quantised_already_is_refused_with_what_to_use(tiny_llama, tmp_path) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    section = ModelSection(path=str(folder), quantisation="nf4")
    for check in (check_quantisation, load_backbone):
        with pytest.raises(ModelError, match=r"are quantised already \(bitsandbytes\).*name the 16-bit model"):
            check(section)


def test_without_bitsandbytes_one_line_says_what_to_install(tiny_llama, monkeypatch) -> None:
    section = ModelSection(path=str(tiny_llama), quantisation="int8")
    quantised.bitsandbytes.cache_clear()
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    for check in (check_quantisation, load_backbone):
        with pytest.raises(ConfigError, match=r"int8 needs the package bitsandbytes.*'cuma-ds\[quantisation\]'"):
            check(section)
    quantised.bitsandbytes.cache_clear()


def config_of(folder: Path, models: tuple[Path, Path], **model: str) -> RunConfig:
    values = {"path": str(models[0]), "dtype": "float32", **model}
    return load_config(recipe(folder, *models, "one", model=values))


def test_quantisation_decides_what_is_learned(tiny_llama, tiny_encoder, tmp_path) -> None:
    before = config_of(tmp_path, (tiny_llama, tiny_encoder))
    now = config_of(tmp_path, (tiny_llama, tiny_encoder), quantisation="nf4")
    assert first_difference(before, before) is None
    assert first_difference(before, now) == ("model.quantisation", "none", "nf4")


def test_stage_3_is_refused(tiny_llama, tiny_encoder, tmp_path) -> None:
    config = config_of(tmp_path, (tiny_llama, tiny_encoder), quantisation="nf4")
    stage_3 = config.model_copy(update={"parallel": config.parallel.model_copy(update={"deepspeed_config": "zero3"})})
    with pytest.raises(ConfigError, match="stage 3 would cast a quantised backbone"):
        read_deepspeed_config(stage_3, 1, 1, 2)


def test_a_backbone_that_trains_is_not_quantised(tiny_llama) -> None:
    values = {"model": {"path": str(tiny_llama), "quantisation": "nf4"}, "adapters": {"method": "full"}}
    with pytest.raises(ConfigError, match="packed weights cannot train"):
        make_config(values)
