"""Which of two answers a person would prefer, asked of a language model behind an OpenAI-compatible endpoint.

Every pair is asked in both orders. Failed calls and unreadable verdicts are counted apart and never become a result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cuma_ds.data.rendering import Message
from cuma_ds.errors import ConfigError
from cuma_ds.judge.calls import Asked, Judge

_TASK = "You compare two answers to the same request and say which one the person who asked would prefer."
_QUESTION = "Which answer would this person prefer? Reply with exactly one of: A, B, tie."
SCORE = {"win": 1.0, "tie": 0.5, "loss": 0.0}
# What a verdict says of our answer, which is A first and B second.
_OURS_FIRST = {"A": "win", "B": "loss", "tie": "tie"}
_OURS_SECOND = {"A": "loss", "B": "win", "tie": "tie"}


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


# A question whose answer needs no profile.
_PROBE = Pair("", [{"role": "user", "content": "What is 2 + 2?"}], "4", "I like trains.", 0)


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


def compare(pairs: Sequence[Pair], judge: Judge, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """Ask the judge about every pair in both orders.

    Raises:
        ConfigError: the judge refuses the key or does not know the model.
    """
    asked = judge.ask(_both_orders(pairs), progress)
    results, disagreed = [], 0
    for first, second in _by_pair(asked):
        if first == "failed" or second == "failed":
            results.append("failed")
        elif "unreadable" in (first, second):
            results.append("unreadable")
        else:
            ours = _OURS_FIRST[first], _OURS_SECOND[second]
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
        tuple(sorted(judge.refused)),
    )


def scores(pairs: Sequence[Pair], judge: Judge) -> list[float | None]:
    """How our answer of each pair fares: 1 for a win, 1/2 for a tie, 0 for a loss, the mean of both orders.

    Returns:
        A number in [0, 1] for each pair; None where a call failed or a verdict could not be read.

    Raises:
        ConfigError: the judge refuses the key or does not know the model.
        JudgeDown: most calls go unanswered, also when tried again.
    """
    found: list[float | None] = []
    for first, second in _by_pair(judge.ask(_both_orders(pairs), must_answer=True)):
        known = first in _OURS_FIRST and second in _OURS_SECOND
        found.append((SCORE[_OURS_FIRST[first]] + SCORE[_OURS_SECOND[second]]) / 2 if known else None)
    return found


def probe(judge: Judge) -> bool:
    """Ask the judge about a pair that is not of the data.

    Returns:
        Whether its verdict could be read.

    Raises:
        ConfigError: the judge refuses the key or does not know the model, or gives no verdict for another reason.
        JudgeDown: it does not answer.
    """
    asked = judge.ask([judge_messages(_PROBE, swapped=False)], must_answer=True, fresh=True)
    if asked.verdicts == ["failed"]:
        raise ConfigError(f"{judge} gave no verdict on a first pair of answers: {next(iter(asked.failures))}")
    return asked.verdicts != ["unreadable"]


def _both_orders(pairs: Sequence[Pair]) -> list[list[dict[str, str]]]:
    return [judge_messages(pair, swapped) for pair in pairs for swapped in (False, True)]


def _by_pair(asked: Asked) -> Iterator[tuple[str, str]]:
    """The two verdicts on each pair, that with our answer first before the other."""
    return zip(asked.verdicts[::2], asked.verdicts[1::2], strict=True)


def judge_messages(pair: Pair, swapped: bool) -> list[dict[str, str]]:
    """What the judge is told about a pair: our answer is A, or B if ``swapped``."""
    first, second = (pair.base, pair.ours) if swapped else (pair.ours, pair.base)
    talk = "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in pair.messages)
    parts = [f"About the person: {pair.about}"] if pair.about else []
    parts += [f"Conversation:\n{talk}", f"Answer A:\n{first}", f"Answer B:\n{second}", _QUESTION]
    return [{"role": "system", "content": _TASK}, {"role": "user", "content": "\n\n".join(parts)}]
