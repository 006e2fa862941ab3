"""What the library PEFT trains: a base of the methods DoRA and P-Tuning v2.

What is asked differs between people only where the profile stands in the prompt (``data.profile_in_prompt``).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch
from cuma_ds.errors import ConfigError
from cuma_ds.methods.model import AdaptedModel, Output, Trained
from cuma_ds.profiles import ProfileTable

if TYPE_CHECKING:
    from peft import PeftModelForCausalLM


class PeftMethod(AdaptedModel):
    """A frozen backbone with what PEFT adds to it, in float32.

    Args:
        backbone: whole or sharded; it is changed in place.
        config: the recipe.

    Attributes:
        peft: PEFT's model, called as a model of transformers is.
    """

    peft: PeftModelForCausalLM

    def __init__(self, backbone: nn.Module, config: RunConfig) -> None:
        super().__init__()
        backbone.requires_grad_(False)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
            torch.manual_seed(config.run.seed)  # every rank begins with the same values
            self.peft = self.wrapped(backbone, config)
        for one in self.trained_parameters():
            one.parameter.data = one.parameter.data.float()

    def wrapped(self, backbone: nn.Module, config: RunConfig) -> PeftModelForCausalLM:
        """PEFT's model around the backbone."""
        raise NotImplementedError

    @classmethod
    def check(cls, skeleton: nn.Module, config: RunConfig) -> None:
        """PEFT must be installed."""
        try:
            import peft  # noqa: F401
        except ImportError:
            method = config.adapters.method
            raise ConfigError(f"adapters.method {method} needs the package peft; pip install peft") from None

    @property
    def backbone(self) -> nn.Module:
        """See :class:`AdaptedModel`."""
        return self.peft.get_base_model()

    @property
    def inference_model(self) -> nn.Module:
        """See :class:`AdaptedModel`."""
        return self.peft

    def forward(self, batch: Batch, table: ProfileTable | None = None) -> Output:
        """See :class:`AdaptedModel`."""
        return Output(self.peft(**batch.to(next(self.peft.parameters()).device).inputs).logits)

    def trained_parameters(self) -> Iterator[Trained]:
        """See :class:`AdaptedModel`. Names are those of PEFT."""
        for name, parameter in self.peft.named_parameters():
            if parameter.requires_grad:
                yield Trained(name, parameter, "replicated")

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """See :class:`AdaptedModel`."""
        return self.peft.disable_adapter()
