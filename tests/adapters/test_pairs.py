"""Pairs of tokens and experts, sorted and brought back, against sorted() and loops."""

from __future__ import annotations

import pytest
import torch

from cuma_ds.adapters.pairs import Pairs, add_up, gather, rows_of_pairs, sort_by_expert

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
# T, K, E, W
SHAPES = [(0, 2, 4, 8), (1, 1, 1, 1), (5, 2, 3, 7), (33, 8, 512, 16), (4_100, 3, 64, 1)]


def experts_of(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    """Half of the experts stay empty, and some tokens are padding."""
    generator = torch.Generator().manual_seed(5)
    expert_TK = torch.randint(0, max(1, experts // 2), (tokens, top_k), generator=generator, dtype=torch.int32)
    expert_TK[torch.rand(tokens, generator=generator) < 0.3] = -1
    return expert_TK


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairs_are_sorted_by_expert_and_moved_there_and_back(shape, device: str) -> None:
    tokens, top_k, experts, width = shape
    expert_TK = experts_of(tokens, top_k, experts)
    pairs = sort_by_expert(expert_TK.to(device), experts)
    flat = expert_TK.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda m: flat[m] if flat[m] >= 0 else experts)  # sorted() is stable
    assert pairs.order_M.tolist() == expected
    place = {m: i for i, m in enumerate(expected)}
    assert pairs.position_TK.flatten().tolist() == [place[m] for m in range(len(flat))]
    assert pairs.end_E.tolist() == [sum(0 <= e <= i for e in flat) for i in range(experts)]
    assert pairs.end_E.dtype == torch.int32
    x_TW = torch.randn(tokens, width, dtype=torch.float64, device=device, requires_grad=True)
    y_MW = torch.randn(tokens * top_k, width, dtype=torch.float64, device=device)
    rows = rows_of_pairs(x_TW, pairs)
    assert torch.equal(rows, gather(x_TW, pairs))
    assert torch.equal(rows.cpu(), x_TW.detach().cpu()[[m // top_k for m in expected]])
    sums = [sum((y_MW[place[t * top_k + k]] for k in range(top_k)), torch.zeros_like(x_TW[0])) for t in range(tokens)]
    found = add_up(y_MW, pairs)
    torch.testing.assert_close(found, torch.stack(sums) if sums else found)
    (d_x,) = torch.autograd.grad(rows, x_TW, y_MW)
    assert torch.equal(d_x, found)


def test_sums_of_16_bit_rows_are_rounded_once() -> None:
    pairs = Pairs(torch.arange(3), torch.arange(3).view(1, 3), torch.tensor([3], dtype=torch.int32))
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # one after another, each 1 would be lost
    assert add_up(rows, pairs).tolist() == [[258.0]]
