"""One adapted linear: the time the mixture adds to the frozen product, against other ways to compute the same.

Reported is the median difference to the frozen product, which runs right before each variant, so that a drifting
machine hurts both. ``--fit`` instead times the dense and the grouped strategy over many sizes and prints the constant
of the cost rule in cuma_ds/adapters/mixture.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import get_args
from unittest import mock

import torch
from measure import turns
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.adapters.mixture import MixtureSizes, Routes, Strategy, cheaper_strategy, mixture
from cuma_ds.ops import library

PROFILE = 384
# Widths and numbers of tokens that the cost rule is fitted on.
FITTED = {"cpu": ((576, 2048), (256, 1024)), "cuda": ((2048, 4096), (4096, 16384))}


class OneLinear(nn.Module):
    """A 'backbone' of one frozen linear."""

    def __init__(self, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False, dtype=dtype, device=device).requires_grad_(False)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.q_proj(inputs_embeds)


class NaiveLayer(nn.Module):
    """What a research script does: a router on [token, profile], and a K x E loop over experts."""

    def __init__(self, base: nn.Linear, config: CumaConfig) -> None:
        super().__init__()
        width, device = base.in_features, base.weight.device
        self.base, self.config = base, config
        hidden = [config.router_hidden] if config.router == "mlp" else []
        sizes = [width + PROFILE, *hidden, config.num_experts]
        linears = [nn.Linear(i, o, bias=config.router == "mlp", device=device) for i, o in itertools.pairwise(sizes)]
        self.router = nn.Sequential(linears[0], *(layer for linear in linears[1:] for layer in (nn.ReLU(), linear)))
        experts, rank = config.num_experts, config.lora_r
        self.lora_a = nn.ParameterList(
            nn.Parameter(torch.randn(rank, width, device=device) / 50) for _ in range(experts)
        )
        self.lora_b = nn.ParameterList(
            nn.Parameter(torch.randn(width, rank, device=device) / 50) for _ in range(experts)
        )

    def forward(self, x: Tensor, profiles_BP: Tensor) -> Tensor:
        out = self.base(x)
        x_TD = x.reshape(-1, x.shape[-1])
        profile_TP = profiles_BP[:, None].expand(-1, x.shape[1], -1).reshape(-1, PROFILE)
        logits_TE = self.router(torch.cat([x_TD.float(), profile_TP], dim=-1))
        top_TK, expert_TK = logits_TE.topk(self.config.top_k, dim=-1)
        weight_TK = top_TK.softmax(dim=-1).to(x.dtype)
        mixed_TO = torch.zeros_like(out.view(x_TD.shape[0], -1))
        for k in range(self.config.top_k):
            for expert in range(self.config.num_experts):
                mask_T = expert_TK[:, k] == expert
                if mask_T.any():
                    y = F.linear(
                        F.linear(x_TD[mask_T], self.lora_a[expert].to(x.dtype)), self.lora_b[expert].to(x.dtype)
                    )
                    mixed_TO[mask_T] += weight_TK[mask_T, k, None] * y
        return out + (mixed_TO * self.config.scaling).view(out.shape)


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """Inside, the operators are their plain PyTorch references."""
    with mock.patch.object(library, "supports", return_value=False):
        yield


def compare(
    arguments: argparse.Namespace, rank: int, dtype: torch.dtype, backward: bool
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each adapted variant, and of the frozen linear before it, round by round."""
    torch.manual_seed(0)
    width, device, batch = arguments.width, arguments.device, 8
    config = CumaConfig(
        num_experts=arguments.experts,
        top_k=arguments.top_k,
        lora_r=rank,
        router=arguments.router,
        target_modules=("q_proj",),
        profile_dim=PROFILE,
    )
    base = OneLinear(width, dtype, device)
    x = torch.randn(batch, arguments.tokens // batch, width, dtype=dtype, device=device, requires_grad=backward)
    profiles = torch.randn(batch, PROFILE, device=device)
    naive = NaiveLayer(base.q_proj, config)
    lora_config = LoraConfig(r=config.top_k * rank, lora_alpha=2 * config.top_k * rank)
    peft_layer = PeftLinear(
        base.q_proj, "default", lora_config, r=config.top_k * rank, lora_alpha=2 * config.top_k * rank
    )
    frozen = base.q_proj
    model = inject_adapters(OneLinear(width, dtype, device), config)
    model.base_model.q_proj.base = frozen  # type: ignore[union-attr]
    for _, layer in model.adapted_layers():
        nn.init.normal_(layer.experts.lora_b, std=0.02)
    d_out = torch.randn(batch, arguments.tokens // batch, width, dtype=dtype, device=device)

    def timed(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(backward):
                out = forward()
            if backward:
                out.backward(d_out)

        return run

    def ours() -> Tensor:
        return model.eval()(inputs_embeds=x, profile_embeddings=profiles)

    def plain() -> Tensor:
        with plain_pytorch():
            return ours()

    def plain_run() -> None:
        with plain_pytorch():
            timed(ours)()

    variants = {
        "naive K x E loop": timed(lambda: naive(x, profiles)),
        "cuma-ds, plain PyTorch": plain_run,
        "cuma-ds": timed(ours),
        f"PEFT LoRA, r {config.top_k * rank}": timed(lambda: peft_layer(x)),
    }
    before = {f"before {name}": timed(lambda: frozen(x)) for name in variants}
    both = {key: run for pair in zip(before.items(), variants.items(), strict=True) for key, run in pair}
    seconds = turns(both, arguments.rounds, device)
    return {name: seconds[name] for name in variants}, {name: seconds[f"before {name}"] for name in variants}


def tables(arguments: argparse.Namespace) -> None:
    """One table per rank, dtype and pass."""
    for rank, dtype, backward in itertools.product(arguments.ranks, arguments.dtypes, (False, True)):
        seconds, frozen = compare(arguments, rank, getattr(torch, dtype), backward)
        base = statistics.median(itertools.chain(*frozen.values()))
        where = f"{arguments.device}, {arguments.threads} threads" if arguments.device == "cpu" else arguments.device
        passes = "forward + backward" if backward else "forward"
        sizes = f"d {arguments.width}, T {arguments.tokens}, E {arguments.experts}, K {arguments.top_k}"
        table = Table(
            title=f"added to a frozen linear ({base * 1e3:.1f} ms): {passes}, r {rank}, {dtype}, {sizes}, "
            f"{arguments.router} router, {where}"
        )
        for heading in ("variant", "added ms", "naive / this", "this / PEFT LoRA"):
            table.add_column(heading, justify="left" if heading == "variant" else "right")
        added = {
            name: statistics.median(t - f for t, f in zip(seconds[name], frozen[name], strict=True)) for name in seconds
        }
        naive, peft = added["naive K x E loop"], added[f"PEFT LoRA, r {arguments.top_k * rank}"]
        for name, value in added.items():
            table.add_row(name, f"{value * 1e3:.2f}", f"{naive / value:.2f}", f"{value / peft:.2f}")
        Console(width=120).print(table)


def fit(arguments: argparse.Namespace) -> None:
    """Time both strategies over many sizes; print the constant that loses least time, and what it loses."""
    torch.manual_seed(0)
    measured = []
    dtype, device = getattr(torch, arguments.dtypes[0]), torch.device(arguments.device).type
    for (width, tokens), (experts, top_k), rank in itertools.product(
        itertools.product(*FITTED[device]), ((4, 1), (4, 2), (8, 2), (8, 4), (8, 6), (16, 2), (64, 4)), (4, 16, 64)
    ):
        if rank * torch.finfo(dtype).bits % 128:
            continue  # torch has no grouped products of such rows
        x_TD = torch.randn(tokens, width, dtype=dtype, device=arguments.device, requires_grad=True)
        lora_a = torch.randn(experts, rank, width, device=arguments.device, requires_grad=True)
        lora_b = torch.randn(experts, width, rank, device=arguments.device, requires_grad=True)
        expert_TK = torch.rand(tokens, experts, device=arguments.device).argsort(dim=1)[:, :top_k].int()
        weight_TK = torch.rand(tokens, top_k, device=arguments.device, requires_grad=True)
        d_out = torch.randn(tokens, width, dtype=dtype, device=arguments.device)

        def run(strategy: Strategy, inputs: tuple[Tensor, Routes, Tensor, Tensor], d_out: Tensor) -> None:
            mixture(*inputs, strategy=strategy).backward(d_out)

        inputs = (x_TD, Routes(weight_TK, expert_TK), lora_a, lora_b)
        variants = {name: partial(run, name, inputs, d_out) for name in get_args(Strategy)}
        times = {
            name: statistics.median(seconds)
            for name, seconds in turns(variants, arguments.rounds, arguments.device).items()
        }
        measured.append((MixtureSizes(experts, top_k, rank, width, width), times))
        dense, grouped = (times[name] * 1e3 for name in ("dense", "grouped"))
        print(f"E {experts} K {top_k} r {rank} d {width} T {tokens}: dense {dense:.2f} ms, grouped {grouped:.2f} ms")

    def lost(moved: float) -> float:
        """Mean ratio of the chosen strategy's time to the better one's."""
        ratios = []
        for sizes, times in measured:
            with mock.patch.dict("cuma_ds.adapters.mixture.MOVED_COLUMNS", {device: moved}):
                chosen = times[cheaper_strategy(sizes, dtype, device)]
            ratios.append(chosen / min(times.values()))
        return statistics.mean(ratios)

    best = min((2 ** (step / 2) for step in range(0, 26)), key=lost)
    print(f"MOVED_COLUMNS[{device!r}] = {best:.0f}: {lost(best):.3f} of the best choice's time on average")
    print(f"always dense {lost(math.inf):.3f}, always grouped {lost(-1e9):.3f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--width", type=int, default=2048, help="input and output features")
    parser.add_argument("--tokens", type=int, default=1024, help="T, in 8 sequences")
    parser.add_argument("--experts", type=int, default=8, help="E")
    parser.add_argument("--top-k", type=int, default=2, help="K")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="r of one expert")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="of the frozen linear and x"
    )
    parser.add_argument("--router", default="mlp", choices=["linear", "mlp"], help="256 wide if mlp")
    parser.add_argument("--rounds", type=int, default=41, help="counted rounds, after two for warming up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--fit", action="store_true", help="fit the cost rule instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fit(arguments) if arguments.fit else tables(arguments)


if __name__ == "__main__":
    main()
