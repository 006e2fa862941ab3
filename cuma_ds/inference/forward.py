"""Encoded examples run through a model in batches of similar length, without gradients.

Shapes: B sequences of a batch, K positions that predict a target in any of them, V vocabulary, N profiles,
P profile width, R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from cuma_ds.adapters import CumaModel
from cuma_ds.data.batch import Batch, EncodedExample, collate

Progress = Callable[[int, int], None]


class ForwardOptions(TypedDict, total=False):
    """How examples are run, beside the model and the batch size.

    device: where batches go; default: the CPU.
    profiles: rows of the embeddings to use instead of the examples' own; the prompts do not change.
    record: also collect the routing.
    progress: called with (examples done, examples in all) after each batch.
    """

    device: torch.device | str
    profiles: Sequence[int] | None
    record: bool
    progress: Progress | None


@torch.no_grad()
def forward_batches(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    embeddings_NP: Tensor | None,
    batch_size: int,
    pad_id: int,
    **options: Unpack[ForwardOptions],
) -> Iterator[tuple[list[int], Batch, Tensor, Tensor | None]]:
    """Run every example once, longest first (so that memory is known to suffice from the first batch).

    Args:
        model: a :class:`CumaModel` (or anything called alike) in eval mode.
        embeddings_NP: raw profile embeddings that ``example.profile`` points into; None for a model without profiles.
        batch_size: sequences per forward; does not change the result.

    Yields:
        Indices of the batch's examples, the batch, its logits float32 [B, K, V], and with ``record`` the mean gates
        [B, R, E] float32 (None where the model has no routers).
    """
    device, progress = options.get("device", "cpu"), options.get("progress")
    recording = model.recording_routing if isinstance(model, CumaModel) and options.get("record") else nullcontext
    examples = asked_as(examples, options.get("profiles"))
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        profiles = [examples[index].profile for index in indices]
        batch = collate([examples[index] for index in indices], pad_id).to(device)
        inputs: dict[str, object] = {}
        if embeddings_NP is not None:
            inputs["profile_embeddings"] = embeddings_NP[profiles].to(device)
        with recording() as routing:
            out = model(**batch.inputs, **inputs)
        gates_BRE = routing.gates[0].transpose(0, 1).cpu() if routing is not None and routing.gates else None
        yield indices, batch, out.logits.float(), gates_BRE
        if progress is not None:
            progress(start + len(indices), len(order))


def asked_as(examples: Sequence[EncodedExample], profiles: Sequence[int] | None) -> Sequence[EncodedExample]:
    """The same prompts with other profiles; as they are for None."""
    if profiles is None:
        return examples
    return [replace(example, profile=profile) for example, profile in zip(examples, profiles, strict=True)]


def distinct(examples: Sequence[EncodedExample], by_profile: bool) -> tuple[list[EncodedExample], list[int]]:
    """The examples without repetitions, in order of first appearance, and the place of each of M examples among them.

    Args:
        by_profile: whether the model sees profiles; else equal sequences of different profiles are one.
    """
    first: dict[tuple[object, ...], int] = {}
    kept: list[EncodedExample] = []
    place_M = []
    for example in examples:
        profile = example.profile if by_profile else None
        key = (tuple(example.input_ids), tuple(example.target_position), tuple(example.target_token), profile)
        if key not in first:
            first[key] = len(kept)
            kept.append(example)
        place_M.append(first[key])
    return kept, place_M


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill up batches with. Which one does not matter: it is masked."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


@dataclass
class RoutingTally:
    """Which experts the tokens of many forwards were routed to.

    Attributes:
        router_names: R names; empty where nothing was routed.
        gates: example -> mean gate over its tokens, float32 [R, E].
        load_RE: top-k assignments of all tokens.
        entropy_R: summed entropy of the tokens' gates, in nats.
        tokens: number of tokens.
    """

    router_names: tuple[str, ...] = ()
    gates: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    load_RE: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    entropy_R: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    tokens: float = 0.0

    def add(self, model: nn.Module, indices: Sequence[int], gates_BRE: Tensor | None) -> None:
        """Count the forward that ``model`` ran last; nothing where it was not recorded."""
        if gates_BRE is None or not isinstance(model, CumaModel):
            return
        statistics = model.routing_statistics()
        assert statistics is not None  # there are gates
        self.gates.update(zip(indices, gates_BRE.numpy(), strict=True))
        if not self.router_names:
            self.router_names = tuple(model.router_names)
            self.load_RE, self.entropy_R = np.zeros(statistics.load_RE.shape), np.zeros(len(statistics.entropy_R))
        self.load_RE += statistics.load_RE.double().cpu().numpy()
        self.entropy_R += statistics.entropy_R.double().cpu().numpy()
        self.tokens += float(statistics.tokens)

    def gates_of(self, examples: Sequence[int]) -> NDArray[np.float32] | None:
        """Mean gates [len(examples), R, E]; None where nothing was recorded."""
        return np.stack([self.gates[index] for index in examples]) if self.gates else None
