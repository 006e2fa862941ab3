"""Grouped products on the CPU, rows times the matrix of their expert: the compiled operators against torch, one expert after the other or
all at once on sorted copies of the rows, and against a dense product with all experts."""

from __future__ import annotations

import argparse

import torch
from measure import parser, report
from torch import Tensor
from torch.nn import functional as F

from cuma_ds.ops import (
    grouped_expand,
    grouped_outer,
    grouped_shrink,
    library,
    permute_gather,
    permute_scatter,
    reference,
    sort_by_expert,
)


def main() -> None:
    """Measure and print a table per operator and rank."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--tokens", type=int, default=1024, help="T")
    arguments_parser.add_argument("--experts", type=int, default=8, help="E")
    arguments_parser.add_argument("--top-k", type=int, default=2, help="K")
    arguments_parser.add_argument("--width", type=int, default=2048, help="wide features")
    arguments_parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="narrow features")
    arguments = arguments_parser.parse_args()
    if arguments.device != "cpu" or arguments.dtype != "float32" or library.reason:
        arguments_parser.error(
            f"these operators are compiled for the CPU in float32{library.reason and ', but ' + library.reason}"
        )
    torch.set_num_threads(arguments.threads)
    for rank in arguments.ranks:
        tables(arguments, rank)


def tables(arguments: argparse.Namespace, rank: int) -> None:
    """Shrink, expand and outer at one rank."""
    torch.manual_seed(0)
    tokens, experts, width = arguments.tokens, arguments.experts, arguments.width
    pairs = sort_by_expert(torch.rand(tokens, experts).argsort(dim=1)[:, : arguments.top_k].int(), experts)
    x, weight, z = (
        torch.randn(tokens, width),
        torch.randn(experts, rank, width),
        torch.randn(tokens * arguments.top_k, rank),
    )
    dense_z = torch.randn(tokens, experts * rank)

    def gathered() -> Tensor:
        return permute_gather(x, pairs.order_M, pairs.position_TK)

    def scattered(rows: Tensor) -> Tensor:
        return permute_scatter(rows, pairs.order_M, pairs.position_TK)

    calls = {
        "shrink": (
            lambda: grouped_shrink(x, weight, pairs),
            lambda: reference.grouped_shrink(x, weight, pairs),
            lambda: F.grouped_mm(gathered(), weight.transpose(1, 2), offs=pairs.end_E),
            lambda: x @ weight.flatten(0, 1).T,
        ),
        "expand": (
            lambda: grouped_expand(z, weight, pairs),
            lambda: reference.grouped_expand(z, weight, pairs),
            lambda: scattered(F.grouped_mm(z, weight, offs=pairs.end_E)),
            lambda: dense_z @ weight.flatten(0, 1),
        ),
        "outer": (
            lambda: grouped_outer(z, x, pairs),
            lambda: reference.grouped_outer(z, x, pairs),
            lambda: F.grouped_mm(z.T, gathered(), offs=pairs.end_E),
            lambda: dense_z.T @ x,
        ),
    }
    for name, (ours, turns, at_once, dense) in calls.items():
        for other in (turns, at_once):
            torch.testing.assert_close(ours(), other(), rtol=1e-4, atol=1e-3)
        title = f"grouped {name}, T {tokens}, E {experts}, K {arguments.top_k}, r {rank}, {width} wide"
        variants = {
            "cuma-ds": ours,
            "expert after expert": turns,
            "gather and grouped_mm": at_once,
            "all experts, dense": dense,
        }
        report(title, variants, 0, arguments)


if __name__ == "__main__":
    main()
