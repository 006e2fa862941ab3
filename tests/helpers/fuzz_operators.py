"""Hundreds of seeded calls of the compiled operators, right and wrong, under AddressSanitizer.

Right ones equal plain PyTorch, wrong ones raise, and nothing is read or written out of bounds. The arguments are the
extension to load and the number of seeds.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cuma_ds.ops import reference

torch.ops.load_library(sys.argv[1])
ops = torch.ops.cuma_ds
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def close(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def gate_case(r: random.Random) -> tuple[Callable, list[Any], Callable, torch.dtype]:
    dtype, tokens, experts, profiles = (
        r.choice(FLOATS),
        r.choice([0, 1, 7, 600]),
        r.choice([1, 5, 8, 64, 512]),
        r.randint(1, 9),
    )
    norm = r.randrange(4)
    top_k = experts if norm == 1 else r.randint(1, min(8, experts))
    index = torch.randint(-1, profiles, (tokens,))
    hidden, profile = (
        torch.randn(tokens, experts).to(dtype),
        torch.randn(profiles, experts) if r.random() < 0.7 else None,
    )
    if r.random() < 0.3:
        hidden = hidden.repeat(1, 2)[:, ::2]  # not contiguous

    def expected(h: Tensor, p: Tensor | None, i: Tensor, k: int, n: int) -> tuple[Tensor, ...]:
        return reference.demographic_gate(h.float(), p, i, k, reference.GATE_NORMS[n])

    return ops.gate, [hidden, profile, index, top_k, norm], expected, dtype


def scale_case(r: random.Random) -> tuple[Callable, list[Any], Callable, torch.dtype]:
    dtype, tokens, experts, rank = (
        r.choice(FLOATS),
        r.choice([0, 1, 9, 300]),
        r.choice([1, 4, 33]),
        r.choice([1, 3, 8, 16]),
    )
    top_k = r.randint(1, min(8, experts))
    z = torch.randn(tokens, r.choice([1, experts]), rank).to(dtype)
    expert = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k].int()
    expert[torch.rand(tokens) < 0.2] = -1
    weight = torch.rand(tokens, top_k)
    if r.random() < 0.5:
        return (
            ops.gate_scale,
            [z, weight, expert, experts, 1.5],
            lambda z, *rest: (reference.gate_scale(z.float(), *rest),),
            dtype,
        )
    d_out = torch.randn(tokens, experts, rank).to(dtype)

    def expected(d_out: Tensor, z: Tensor, weight: Tensor, expert: Tensor, scale: float) -> tuple[Tensor, ...]:
        leaves = [z.float().requires_grad_(), weight.clone().requires_grad_()]
        out = reference.gate_scale(*leaves, expert, d_out.shape[1], scale)
        return torch.autograd.grad(out, leaves, d_out.float())

    return ops.gate_scale_backward, [d_out, z, weight, expert, 1.5], expected, dtype


def spoilt(arguments: list[Any], r: random.Random) -> list[Any]:
    """The arguments with one of them wrong: another shape or dtype, an index or number out of range, a NaN."""
    arguments = list(arguments)
    place = r.choice([i for i, argument in enumerate(arguments) if argument is not None])
    value = arguments[place]
    if not isinstance(value, Tensor):
        arguments[place] = r.choice([-1, 0, 1000, 7]) if isinstance(value, int) else value
        return arguments
    kind = r.randrange(4)
    if kind == 0:
        arguments[place] = value[..., :-1] if value.shape[-1] else value.new_zeros(3)
    elif kind == 1:
        arguments[place] = value.double() if value.is_floating_point() else value.float()
    elif kind == 2:
        arguments[place] = value[:-1] if value.shape[0] else value.unsqueeze(0)
    elif value.numel():
        flat = value.clone().flatten()
        flat[r.randrange(len(flat))] = float("nan") if value.is_floating_point() else r.choice([-7, 2**20, 2**31 - 1])
        arguments[place] = flat.view(value.shape)
    return arguments


right = refused = survived = 0
for seed in range(int(sys.argv[2])):
    r = random.Random(seed)
    torch.manual_seed(seed)
    op, arguments, expected, dtype = r.choice([gate_case, scale_case])(r)
    results = op(*arguments)
    for one, other in zip(
        results if isinstance(results, tuple | list) else (results,), expected(*arguments), strict=True
    ):
        if one.dim() == 0 or one.dtype == torch.int32:
            assert torch.allclose(one.double(), other.double(), rtol=1e-3), (seed, op)
        else:
            scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
            close(one / scale, other / scale, dtype)
    right += 1
    for _ in range(3):
        unclear = ""
        try:
            op(*spoilt(arguments, r))
            survived += 1
        except RuntimeError as error:
            refused += 1
            unclear = "" if "expected" in str(error) else str(error)
        if unclear:
            sys.exit(f"seed {seed}, {op}: {unclear}")
print(f"{right} right, {refused} refused, {survived} of the spoilt ones were harmless")
