"""Whether a model tells the examples of a packed row apart: measured on the model itself before the first step.

Shapes: N targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cuma_ds.data.batch import Batch, EncodedExample, collate, pack

# Of the difference that seeing the other example makes. Rounding in 16 bits stays far below, a leak is near 1.
_TOLERATED = 0.1


@torch.no_grad()
def tells_examples_apart(logits_of: Callable[[Batch], Tensor], example: EncodedExample, pad_id: int) -> bool:
    """Whether an example behind another one in a packed row is answered as it is alone.

    The probe is answered in a row of its own, packed behind another one, and as the continuation of that other one. A
    model that tells examples apart by their positions answers the first two alike. A model that does not (ALiBi, a
    recurrent state, attention without a mask for packed rows) answers the second like the third.

    Args:
        logits_of: logits [B, K, V] of a batch; all ranks call it together.
        example: any example; its tokens are the probe.
        pad_id: token id of padding.
    """
    tokens = (example.input_ids * 12)[:12]
    front, back, both = (_probe(part, example.profile) for part in (tokens[:7], tokens[7:], tokens))
    packed_NV = _answers(logits_of, pack([front, back], pad_id, len(tokens)))
    alone_NV, joined_NV = (_answers(logits_of, collate([probe], pad_id)) for probe in (back, both))
    return not bool((packed_NV - alone_NV).norm() > _TOLERATED * (joined_NV - alone_NV).norm())


def _probe(tokens: list[int], profile: int) -> EncodedExample:
    """An example that asks for the logits of its last five tokens."""
    return EncodedExample(tokens, list(range(len(tokens) - 5, len(tokens))), [0] * 5, [0.0] * 5, profile)


def _answers(logits_of: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """Logits [N, V] float32 of the batch's last example."""
    logits_NV = logits_of(batch)[batch.targets.row_L, batch.targets.position_L].float()
    return logits_NV[-5:]
