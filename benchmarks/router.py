"""What float32 routing costs a 16-bit backbone: an adapted linear, forward and backward, or with ``--model`` a training
step, with the router as it is and with its product of tokens in the dtype of the layer.

Both take turns on the same adapters. On a CPU the time is that of the processor, which other work on the machine
lengthens less than wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from layer import PROFILE, OneLinear
from measure import backbone, turns
from torch import Tensor
from torch.nn import functional as F
from training_step import one_step, ours
from transformers import AutoConfig

from cuma_ds.adapters import CumaConfig, inject_adapters


def sixteen_bit(h_TD: Tensor, weight_WD: Tensor) -> Tensor:
    """The product in the dtype of the tokens."""
    return F.linear(h_TD, weight_WD.to(h_TD.dtype)).float()


def layer_step(arguments: argparse.Namespace, router: str) -> Callable[[], None]:
    """Forward and backward of one adapted linear."""
    torch.manual_seed(0)
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    config = CumaConfig(router=router, lora_r=8, target_modules=("q_proj",), profile_dim=PROFILE)
    model = inject_adapters(OneLinear(arguments.width, dtype, device), config)
    profiles, shape = torch.randn(8, PROFILE, device=device), (8, arguments.tokens // 8, arguments.width)
    x, d_out = torch.randn(shape, dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device)
    x.requires_grad_()

    def step() -> None:
        model(inputs_embeds=x, profile_embeddings=profiles).backward(d_out)

    return step


def model_step(arguments: argparse.Namespace, router: str) -> Callable[[], None]:
    """A training step of a whole model, whose q and v are adapted."""
    torch.manual_seed(0)
    arguments.router, arguments.lora_r, arguments.layers, device = router, 8, None, arguments.device
    vocabulary, shape = AutoConfig.from_pretrained(arguments.model).vocab_size, (8, arguments.tokens // 8)
    ids = torch.randint(0, vocabulary, shape, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = ours(backbone(arguments), False, arguments).to(device)
    return one_step(model, batch | {"profile_embeddings": torch.randn(8, PROFILE, device=device)})


def with_product(step: Callable[[], None], product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The step with another product of tokens in the router."""
    with mock.patch("cuma_ds.adapters.router._product", product):
        step()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--model", help="folder of a model: measure a training step instead of one linear")
    parser.add_argument("--width", type=int, default=2048, help="of the linear (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=25, help="counted rounds, after two for warming up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    what = f"a linear of {arguments.width}" if arguments.model is None else "a training step"
    for router in ("linear", "mlp"):
        step = layer_step(arguments, router) if arguments.model is None else model_step(arguments, router)
        variants: dict[str, Callable[[], object]] = {
            "float32": step,
            arguments.dtype: partial(with_product, step, sixteen_bit),
        }
        with mock.patch("time.perf_counter", time.process_time):
            seconds = turns(variants, arguments.rounds, arguments.device)
        ours, theirs = (statistics.median(times) for times in seconds.values())
        difference = statistics.median(a - b for a, b in zip(*seconds.values(), strict=True))
        print(
            f"{router} router, {what}, {arguments.tokens} tokens, {arguments.device}: float32 "
            f"{1e3 * ours:.2f} ms, {arguments.dtype} {1e3 * theirs:.2f} ms; median of the differences "
            f"{1e3 * difference:.2f} ms, {difference / theirs:.1%}"
        )


if __name__ == "__main__":
    main()
