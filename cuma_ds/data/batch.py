"""One micro batch: encoded examples, padded or packed into rows, with everything that a forward and a loss read of
them.

Shape suffixes: B rows of a micro batch, S padded length, N examples of the micro batch, L labels (predicted tokens), K
kept positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from cuma_ds.config import DataSection
from cuma_ds.data.rendering import Renderer, worded
from cuma_ds.data.rows import Row

# In ``Batch.extras`` of a stream: [N] int64, a seed for each example, of what training does to its profile alone.
PROFILE_SEED = "profile_seed"


@dataclass(frozen=True)
class EncodedExample:
    """One token sequence with its weighted targets.

    ``target_position[l]`` is the index into ``input_ids`` whose logits predict ``target_token[l]``. ``profile`` is a
    row of the run's table of profiles; -1 marks a filler.
    """

    input_ids: list[int]
    target_position: list[int]
    target_token: list[int]
    target_weight: list[float]
    profile: int


# Examples that must meet in one micro batch, equally many in every unit of a run: one for supervised learning, two for
# a pair.
Unit = tuple[EncodedExample, ...]


def encode_example(row: Row, renderer: Renderer, sentences: Sequence[str], config: DataSection) -> EncodedExample:
    """Render one row of a prepared split.

    A choice row has one target per option, all at the prompt's last token, with the shares of its answers as weights
    (times the number of answers with ``example_weight: answers``); a chat row has weight 1 on each assistant token
    (``loss_on: last``: of the last answer).

    Args:
        row: a row as in :class:`~cuma_ds.data.prepared.PreparedData`.
        renderer: of the model's tokenizer.
        sentences: profile sentences by profile.
        config: the recipe's data section.
    """
    profile = int(row["profile"])
    if "messages" in row:
        last = config.loss_on == "last"
        return _said(*renderer.encode_chat(row["messages"], sentences[profile], last_only=last), profile)
    options, counts = row["options"], row["counts"]
    question = worded(row["question"], row.get("label"), renderer.prompt_style)
    ids = renderer.encode_choice(question, options, sentences[profile])
    total = sum(counts)
    scale = 1.0 if config.example_weight == "uniform" else float(total)
    weights = [scale * count / total for count in counts]
    return EncodedExample(ids, [len(ids) - 1] * len(options), renderer.letter_ids(len(options)), weights, profile)


def encode_pair(row: Row, renderer: Renderer, sentences: Sequence[str]) -> tuple[EncodedExample, EncodedExample]:
    """Render a row of kind preference: the prompt with the chosen answer, and with the rejected one.

    Both have the same prompt (see :meth:`~cuma_ds.data.rendering.Renderer.encode_answers`), and weight 1 on each token
    of the answer.

    Args:
        row: of a prepared split.
        renderer: of the model's tokenizer.
        sentences: profile sentences by profile.
    """
    profile = int(row["profile"])
    answers = (row["chosen"], row["rejected"])
    chosen, rejected = renderer.encode_answers(row["prompt"], answers, sentences[profile])
    return _said(*chosen, profile), _said(*rejected, profile)


def _said(ids: list[int], positions: list[int], profile: int) -> EncodedExample:
    """Tokens of which those behind ``positions`` are targets of weight 1."""
    return EncodedExample(
        ids, positions, [ids[position + 1] for position in positions], [1.0] * len(positions), profile
    )


@dataclass(frozen=True)
class Targets:
    """The labels of a micro batch and where they are predicted.

    Attributes:
        example_L: [L] int64, example (row of ``Batch.profile_rows_N``) that each label belongs to.
        row_L: [L] int64, row of the batch.
        position_L: [L] int64, index into the positions that ``Batch.keep`` names.
        token_L: [L] int64.
        weight_L: [L] float32; 0 for fillers.
    """

    example_L: Tensor
    row_L: Tensor
    position_L: Tensor
    token_L: Tensor
    weight_L: Tensor

    def log_probabilities(self, logits_BKV: Tensor) -> Tensor:
        """[L] log p of each label: float32, or float64 for float64 logits.

        Args:
            logits_BKV: [B, K, V], any float dtype, at the kept positions of each row.
        """
        logits_UV, normaliser_U, place_L = self._normalised(logits_BKV)
        return logits_UV[place_L, self.token_L] - normaliser_U[place_L]

    def scores(self, logits_BKV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """[L] log p of each label, and [L] entropy of the distribution it is drawn from, in nats and without gradients.

        Args:
            logits_BKV: as above.
            temperature: that logits are divided by.
        """
        logits_UV, normaliser_U, place_L = self._normalised(logits_BKV, temperature)
        with torch.no_grad():
            entropy_U = torch.special.entr((logits_UV - normaliser_U[:, None]).exp()).sum(dim=-1)
        return logits_UV[place_L, self.token_L] - normaliser_U[place_L], entropy_U[place_L]

    def _normalised(self, logits_BKV: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [U, V] of the places that have labels, their logsumexp [U], and the place [L] of each label."""
        # The labels of a histogram share their position; its logits are normalised once.
        places, place_L = torch.unique(self.row_L * logits_BKV.shape[1] + self.position_L, return_inverse=True)
        logits_UV = logits_BKV.flatten(0, 1)[places]
        logits_UV = logits_UV if logits_UV.dtype == torch.float64 else logits_UV.float()
        logits_UV = logits_UV if temperature == 1 else logits_UV / temperature
        return logits_UV, logits_UV.logsumexp(dim=-1), place_L

    def to(self, device: str | torch.device) -> Targets:
        """The same with all tensors on ``device``."""
        return Targets(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


class ModelInputs(TypedDict, total=False):
    """Keyword arguments of a causal language model of transformers."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    logits_to_keep: Tensor
    use_cache: bool


@dataclass(frozen=True)
class Batch:
    """One micro batch: an example per row (:func:`collate`), or several per row (:func:`pack`).

    Rows are padded at their end. A causal model then counts the positions of a row as it does for that example alone,
    whatever kind of positions it has (learned, rotary, ALiBi, a recurrent state), and real tokens never see padding.

    Attributes:
        input_ids_BS: [B, S] int64.
        attention_mask_BS: [B, S] int64, 1 for tokens of examples and fillers, 0 for padding.
        position_ids_BS: [B, S] int64 where examples share rows, counting the tokens of each from 0; None where they do
            not.
        profile_BS: [B, S] int64, row of ``profile_rows_N`` for each token; -1 on padding and fillers, which the
            routers ignore.
        profile_rows_N: [N] int64, row of the run's table of profiles for each example. Each example has a row of its
            own, so that a gradient mask made of one example's routing does not depend on its neighbours. 0 for
            fillers, whose row no token names.
        targets: the labels.
        keep: [K] int64, the positions that need logits in any row (``logits_to_keep``), ascending.
        rows: rows of the split behind the units of the batch, fillers left out.
        extras: further tensors, of whoever made the batch for the objective that reads it.
    """

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    position_ids_BS: Tensor | None
    profile_BS: Tensor
    profile_rows_N: Tensor
    targets: Targets
    keep: Tensor
    rows: tuple[int, ...] = ()
    extras: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def weight_sum(self) -> float:
        """Sum of all target weights."""
        return float(self.targets.weight_L.sum(dtype=torch.float64))

    @property
    def real_tokens(self) -> float:
        """Number of tokens that are neither padding nor a filler's."""
        return float((self.profile_BS >= 0).sum())

    @property
    def inputs(self) -> ModelInputs:
        """Keyword arguments of a causal language model; its logits are [B, K, V]."""
        inputs = ModelInputs(input_ids=self.input_ids_BS, logits_to_keep=self.keep, use_cache=False)
        if self.position_ids_BS is None:
            inputs["attention_mask"] = self.attention_mask_BS
        else:
            # Without a mask and a cache, transformers finds the examples of a row by their positions.
            inputs["position_ids"] = self.position_ids_BS
        return inputs

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        return Batch(
            self.input_ids_BS.to(device),
            self.attention_mask_BS.to(device),
            None if self.position_ids_BS is None else self.position_ids_BS.to(device),
            self.profile_BS.to(device),
            self.profile_rows_N.to(device),
            self.targets.to(device),
            self.keep.to(device),
            self.rows,
            {name: tensor.to(device) for name, tensor in self.extras.items()},
        )


def as_filler(example: EncodedExample) -> EncodedExample:
    """The same tokens with profile -1 and weights 0: they take part in no loss and no routing statistics."""
    return dataclasses.replace(example, target_weight=[0.0] * len(example.target_weight), profile=-1)


def collate(examples: Sequence[EncodedExample], pad_id: int) -> Batch:
    """Give each example a row of its own and gather the targets.

    Args:
        examples: N examples, in the order of the batch's rows; fillers keep ranks in step.
        pad_id: token id of padding.
    """
    batch = _in_rows(examples, [[number] for number in range(len(examples))], pad_id)
    return dataclasses.replace(batch, position_ids_BS=None)


def pack(examples: Sequence[EncodedExample], pad_id: int, length: int) -> Batch:
    """Put examples one behind the other into as few rows as fit, longest first, each into the first row with room.

    Positions start again with each example; that is how the backbone tells examples of a row apart (it is given no
    attention mask), so none sees another, and what is learned is what single rows would teach.

    Args:
        examples: N examples and fillers. Their numbers in ``targets.example_L`` and ``profile_rows_N`` are in this
            order.
        pad_id: token id of padding.
        length: tokens of a row; a longer example has a row of its own length.
    """
    rows: list[list[int]] = []
    used: list[int] = []
    sizes = [len(example.input_ids) for example in examples]
    limit = max(length, *sizes)
    for number in sorted(range(len(examples)), key=lambda number: -sizes[number]):
        row = next((row for row, tokens in enumerate(used) if tokens + sizes[number] <= limit), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(number)
        used[row] += sizes[number]
    return _in_rows(examples, rows, pad_id)


def _in_rows(examples: Sequence[EncodedExample], rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """The batch whose row b holds the examples with the numbers ``rows[b]`` one behind the other."""
    width = max(sum(len(examples[number].input_ids) for number in row) for row in rows)
    input_ids_BS = torch.full((len(rows), width), pad_id)
    position_BS, profile_BS, mask_BS = (torch.full((len(rows), width), fill) for fill in (0, -1, 0))
    labels: list[tuple[int, int, int, int, float]] = []
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            example = examples[number]
            end = start + len(example.input_ids)
            input_ids_BS[row, start:end] = torch.tensor(example.input_ids)
            position_BS[row, start:end] = torch.arange(end - start)
            profile_BS[row, start:end] = -1 if example.profile < 0 else number
            mask_BS[row, start:end] = 1
            places = zip(example.target_position, example.target_token, example.target_weight, strict=True)
            labels.extend((number, row, start + position, token, weight) for position, token, weight in places)
            start = end
        # Padding counts its positions as one more example would, so that no example before it sees it.
        position_BS[row, start:] = torch.arange(width - start)
    example_L, row_L, position_L, token_L, weight_L = zip(*labels, strict=True)
    keep, kept_L = torch.unique(torch.tensor(position_L), return_inverse=True)
    targets = Targets(
        torch.tensor(example_L),
        torch.tensor(row_L),
        kept_L,
        torch.tensor(token_L),
        torch.tensor(weight_L, dtype=torch.float32),
    )
    profile_rows_N = torch.tensor([max(example.profile, 0) for example in examples])
    return Batch(input_ids_BS, mask_BS, position_BS, profile_BS, profile_rows_N, targets, keep)
