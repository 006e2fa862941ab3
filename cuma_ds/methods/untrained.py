"""Nothing trains: the model as it is, which a prompt tells who asks (persona), or how others answered (few_shot)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch
from cuma_ds.methods.model import AdaptedModel, Output, Trained
from cuma_ds.profiles import ProfileTable


class UntrainedMethod(AdaptedModel):
    """A backbone that is asked and not trained; there is nothing to switch off.

    Args:
        backbone: whole.
        config: the recipe.
    """

    switches_off = False

    def __init__(self, backbone: nn.Module, config: RunConfig) -> None:
        super().__init__()
        self.base = backbone.requires_grad_(False)

    @property
    def backbone(self) -> nn.Module:
        """See :class:`AdaptedModel`."""
        return self.base

    def forward(self, batch: Batch, table: ProfileTable | None = None) -> Output:
        """See :class:`AdaptedModel`."""
        return Output(self.base(**batch.to(next(self.base.parameters()).device).inputs).logits)

    def trained_parameters(self) -> Iterator[Trained]:
        """Nothing."""
        return iter(())
