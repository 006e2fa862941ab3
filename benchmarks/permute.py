"""The expert permutation and its way back: the compiled operators against PyTorch indexing and a loop."""

from __future__ import annotations

import torch
from measure import parser, report, size_of, with_backward
from torch import Tensor

from cuma_ds.ops import permute_gather, permute_scatter, sort_by_expert


def main() -> None:
    """Measure and print two tables."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--tokens", type=int, default=4096, help="T")
    arguments_parser.add_argument("--experts", type=int, default=8, help="E")
    arguments_parser.add_argument("--top-k", type=int, default=2, help="K")
    arguments_parser.add_argument("--width", type=int, default=1024, help="features of a token")
    arguments = arguments_parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokens, experts, top_k, device = arguments.tokens, arguments.experts, arguments.top_k, arguments.device
    x_TW = torch.randn(
        tokens, arguments.width, device=device, dtype=getattr(torch, arguments.dtype), requires_grad=True
    )
    expert_TK = torch.rand(tokens, experts, device=device).argsort(dim=1)[:, :top_k].int()
    weight_TK = torch.rand(tokens, top_k, device=device, requires_grad=True)

    def ours() -> Tensor:
        order_M, position_TK, _ = sort_by_expert(expert_TK, experts)
        return permute_scatter(permute_gather(x_TW, order_M, position_TK), order_M, position_TK, weight_TK)

    def indexing() -> Tensor:
        order_M = expert_TK.flatten().argsort(stable=True)
        token_M = order_M // top_k
        rows_MW = x_TW[token_M] * weight_TK.flatten()[order_M, None].to(x_TW.dtype)
        return torch.zeros_like(x_TW).index_add(0, token_M, rows_MW)

    def loop() -> Tensor:
        out_TW = torch.zeros_like(x_TW)
        for expert in range(experts):
            token_M, choice_M = (expert_TK == expert).nonzero(as_tuple=True)
            out_TW = out_TW.index_add(0, token_M, x_TW[token_M] * weight_TK[token_M, choice_M, None].to(x_TW.dtype))
        return out_TW

    d_TW = torch.randn_like(x_TW)
    rtol, atol = (2e-2, 2e-2) if x_TW.element_size() == 2 else (1.3e-6, 1e-5)
    torch.testing.assert_close(ours(), indexing(), rtol=rtol, atol=atol)
    torch.testing.assert_close(ours(), loop(), rtol=rtol, atol=atol)
    title = f"sort, gather, scatter, T {tokens}, E {experts}, K {top_k}, width {arguments.width}"
    variants = {"cuma-ds": ours, "PyTorch indexing": indexing, "loop over experts": loop}
    moved = (2 + 3 * top_k) * size_of(x_TW)
    with torch.no_grad():
        report(f"{title}, forward", variants, moved, arguments)
    leaves = [x_TW, weight_TK]
    both = {name: with_backward(call, leaves, d_TW) for name, call in variants.items()}
    report(f"{title}, forward + backward", both, 2 * moved, arguments)


if __name__ == "__main__":
    main()
