"""The equation: a mixture of LoRA experts routed by the token and the profile. No deepspeed, no I/O."""

from cuma_ds.adapters.balance import RoutingStatistics, balance_loss
from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.inject import inject_adapters
from cuma_ds.adapters.model import CumaModel

__all__ = ["CumaConfig", "CumaModel", "RoutingStatistics", "balance_loss", "inject_adapters"]
