"""A batch of random tokens, each sequence with a random profile of its own."""

from __future__ import annotations

import torch

from cuma_ds.data.batch import Batch, EncodedExample, collate
from cuma_ds.profiles import ProfileTable


def random_batch(sequences: int, length: int, kept: int, width: int) -> tuple[Batch, ProfileTable]:
    """Logits are wanted at the last ``kept`` positions; profiles have ``width`` numbers."""
    ids_BS, places = torch.randint(6, 100, (sequences, length)).tolist(), list(range(length - kept, length))
    examples = [EncodedExample(ids, places, [0] * kept, [1.0] * kept, row) for row, ids in enumerate(ids_BS)]
    return collate(examples, 0), ProfileTable([""] * sequences, torch.randn(sequences, width))
