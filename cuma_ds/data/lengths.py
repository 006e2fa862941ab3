"""Rows whose prompt is longer than a model reads: found and named before anything is learned or judged, never cut in
silence.

Shapes: M rows of a split, Q questions, N profiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from cuma_ds.config import DataSection
from cuma_ds.data.asked import encode_asked
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import PromptTooLong, Renderer, worded
from cuma_ds.data.rows import Row, Split
from cuma_ds.errors import CumaError, DataError
from cuma_ds.telemetry.progress import shown

logger = logging.getLogger(__name__)

# Tokens by which the length of a prompt may differ from that of its parts, because words join where they meet.
_SEAM = 16
_REASON = "examples longer than max_length"


@dataclass(frozen=True)
class LongRows:
    """Rows of one split that do not fit: their numbers, ascending, and the tokens of the longest."""

    numbers: list[int]
    longest: int


class Reading(NamedTuple):
    """How rows are read.

    Attributes:
        renderer: of the model's tokenizer. Its limit counts, which may be less than ``data.max_length``.
        prompts: the answers of the data are not read. A model writes its own after each prompt.
        bar: show a progress bar on a terminal.
    """

    renderer: Renderer
    prompts: bool = False
    bar: bool = False


def fitting(
    data: PreparedData, reading: Reading, config: DataSection, splits: Sequence[str], advice: Callable[[int], str]
) -> PreparedData:
    """The data with nothing in ``splits`` that is longer than ``data.max_length``.

    Args:
        data: of any kind.
        reading: how rows are read.
        config: ``on_long_prompt`` decides: refuse such rows, or leave them out, count them in the manifest and say so.
        splits: names of the splits that will be read.
        advice: what to do about a refusal, given the tokens that the longest row needs.

    Raises:
        DataError: rows are too long and are not to be skipped, or nothing is left for training. Names splits and row
            numbers.
        CumaError: a row cannot be rendered at all; names it.
    """
    sentences = data.sentences
    whole = {"choice": _long_choices, "chat": _long_chats, "preference": _long_pairs}
    find = _long_prompts if reading.prompts and data.kind != "choice" else whole[data.kind]
    found = {name: find(name, data.splits[name], reading, sentences) for name in splits if len(data.splits[name])}
    found = {name: rows for name, rows in found.items() if rows.numbers}
    if not found:
        return data
    what = "; ".join(
        f"{len(rows.numbers)} of {len(data.splits[name])} rows of split {name} (row "
        f"{', '.join(map(str, rows.numbers[:3]))}"
        f"{', ...' if len(rows.numbers) > 3 else ''}; the longest has {rows.longest} tokens)"
        for name, rows in found.items()
    )
    room = config.max_length - reading.renderer.max_length
    for_answer = f", of which {room} are for an answer" if room else ""
    limit = f"data.max_length is {config.max_length}{for_answer}, and a question is never cut"
    if config.on_long_prompt == "refuse":
        raise DataError(
            f"too long to be read whole: {what}; {limit}; {advice(max(rows.longest for rows in found.values()))}"
        )
    if len(found.get("train", LongRows([], 0)).numbers) == len(data.splits["train"]):
        raise DataError(f"nothing is left for training without what is too long: {what}; {limit}")
    logger.warning("left out, being too long: %s; %s", what, limit)
    return _without(data, found)


def _long_choices(name: str, split: Split, reading: Reading, sentences: Sequence[str]) -> LongRows:
    """Encodes each question once; with its profiles only those pairs whose lengths together come near the limit."""
    renderer = reading.renderer
    question_M, profile_M = split.numbers("question"), split.numbers("profile")
    question_Q, first_Q, which_M = np.unique(question_M, return_index=True, return_inverse=True)
    questions = [split.question(int(number)) for number in question_Q]

    def length(which: int, sentence: str, row: int) -> int:
        question = questions[which]
        text = worded(question.text, question.label, renderer.prompt_style)
        return _tokens(lambda: renderer.encode_choice(text, question.options, sentence), name, row)

    tokens_M = np.array([length(which, "", int(row)) for which, row in enumerate(first_Q)])[which_M]
    if renderer.profile_in_prompt or renderer.shots is not None:
        profile_N, who_M = np.unique(profile_M, return_inverse=True)
        asked = {"add_special_tokens": False, "split_special_tokens": True}
        said = renderer.tokenizer([sentences[profile] for profile in profile_N], **asked)["input_ids"]
        tokens_M = tokens_M + np.array([len(ids) for ids in said])[who_M]
        near = np.flatnonzero((tokens_M > renderer.max_length - _SEAM) | (renderer.shots is not None))
        pairs, first, pair_of = np.unique(
            which_M[near] * len(profile_N) + who_M[near], return_index=True, return_inverse=True
        )
        exact = [
            length(int(pair) // len(profile_N), sentences[profile_N[pair % len(profile_N)]], int(near[place]))
            for pair, place in zip(pairs, first, strict=True)
        ]
        tokens_M[near] = np.array(exact, dtype=tokens_M.dtype)[pair_of]
    numbers = np.flatnonzero(tokens_M > renderer.max_length)
    return LongRows(numbers.tolist(), int(tokens_M[numbers].max(initial=0)))


def _long_chats(name: str, split: Split, reading: Reading, sentences: Sequence[str]) -> LongRows:
    def ids(row: Row) -> list[int]:
        return reading.renderer.encode_chat(row["messages"], sentences[row["profile"]])[0]

    return _long_texts(name, split, reading, ids)


def _long_pairs(name: str, split: Split, reading: Reading, sentences: Sequence[str]) -> LongRows:
    def ids(row: Row) -> list[int]:
        both = reading.renderer.encode_answers(
            row["prompt"], (row["chosen"], row["rejected"]), sentences[row["profile"]]
        )
        return max((ids for ids, _ in both), key=len)

    return _long_texts(name, split, reading, ids)


def _long_prompts(name: str, split: Split, reading: Reading, sentences: Sequence[str]) -> LongRows:
    def ids(row: Row) -> list[int]:
        return encode_asked(row, reading.renderer, sentences[row["profile"]], reading.renderer.max_length)

    return _long_texts(name, split, reading, ids)


def _long_texts(name: str, split: Split, reading: Reading, ids: Callable[[Row], list[int]]) -> LongRows:
    """Encodes each row."""
    with closing(shown(split, f"reading {name}", reading.bar)) as rows:
        tokens_M = np.array([_tokens(partial(ids, row), name, number) for number, row in enumerate(rows)])
    numbers = np.flatnonzero(tokens_M > reading.renderer.max_length)
    return LongRows(numbers.tolist(), int(tokens_M[numbers].max(initial=0)))


def _tokens(encode: Callable[[], list[int]], split: str, row: int) -> int:
    try:
        return len(encode())
    except PromptTooLong as error:
        return error.tokens
    except CumaError as error:
        raise type(error)(f"row {row} of split {split}: {error}") from None


def _without(data: PreparedData, found: dict[str, LongRows]) -> PreparedData:
    kept = {
        name: data.splits[name].select(np.setdiff1d(np.arange(len(data.splits[name])), rows.numbers))
        for name, rows in found.items()
    }
    left_out = sum(len(rows.numbers) for rows in found.values())
    return data.with_splits(kept, {"skipped": {**data.manifest.get("skipped", {}), _REASON: left_out}})
