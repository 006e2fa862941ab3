"""The gate scale: the compiled operator against broadcasting and against a loop over experts."""

from __future__ import annotations

import torch
from measure import parser, report, size_of, with_backward
from torch import Tensor

from cuma_ds.ops import dense_gate, gate_scale


def main() -> None:
    """Measure and print two tables."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--tokens", type=int, default=8192, help="T")
    arguments_parser.add_argument("--experts", type=int, default=8, help="E")
    arguments_parser.add_argument("--top-k", type=int, default=2, help="K")
    arguments_parser.add_argument("--rank", type=int, default=16, help="r")
    arguments = arguments_parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokens, experts, top_k, device = arguments.tokens, arguments.experts, arguments.top_k, arguments.device
    z_TER = torch.randn(
        tokens, experts, arguments.rank, device=device, dtype=getattr(torch, arguments.dtype), requires_grad=True
    )
    expert_TK = torch.rand(tokens, experts, device=device).argsort(dim=1)[:, :top_k].int()
    weight_TK = torch.rand(tokens, top_k, device=device, requires_grad=True)

    def ours() -> Tensor:
        return gate_scale(z_TER, weight_TK, expert_TK, experts, 2.0)

    def broadcast() -> Tensor:
        return z_TER * (2.0 * dense_gate(weight_TK, expert_TK, experts)).to(z_TER.dtype)[:, :, None]

    def loop() -> Tensor:
        parts = []
        for expert in range(experts):
            gate_T = 2.0 * (weight_TK * (expert_TK == expert)).sum(dim=1)
            parts.append(z_TER[:, expert] * gate_T[:, None].to(z_TER.dtype))
        return torch.stack(parts, dim=1)

    d_TER = torch.randn_like(z_TER)
    torch.testing.assert_close(ours(), broadcast())
    torch.testing.assert_close(ours(), loop())
    title = f"gate scale, T {tokens}, E {experts}, K {top_k}, r {arguments.rank}"
    chosen = size_of(z_TER) * top_k // experts
    variants = {"cuma-ds": ours, "broadcasting": broadcast, "loop over experts": loop}
    with torch.no_grad():
        report(f"{title}, forward", variants, size_of(z_TER) + chosen, arguments)
    leaves = [z_TER, weight_TK]
    both = {name: with_backward(call, leaves, d_TER) for name, call in variants.items()}
    report(f"{title}, forward + backward", both, 2 * size_of(z_TER) + 3 * chosen, arguments)


if __name__ == "__main__":
    main()
