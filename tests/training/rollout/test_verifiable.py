"""Rewards against what they say they are: option by option, and by exact enumeration of everything a policy can say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cuma_ds.distances import emd
from cuma_ds.training.rollout.verifiable import answer, chosen_option, energy_shares, log_score, match, survey

OPTIONS = ["Very important", "Rather important", "Not at all"]


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("A", 0), (" B\n", 1), ("C.", 2), ("B: Rather important", 1), ("A) because", 0), ("C\nNot at all", 2),
        ("Rather important", 1), ("  Not at all  ", 2),
        ("", None), ("D", None), ("a", None), ("b.", None), ("A man", None), ("An answer", None), ("(A)", None),
        ("A-level", None), ("AB", None), ("not at all", None), ("Not at all.", None), ("I choose A", None), ("1", None),
    ],
)  # fmt: skip
def test_a_completion_is_an_option_by_its_letter_or_its_own_text(text: str, option: int | None) -> None:
    assert chosen_option(text, OPTIONS) == option


def test_letters_are_those_that_were_shown() -> None:
    assert [chosen_option(letter, OPTIONS, is_reversed=True) for letter in "ABCD"] == [2, 1, 0, None]
    assert chosen_option("Very important", OPTIONS, is_reversed=True) == 0


def test_an_option_that_looks_like_a_letter_is_the_letter_first() -> None:
    assert [chosen_option(text, ["B", "A", "X"]) for text in ("A", "B", "X")] == [0, 1, 2]


def columns(options: list[int | None], counts: list[float], scale: str = "ordinal") -> dict[str, list]:
    size = len(options)
    return {"option": options, "counts": [counts] * size, "scale": [scale] * size}


def told(size: int) -> tuple[list, list, list]:
    return [[]] * size, [""] * size, [{}] * size


def test_answer_is_the_share_of_people_who_said_so() -> None:
    assert answer(*told(4), **columns([0, 1, 2, None], [3, 1, 0])) == [0.75, 0.25, 0.0, 0.0]
    assert answer(*told(3), **columns([0, 1, None], [0, 1])) == [0.0, 1.0, 0.0]
    assert answer(*told(2), **columns([0, 1], [0.5, 1.5])) == [0.25, 0.75]
    assert answer(*told(2), **columns([0, None], [0, 0])) == [None, None], "nobody answered"


def test_answer_to_a_preference_is_the_preferred_one() -> None:
    found = answer([[]] * 3, ["yes", " yes\n", "no"], [{}] * 3, chosen=["yes"] * 3, rejected=["no"] * 3)
    assert found == [1.0, 1.0, 0.0]


def test_log_score_is_the_log_of_the_smoothed_share() -> None:
    found = log_score(*told(4), **columns([0, 1, 2, None], [3, 1, 0]))
    np.testing.assert_allclose(found, np.log([3.5 / 5.5, 1.5 / 5.5, 0.5 / 5.5, 0.5 / 5.5]))


def test_survey_reads_each_prompt_by_itself() -> None:
    first, second = [0, 1, None, 2], [1, 1, 0, 2]
    both = survey(
        *told(8),
        group_size=4,
        option=first + second,
        counts=[[3, 1, 2]] * 4 + [[1, 0, 1]] * 4,
        scale=["ordinal"] * 4 + ["nominal"] * 4,
    )
    assert both == [*energy_shares(first, [3, 1, 2], False), *energy_shares(second, [1, 0, 1], True)]
    assert survey(*told(3), group_size=3, **columns([0, 1, None], [0, 0])) == [None] * 3


def kernel(n: int, nominal: bool) -> np.ndarray:
    """Distances of n options and, last, of what is no option, as loops."""
    k = np.zeros((n + 1, n + 1))
    for x, y in itertools.product(range(n), repeat=2):
        k[x, y] = float(x != y) if nominal else abs(x - y) / (n - 1)
    return k


def energy(policy: np.ndarray, people: np.ndarray, nominal: bool) -> float:
    """Half the energy distance of a policy over n options and no option (last), by its definition."""
    k = kernel(len(people), nominal)
    far = k.copy()
    far[-1, :-1] = 1.0  # from what is no option to each answer
    people = np.append(people, 0.0)
    return policy @ far @ people - policy @ k @ policy / 2 - people @ k @ people / 2


def softmax(logits: np.ndarray) -> np.ndarray:
    exponential = np.exp(logits - logits.max())
    return exponential / exponential.sum()


def drift(policy: np.ndarray, people: np.ndarray, nominal: bool, size: int, shares, baseline: bool = True):
    """Expected REINFORCE gradient with respect to the logits of a softmax policy over n options and no option, and the
    expected mean reward: over all (n + 1)^size groups of completions.
    """
    total, reward = np.zeros_like(policy), 0.0
    for group in itertools.product(range(len(policy)), repeat=size):
        probability = policy[list(group)].prod()
        if probability == 0:
            continue
        options = [None if option == len(people) else option for option in group]
        found = shares(options, people, nominal)
        advantages = found - found.mean() if baseline else found
        for option, advantage in zip(group, advantages, strict=True):
            total += probability * advantage * (np.eye(len(policy))[option] - policy) / size
        reward += probability * found.mean()
    return total, reward


def slope(logits: np.ndarray, people: np.ndarray, nominal: bool) -> np.ndarray:
    """Gradient of minus the energy with respect to the logits, by central differences."""
    step = 1e-5 * np.eye(len(logits))
    up = [energy(softmax(logits + move), people, nominal) for move in step]
    down = [energy(softmax(logits - move), people, nominal) for move in step]
    return -(np.array(up) - np.array(down)) / 2e-5


@pytest.mark.parametrize("nominal", [False, True])
@pytest.mark.parametrize("size", [3, 4, 5])
def test_the_expected_gradient_of_survey_is_that_of_the_energy_distance(nominal: bool, size: int) -> None:
    logits, people = np.array([0.3, -0.5, 0.2, -0.1]), np.array([0.5, 0.1, 0.4])
    expected = slope(logits, people, nominal)
    with_baseline, reward = drift(softmax(logits), people, nominal, size, energy_shares)
    alone, _ = drift(softmax(logits), people, nominal, size, energy_shares, baseline=False)
    np.testing.assert_allclose(with_baseline, (1 - 1 / size) * expected, atol=1e-9)
    np.testing.assert_allclose(alone, expected, atol=1e-9)
    assert reward == pytest.approx(-energy(softmax(logits), people, nominal), abs=1e-12)


def test_the_energy_of_ordered_options_is_cramers_distance() -> None:
    policy, people = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.1, 0.2, 0.3])
    gaps = np.cumsum(policy - people)
    assert energy(np.append(policy, 0), people, False) == pytest.approx((gaps**2).sum() / 3)
    assert energy(np.append(policy, 0), people, True) == pytest.approx(((policy - people) ** 2).sum() / 2)


def without_correction(options, people, nominal) -> np.ndarray:
    """The form that is unbiased without a baseline, which the group's mean makes favour the middle."""
    k, chosen = kernel(len(people), nominal), list(options)
    to_people = (k[:-1, :-1] @ people)[chosen]
    return -to_people + k[np.ix_(chosen, chosen)].sum(axis=1) / (len(chosen) - 1)


