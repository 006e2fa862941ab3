"""Encoded examples through a model in batches of similar length, one forward each, nothing learned.

Shapes: B sequences of a batch, keep = trailing positions that predict a target, V vocabulary, N profiles, P profile width,
R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cuma_ds.data.batching import Batch, EncodedExample, collate

Progress = Callable[[int, int], None]


@torch.no_grad()
def forward_batches(
    model: Any,
    examples: Sequence[EncodedExample],
    embeddings_NP: Tensor | None,
    batch_size: int,
    pad_id: int,
    device: torch.device | str = "cpu",
    record: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], Batch, Tensor, Tensor | None]]:
    """Run every example once, longest first (so that memory is known to suffice from the first batch).

    Args:
        model: a :class:`CumaModel` (or anything called alike) in eval mode.
        embeddings_NP: raw profile embeddings that ``example.profile`` points into; None for a model without profiles.
        record: also return the routing.
        progress: called with (examples done, examples in all) after each batch.

    Yields:
        Indices of the batch's examples, the batch, its logits float32 [B, keep, V], and with ``record`` the mean gates [B, R, E]
        float32 (None where the model has no routers).
    """
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        profiles = [examples[index].profile for index in indices]
        batch = collate([examples[index] for index in indices], pad_id).to(device)
        inputs: dict[str, Any] = {}
        if embeddings_NP is not None:
            inputs["profile_embeddings"] = embeddings_NP[profiles].to(device)
        with model.recording_routing() if record else nullcontext() as routing:
            out = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                logits_to_keep=batch.keep,
                use_cache=False,
                **inputs,
            )
        gates_BRE = routing.gates[0].transpose(0, 1).cpu() if routing is not None and routing.gates else None
        yield indices, batch, out.logits.float(), gates_BRE
        if progress is not None:
            progress(start + len(indices), len(order))
