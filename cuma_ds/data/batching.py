"""Batches that depend on (seed, step) alone: any number of ranks sees the same examples in the same step.

Shape suffixes: B rows of a micro-batch, S padded length, N prediction targets of the micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cuma_ds.config import DataSection
from cuma_ds.data.rendering import Renderer
from cuma_ds.errors import DataError


@dataclass(frozen=True)
class EncodedExample:
    """One row as token ids with its weighted targets.

    ``target_position[n]`` is the index into ``input_ids`` whose logits predict ``target_token[n]``.
    """

    input_ids: list[int]
    target_position: list[int]
    target_token: list[int]
    target_weight: list[float]
    profile: int


def encode_example(
    row: Mapping[str, Any], renderer: Renderer, sentences: Sequence[str], config: DataSection
) -> EncodedExample:
    """Render one row of a prepared split.

    A choice row has one target per option, all at the prompt's last token, with the shares of its answers as weights
    (times the number of answers with ``example_weight: answers``); a chat row has weight 1 on each assistant token.

    Args:
        row: a row as in :class:`~cuma_ds.data.prepared.PreparedData`.
        renderer: of the model's tokenizer.
        sentences: profile sentences by profile index.
        config: the recipe's data section.
    """
    profile = int(row["profile"])
    if "messages" in row:
        ids, positions = renderer.encode_chat(row["messages"], sentences[profile])
        return EncodedExample(
            ids, positions, [ids[position + 1] for position in positions], [1.0] * len(positions), profile
        )
    options, counts = row["options"], row["counts"]
    ids = renderer.encode_choice(row["question"], options, sentences[profile])
    total = sum(counts)
    scale = 1.0 if config.example_weight == "uniform" else float(total)
    weights = [scale * count / total for count in counts]
    return EncodedExample(ids, [len(ids) - 1] * len(options), renderer.letter_ids(len(options)), weights, profile)


@dataclass(frozen=True)
class Batch:
    """One micro-batch and its targets: an example per row (:func:`collate`), or several per row (:func:`pack`).

    Rows are padded at their end. A causal model then counts the positions of a row as it does for that example alone, whatever
    kind of positions it has (learned, rotary, ALiBi, a recurrent state), and real tokens never see padding.

    Attributes:
        input_ids: [B, S] int64.
        attention_mask: [B, S] int64, 1 for real tokens.
        position_ids: [B, S] int64 where examples share rows, counting the tokens of each from 0; None where they do not.
        profile_index: [B] int64, row in the table of profiles; -1 for a filler that only keeps ranks in step. [B, S] where
            examples share rows, -1 on padding.
        target_row: [N] int64, row of the batch.
        target_position: [N] int64, index into the positions that ``keep`` names.
        target_token: [N] int64.
        target_weight: [N] float32; 0 for fillers.
        keep: [K] int64, the positions that need logits in any row (``logits_to_keep``), ascending.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    profile_index: Tensor
    target_row: Tensor
    target_position: Tensor
    target_token: Tensor
    target_weight: Tensor
    keep: Tensor

    @property
    def packed(self) -> bool:
        """Whether examples share rows."""
        return self.position_ids is not None

    @property
    def weight_sum(self) -> float:
        """Sum of all target weights."""
        return float(self.target_weight.sum(dtype=torch.float64))

    @property
    def real_tokens(self) -> float:
        """Tokens that are neither padding nor a filler's."""
        return float(self.attention_mask[self.profile_index >= 0].sum())

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of a causal language model; its logits are [B, K, V]."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "logits_to_keep": self.keep, "use_cache": False}
        # Without a mask and a cache, transformers finds the examples of a row by their positions.
        return inputs | (
            {"attention_mask": self.attention_mask}
            if self.position_ids is None
            else {"position_ids": self.position_ids}
        )

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)


def collate(examples: Sequence[EncodedExample | None], pad_id: int, profile_fill: int = -1) -> Batch:
    """Give each example a row of its own and gather the targets.

    Args:
        examples: rows; None becomes a filler: a copy of the first real row with zero weights.
        pad_id: token id of padding.
        profile_fill: profile index that fillers get.

    Raises:
        ValueError: nothing but fillers.
    """
    real = next((example for example in examples if example is not None), None)
    if real is None:
        raise ValueError("a batch needs at least one real example to shape its fillers")
    batch = _in_rows(
        [[example if example is not None else as_filler(real, profile_fill)] for example in examples], pad_id
    )
    return dataclasses.replace(batch, position_ids=None, profile_index=batch.profile_index[:, 0])