def left_out_emd(options, people, nominal) -> np.ndarray:
    """What each completion adds to 1 - EMD of the group."""
    counts = np.bincount(options, minlength=len(people)).astype(float)
    rest = [counts - np.eye(len(people))[option] for option in options]
    return np.array([emd(one / one.sum(), people) - emd(counts / counts.sum(), people) for one in rest])


def test_only_survey_rests_at_peoples_distribution() -> None:
    """Of three ways to share out how well a group matches, the two plain ones move away from the right answer."""
    people = np.array([0.4, 0.3, 0.2, 0.1])
    policy = np.append(people, 0.0)
    moves = {
        shares: np.abs(drift(policy, people, False, 6, shares)[0]).max()
        for shares in (energy_shares, without_correction, left_out_emd)
    }
    assert moves[energy_shares] < 1e-12
    assert moves[without_correction] > 1e-3
    assert moves[left_out_emd] > 1e-3


@pytest.mark.parametrize(("people", "nominal"), [([0.4, 0.3, 0.2, 0.1], False), ([0.1, 0.2, 0.1, 0.6], True)])
def test_reinforce_with_survey_learns_peoples_distribution(people: list[float], nominal: bool) -> None:
    """Groups of 8 from a softmax policy that starts with half of what it says being no option."""
    rng, logits = np.random.default_rng(0), np.array([0.0, 0.0, 0.0, 0.0, np.log(4)])
    counts, seen = 100 * np.array(people), []
    for step in range(4000):
        policy = softmax(logits)
        group = rng.choice(5, size=8, p=policy)
        found = energy_shares([None if option == 4 else int(option) for option in group], counts, nominal)
        gradient = (found - found.mean()) @ (np.eye(5)[group] - policy) / 8
        logits = logits + 2.0 / (1 + step / 500) * gradient
        seen.append(softmax(logits))
    learned = np.mean(seen[-1000:], axis=0)
    assert learned[4] < 0.01, "it has stopped saying what is no option"
    np.testing.assert_allclose(learned[:4], people, atol=0.02)


def test_no_option_is_never_better_than_an_option() -> None:
    for options in itertools.product([0, 1, 2, None], repeat=4):
        found = energy_shares(options, [5, 1, 2], nominal=False)
        valid = [value for value, option in zip(found, options, strict=True) if option is not None]
        missing = [value for value, option in zip(found, options, strict=True) if option is None]
        assert not valid or not missing or max(missing) <= min(valid)


def test_match_is_one_minus_the_distance_of_the_sample() -> None:
    assert match([0, 0, 1, 2], [2, 1, 1], nominal=False) == 1.0
    assert match([0, 0, 0, 0], [0, 0, 1], nominal=False) == 0.0
    assert match([0, 1], [0, 1, 1], nominal=True) == pytest.approx(0.5)
    assert match([0, 0, 1, None], [2, 1], nominal=False) == pytest.approx(0.75)
    assert match([None, None], [1, 1], nominal=False) == 0.0
    assert np.isnan(match([0], [0, 0], nominal=False))
