"""Full training step of a whole model: ours against PEFT LoRA of equal active rank and against a naive K x E loop.

All variants take turns within one run, so that a drifting machine hurts them alike; medians and ratios are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from measure import backbone
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.adapters.experts import Experts, ExpertWeights
from cuma_ds.adapters.mixture import Routes


class NaiveExperts(Experts):
    """What a research script does: one small product for each of the K choices and each expert."""

    def forward(self, x_MI: Tensor, routes: Routes, weights: ExpertWeights | None = None) -> Tensor:
        """See ``cuma_ds.adapters.experts.Experts``."""
        out_MO = x_MI.new_zeros(x_MI.shape[0], self.lora_b.shape[1])
        for k in range(routes.expert_TK.shape[1]):
            for expert in range(self.num_experts):
                mask_M = routes.expert_TK[:, k] == expert
                if mask_M.any():
                    z = x_MI[mask_M] @ self.lora_a[expert].to(x_MI.dtype).T
                    y = z @ self.lora_b[expert].to(x_MI.dtype).T
                    out_MO[mask_M] = out_MO[mask_M] + routes.weight_TK[mask_M, k, None].to(x_MI.dtype) * y
        return self.scaling * out_MO


def ours(model: nn.Module, naive: bool, arguments: argparse.Namespace) -> CumaModel:
    """The backbone with 8 experts of rank r, top 2, on q and v."""
    adapted = inject_adapters(
        model, CumaConfig(num_experts=8, top_k=2, lora_r=arguments.lora_r, router=arguments.router, profile_dim=384)
    )
    adapted.set_profile_standardisation(torch.randn(64, 384), 3.0)
    if naive:
        for _, layer in adapted.adapted_layers():
            layer.experts.__class__ = NaiveExperts
    return adapted


def one_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward, backward and AdamW step on a last-token loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step() -> None:
        out = model(**batch, logits_to_keep=1)
        loss = out.logits.float().logsumexp(dim=-1).mean()
        if hasattr(out, "balance_loss"):
            loss = loss + 0.01 * out.balance_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct", help="folder or config.json")
    parser.add_argument("--layers", type=int, help="with a config.json: so many layers instead of its own")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the backbone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=96, help="tokens per sequence")
    parser.add_argument("--lora-r", type=int, default=8, help="rank of one expert; PEFT LoRA gets twice that (K = 2)")
    parser.add_argument("--router", default="linear", choices=["linear", "mlp"], help="router of our adapters")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, after two for warming up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    vocabulary = AutoConfig.from_pretrained(arguments.model).vocab_size
    ids = torch.randint(0, vocabulary, (arguments.batch, arguments.length), device=arguments.device)
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    asked = plain | {"profile_embeddings": torch.randn(arguments.batch, 384, device=arguments.device)}
    lora = LoraConfig(r=2 * arguments.lora_r, lora_alpha=4 * arguments.lora_r, target_modules=["q_proj", "v_proj"])
    peft_model = get_peft_model(backbone(arguments), lora)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    peft_model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    steps = {
        f"PEFT LoRA, r {2 * arguments.lora_r}": one_step(peft_model, plain),
        f"cuma-ds, r {arguments.lora_r}, E 8, K 2": one_step(
            ours(backbone(arguments), False, arguments).to(arguments.device), asked
        ),
        "naive K x E loop, same adapters": one_step(
            ours(backbone(arguments), True, arguments).to(arguments.device), asked
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(arguments.rounds + 2):
        for name, step in steps.items():
            _synchronise(arguments.device)
            start = time.perf_counter()
            step()
            _synchronise(arguments.device)
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - start)

    table = Table(
        title=f"training step, {arguments.batch} x {arguments.length} tokens, {arguments.dtype}, {arguments.device}, "
        f"{arguments.threads} threads, median of {arguments.rounds} rounds"
    )
    for heading in ("variant", "seconds", "ratio to PEFT LoRA", "min", "max"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    base = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        median = statistics.median(times)
        table.add_row(name, f"{median:.3f}", f"{median / base:.2f}", f"{min(times):.3f}", f"{max(times):.3f}")
    Console(width=110).print(table)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
