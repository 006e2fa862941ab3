"""Nothing trains: the model as it is, which a prompt tells who asks (persona), or how others answered (few_shot)."""

from __future__ import annotations

from collections.abc import Iterator

from cuma_ds.methods.full import FullMethod
from cuma_ds.methods.model import Trained


class UntrainedMethod(FullMethod):
    """A backbone that is asked and not trained; otherwise as where all of it trains."""

    trains = False

    def trained_parameters(self) -> Iterator[Trained]:
        """Nothing."""
        return iter(())
