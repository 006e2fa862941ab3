"""Entropy, accuracy, cells and references against scipy, pandas and hand-written loops."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cuma_ds.errors import DataError
from cuma_ds.evaluation.columns import Labels
from cuma_ds.evaluation.examples import ChoiceExamples, swap_profiles
from cuma_ds.evaluation.metrics import (
    entropy,
    gather_cells,
    mean_by_group,
    mean_collapse_recovered,
    normalise,
    predicted_distributions,
)
from cuma_ds.evaluation.references import TrainingAnswers
from cuma_ds.evaluation.scores import Scorer


@st.composite
def two_distributions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    options = draw(st.integers(2, 11))
    weights = st.lists(st.integers(0, 1000), min_size=options, max_size=options).filter(any)
    return normalise(draw(weights)), normalise(draw(weights))


@settings(deadline=None, derandomize=True)
@given(two_distributions())
def test_entropy_is_scipys(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, _ = pair
    assert float(entropy(p)) == pytest.approx(float(stats.entropy(p)), abs=1e-12)


@pytest.mark.parametrize(("value", "expected"), [(0.08, 0.0), (0.01, 1.0), (0.045, 0.5), (0.15, -1.0)])
def test_recovered_is_the_share_of_the_way_to_the_oracle(value: float, expected: float) -> None:
    assert mean_collapse_recovered(0.08, 0.01, value) == pytest.approx(expected)


def test_recovered_says_nothing_where_groups_do_not_differ() -> None:
    assert mean_collapse_recovered(0.01, 0.01, 0.0) is None
    assert mean_collapse_recovered(0.01, 0.02, 0.0) is None


def test_normalise_is_uniform_without_answers() -> None:
    np.testing.assert_allclose(normalise([0, 0, 0, 0]), 0.25)
    np.testing.assert_allclose(normalise([1, 3]), [0.25, 0.75])


def survey(seed: int = 0, profiles: int = 12, per_cell: int = 40) -> pd.DataFrame:
    """Answers of single people: question, group (three profiles each), profile, answer."""
    rng = np.random.default_rng(seed)
    rows = []
    for (question, options), profile in itertools.product([("q1", 4), ("q2", 3)], range(profiles)):
        taste = rng.dirichlet(np.ones(options))
        for answer in rng.choice(options, size=int(rng.integers(1, per_cell)), p=taste):
            rows.append((question, options, f"land {profile // 3}", profile, int(answer)))
    return pd.DataFrame(rows, columns=["question", "options", "group", "profile", "answer"])


def merged(people: pd.DataFrame) -> ChoiceExamples:
    split: dict[str, list] = {name: [] for name in ("question_id", "question", "options", "group", "profile", "counts")}
    for (question, options, group, profile), part in people.groupby(["question", "options", "group", "profile"]):
        counts = [int((part["answer"] == k).sum()) for k in range(options)]
        for name, value in zip(
            split, (question, f"{question}?", list("abcd")[:options], group, profile, counts), strict=True
        ):
            split[name].append(value)
    return ChoiceExamples.of(split)


def guesses(examples: ChoiceExamples, seed: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.dirichlet(np.ones(len(counts))) for counts in examples.counts]


def test_examples_name_a_profile_where_there_is_no_group() -> None:
    split = {
        "question_id": ["q"] * 2,
        "question": ["?"] * 2,
        "options": [["a", "b"]] * 2,
        "group": ["", "Peru"],
        "profile": [7, 8],
    }
    examples = ChoiceExamples.of({**split, "counts": [[1, 2], [3, 4]]})
    assert list(examples.groups) == ["profile 7", "Peru"]
    assert len(examples) == 2


def test_cells_pool_the_answers_of_their_people() -> None:
    people = survey()
    examples = merged(people)
    cells = gather_cells(examples.questions, examples.groups, examples.counts, min_answers=1)
    for (question, group), observed, answers in zip(cells.keys, cells.observed, cells.answers, strict=True):
        part = people[(people["question"] == question) & (people["group"] == group)]
        assert answers == len(part)
        expected = part["answer"].value_counts(normalize=True).reindex(range(len(observed)), fill_value=0)
        np.testing.assert_allclose(observed, expected)


def test_small_cells_are_counted_and_not_kept() -> None:
    cells = gather_cells(["q"] * 4, ["a", "b", "b", "c"], [[20, 9], [10, 10], [5, 5], [3, 0]], min_answers=30)
    assert cells.keys == [("q", "b")]
    assert (cells.left_out, cells.left_out_answers) == (2, 32)
    assert cells.examples == [1, 2]


def test_one_question_cannot_have_two_scales() -> None:
    with pytest.raises(DataError, match=r"'q' has examples with \[2, 3\] options"):
        gather_cells(["q", "q"], ["a", "a"], [[1, 2], [1, 2, 3]], min_answers=1)


def test_a_cells_prediction_is_its_peoples_average() -> None:
    people = survey(seed=3)
    examples = merged(people)
    given = guesses(examples)
    by_key = {(q, p): given[i] for i, (q, p) in enumerate(zip(examples.questions, examples.profiles, strict=True))}
    cells = gather_cells(examples.questions, examples.groups, examples.counts, min_answers=1)
    for (question, group), predicted in zip(
        cells.keys, predicted_distributions(cells, given, examples.counts), strict=True
    ):
        asked = people[(people["question"] == question) & (people["group"] == group)]
        np.testing.assert_allclose(
            predicted, np.mean([by_key[question, profile] for profile in asked["profile"]], axis=0)
        )


def test_collapse_is_the_share_of_all_training_answers() -> None:
    people = survey(seed=7)
    train, test = merged(people), merged(survey(seed=8))
    for question, distribution in zip(test.questions, TrainingAnswers.of(train, 30).collapse(test), strict=True):
        expected = (
            people[people["question"] == question]["answer"]
            .value_counts(normalize=True)
            .reindex(range(len(distribution)), fill_value=0)
        )
        np.testing.assert_allclose(distribution, expected)


@pytest.mark.parametrize("least", [1, 20, 60, 10_000])
def test_oracle_is_the_profiles_own_training_answers_else_the_groups_else_the_global_ones(least: int) -> None:
    people = survey(seed=9)
    people = people[~((people["profile"] == 4) & (people["question"] == "q1"))]
    train, test = merged(people), merged(survey(seed=10))
    answers = TrainingAnswers.of(train, least)
    collapse = answers.collapse(test)
    kinds = set()
    for index, distribution in enumerate(answers.oracle(test)):
        asked = people[people["question"] == test.questions[index]]
        own, group = asked[asked["profile"] == test.profiles[index]], asked[asked["group"] == test.groups[index]]
        kind = "own" if len(own) >= least else "group" if len(group) >= least else "all"
        some = {"own": own, "group": group, "all": asked}[kind]
        kinds.add(kind)
        np.testing.assert_allclose(distribution, [np.mean(some["answer"] == k) for k in range(len(distribution))])
        if kind == "all":
            np.testing.assert_allclose(distribution, collapse[index])
    assert kinds == {1: {"own", "group"}, 20: {"own", "group", "all"}, 60: {"group", "all"}, 10_000: {"all"}}[least]


def test_an_oracle_of_people_with_profiles_of_their_own_is_their_countrys() -> None:
    """Almost everybody is the only one of a profile, so the training answers of the country are what is known."""
    rng = np.random.default_rng(0)
    taste = rng.dirichlet(np.ones(5), size=8)
    rows = []
    for person in range(6400):
        country = person % 8
        # Every twentieth person of a country has the profile of the person before: 1.05 people per profile.
        profile = person - 8 if person % 160 >= 152 else person
        rows.append(("q", 5, f"land {country}", profile, int(rng.choice(5, p=taste[country]))))
    people = pd.DataFrame(rows, columns=["question", "options", "group", "profile", "answer"])
    half = rng.permutation(len(people)) < 4000
    train, test = merged(people[half]), merged(people[~half])
    emd_of, answers = {}, TrainingAnswers.of(train, 30)
    for name, reference in (("collapse", answers.collapse(test)), ("oracle", answers.oracle(test))):
        emd_of[name] = Scorer(test, {}, 30).scores({name: reference}).rows[name]["emd"].value
    by_country = []
    for country, part in people[~half].groupby("group"):
        own = people[half & (people["group"] == country)]["answer"]
        by_country.append((stats.wasserstein_distance(own / 4, part["answer"] / 4), len(part)))
    assert emd_of["oracle"] == pytest.approx(
        np.average([d for d, _ in by_country], weights=[n for _, n in by_country]), abs=1e-12
    )
    assert emd_of["oracle"] < 0.3 * emd_of["collapse"]


def test_the_nearest_profile_answers_by_the_same_rule() -> None:
    people = survey(seed=9)
    train = merged(people)
    test = merged(survey(seed=10, profiles=6).assign(profile=lambda some: some["profile"] + 12, group="elsewhere"))
    # Profile 12 + k stands beside profile k.
    embeddings = np.concatenate([np.eye(12), np.eye(12) + 0.1])
    answers = TrainingAnswers.of(train, 20)
    found = answers.nearest(test, embeddings)
    alike = replace(
        test, profiles=test.profiles - 12, groups=Labels.of([f"land {(p - 12) // 3}" for p in test.profiles])
    )
    for a, b in zip(found, answers.oracle(alike), strict=True):
        np.testing.assert_array_equal(a, b)


def test_references_are_the_same_whether_answers_are_merged_or_not() -> None:
    people, test = survey(seed=11), merged(survey(seed=12))
    one_by_one = {
        "question_id": list(people["question"]),
        "question": list(people["question"]),
        "options": [["x"] * n for n in people["options"]],
        "group": list(people["group"]),
        "profile": list(people["profile"]),
        "counts": [np.eye(n)[a].tolist() for n, a in zip(people["options"], people["answer"], strict=True)],
    }
    single = ChoiceExamples.of(one_by_one)
    for reference in (TrainingAnswers.collapse, TrainingAnswers.oracle):
        both = (reference(TrainingAnswers.of(train, 20), test) for train in (merged(people), single))
        for a, b in zip(*both, strict=True):
            np.testing.assert_allclose(a, b)


def test_a_question_never_trained_on_is_uniform_and_a_changed_scale_is_refused() -> None:
    def of(question: str, counts: list[int]) -> ChoiceExamples:
        columns = {"question_id": [question], "question": ["?"], "options": [[]], "group": ["a"], "profile": [0]}
        return ChoiceExamples.of({**columns, "counts": [counts]})

    train = TrainingAnswers.of(of("q1", [1, 2, 3]), 1)
    np.testing.assert_allclose(train.collapse(of("q2", [4, 0, 0]))[0], 1 / 3)
    with pytest.raises(DataError, match="'q1' has 3 options in one place and 4 in another"):
        train.collapse(of("q1", [1, 2, 3, 4]))


def test_there_is_an_oracle_only_for_groups_with_training_answers() -> None:
    train = merged(survey(seed=1, profiles=6))
    others = replace(train, profiles=train.profiles + 100)
    elsewhere = replace(others, groups=Labels.of([f"other {group}" for group in train.groups]))
    most = int(survey(seed=1, profiles=6).groupby(["question", "group"]).size().max())
    assert TrainingAnswers.of(train, most).has_oracle(others)
    assert not TrainingAnswers.of(train, most + 1).has_oracle(others)
    assert not TrainingAnswers.of(train, 1).has_oracle(elsewhere)


def test_mean_by_group_is_the_weighted_mean() -> None:
    rng = np.random.default_rng(2)
    values, weights, groups = rng.normal(size=(6, 2, 3)), rng.uniform(1, 2, 6), list("abbcab")
    means = mean_by_group(values, groups, weights)
    for name in "abc":
        rows = [i for i in range(6) if groups[i] == name]
        np.testing.assert_allclose(
            means[name], sum(values[i] * weights[i] for i in rows) / sum(weights[i] for i in rows)
        )


def test_swapped_profiles_are_a_fixed_derangement_across_groups_within_each_question() -> None:
    questions = ["q1"] * 9 + ["q2"] * 4
    groups = ["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["a", "b", "c", "d"]
    profiles = [*range(9), 0, 4, 7, 20]
    swapped = swap_profiles(questions, groups, profiles)
    group_of = dict(zip(profiles, groups, strict=True))
    for question in ("q1", "q2"):
        rows = [i for i, q in enumerate(questions) if q == question]
        assert sorted(swapped[i] for i in rows) == sorted(profiles[i] for i in rows)
        assert all(group_of[swapped[i]] != groups[i] for i in rows)
    assert swapped == swap_profiles(questions, groups, profiles)


def test_swapping_moves_everyone_even_inside_one_big_group_and_leaves_one_alone() -> None:
    big = swap_profiles(["q"] * 5, ["a", "a", "a", "a", "b"], [1, 2, 3, 4, 5])
    assert all(new != old for new, old in zip(big, [1, 2, 3, 4, 5], strict=True))
    assert swap_profiles(["q"], ["a"], [3]) == [3]
    only = swap_profiles(["q"] * 3, ["a"] * 3, [1, 2, 3])
    assert sorted(only) == [1, 2, 3]
    assert all(new != old for new, old in zip(only, [1, 2, 3], strict=True))


def test_a_question_put_to_one_group_alone_is_swapped_with_other_questions() -> None:
    """Every question has one person, as in conversations; still the swapped contender must not be the trained one."""
    questions, groups = [f"q{k}" for k in range(6)] + ["q6", "q6"], ["a", "b", "c"] * 2 + ["a", "a"]
    profiles = [10, 11, 12, 13, 14, 15, 10, 13]
    swapped = swap_profiles(questions, groups, profiles)
    group_of = dict(zip(profiles, groups, strict=True))
    assert all(group_of[new] != group for new, group in zip(swapped, groups, strict=True))


def test_swapping_gives_equal_profiles_equal_partners() -> None:
    swapped = swap_profiles(["q"] * 5, ["a", "b", "a", "c", "b"], [1, 2, 1, 3, 2])
    assert swapped[0] == swapped[2] != 1
    assert swapped[1] == swapped[4] != 2
