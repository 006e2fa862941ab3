"""HydraLoRA as its authors publish it: y = W0 x + (alpha / r) sum_i softmax(W_r x)_i B_i A x, over all B."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cuma_ds.adapters import CumaConfig, inject_adapters

TARGETS = ["q_proj", "k_proj", "up_proj"]


@torch.no_grad()
def test_every_expert_answers_every_token(tiny_llama) -> None:
    config = CumaConfig(method="hydralora-original", num_experts=3, lora_r=4, lora_alpha=8, target_modules=TARGETS)
    assert (config.balance_weight, config.active_experts, config.uses_profiles) == (0, 3, False)
    model = inject_adapters(AutoModelForCausalLM.from_pretrained(tiny_llama), config).eval()
    generator = torch.Generator().manual_seed(1)
    for _, parameter in model.adapter_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    seen = {}
    for name, layer in model.adapted_layers():
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    model(torch.tensor([[1, 20, 30, 40, 50]]))
    assert len(seen) == 2 * len(TARGETS)
    layers = dict(model.adapted_layers())
    assert len(model.router_names) == len(layers)  # each linear has a router of its own
    for name, (x, out) in seen.items():
        layer = layers[name]
        W0, A, B, W_r = (
            tensor.double().numpy()
            for tensor in (layer.base.weight, layer.experts.lora_a, layer.experts.lora_b, layer.router.weight_h)
        )
        x_TD = x[0].double().numpy()
        s_TE = np.exp(x_TD @ W_r.T)
        g_TE = s_TE / s_TE.sum(axis=1, keepdims=True)
        expected = x_TD @ W0.T + 2 * np.einsum("te,eor,tr->to", g_TE, B, x_TD @ A.T)
        assert out[0].double().numpy() == pytest.approx(expected, rel=1e-4, abs=1e-4)
