"""Routers decide in float32, whatever the dtype of the backbone and the units of the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cuma_ds.adapters import CumaConfig
from cuma_ds.adapters.router import Router

T, D, N, P, E = 96, 256, 5, 16, 8
HALF = [torch.bfloat16, torch.float16]


def inputs(dtype: torch.dtype, router: str = "linear", seed: int = 0) -> tuple[Router, Tensor, Tensor, Tensor]:
    """A router, hidden states [T, D] in a 16-bit dtype, profiles [N, P], and the profile of each token."""
    config = CumaConfig(num_experts=E, top_k=2, router=router, router_hidden=12, profile_dim=P)
    made = Router(config, D)
    generator = torch.Generator().manual_seed(seed)
    made.reset_parameters(generator)
    h_TD = (4 * torch.randn(T, D, generator=generator)).to(dtype)
    return made, h_TD, torch.randn(N, P, generator=generator), torch.arange(T) % N


@pytest.mark.sixteen_bit
@pytest.mark.parametrize("dtype", HALF)
def test_logits_of_16_bit_tokens_are_a_float32_product_of_the_same_numbers(dtype) -> None:
    router, h_TD, profiles_NP, profile_T = inputs(dtype)
    s_TE, profile_NE = router.logits(h_TD, profiles_NP, profile_T)
    assert s_TE.dtype == torch.float32
    assert profile_NE is not None
    exact_TE = h_TD.double().numpy() @ router.weight_h.detach().double().numpy().T
    largest = np.abs(exact_TE).max()
    assert np.abs(s_TE.detach().numpy() - exact_TE).max() < 1e-5 * largest
    rounded_TE = (h_TD @ router.weight_h.to(dtype).T).double().detach().numpy()
    assert np.abs(rounded_TE - exact_TE).max() > 1e-4 * largest, "a 16-bit product must differ for this to say anything"
    torch.testing.assert_close(s_TE, h_TD.float() @ router.weight_h.T, rtol=0, atol=0)
    torch.testing.assert_close(profile_NE, profiles_NP @ router.weight_p.T, rtol=0, atol=0)


@pytest.mark.sixteen_bit
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_gates_and_gradients_are_those_of_float32_copies_of_the_tokens(dtype, kind) -> None:
    router, h_TD, profiles_NP, profile_T = inputs(dtype, kind)
    found = {}
    for name, tokens in (("16-bit", h_TD), ("float32", h_TD.float())):
        tokens = tokens.clone().requires_grad_()
        router.zero_grad()
        gate, probability_E = router(tokens, profiles_NP, profile_T, full_softmax=True)
        loss = (gate.weight_TK * torch.arange(1.0, 3.0)).sum() + (probability_E * torch.arange(E)).sum()
        loss.backward()
        found[name] = (gate, tokens.grad, {key: p.grad.clone() for key, p in router.named_parameters()})
    (gate, dh_TD, grads), (same_gate, same_dh_TD, same_grads) = found["16-bit"], found["float32"]
    assert torch.equal(gate.expert_TK, same_gate.expert_TK)
    assert torch.equal(gate.weight_TK, same_gate.weight_TK)
    assert dh_TD.dtype == dtype
    assert torch.equal(dh_TD, same_dh_TD.to(dtype))
    for key, grad in grads.items():
        torch.testing.assert_close(grad, same_grads[key], rtol=0, atol=0, msg=key)


@pytest.mark.sixteen_bit
def test_a_router_keeps_its_tokens_in_16_bits_for_the_backward_pass() -> None:
    router, h_TD, profiles_NP, profile_T = inputs(torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        router(h_TD.requires_grad_(), profiles_NP, profile_T)
    of_tokens = [tensor for tensor in kept if tensor.shape == h_TD.shape]
    assert [tensor.dtype for tensor in of_tokens] == [torch.bfloat16]
