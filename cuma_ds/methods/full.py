"""Full fine-tuning: every parameter of the backbone trains.

What is asked differs between people only where the profile stands in the prompt (``data.profile_in_prompt``).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch
from cuma_ds.methods.model import AdaptedModel, Output, Trained
from cuma_ds.profiles import ProfileTable


class FullMethod(AdaptedModel):
    """A backbone that trains itself.

    It cannot be switched off, because nothing is left of the backbone it started from. Parameters have
    ``model.dtype``. DeepSpeed keeps float32 master weights of them.

    Args:
        backbone: whole, or partitioned by ZeRO stage 3; its parameters are set to require gradients or not.
        config: the recipe.

    Attributes:
        trains: whether parameters require gradients.
    """

    switches_off = False
    trains = True

    def __init__(self, backbone: nn.Module, config: RunConfig) -> None:
        super().__init__()
        self.base = backbone.requires_grad_(self.trains)

    @property
    def backbone(self) -> nn.Module:
        """See :class:`AdaptedModel`."""
        return self.base

    def forward(self, batch: Batch, table: ProfileTable | None = None) -> Output:
        """See :class:`AdaptedModel`."""
        return Output(self.base(**batch.to(next(self.base.parameters()).device).inputs).logits)

    def trained_parameters(self) -> Iterator[Trained]:
        """See :class:`AdaptedModel`. Tied weights are one parameter, under its first name."""
        for name, parameter in self.base.named_parameters():
            yield Trained(name, parameter, "replicated")
