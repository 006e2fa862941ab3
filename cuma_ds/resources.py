"""Files that come with the package: launchers, recipes, shapes of backbones and DeepSpeed configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

# Where they are in a checkout. An installed package holds copies (setup.py).
_IN_CHECKOUT = {
    "launchers": "launchers",
    "recipes": "launchers/recipes",
    "model_configs": "launchers/model_configs",
    "ds_configs": "ds_configs",
}


def resource_folder(name: Literal["launchers", "recipes", "model_configs", "ds_configs"]) -> Path:
    """The folder of the launchers, of the recipes, of the backbones' shapes, or of the DeepSpeed configurations."""
    package = Path(__file__).resolve().parent
    installed = package / "resources" / name
    return installed if installed.is_dir() else package.parent / _IN_CHECKOUT[name]
