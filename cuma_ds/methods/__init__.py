"""What is trained: one interface (cuma_ds.methods.model), and the methods behind it by ``adapters.method``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from cuma_ds.config import RunConfig
from cuma_ds.methods.cuma import CumaMethod
from cuma_ds.methods.model import AdaptedModel

METHODS: dict[str, Callable[[nn.Module, RunConfig], AdaptedModel]] = {
    "cuma": CumaMethod,
    "mixlora": CumaMethod,
    "hydralora": CumaMethod,
    "lora": CumaMethod,
}
