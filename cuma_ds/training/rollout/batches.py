"""Completions as the micro batches of an update.

Shapes: L labels (tokens of completions).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cuma_ds.data.batch import Batch, EncodedExample, as_filler, collate, pack


@dataclass(frozen=True)
class Written:
    """One completion.

    Attributes:
        row: number of its prompt's row in the training split.
        number: among the completions of the prompt.
        prompt: the prompt's tokens and profile.
        tokens: what the policy wrote, at least one token.
        truncated: it was cut at ``rollout.max_new_tokens``.
    """

    row: int
    number: int
    prompt: EncodedExample
    tokens: Sequence[int]
    truncated: bool


class Cutter:
    """Cuts the completions of one rank into micro batches.

    Args:
        layout: completions of each micro batch, and the number of micro batches.
        pad_id: token id of padding.
        pack_length: tokens of a row that several sequences share; None gives each a row of its own.
        mask_truncated: truncated completions have weight 0.
    """

    def __init__(self, layout: tuple[int, int], pad_id: int, pack_length: int | None, mask_truncated: bool) -> None:
        self._micro, self._accumulation = layout
        self._pad_id, self._pack_length, self._mask_truncated = pad_id, pack_length, mask_truncated

    def __call__(self, written: Sequence[Written], advantages: Sequence[float], filler: EncodedExample) -> list[Batch]:
        """As many batches on every rank; see :class:`~cuma_ds.training.objectives.grpo.Grpo` for their extras.

        Args:
            written: completions of this rank.
            advantages: of each.
            filler: any prompt, for batches without completions.
        """
        parts = [slice(start * self._micro, (start + 1) * self._micro) for start in range(self._accumulation)]
        return [self._batch(written[part], advantages[part], filler) for part in parts]

    def _batch(self, written: Sequence[Written], advantages: Sequence[float], filler: EncodedExample) -> Batch:
        """Completions whose sequences are equal but for the last token, which nothing follows, share one sequence."""
        sequences: dict[tuple[int, ...], EncodedExample] = {}
        labels: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for number, (one, advantage) in enumerate(zip(written, advantages, strict=True)):
            example = self._example(one)
            key = (example.profile, *example.input_ids)
            sequences[key] = _joined(sequences[key], example) if key in sequences else example
            labels.setdefault(key, []).extend([(number, advantage)] * len(one.tokens))
        examples = list(sequences.values()) or [as_filler(filler)]
        told = [label for part in labels.values() for label in part] or [(-1, 0.0)]
        if self._pack_length is None:
            batch = collate(examples, self._pad_id)
        else:
            batch = pack(examples, self._pad_id, self._pack_length)
        # Labels stand in the order of the batch's rows; those of one sequence stand together.
        order_L = batch.targets.example_L.argsort(stable=True)
        completion_L, advantage_L = (torch.tensor(values) for values in zip(*told, strict=True))
        extras = {"completion_L": torch.empty_like(completion_L), "advantage_L": torch.empty_like(advantage_L)}
        extras["completion_L"][order_L], extras["advantage_L"][order_L] = completion_L, advantage_L
        rows = tuple(one.row for one in written if one.number == 0)
        return dataclasses.replace(batch, rows=rows, extras=extras)

    def _example(self, one: Written) -> EncodedExample:
        """The prompt and what follows it, with each written token as a target."""
        first, count = len(one.prompt.input_ids) - 1, len(one.tokens)
        weight = 0.0 if self._mask_truncated and one.truncated else 1.0
        return EncodedExample(
            [*one.prompt.input_ids, *one.tokens[:-1]],
            list(range(first, first + count)),
            list(one.tokens),
            [weight] * count,
            one.prompt.profile,
        )


def _joined(first: EncodedExample, second: EncodedExample) -> EncodedExample:
    """The targets of two examples of one sequence."""
    return EncodedExample(
        first.input_ids,
        first.target_position + second.target_position,
        first.target_token + second.target_token,
        first.target_weight + second.target_weight,
        first.profile,
    )
