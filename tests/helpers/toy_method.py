"""One rank that trains a method which is no mixture: a bias on the logits and a prompt of its own; started by a test.

In recipes it is what ``adapters.method: lora`` names.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator

import torch
from torch import nn

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch
from cuma_ds.methods import METHODS
from cuma_ds.methods.model import AdaptedModel, Output, Trained
from cuma_ds.profiles import ProfileTable
from cuma_ds.recipe import load_config

PROMPT = 3


class Toy(AdaptedModel):
    """``PROMPT`` trained embeddings before each sequence, and a trained bias on the logits."""

    def __init__(self, backbone: nn.Module, config: RunConfig) -> None:
        super().__init__()
        self.base = backbone.requires_grad_(False)
        self.enabled = True
        generator = torch.Generator().manual_seed(config.run.seed)
        self.prompt_PD = nn.Parameter(0.1 * torch.randn(PROMPT, backbone.config.hidden_size, generator=generator))
        self.bias_V = nn.Parameter(torch.zeros(backbone.config.vocab_size))

    @property
    def backbone(self) -> nn.Module:
        return self.base

    def forward(self, batch: Batch, table: ProfileTable | None = None) -> Output:
        if not self.enabled:
            return Output(self.base(**batch.inputs).logits)
        x_BSD = self.base.get_input_embeddings()(batch.input_ids_BS)
        x_BSD = torch.cat([self.prompt_PD.to(x_BSD.dtype).expand(len(x_BSD), -1, -1), x_BSD], dim=1)
        mask_BS = nn.functional.pad(batch.attention_mask_BS, (PROMPT, 0), value=1)
        keep = batch.keep + PROMPT
        logits = self.base(inputs_embeds=x_BSD, attention_mask=mask_BS, logits_to_keep=keep, use_cache=False).logits
        return Output(logits + self.bias_V)

    def trained_parameters(self) -> Iterator[Trained]:
        yield Trained("prompt", self.prompt_PD, "replicated")
        yield Trained("head.bias", self.bias_V, "replicated")

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        self.enabled = False
        yield
        self.enabled = True


if __name__ == "__main__":
    from cuma_ds.parallel.topology import start_processes, with_expert_groups
    from cuma_ds.training.run import train

    METHODS["lora"] = Toy
    topology = start_processes(120)
    for recipe in json.loads(sys.argv[1]):
        config = load_config(recipe)
        train(config, with_expert_groups(topology, config.parallel.ep_size))
