"""Rows whose prompt is longer than a model reads, or cannot be written at all: found and named before anything is
learned or judged, never cut in silence.

Shapes: M rows of a split, Q questions, N profiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
_NOT_WRITTEN = "examples that cannot be written as a prompt"
# The tokens of a prompt that cannot be written.
_NEVER = 1 << 40


@dataclass(frozen=True)
class LongRows:
    """Rows of one split that do not fit, by ascending numbers.

    Attributes:
        numbers: of rows that are too long.
        longest: tokens of the longest.
        broken: numbers of rows that cannot be written as a prompt.
    """

    numbers: list[int]
    longest: int
    broken: list[int]

    @classmethod
    def among(cls, tokens_M: np.ndarray, limit: int) -> LongRows:
        """Those with more than ``limit`` tokens."""
        broken_M = tokens_M >= _NEVER
        long_M = (tokens_M > limit) & ~broken_M
        return cls(
            np.flatnonzero(long_M).tolist(), int(tokens_M[long_M].max(initial=0)), np.flatnonzero(broken_M).tolist()
        )


class Reading(NamedTuple):
    """How rows are read.

    Attributes:
        renderer: of the model's tokenizer. Its limit counts, which may be less than ``data.max_length``.
        prompts: the answers of the data are not read. A model writes its own after each prompt.
        bar: show a progress bar on a terminal.
        faults: gets why rows cannot be written; None makes the first such row an error.
    """

    renderer: Renderer
    prompts: bool = False
    bar: bool = False
    faults: list[str] | None = None


def fitting(
    data: PreparedData, reading: Reading, config: DataSection, splits: Sequence[str], advice: Callable[[int], str]
) -> PreparedData:
    """The data with nothing in ``splits`` that is longer than ``data.max_length``.

    Args:
        data: of any kind.
        reading: how rows are read.
        config: ``on_long_prompt`` decides: refuse such rows, or leave them out, count them in the manifest and say so.
            ``on_bad_row`` decides the same of rows that cannot be written as a prompt.
        splits: names of the splits that will be read.
        advice: what to do about a refusal, given the tokens that the longest row needs.

    Raises:
        DataError: rows are too long and are not to be skipped, or nothing is left for training. Names splits and row
            numbers.
        CumaError: a row cannot be written as a prompt; names it.
    """
    faults: list[str] = []
    if config.on_bad_row == "skip":
        reading = reading._replace(faults=faults)
    sentences = data.sentences
    whole = {"choice": _long_choices, "chat": _long_chats, "preference": _long_pairs}
    find = _long_prompts if reading.prompts and data.kind != "choice" else whole[data.kind]
    found = {name: find(name, data.splits[name], reading, sentences) for name in splits if len(data.splits[name])}
    broken = {name: rows.broken for name, rows in found.items() if rows.broken}
    long = {name: rows for name, rows in found.items() if rows.numbers}
    said = []
    if broken:
        said.append(f"cannot be written as a prompt: {_named(data, broken)}; the first: {faults[0]}")
    if long:
        longest = max(rows.longest for rows in long.values())
        room = config.max_length - reading.renderer.max_length
        for_answer = f", of which {room} are for an answer" if room else ""
        what = f"too long to be read whole: {_named(data, {name: rows.numbers for name, rows in long.items()})}"
        said.append(
            f"{what}; the longest has {longest} tokens; data.max_length is {config.max_length}{for_answer}, and a "
            "question is never cut"
        )
        if config.on_long_prompt == "refuse":
            raise DataError(f"{said[-1]}; {advice(longest)}")
    if not said:
        return data
    if "train" in found and len(found["train"].numbers + found["train"].broken) == len(data.splits["train"]):
        raise DataError(f"nothing is left for training: {'; '.join(said)}")
    for one in said:
        logger.warning("left out: %s", one)
    return _without(data, found)


def _named(data: PreparedData, numbers: Mapping[str, list[int]]) -> str:
    """Some rows of each split in words."""
    return "; ".join(
        f"{len(rows)} of {len(data.splits[name])} rows of split {name} (row {', '.join(map(str, rows[:3]))}"
        f"{', ...' if len(rows) > 3 else ''})"
        for name, rows in numbers.items()
    )


def _long_choices(name: str, split: Split, reading: Reading, sentences: Sequence[str]) -> LongRows:
    """Encodes each question once; with its profiles only those pairs whose lengths together come near the limit."""
    renderer = reading.renderer
    question_M, profile_M = split.numbers("question"), split.numbers("profile")
    question_Q, first_Q, which_M = np.unique(question_M, return_index=True, return_inverse=True)
    questions = [split.question(int(number)) for number in question_Q]

    def length(which: int, sentence: str, row: int) -> int:
        question = questions[which]
        text = worded(question.text, question.label, renderer.prompt_style)
        return _tokens(
            lambda: renderer.encode_choice(text, question.options, sentence), f"row {row} of split {name}", reading
        )

    with closing(shown(first_Q, f"reading {name}", reading.bar)) as rows:
        tokens_M = np.array([length(which, "", int(row)) for which, row in enumerate(rows)])[which_M]
    if renderer.profile_in_prompt or renderer.shots is not None:
        profile_N, who_M = np.unique(profile_M, return_inverse=True)
        asked = {"add_special_tokens": False, "split_special_tokens": True}
        said = renderer.tokenizer([sentences[profile] for profile in profile_N], **asked)["input_ids"]
        tokens_M = tokens_M + np.array([len(ids) for ids in said])[who_M]
        near = np.flatnonzero((tokens_M > renderer.max_length - _SEAM) | (renderer.shots is not None))
        pairs, first, pair_of = np.unique(
            which_M[near] * len(profile_N) + who_M[near], return_index=True, return_inverse=True
        )
        with closing(shown(pairs, f"reading {name} with profiles", reading.bar)) as shown_pairs:
            exact = [
                length(int(pair) // len(profile_N), sentences[profile_N[pair % len(profile_N)]], int(near[place]))
                for pair, place in zip(shown_pairs, first, strict=True)
            ]
        tokens_M[near] = np.array(exact, dtype=tokens_M.dtype)[pair_of]
    return LongRows.among(tokens_M, renderer.max_length)


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
        tokens_M = np.array(
            [_tokens(partial(ids, row), f"row {number} of split {name}", reading) for number, row in enumerate(rows)]
        )
    return LongRows.among(tokens_M, reading.renderer.max_length)


def _tokens(encode: Callable[[], list[int]], where: str, reading: Reading) -> int:
    """The tokens of a prompt; ``_NEVER`` where it cannot be written and that is no error."""
    try:
        return len(encode())
    except PromptTooLong as error:
        return error.tokens
    except CumaError as error:
        if reading.faults is None:
            raise type(error)(f"{where}: {error}") from None
        reading.faults.append(f"{where}: {error}")
        return _NEVER


def _without(data: PreparedData, found: dict[str, LongRows]) -> PreparedData:
    kept = {
        name: data.splits[name].select(np.setdiff1d(np.arange(len(data.splits[name])), rows.numbers + rows.broken))
        for name, rows in found.items()
    }
    counts = {
        _REASON: sum(len(rows.numbers) for rows in found.values()),
        _NOT_WRITTEN: sum(len(rows.broken) for rows in found.values()),
    }
    skipped = {reason: count for reason, count in counts.items() if count}
    return data.with_splits(kept, {"skipped": {**data.manifest.get("skipped", {}), **skipped}})
