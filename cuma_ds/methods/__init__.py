"""What is trained: one interface (cuma_ds.methods.model), and the methods behind it by ``adapters.method``."""

from __future__ import annotations

from cuma_ds.methods.cuma import CumaMethod
from cuma_ds.methods.full import FullMethod
from cuma_ds.methods.model import AdaptedModel

METHODS: dict[str, type[AdaptedModel]] = {
    "cuma": CumaMethod,
    "mixlora": CumaMethod,
    "hydralora": CumaMethod,
    "lora": CumaMethod,
    "full": FullMethod,
}
