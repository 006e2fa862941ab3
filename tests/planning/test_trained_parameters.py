"""What each method trains on the shapes of the paper's backbones, against counts made by hand."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from cuma_ds.planning.cost import Hardware, Work
from cuma_ds.planning.plan import Planner
from cuma_ds.planning.skeleton import Setup, read_model_config
from cuma_ds.recipe import make_config

SHAPES = Path(__file__).parents[2] / "launchers" / "model_configs"
MLP = {"router": "mlp", "router_hidden": 256, "router_layers": 2, "target_modules": ["q_proj", "v_proj"]}
LINEAR = {"router": "linear", "target_modules": ["q_proj", "v_proj"]}
# Widths of both backbones: hidden, keys and values, profile, experts, hidden width of the router.
D, KV, P, E, H = 4096, 1024, 1024, 8, 256
LAYERS = {"qwen3-8b": 36, "llama-8b": 32}
BACKBONE = {"qwen3-8b": 8_190_735_360, "llama-8b": 8_030_261_248}


def mlp_router(profile: int) -> int:
    return (D + profile) * H + H + H * E + E


def experts(rank: int, shared_a: bool = False) -> int:
    a = 2 * rank * D * (1 if shared_a else E)
    return a + E * rank * (D + KV)


METHODS = {
    "cuma, r 8": ({"lora_r": 8, "share_router": False, **MLP}, experts(8) + 2 * mlp_router(P)),
    "cuma, r 64": ({"lora_r": 64, "share_router": False, **MLP}, experts(64) + 2 * mlp_router(P)),
    "cuma, r 64, as released": ({"lora_r": 64, "shared_a": True, **MLP}, experts(64, True) + mlp_router(P)),
    "mixlora": ({"method": "mixlora", "lora_r": 64, **LINEAR}, experts(64) + D * E),
    "hydralora": (
        {"method": "hydralora", "lora_r": 64, "share_router": False, **MLP}, experts(64, True) + 2 * mlp_router(0),
    ),
    "hydralora-original": (
        {"method": "hydralora-original", "lora_r": 64, "num_experts": 4}, 2 * 64 * D + 4 * 64 * (D + KV) + 2 * 4 * D,
    ),
    "dora, r 64": (
        {"method": "dora", "lora_r": 64, "target_modules": ["q_proj", "v_proj"]}, 64 * (3 * D + KV) + D + KV,
    ),
    "lora, r 8": ({"method": "lora", "lora_r": 8, **LINEAR}, 8 * (3 * D + KV)),
    "lora, r 64": ({"method": "lora", "lora_r": 64, **LINEAR}, 64 * (3 * D + KV)),
}  # fmt: skip
# Of all parameters of Qwen3-8B and Llama-3.1-8B, in percent.
SHARES = {
    "cuma, r 8": (1.53, 1.39),
    "cuma, r 64": (4.15, 3.76),
    "mixlora": (3.01, 2.73),
    "hydralora": (2.31, 2.09),
    "lora, r 64": (0.37, 0.34),
    "dora, r 64": (0.38, 0.34),
    "p_tuning_v2, 32": (3.74, 3.40),
    "full": (100.0, 100.0),
}


def prefix(layers: int, embedded: int, tokens: int = 32, hidden: int = D) -> int:
    """Embeddings of the virtual tokens, and the two linears with biases that make keys and values of all layers."""
    return tokens * embedded + (embedded + 1) * hidden + (hidden + 1) * layers * 2 * KV


def trained(adapters: dict, shape: str) -> int:
    config = make_config({"model": {"path": shape}, "profiles": {"encoder": "any"}, "adapters": dict(adapters)})
    width = P if config.adapters.uses_profiles else 0
    sized = config.adapters.model_copy(update={"profile_dim": width})
    setup = Setup(read_model_config(SHAPES / f"{shape}.json"), config.model_copy(update={"adapters": sized}))
    return sum(one.parameter.numel() for one in setup.build().trained_parameters())


@pytest.mark.parametrize("shape", LAYERS)
def test_each_method_trains_as_many_parameters_as_counted_by_hand(shape) -> None:
    counted = {name: trained(adapters, shape) for name, (adapters, _) in METHODS.items()}
    assert counted == {name: LAYERS[shape] * of_layer for name, (_, of_layer) in METHODS.items()}
    counted["p_tuning_v2, 32"] = trained({"method": "p_tuning_v2"}, shape)
    assert counted["p_tuning_v2, 32"] == prefix(LAYERS[shape], KV)
    counted["full"] = trained({"method": "full"}, shape)
    assert counted["full"] == BACKBONE[shape]
    place = list(LAYERS).index(shape)
    shares = {name: round(100 * counted[name] / BACKBONE[shape], 2) for name in SHARES}
    assert shares == {name: both[place] for name, both in SHARES.items()}


def test_a_prefix_of_3_89_percent_is_none_that_peft_makes() -> None:
    """3.89% of Qwen3-8B counts embeddings of the backbone's width. Those of PEFT are as wide as keys and values, of
    which Qwen3-8B has fewer than queries: 3.74%.
    """
    assert round(100 * prefix(36, D) / BACKBONE["qwen3-8b"], 2) == 3.89
    asked = peft.PrefixTuningConfig(
        num_virtual_tokens=32, prefix_projection=True, encoder_hidden_size=D, task_type="CAUSAL_LM"
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(read_model_config(SHAPES / "qwen3-8b.json"))
        model = peft.get_peft_model(base, asked)
    of_peft, everything = model.get_nb_trainable_parameters()
    assert of_peft == prefix(36, KV) == trained({"method": "p_tuning_v2"}, "qwen3-8b") == 306_294_784
    assert everything - of_peft == BACKBONE["qwen3-8b"]


def test_full_is_planned_in_the_dtype_of_the_model() -> None:
    values = {"model": {"path": "llama-8b"}, "adapters": {"method": "full"}}
    config = make_config({**values, "parallel": {"deepspeed_config": "zero3"}})
    plan = Planner(config, read_model_config(SHAPES / "llama-8b.json"), 0).plan(8, Work(1, 64, 64), Hardware())
    part = BACKBONE["llama-8b"] // 8
    assert plan.trained_parameters == BACKBONE["llama-8b"]
    assert plan.backbone_parameters == plan.memory["backbone"] == 0
    assert plan.memory["adapters"] == 2 * part
    assert plan.memory["optimizer"] == 12 * part
    assert plan.memory["live layer"] == 2 * 128_256 * 4096
    # Six FLOPs for each number but those of the embedding, which is looked up, and the attention.
    flops = 64 * (6 * (BACKBONE["llama-8b"] - 128_256 * 4096) + 2 * 2 * 32 * 4096 * 64)
    assert plan.seconds["compute"] == pytest.approx(flops / (989e12 * 0.4), rel=1e-3)