def pack(examples: Sequence[EncodedExample], pad_id: int, length: int) -> Batch:
    """Put examples one behind the other into as few rows as fit, longest first, each into the first row with room.

    Positions start again with each example; that is how the backbone tells examples of a row apart (it is given no attention
    mask), so none sees another, and what is learned is what single rows would teach.

    Args:
        examples: real ones and fillers (profile -1).
        pad_id: token id of padding.
        length: tokens of a row; a longer example has a row of its own length.
    """
    rows: list[list[EncodedExample]] = []
    used: list[int] = []
    limit = max(length, *(len(example.input_ids) for example in examples))
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        size = len(example.input_ids)
        row = next((row for row, tokens in enumerate(used) if tokens + size <= limit), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(example)
        used[row] += size
    return _in_rows(rows, pad_id)


def _in_rows(rows: Sequence[Sequence[EncodedExample]], pad_id: int) -> Batch:
    """The batch whose row b holds the examples ``rows[b]`` one behind the other, with positions and profiles per token."""
    width = max(sum(len(example.input_ids) for example in row) for row in rows)
    input_ids_BS = torch.full((len(rows), width), pad_id)
    position_BS, profile_BS, mask_BS = (torch.full((len(rows), width), fill) for fill in (0, -1, 0))
    targets: list[tuple[int, int, int, float]] = []
    for row, members in enumerate(rows):
        start = 0
        for example in members:
            end = start + len(example.input_ids)
            input_ids_BS[row, start:end] = torch.tensor(example.input_ids)
            position_BS[row, start:end] = torch.arange(end - start)
            profile_BS[row, start:end] = example.profile
            mask_BS[row, start:end] = 1
            places = zip(example.target_position, example.target_token, example.target_weight, strict=True)
            targets.extend((row, start + position, token, weight) for position, token, weight in places)
            start = end
        # Padding counts as one more example, with profile -1, which the router ignores.
        position_BS[row, start:] = torch.arange(width - start)
    row_N, position_N, token_N, weight_N = zip(*targets, strict=True)
    keep_K, target_position = torch.unique(torch.tensor(position_N), return_inverse=True)
    return Batch(
        input_ids=input_ids_BS,
        attention_mask=mask_BS,
        position_ids=position_BS,
        profile_index=profile_BS,
        target_row=torch.tensor(row_N),
        target_position=target_position,
        target_token=torch.tensor(token_N),
        target_weight=torch.tensor(weight_N, dtype=torch.float32),
        keep=keep_K,
    )


def as_filler(example: EncodedExample, profile: int = -1) -> EncodedExample:
    """The same tokens without any say in the loss or the routing statistics."""
    return dataclasses.replace(example, target_weight=[0.0] * len(example.target_weight), profile=profile)


class BatchStream:
    """The micro-batches of one rank, a pure function of (seed, step).

    The stream of examples is one permutation per epoch after another, so small data wraps around; step t takes its next
    ``global_batch_size`` of them whatever the number of ranks is, and ranks without an example get fillers.

    Args:
        n_examples: rows of the split.
        global_batch_size: examples per optimizer step, over all ranks.
        micro_batch_size: most examples per rank in one forward.
        rank: of this process.
        world_size: number of ranks that share the step.
        seed: of the permutations.
        encode: row number to example; called again whenever a row comes up.
        pad_id: token id of padding.
        pack_length: tokens of a row that several examples share; None gives each a row of its own.

    Attributes:
        accumulation: micro-batches per step and rank.
        micro: rows of each micro-batch.

    Raises:
        DataError: no examples.
    """

    def __init__(
        self,
        n_examples: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        encode: Callable[[int], EncodedExample],
        pad_id: int,
        pack_length: int | None = None,
    ) -> None:
        if n_examples < 1:
            raise DataError("there are no training examples; at least one is needed")
        self.n_examples, self.global_batch_size = n_examples, global_batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.encode, self.pad_id, self.pack_length = encode, pad_id, pack_length
        slots = -(-global_batch_size // world_size)
        self.accumulation = -(-slots // micro_batch_size)
        self.micro = -(-slots // self.accumulation)
        # A step touches few epochs at a time; the cache is per stream, not per class.
        self._permutation = lru_cache(maxsize=4)(self._draw)

    def indices(self, step: int) -> list[list[int | None]]:
        """Row numbers of this rank's micro-batches in ``step``; None where a filler stands."""
        return [
            [
                self._row(step, (micro_step * self.world_size + self.rank) * self.micro + slot)
                for slot in range(self.micro)
            ]
            for micro_step in range(self.accumulation)
        ]

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of ``step``, ``accumulation`` of them."""
        batches = []
        for rows in self.indices(step):
            examples = [None if row is None else self.encode(row) for row in rows]
            if all(example is None for example in examples):
                first = self._row(step, 0)
                assert first is not None
                examples[0] = as_filler(self.encode(first))
            if self.pack_length is None:
                batches.append(collate(examples, self.pad_id))
            else:
                batches.append(
                    pack([example for example in examples if example is not None], self.pad_id, self.pack_length)
                )
        return batches

    def _row(self, step: int, offset: int) -> int | None:
        if offset >= self.global_batch_size:
            return None
        epoch, place = divmod(step * self.global_batch_size + offset, self.n_examples)
        return int(self._permutation(epoch)[place])

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.n_examples)
