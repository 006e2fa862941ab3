"""What is trained: one interface (cuma_ds.methods.model), and the methods behind it by ``adapters.method``."""

from __future__ import annotations

from cuma_ds.methods.cuma import CumaMethod
from cuma_ds.methods.dora import DoraMethod
from cuma_ds.methods.full import FullMethod
from cuma_ds.methods.model import AdaptedModel
from cuma_ds.methods.prefix import PrefixMethod
from cuma_ds.methods.untrained import UntrainedMethod

METHODS: dict[str, type[AdaptedModel]] = {
    "cuma": CumaMethod,
    "mixlora": CumaMethod,
    "hydralora": CumaMethod,
    "hydralora-original": CumaMethod,
    "lora": CumaMethod,
    "dora": DoraMethod,
    "p_tuning_v2": PrefixMethod,
    "full": FullMethod,
    "vanilla": UntrainedMethod,
    "persona": UntrainedMethod,
    "few_shot": UntrainedMethod,
}
