"""The demographic gate: the compiled operator against the same in PyTorch operations."""

from __future__ import annotations

import torch
from measure import parser, report, size_of, with_backward
from torch import Tensor

from cuma_ds.ops import GATE_NORMS, demographic_gate


def composition(hidden_TE: Tensor, profile_NE: Tensor, index_T: Tensor, top_k: int, norm: str) -> tuple[Tensor, Tensor]:
    """Gate weights [T, K] and summed weights [E], with load and entropy of all real tokens."""
    real_T = index_T >= 0
    logits_TE = hidden_TE.float() + profile_NE[index_T.clamp(min=0)]
    if norm == "softmax":
        weight_TK, expert_TK = (
            logits_TE.softmax(dim=-1),
            torch.arange(hidden_TE.shape[1], device=hidden_TE.device).expand_as(hidden_TE),
        )
    else:
        values_TE = logits_TE if norm == "topk_softmax" else logits_TE.softmax(dim=-1)
        weight_TK, expert_TK = values_TE.topk(top_k, dim=-1)
        if norm != "softmax_topk":
            weight_TK = weight_TK.softmax(dim=-1)
    weight_TK = weight_TK * real_T[:, None]
    experts = hidden_TE.shape[1]
    load_E = torch.bincount(expert_TK[real_T].flatten(), minlength=experts)
    weight_sum_E = weight_TK.new_zeros(experts).index_add(0, expert_TK.flatten(), weight_TK.flatten())
    entropy = torch.special.entr(weight_TK.detach()).sum()
    assert load_E.shape == weight_sum_E.shape
    assert entropy.dim() == 0
    return weight_TK, weight_sum_E


def main() -> None:
    """Measure and print two tables."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--tokens", type=int, default=8192, help="T")
    arguments_parser.add_argument("--experts", type=int, default=64, help="E")
    arguments_parser.add_argument("--top-k", type=int, default=2, help="K")
    arguments_parser.add_argument("--profiles", type=int, default=16, help="N")
    arguments_parser.add_argument(
        "--norm", default=GATE_NORMS[0], choices=GATE_NORMS, help="how the gate is normalised"
    )
    arguments = arguments_parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokens, experts, top_k, device = arguments.tokens, arguments.experts, arguments.top_k, arguments.device
    hidden_TE = torch.randn(tokens, experts, device=device, dtype=getattr(torch, arguments.dtype), requires_grad=True)
    profile_NE = torch.randn(arguments.profiles, experts, device=device, requires_grad=True)
    index_T = torch.arange(arguments.profiles, device=device).repeat_interleave(-(-tokens // arguments.profiles))[
        :tokens
    ]

    def ours() -> Tensor:
        return demographic_gate(hidden_TE, profile_NE, index_T, top_k, arguments.norm).weight_TK

    def plain() -> Tensor:
        return composition(hidden_TE, profile_NE, index_T, top_k, arguments.norm)[0]

    d_TK = torch.randn_like(ours())
    torch.testing.assert_close(ours(), plain())
    title = f"gate, T {tokens}, E {experts}, K {top_k}, N {arguments.profiles}, {arguments.norm}"
    moved = size_of(hidden_TE, index_T) + 2 * size_of(d_TK)
    with torch.no_grad():
        report(f"{title}, forward", {"cuma-ds": ours, "PyTorch operations": plain}, moved, arguments)
    leaves = [hidden_TE, profile_NE]
    both = {"cuma-ds": with_backward(ours, leaves, d_TK), "PyTorch operations": with_backward(plain, leaves, d_TK)}
    report(f"{title}, forward + backward", both, 3 * moved, arguments)


if __name__ == "__main__":
    main()
