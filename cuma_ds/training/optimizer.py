"""AdamW over the adapters' parameter groups."""

from __future__ import annotations

import torch

from cuma_ds.config import TrainingSection


def make_optimizer(groups: list[dict[str, object]], training: TrainingSection) -> torch.optim.Optimizer:
    """AdamW with the recipe's betas, epsilon and weight decay; the learning rate is set anew at every step."""
    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=training.adam_betas,
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
    )
