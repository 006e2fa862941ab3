"""A benchmark whose truth is known: groups of people that fall into modes far apart, as the paper defines cultural
sparsity.

The answers are quotas, not samples: of the 200 people of a group and split, exactly 200 p choose an option of
probability p. So the training answers of a group, its test answers and the truth are one distribution, the oracle of
a report is the truth, and its distance is 0.

Shapes: M modes, Q questions, n = M options of each question.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cuma_ds.data.raw import ProfileList, ReadOptions, Rows, check_questions, question_file
from cuma_ds.data.rows import Question
from cuma_ds.data.splits import TEST, TRAIN, VALID, draws

Array = NDArray[np.float64]

GROUPS_PER_MODE = 6
PEOPLE = 200  # of each group, in each of the splits train, valid and test
# One for each mode, of which a profile names one.
TRADITIONS = ("coast", "mountain", "desert", "forest", "river", "steppe", "island", "valley")
_SPLITS = (TRAIN, VALID, TEST)
_TOPICS = ("family", "work", "religion", "nature")
_STARTS = ("Al", "Bren", "Cor", "Dun", "El", "Far", "Gal", "Hal")
_ENDS = ("dora", "mark", "nia", "stan", "ton", "vale")


def read(path: str, options: ReadOptions) -> Rows:
    """Make the benchmark of ``data.modes`` modes that lie ``data.separation`` apart.

    Each mode has six groups with names of their own (profile field ``country``), and a word in their profiles that all
    groups of the mode share (``tradition``). Which group has which mode is drawn once, the same for every seed.

    Args:
        path: not read.
        options: how to read.

    Raises:
        DataError: ``data.questions`` names another question.
    """
    config = options.config
    counts_MQn = truth(config.modes, config.separation)
    asked = [_TOPICS.index(topic) for topic in check_questions(config, _TOPICS)]
    counts_MQn = counts_MQn[:, asked]
    profiles, names = ProfileList(options.template), _names(config.modes)
    profile_G = [
        profiles.add({"country": name, "tradition": TRADITIONS[mode]})
        for mode, group in enumerate(names)
        for name in group
    ]
    mode_G = np.repeat(np.arange(config.modes), GROUPS_PER_MODE)
    generator = np.random.default_rng(0)
    option_NQ = np.concatenate([_people(counts_MQn[mode], generator) for mode in mode_G for _ in _SPLITS])
    person_N = np.arange(len(option_NQ), dtype=np.int32)
    return Rows(
        "choice",
        person_N,
        draws(config.split_seed, "person", map(str, person_N)),
        np.repeat(np.array(profile_G, np.int32), len(_SPLITS) * PEOPLE),
        profiles,
        {"separation": f"{separation(counts_MQn):.4g}"},
        question_file([_question(topic, config.modes) for topic in np.array(_TOPICS)[asked]], None),
        option_NQ=option_NQ,
        given_N=np.tile(np.repeat(np.array(_SPLITS, np.int8), PEOPLE), len(mode_G)),
    )


def truth(modes: int, apart: float) -> NDArray[np.int64]:
    """How many of 200 people of each mode choose each option, [M, Q, n].

    Each mode prefers one option of each question, each option of a question is preferred by one mode, and the further
    an option is from the preferred one the fewer choose it: p(option) ~ exp(-b |option - preferred|). b is the
    smallest for which :func:`separation` is ``apart``, before the shares are rounded to whole people.

    Args:
        modes: M.
        apart: the smallest separation of two modes.
    """
    preferred_MQ = (np.arange(modes)[:, None] + np.arange(len(_TOPICS))) % modes
    away_MQn = np.abs(np.arange(modes) - preferred_MQ[..., None])
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if separation(np.exp(-middle * away_MQn)) < apart else (low, middle)
    shares_MQn = np.exp(-high * away_MQn)
    return _quotas(shares_MQn / shares_MQn.sum(axis=-1, keepdims=True))


def separation(counts_MQn: Array | NDArray[np.int64]) -> float:
    """The smallest (mu_i - mu_j)^T S^-1 (mu_i - mu_j) / m of two modes i, j; culture is sparse where it is far above 1.

    A person's values are their answers to the Q questions as numbers 1 to n, so m = Q. mu is the mean of a mode, S the
    covariance within modes, mean over modes; it is diagonal, because a person's answers are independent given the
    mode (the paper's definition of cultural sparsity, section 2).

    Args:
        counts_MQn: how often each option is chosen, in any unit.
    """
    share_MQn = counts_MQn / counts_MQn.sum(axis=-1, keepdims=True)
    value_n = np.arange(1, share_MQn.shape[-1] + 1)
    mean_MQ = share_MQn @ value_n
    variance_Q = (share_MQn @ value_n**2 - mean_MQ**2).mean(axis=0)
    pairs = combinations(mean_MQ, 2)
    return float(min(np.mean((one - other) ** 2 / variance_Q) for one, other in pairs))


def _quotas(share_MQn: Array) -> NDArray[np.int64]:
    """Shares as whole numbers of people; those with the largest remainders are rounded up."""
    exact = share_MQn * PEOPLE
    counts = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(counts - exact, axis=-1, kind="stable"), axis=-1, kind="stable")
    return counts + (rank < PEOPLE - counts.sum(axis=-1, keepdims=True))


def _people(counts_Qn: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int8]:
    """[200, Q] options that 200 people choose: those of each question shuffled on their own."""
    options = np.arange(counts_Qn.shape[1], dtype=np.int8)
    return np.stack([generator.permutation(np.repeat(options, counts_n)) for counts_n in counts_Qn], axis=1)


def _names(modes: int) -> list[list[str]]:
    """Six names for each mode; the names do not tell the mode."""
    names = [start + end for start in _STARTS for end in _ENDS][: modes * GROUPS_PER_MODE]
    order = np.random.default_rng(0).permutation(len(names))
    return [[names[place] for place in row] for row in order.reshape(modes, GROUPS_PER_MODE)]


def _question(topic: str, options: int) -> Question:
    scale = [f"{number} of {options}" for number in range(1, options + 1)]
    return Question(
        topic, f"How important is {topic} in life, from 1 (not at all) to {options} (above all)?", tuple(scale)
    )
