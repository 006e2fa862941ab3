"""cuma-ds: a DeepSpeed trainer for the Cultural Mixture of Adapters (CuMA)."""

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.profiles import ProfileEncoder

__version__ = "0.1.0"
__all__ = ["CumaConfig", "CumaModel", "ProfileEncoder", "inject_adapters"]
