"""Rewards that need no judge: what people answered, or preferred, is known.

Shapes: M completions, G completions of one prompt, n options of a question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuma_ds.data.rendering import LETTERS
from cuma_ds.distances import distance

Array = NDArray[np.float64]
# A letter that stands alone, or before a punctuation mark or the end of its line.
_LETTER = re.compile(r"([A-Z])(?:$|[\n.,:;!?)\]])")


def chosen_option(text: str, options: Sequence[str], is_reversed: bool = False) -> int | None:
    """The option that a completion chooses.

    It is the one whose letter the text begins with, where the text or its line ends behind the letter or a punctuation
    mark stands there; else the one whose own text it is. Surrounding blanks do not count.

    Args:
        text: of the completion.
        options: of the question, in their own order.
        is_reversed: the question showed the last option as A (``data.option_order: reversed``).

    Returns:
        A place in ``options``; None where the text is no option.
    """
    text = text.strip()
    letter = _LETTER.match(text)
    place = LETTERS.index(letter[1]) if letter else len(options)
    if place < len(options):
        return len(options) - 1 - place if is_reversed else place
    stripped = [option.strip() for option in options]
    return stripped.index(text) if text in stripped else None


def answer(prompts: list[Any], completions: list[str], profiles: list[Any], **columns: list[Any]) -> list[float | None]:
    """The probability that a completion is what a person of the profile answered.

    For a choice question it is the share of the profile's answers that equal the chosen option: 1 or 0 where there is
    one answer. For a preference it is 1 for the text of the preferred answer, else 0. What is no option gets 0.
    The best policy for this reward always says the most frequent answer.
    """
    if "chosen" in columns:
        pairs = zip(completions, columns["chosen"], strict=True)
        return [float(text.strip() == chosen.strip()) for text, chosen in pairs]
    return [
        None if sum(counts) <= 0 else 0.0 if option is None else counts[option] / sum(counts)
        for option, counts in zip(columns["option"], columns["counts"], strict=True)
    ]


def log_score(
    prompts: list[Any], completions: list[str], profiles: list[Any], **columns: list[Any]
) -> list[float | None]:
    """Log of the chosen option's smoothed share of the profile's answers, in nats.

    The share is (count + 1/2) / (answers + n/2). What is no option gets the floor, the score of an option that nobody
    chose: log of 1/2 / (answers + n/2). As with :func:`answer`, the best policy always says the most frequent answer,
    but rare answers are told apart.
    """
    return [
        float(np.log(((0.0 if option is None else counts[option]) + 0.5) / (sum(counts) + len(counts) / 2)))
        for option, counts in zip(columns["option"], columns["counts"], strict=True)
    ]


def survey(
    prompts: list[Any], completions: list[str], profiles: list[Any], *, group_size: int, **columns: list[Any]
) -> list[float | None]:
    """How well the completions of a prompt together match the distribution of the profile's answers, shared out to the
    single completions by :func:`energy_shares`.

    Args:
        group_size: completions of each prompt, which stand together; at least 3.
    """
    found: list[float | None] = []
    for first in range(0, len(completions), group_size):
        options, counts = columns["option"][first : first + group_size], columns["counts"][first]
        if sum(counts) <= 0:
            found += [None] * group_size
        else:
            found += energy_shares(options, counts, columns["scale"][first] == "nominal").tolist()
    return found


def energy_shares(options: Sequence[int | None], counts: ArrayLike, nominal: bool) -> Array:
    """The reward whose policy gradient makes sampled answers distributed as the observed ones.

    With k(x, y) = |x - y| / (n - 1) for ordered options, else 1[x != y], half the energy distance of the policy's
    answers X and people's answers Y is

        D = E k(X, Y) - E k(X, X') / 2 - E k(Y, Y') / 2 = sum_k (F_k - P_k)^2 / (n - 1)   (Cramér; F, P cumulative)
                                                     or = sum_k (f_k - p_k)^2 / 2          (options without an order)

    which is 0 for equal distributions alone. Its derivative with respect to the probability of x is c(x) - m(x), with
    c(x) = E k(x, Y) and m(x) = E k(x, X'). With c_i = c(x_i) and m_i the mean of k(x_i, x_j) over the G - 1 others,
    the reward -c_i + m_i has the gradient of -D. But the others' rewards depend on x_i through m_j, so that a baseline
    that is the mean of the group takes part of m_i away: what is left is (1 - 1/G) (-c_i) + (1 - 2/G) m_i, which
    favours the middle of the scale. Here m_i counts (G - 1) / (G - 2) fold instead, and a term that is the same for
    the whole group makes the group's mean the unbiased estimate of -D:

        r_i = -c_i + a m_i - (a - 1/2) mean_j m_j + E k(Y, Y') / 2,   a = (G - 1) / (G - 2)

    The expected gradient is that of -D, times 1 - 1/G where the group's mean is subtracted. (Dividing by the standard
    deviation of each group changes its direction; ``grpo.scale_rewards`` should be ``batch`` or ``none``.) The plain
    difference that a completion makes to 1 - EMD of the group has another optimum: fewer distinct answers.

    A completion that is no option has c = 1, as far as can be, and k = 0 to all others: it gains nothing from variety.

    Args:
        options: [G] of one prompt, None for no option; at least 3.
        counts: [n] answers of the profile, or sums of their weights; not all 0.
        nominal: the options have no order.

    Returns:
        [G] rewards, in the unit of D.
    """
    counts = np.asarray(counts, dtype=np.float64)
    observed, n, size = counts / counts.sum(), len(counts), len(options)
    k_nn = 1.0 - np.eye(n) if nominal else np.abs(np.subtract.outer(np.arange(n), np.arange(n))) / max(n - 1, 1)
    # One more row and column for what is no option.
    k_nn = np.pad(k_nn, (0, 1))
    chosen_G = np.array([n if option is None else option for option in options])
    c_G = np.append(k_nn[:n, :n] @ observed, 1.0)[chosen_G]
    m_G = k_nn[np.ix_(chosen_G, chosen_G)].sum(axis=1) / (size - 1)
    factor = (size - 1) / (size - 2)
    variety = observed @ k_nn[:n, :n] @ observed
    return -c_G + factor * m_G - (factor - 0.5) * m_G.mean() + variety / 2


def match(options: Sequence[int | None], counts: ArrayLike, nominal: bool) -> float:
    """1 - EMD (total variation without an order) of the sampled and the observed answers, for the log.

    Answers that are no option count as the farthest. Arguments as in :func:`energy_shares`.

    Returns:
        A number in [0, 1], nan where nothing was observed.
    """
    counts = np.asarray(counts, dtype=np.float64)
    valid = [option for option in options if option is not None]
    if counts.sum() <= 0:
        return float("nan")
    if not valid:
        return 0.0
    sampled = np.bincount(valid, minlength=len(counts)) / len(valid)
    return len(valid) / len(options) * (1.0 - float(distance(sampled, counts / counts.sum(), nominal)))
