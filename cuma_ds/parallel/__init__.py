"""DeepSpeed, and no math: where parameters live and how ranks talk."""

import os
import warnings

import torch

if not torch.cuda.is_available():
    # Said once here, or DeepSpeed looks for other accelerators and warns on every rank.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Renamed after torch 2.11, which lacks the new names; DeepSpeed uses the old ones too, several times a step.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
