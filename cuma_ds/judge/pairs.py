"""Which of two answers a person would prefer, asked of a language model behind an OpenAI-compatible endpoint.

Every pair is asked in both orders. Failed calls and unreadable verdicts are counted apart and never become a result.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cuma_ds.data.rendering import Message
from cuma_ds.judge.calls import JudgeSettings, ask_all

_TASK = "You compare two answers to the same request and say which one the person who asked would prefer."
_QUESTION = "Which answer would this person prefer? Reply with exactly one of: A, B, tie."
SCORE = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True)
class Pair:
    """Two answers to one conversation.

    Attributes:
        about: the sentence about the person; "" where nothing is known.
        messages: the conversation, the last message from the user.
        ours, base: the answers to compare.
        person: who asked; pairs of one person are drawn together in the interval.
    """

    about: str
    messages: Sequence[Message]
    ours: str
    base: str
    person: int


@dataclass(frozen=True)
class Comparison:
    """The result of every pair.

    It is ``win`` or ``loss`` where both orders agree, ``tie`` where both say so or disagree, ``failed`` where a call
    did, ``unreadable`` where a verdict was neither A, B nor tie.

    Attributes:
        results: of each pair.
        people: of each pair.
        disagreed: ties in which the two orders did not agree.
        first: readable verdicts that preferred the answer shown first, and that preferred either.
        failures: kind of failure -> calls.
        cached: verdicts that were known already.
        refused: arguments that the judge does not take, of ``max_tokens`` and ``temperature``.
    """

    results: list[str]
    people: list[int]
    disagreed: int
    first: tuple[int, int]
    failures: dict[str, int]
    cached: int
    refused: tuple[str, ...] = ()

    @property
    def win_rate(self) -> float | None:
        """(wins + ties / 2) / (wins + losses + ties); None where nothing was decided."""
        scores = [SCORE[result] for result in self.results if result in SCORE]
        return float(np.mean(scores)) if scores else None


def compare(
    pairs: Sequence[Pair], settings: JudgeSettings, progress: Callable[[int, int], None] | None = None
) -> Comparison:
    """Ask the judge about every pair in both orders.

    Raises:
        ConfigError: the ``openai`` package is missing, or the judge refuses the key or does not know the model.
    """
    requests = [judge_messages(pair, swapped) for pair in pairs for swapped in (False, True)]
    asked = asyncio.run(ask_all(requests, settings, progress))
    results, disagreed = [], 0
    for first, second in zip(asked.verdicts[::2], asked.verdicts[1::2], strict=True):
        if first == "failed" or second == "failed":
            results.append("failed")
        elif "unreadable" in (first, second):
            results.append("unreadable")
        else:
            ours = {"A": "win", "B": "loss", "tie": "tie"}[first], {"A": "loss", "B": "win", "tie": "tie"}[second]
            disagreed += ours[0] != ours[1]
            results.append(ours[0] if ours[0] == ours[1] else "tie")
    counts = Counter(asked.verdicts)
    return Comparison(
        results,
        [pair.person for pair in pairs],
        disagreed,
        (counts["A"], counts["A"] + counts["B"]),
        dict(asked.failures),
        asked.cached,
        tuple(sorted(asked.refused)),
    )


def judge_messages(pair: Pair, swapped: bool) -> list[dict[str, str]]:
    """What the judge is told about a pair: our answer is A, or B if ``swapped``."""
    first, second = (pair.base, pair.ours) if swapped else (pair.ours, pair.base)
    talk = "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in pair.messages)
    parts = [f"About the person: {pair.about}"] if pair.about else []
    parts += [f"Conversation:\n{talk}", f"Answer A:\n{first}", f"Answer B:\n{second}", _QUESTION]
    return [{"role": "system", "content": _TASK}, {"role": "user", "content": "\n\n".join(parts)}]
