"""DeepSpeed, and no math: where parameters live and how ranks talk."""

import os
import warnings

import torch

from cuma_ds.errors import ConfigError

if not torch.cuda.is_available():
    # Said once here, or DeepSpeed looks for other accelerators and warns on every rank.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
if os.environ.get("DS_ACCELERATOR", "cuda") not in ("cpu", "cuda"):
    raise ConfigError(
        f"the environment variable DS_ACCELERATOR is {os.environ['DS_ACCELERATOR']!r}; allowed: cpu, cuda; unset it"
    )
# Renamed after torch 2.11, which lacks the new names; DeepSpeed uses the old ones too, several times a step.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
