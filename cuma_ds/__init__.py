"""cuma-ds: a DeepSpeed trainer for the Cultural Mixture of Adapters (CuMA)."""

from typing import Any

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.profiles import ProfileEncoder

__version__ = "0.2.0"
__all__ = ["CumaConfig", "CumaModel", "ProfileEncoder", "inject_adapters", "load_exported"]


def load_exported(folder: Any, dtype: Any = None, **kwargs: Any) -> Any:
    """Load a folder that launchers/export.py wrote; see :func:`cuma_ds.export.load_exported`."""
    from cuma_ds.export import (
        load_exported as load,
    )  # transformers is slow to import, and training ranks need none of this

    return load(folder, dtype, **kwargs)
