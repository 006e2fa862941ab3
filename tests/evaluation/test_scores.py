"""Scores and bootstrap intervals of a split against walks over single people with pandas, SciPy and scikit-learn."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from run_folder import content
from scipy import stats
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import accuracy_score, f1_score

from cuma_ds.config import EvaluationSection
from cuma_ds.evaluation.columns import Ragged
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.generation import diversities
from cuma_ds.evaluation.metrics import (
    calibration_error,
    distinct,
    equal_lengths,
    inequity,
    macro_f1,
    predicted_distributions,
    question_figures,
)
from cuma_ds.evaluation.resampling import Answers, interval, resample
from cuma_ds.evaluation.scores import BINS, Scorer
from cuma_ds.evaluation.sections import choice_split
from cuma_ds.evaluation.subgroups import subgroups

OPTIONS = {"q1": 4, "q2": 3, "q3": 2}
SETTINGS = EvaluationSection(min_answers=10, bootstrap=20)
FIELDS = {"gender": ["man", "woman", None] * 8, "age": [str(k % 4) for k in range(24)]}


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    """One row per answer of 150 people with 24 profiles in 5 countries; most answer two or three questions."""
    rng = np.random.default_rng(0)
    rows = []
    for person in range(150):
        profile = int(rng.integers(24))
        for question in rng.choice(list(OPTIONS), size=int(rng.integers(1, 4)), replace=False):
            taste = np.random.default_rng([profile % 5, ord(question[1])]).dirichlet(np.ones(OPTIONS[question]))
            rows.append(
                (person, str(question), f"land {profile % 5}", profile, int(rng.choice(OPTIONS[question], p=taste)))
            )
    return pd.DataFrame(rows, columns=["person", "question", "group", "profile", "answer"])


@pytest.fixture(scope="module")
def examples(people) -> ChoiceExamples:
    split: dict[str, list] = {
        name: [] for name in ("question_id", "question", "options", "group", "profile", "counts", "people")
    }
    for (question, group, profile), part in people.groupby(["question", "group", "profile"]):
        part = part.sort_values("answer")
        counts = [int((part["answer"] == k).sum()) for k in range(OPTIONS[question])]
        row = (
            question,
            f"{question}?",
            list("abcd")[: OPTIONS[question]],
            group,
            profile,
            counts,
            list(part["person"]),
        )
        for name, value in zip(split, row, strict=True):
            split[name].append(value)
    return ChoiceExamples.of(split)


@pytest.fixture(scope="module")
def rows(examples) -> dict[str, list[np.ndarray]]:
    found = {}
    for seed, name in enumerate(["collapse", "oracle", "trained"]):
        rng = np.random.default_rng(seed)
        found[name] = [rng.dirichlet(np.ones(len(counts))) for counts in examples.counts]
    # The oracle is what people answered, so that it is better than the rest.
    found["oracle"] = [(counts + 0.1) / (counts + 0.1).sum() for counts in examples.counts]
    return found


def walk(
    people: pd.DataFrame, examples: ChoiceExamples, given: list[np.ndarray], kept: set, large: dict
) -> dict[str, float]:
    """Every metric from single answers.

    kept: (question, group) cells that are compared.  large: column -> labels with enough people.
    """
    by_key = {(q, p): given[i] for i, (q, p) in enumerate(zip(examples.questions, examples.profiles, strict=True))}
    shares = [by_key[row.question, row.profile] for row in people.itertuples()]
    table = people.reset_index(drop=True).assign(sure=[p.max() for p in shares], share=shares)
    # One row for each option that ties for the mode; together they weigh one.
    tied = table.assign(mode=[np.flatnonzero(p == p.max()) for p in shares]).explode("mode").astype({"mode": int})
    tied["weight"] = 1 / tied.groupby(level=0)["mode"].transform("count")
    table["right"] = ((tied["mode"] == tied["answer"]) * tied["weight"]).groupby(level=0).sum()

    def f1(part: pd.DataFrame) -> float:
        return f1_score(part["answer"], part["mode"], average="macro", sample_weight=part["weight"], zero_division=0)

    def argmax_distance(part: pd.DataFrame) -> float:
        steps = OPTIONS[part["question"].iloc[0]] - 1
        return stats.wasserstein_distance(part["answer"] / steps, part["mode"] / steps, part["weight"], part["weight"])

    def distance(part: pd.DataFrame) -> float:
        options = OPTIONS[part["question"].iloc[0]]
        places = np.arange(options) / (options - 1)
        observed = [np.mean(part["answer"] == k) for k in range(options)]
        return stats.wasserstein_distance(places, places, np.mean(list(part["share"]), axis=0), observed)

    def shares_of(part: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        options = range(OPTIONS[part["question"].iloc[0]])
        return np.mean(list(part["share"]), axis=0), np.array([np.mean(part["answer"] == k) for k in options])

    def over_questions(name: str, distances: list[float]) -> dict[str, float]:
        """The share of questions within each threshold, as the benchmark's notebook draws it."""
        curve = [np.mean(np.array(distances) <= k * 0.05 + 1e-12) for k in range(9)]
        area = np.trapezoid(curve, dx=0.05) / 0.4
        return {f"{name}_median": np.median(distances), f"{name}_within": curve[4], f"{name}_auc": area}

    cells = [part for key, part in table.groupby(["question", "group"]) if key in kept]
    sizes = [len(part) for part in cells]
    by_group: dict[str, list[tuple[float, int]]] = {}
    for part in cells:
        by_group.setdefault(part["group"].iloc[0], []).append((distance(part), len(part)))
    full = [distance(part) for _, part in table.groupby("question")]
    modes = [argmax_distance(part) for _, part in tied.groupby("question")]
    fields = table.assign(**{field: [labels[p] for p in table["profile"]] for field, labels in FIELDS.items()})
    bins = np.minimum((table["sure"] * BINS).astype(int), BINS - 1)
    spreads = []
    for field in FIELDS:
        accuracy = fields[fields[field].isin(large[field])].groupby(field)["right"].mean()
        spreads.append(np.std(accuracy))
    return {
        "emd": np.average([distance(part) for part in cells], weights=sizes),
        "total_variation": np.average([np.abs(np.subtract(*shares_of(c))).sum() / 2 for c in cells], weights=sizes),
        "similarity": np.average([1 - jensenshannon(*shares_of(c)) for c in cells], weights=sizes),
        "emd_worst_group": max(
            np.average([d for d, _ in parts], weights=[n for _, n in parts]) for parts in by_group.values()
        ),
        "log_score": np.mean([np.log(p[answer]) for p, answer in zip(shares, table["answer"], strict=True)]),
        "emd_questions": np.mean(full),
        "emd_argmax": np.mean(modes),
        **over_questions("questions", full),
        **over_questions("argmax", modes),
        "accuracy": accuracy_score(tied["answer"], tied["mode"], sample_weight=tied["weight"]),
        "macro_f1": f1(tied),
        "macro_f1_questions": np.mean([f1(part) for _, part in tied.groupby("question")]),
        "group_accuracy": table[table["group"].isin(large["group"])].groupby("group")["right"].mean().mean(),
        "inequity": np.mean(spreads),
        "entropy": np.mean([stats.entropy(p) for p in shares]),
        "calibration_error": sum(
            len(b) / len(table) * abs(b["right"].mean() - b["sure"].mean()) for _, b in table.groupby(bins)
        ),
    }


def settings(people: pd.DataFrame, limit: int, smallest: int) -> tuple[set, dict]:
    kept = {key for key, part in people.groupby(["question", "group"]) if len(part) >= limit}
    labelled = people.assign(**{field: [labels[p] for p in people["profile"]] for field, labels in FIELDS.items()})
    large = {}
    for column in ("group", *FIELDS):
        sizes = labelled.groupby(column)["person"].nunique()
        large[column] = set(sizes[sizes >= smallest].index)
    return kept, large


@pytest.mark.parametrize(("limit", "smallest"), [(1, 2), (20, 2), (20, 31)])
def test_scores_equal_a_walk_over_single_answers(people, examples, rows, limit, smallest) -> None:
    kept, large = settings(people, limit, smallest)
    found = Scorer(examples, FIELDS, limit, smallest).scores(rows).rows
    assert limit == 1 or 0 < len(kept) < 15
    assert smallest < 30 or 0 < len(large["group"]) < 5
    for name, given in rows.items():
        for metric, value in walk(people, examples, given, kept, large).items():
            assert found[name][metric].value == pytest.approx(value, abs=1e-12), (name, metric)
    span = found["collapse"]["emd"].value - found["oracle"]["emd"].value
    assert found["trained"]["recovered"].value == pytest.approx(
        (found["collapse"]["emd"].value - found["trained"]["emd"].value) / span
    )


def test_the_worst_group_is_named_and_its_distance_is_the_score(people, examples, rows) -> None:
    found = Scorer(examples, FIELDS, 20).scores(rows)
    section = content(choice_split(examples, rows, FIELDS, EvaluationSection(min_answers=20, bootstrap=0)))
    for name, worst in found.worst.items():
        assert worst.distance == pytest.approx(found.rows[name]["emd_worst_group"].value, abs=1e-12)
        own = [cell for cell in section["cells"] if cell["group"] == worst.group]
        weights = [cell["answers"] for cell in own]
        assert worst.answers == sum(weights)
        assert worst.distance == pytest.approx(
            np.average([cell["emd"][name] for cell in own], weights=weights), abs=1e-6
        )
        assert section["worst_groups"][name]["group"] == worst.group
    # No group is named where none is large enough.
    assert Scorer(examples, FIELDS, 10_000).scores(rows).worst == {}


def test_people_with_the_same_answers_are_one_kind(people, examples) -> None:
    answers = Answers.of(examples)
    sets = people.groupby("person")[["question", "profile", "answer"]].apply(
        lambda part: frozenset(map(tuple, part.to_numpy().tolist()))
    )
    kind_U, people_Y = answers.kinds()
    assert answers.people == people["person"].nunique()
    assert sorted(people_Y) == sorted(Counter(sets).values())
    assert max(people_Y) > 1
    for kind in set(kind_U):
        assert len({sets.iloc[person] for person in np.flatnonzero(kind_U == kind)}) == 1


@pytest.mark.parametrize("chunk", [1, 64])
def test_intervals_equal_a_loop_over_drawn_people(people, examples, rows, chunk, monkeypatch) -> None:
    limit, smallest, replicates = 20, 5, 5
    scorer = Scorer(examples, FIELDS, limit, smallest)
    monkeypatch.setattr("cuma_ds.evaluation.scores._CHUNK", chunk * 100_000)
    kept, large = settings(people, limit, smallest)
    found = scorer.scores(rows, replicates, seed=3)
    kind_U, people_Y = Answers.of(examples).kinds()
    first = [int(np.flatnonzero(kind_U == kind)[0]) for kind in range(len(people_Y))]
    looped: dict[str, dict[str, list[float]]] = {name: {} for name in rows}
    for (weights,) in resample(people_Y, replicates, 3, 1):
        drawn = [
            part
            for kind, times in zip(first, weights, strict=True)
            for part in [people[people["person"] == kind]] * int(times)
        ]
        assert len(drawn) == 150
        for name, given in rows.items():
            for metric, value in walk(pd.concat(drawn), examples, given, kept, large).items():
                looped[name].setdefault(metric, []).append(value)
    for name in rows:
        for metric, values in looped[name].items():
            expected = np.percentile(values, [2.5, 97.5]) - np.mean(values) + found.rows[name][metric].value
            assert found.rows[name][metric].interval == pytest.approx(tuple(expected), abs=1e-12), metric
    gap = np.array(looped["trained"]["emd"]) - np.array(looped["collapse"]["emd"])
    assert found.differences["collapse"]["emd"].interval == pytest.approx(
        tuple(np.percentile(gap, [2.5, 97.5]) - np.mean(gap) + found.differences["collapse"]["emd"].value)
    )


def test_an_interval_covers_what_drawing_new_people_gives() -> None:
    """Accuracy of one question with independent people: the interval has the width of the binomial one."""
    split = {
        "question_id": ["q"],
        "question": ["?"],
        "options": [["a", "b"]],
        "group": ["x"],
        "profile": [0],
        "counts": [[300, 100]],
    }
    scorer = Scorer(ChoiceExamples.of(split | {"people": [list(range(400))]}), {})
    low, high = scorer.scores({"trained": [[0.9, 0.1]]}, replicates=4000).rows["trained"]["accuracy"].interval
    assert (low, high) == pytest.approx(stats.norm.interval(0.95, 0.75, np.sqrt(0.75 * 0.25 / 400)), abs=0.004)


def test_answers_of_one_person_are_drawn_together() -> None:
    """Ten people who each answer twenty questions alike are ten draws, not two hundred."""
    names = [f"q{k}" for k in range(20)]
    split = {
        "question_id": names,
        "question": names,
        "options": [["a", "b"]] * 20,
        "group": ["x"] * 20,
        "profile": [0] * 20,
    }
    counts, right = {"counts": [[5, 5]] * 20}, [[0.9, 0.1]] * 20
    together = Scorer(ChoiceExamples.of({**split, **counts, "people": [list(range(10))] * 20}), {})
    apart = Scorer(ChoiceExamples.of({**split, **counts}), {})
    assert (together.answers.people, together.answers.known, apart.answers.people, apart.answers.known) == (
        10,
        True,
        200,
        False,
    )
    wide, narrow = (
        s.scores({"trained": right}, replicates=2000).rows["trained"]["accuracy"].interval for s in (together, apart)
    )
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(np.sqrt(20), rel=0.1)


def weighted(examples: ChoiceExamples, weight_P: np.ndarray) -> ChoiceExamples:
    """The same answers, each with the weight of its person."""
    weights = [weight_P[people] for people in examples.people]
    options = [np.repeat(np.arange(len(c)), c.astype(int)) for c in examples.counts]
    sums = [np.bincount(o, w, len(c)) for o, w, c in zip(options, weights, examples.counts, strict=True)]
    answers = Ragged.of([c.astype(np.int64) for c in examples.counts], np.int64)
    return replace(examples, counts=Ragged.of(sums), answers=answers, weights=Ragged.of(weights))


def rights(people: pd.DataFrame, examples: ChoiceExamples, given: list[np.ndarray]) -> list[float]:
    """Whether each answer is the one the row finds most likely."""
    by_key = dict(zip(zip(examples.questions, examples.profiles, strict=True), given, strict=True))
    return [float(np.argmax(by_key[row.question, row.profile]) == row.answer) for row in people.itertuples()]


def test_equal_survey_weights_change_nothing(examples, rows) -> None:
    plain, alike = (
        content(choice_split(some, rows, FIELDS, SETTINGS)) for some in (examples, weighted(examples, np.ones(150)))
    )
    assert (plain.pop("weighted"), alike.pop("weighted"), alike.pop("effective_answers")) == (
        False,
        True,
        plain["answers"],
    )
    for question in alike["questions"].values():
        del question["effective_answers"]
    assert alike == plain


def test_intervals_with_survey_weights_draw_people_with_their_weights(people, examples, rows) -> None:
    """People with the same answers but another weight are no longer one kind."""
    weight_P = np.where(np.arange(150) % 3 == 0, 2.0, 0.5)
    some = weighted(examples, weight_P)
    kind_U, people_Y = Answers.of(some).kinds()
    table = people.assign(weight=weight_P[people["person"]], right=rights(people, examples, rows["trained"]))
    kinds: dict[int, frozenset] = {}
    for person, part in table.groupby("person"):
        mine = frozenset(zip(part["question"], part["profile"], part["answer"], part["weight"], strict=True))
        assert kinds.setdefault(int(kind_U[person]), mine) == mine
    assert len(set(kinds.values())) == len(kinds) == len(people_Y)
    of_kind = table.assign(kind=kind_U[table["person"]], right=table["right"] * table["weight"])
    sums = of_kind.groupby("kind")[["right", "weight"]].sum().div(people_Y, axis=0)
    values = [
        (drawn @ sums["right"]) / (drawn @ sums["weight"])
        for drawn in np.concatenate(list(resample(people_Y, 40, 3, 40)))
    ]
    found = Scorer(some, FIELDS, 20).scores(rows, 40, seed=3).rows["trained"]["accuracy"]
    assert found.interval == pytest.approx(
        tuple(np.percentile(values, [2.5, 97.5]) - np.mean(values) + found.value), abs=1e-12
    )


def test_survey_weights_count_as_a_walk_over_weighted_answers(people, examples, rows) -> None:
    weight_P = np.random.default_rng(7).uniform(0.3, 3, 150)
    table = people.assign(weight=weight_P[people["person"]])
    section = content(choice_split(weighted(examples, weight_P), rows, FIELDS, SETTINGS))
    assert section["people"] == 150
    assert section["answers"] == pytest.approx(table["weight"].sum(), abs=0.01)
    assert section["effective_answers"] == pytest.approx(
        table["weight"].sum() ** 2 / (table["weight"] ** 2).sum(), abs=0.01
    )
    found = Scorer(weighted(examples, weight_P), FIELDS, 20).scores(rows, 10).rows["trained"]
    by_key = dict(zip(zip(examples.questions, examples.profiles, strict=True), rows["trained"], strict=True))
    table["right"] = rights(people, examples, rows["trained"])
    assert found["accuracy"].value == pytest.approx(np.average(table["right"], weights=table["weight"]), abs=1e-12)
    distances = []
    for question, part in table.groupby("question"):
        options = OPTIONS[question]
        shares = np.average([by_key[question, profile] for profile in part["profile"]], axis=0, weights=part["weight"])
        places, observed = np.linspace(0, 1, options), part["answer"] / (options - 1)
        distances.append(stats.wasserstein_distance(places, observed, shares, part["weight"]))
    assert found["emd_questions"].value == pytest.approx(np.mean(distances), abs=1e-12)


def test_the_same_seed_draws_the_same_people_in_any_chunks() -> None:
    sizes = np.array([3, 1, 6])
    whole = np.concatenate(list(resample(sizes, 9, 1, 9)))
    np.testing.assert_array_equal(whole, np.concatenate(list(resample(sizes, 9, 1, 2))))
    assert (whole.sum(axis=1) == 10).all()
    many = np.concatenate(list(resample(sizes, 4000, 0, 500)))
    np.testing.assert_allclose(many.mean(axis=0), sizes, atol=0.1)


def test_an_interval_of_nothing_is_none() -> None:
    assert interval(np.array([np.nan, np.nan]), 1.0) is None
    assert interval(np.array([1.0, np.nan, 3.0]), float("nan")) is None
    assert interval(np.array([1.0, 3.0]), 12.0) == pytest.approx((11.05, 12.95))
    assert interval(np.array([1.0, 3.0] * 20 + [np.nan]), 12.0) == pytest.approx((11.0, 13.0))
    # Where groups hardly differ, many samples of people have an oracle no better than one global distribution, so
    # that nothing could be
    # recovered; the other samples alone would claim to know more than they do.
    assert interval(np.array([1.0, np.nan, 3.0]), 12.0) is None


@pytest.mark.parametrize("nominal", [True, False])
def test_the_order_of_unordered_options_changes_no_number(people, examples, rows, nominal) -> None:
    """Nominal questions are judged by total variation; an ordinal one with shuffled options is another question."""
    order = {"q1": [2, 0, 3, 1], "q2": [1, 2, 0], "q3": [0, 1]}
    marked = replace(examples, nominal=frozenset(OPTIONS) if nominal else frozenset())
    turned = [counts[order[q]] for q, counts in zip(examples.questions, examples.counts, strict=True)]
    shuffled = replace(marked, counts=Ragged.of(turned))
    there = {
        name: [shares[order[q]] for q, shares in zip(examples.questions, row, strict=True)]
        for name, row in rows.items()
    }
    # Who gave which answer moves along with the options; without people every answer is somebody of its own.
    before, after = (
        Scorer(replace(some, people=None), FIELDS, 20).scores(given)
        for some, given in ((marked, rows), (shuffled, there))
    )
    for name in rows:
        if not nominal:
            assert after.rows[name]["emd"].value != pytest.approx(before.rows[name]["emd"].value, abs=1e-3)
            continue
        for metric in set(before.rows[name]) - {"macro_f1"}:  # over letters, as its name in the report says
            assert after.rows[name][metric].value == pytest.approx(before.rows[name][metric].value, abs=1e-12), (
                name,
                metric,
            )


def test_a_split_of_both_scales_judges_each_question_by_its_own_distance(people, examples, rows) -> None:
    mixed = replace(examples, nominal=frozenset({"q1"}))
    scorer = Scorer(mixed, FIELDS, 20)
    found = scorer.scores(rows).rows["trained"]
    cells = scorer.cells
    distances = []
    for (question, _), p, q in zip(
        cells.keys, predicted_distributions(cells, rows["trained"], mixed.counts), cells.observed, strict=True
    ):
        places = np.linspace(0, 1, len(p))
        tv = max(
            abs(sum(p[k] - q[k] for k in some))
            for size in range(len(p))
            for some in itertools.combinations(range(len(p)), size)
        )
        distances.append(tv if question == "q1" else stats.wasserstein_distance(places, places, p, q))
    assert {key[0] for key in cells.keys} == set(OPTIONS)
    assert found["emd"].value == pytest.approx(np.average(distances, weights=cells.answers), abs=1e-12)


def test_options_that_tie_share_the_mode() -> None:
    """Which of two equally probable options stands first decides nothing."""
    split = {"question_id": ["q"], "question": ["?"], "options": [["a", "b", "c"]], "group": ["x"], "profile": [0]}
    for counts in ([6, 2, 0], [2, 6, 0]):
        found = (
            Scorer(ChoiceExamples.of({**split, "counts": [counts]}), {})
            .scores({"trained": [[0.4, 0.4, 0.2]]})
            .rows["trained"]
        )
        assert found["accuracy"].value == 0.5
        # Half of the answers are predicted as a, half as b: EMD between (0.75, 0.25) and (0.5, 0.5) with n = 3.
        assert found["emd_argmax"].value == pytest.approx(0.125)


def test_no_cell_is_large_enough_and_accuracy_still_counts(people, examples, rows) -> None:
    found = Scorer(examples, FIELDS, min_answers=10_000).scores(rows, replicates=10)
    assert found.rows["trained"]["emd"].value is None
    assert found.rows["trained"]["emd"].interval is None
    assert found.rows["trained"]["accuracy"].value > 0
    assert found.subgroups == {}


def test_subgroups_are_named_from_the_size_on_and_carry_intervals(people, examples, rows) -> None:
    kept = people.assign(age=[FIELDS["age"][p] for p in people["profile"]])
    sizes = kept.groupby("age")["person"].nunique()
    limit = int(sizes.sort_values().iloc[1])
    scorer = Scorer(examples, FIELDS, min_answers=limit)
    found = scorer.scores(rows, replicates=20).subgroups
    assert scorer.sizes["age"] == sizes.to_dict()
    assert set(found["age"]) == set(sizes[sizes >= limit].index)
    label = next(iter(found["age"]))
    by_key = {
        (q, p): rows["trained"][i] for i, (q, p) in enumerate(zip(examples.questions, examples.profiles, strict=True))
    }
    part = kept[kept["age"] == label]
    score = found["age"][label]["trained"]
    assert score.value == pytest.approx(
        np.mean([row.answer == np.argmax(by_key[row.question, row.profile]) for row in part.itertuples()])
    )
    assert score.interval[0] <= score.value <= score.interval[1]


def test_the_distance_of_a_subgroup_is_over_the_questions_it_answered_often_enough(people, examples, rows) -> None:
    """A perfect sampler of few answers is far from the observed ones, the further the smaller the subgroup."""
    least = 25
    split = content(choice_split(examples, rows, FIELDS, EvaluationSection(min_answers=least, bootstrap=0)))
    kept = people.assign(age=[FIELDS["age"][p] for p in people["profile"]])
    by_key = {
        (q, p): rows["trained"][i] for i, (q, p) in enumerate(zip(examples.questions, examples.profiles, strict=True))
    }
    small = 0
    for shown in split["subgroups"]["age"]["shown"]:
        part = kept[kept["age"] == shown["label"]]
        distances, sizes = [], []
        for question, asked in part.groupby("question"):
            if len(asked) < least:
                small += 1
                continue
            options = OPTIONS[question]
            places, shares = (
                np.linspace(0, 1, options),
                np.mean([by_key[question, p] for p in asked["profile"]], axis=0),
            )
            observed = asked["answer"] / (options - 1)
            distances.append(stats.wasserstein_distance(places, observed, shares))
            sizes.append(len(asked))
        assert shown["answers"] == len(part)
        expected = np.average(distances, weights=sizes) if sizes else None
        assert shown["rows"]["trained"]["emd"] == pytest.approx(expected, abs=1e-6)
    assert small > 0


def test_reliability_bins_hold_every_answer_once(people, examples, rows) -> None:
    found = Scorer(examples, {}).scores(rows)
    right, sure, answers = found.reliability["trained"]
    assert answers.sum() == len(people)
    filled = answers > 0
    assert calibration_error((right * answers)[filled], (sure * answers)[filled], len(people)) == pytest.approx(
        found.rows["trained"]["calibration_error"].value
    )
    assert (np.floor(sure[filled] * BINS).clip(max=BINS - 1) == np.flatnonzero(filled)).all()


def test_macro_f1_is_scikit_learns() -> None:
    rng = np.random.default_rng(2)
    for letters in (2, 4, 7):
        true, predicted = rng.integers(0, letters, 200), rng.integers(0, max(letters - 1, 2), 200)
        counts = [np.bincount(x, minlength=9) for x in (true, predicted, true[true == predicted])]
        assert float(macro_f1(*counts)) == pytest.approx(f1_score(true, predicted, average="macro", zero_division=0))


def test_calibration_error_by_hand() -> None:
    # Ten answers said with 0.9 of which eight are right, ten with 0.6 of which seven are: (|8 - 9| + |7 - 6|) / 20.
    assert float(calibration_error([8, 7], [9, 6], 20)) == pytest.approx(0.1)


def test_inequity_by_hand() -> None:
    # Standard deviations 0.1 and 0.2 of two fields; a subgroup without answers does not count.
    found = inequity([np.array([[0.4, 0.6]]), np.array([[0.1, 0.5, np.nan]])])
    assert float(found[0]) == pytest.approx(0.15)
    assert np.isnan(inequity([])).all()
    assert np.isnan(inequity([np.array([[0.4, np.nan]])])).all()


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),
        (["The cat", "the cat sat"], 2, 2 / 3),
        (["one", "two"], 1, 1.0),
    ],
)
def test_distinct_by_hand(texts: list[str], n: int, expected: float) -> None:
    assert distinct(texts, n) == pytest.approx(expected)


def test_distinct_of_too_short_texts_is_not_a_number() -> None:
    assert np.isnan(distinct(["one", "two"], 2))


def test_distinct_with_equal_lengths_is_of_the_same_number_of_words() -> None:
    rows = {"before": ["a b c d e", "x y", ""], "trained": ["a a", "x y z", "w"]}
    found = equal_lengths(rows)
    # The last prompt has an empty answer, and is left out.
    assert found == {"before": ["a b", "x y"], "trained": ["a a", "x y"]}
    by_row = diversities(rows)
    assert by_row["before"].equal.distinct_1 == 1.0
    assert by_row["trained"].equal.distinct_1 == 3 / 4
    assert by_row["before"].equal.words == by_row["trained"].equal.words == 2
    assert by_row["before"].words == pytest.approx(7 / 3, abs=1e-6)
    assert diversities({"before": ["a b"]})["before"].equal is None


def test_a_longer_writer_of_the_same_words_is_as_varied_at_equal_lengths() -> None:
    """Both draw words from one vocabulary; only the number of words differs."""
    rng = np.random.default_rng(0)
    words = {
        name: [" ".join(rng.choice(list("abcdefghijklmnop"), length)) for _ in range(40)]
        for name, length in (("before", 200), ("trained", 20))
    }
    found = diversities(words)
    assert found["before"].distinct_2 < 0.5 * found["trained"].distinct_2
    assert found["before"].equal.distinct_2 == pytest.approx(found["trained"].equal.distinct_2, rel=0.1)


def test_figures_over_questions_by_hand() -> None:
    found = question_figures([0.0, 0.05, 0.2, 0.3, np.nan])
    assert float(found["median"]) == pytest.approx(0.125)
    assert float(found["within"]) == 0.75
    # Shares within 0, 0.05, ... 0.4: 1, 2, 2, 2, 3, 3, 4, 4, 4 quarters.
    assert float(found["auc"]) == pytest.approx((1 / 2 + 2 + 2 + 2 + 3 + 3 + 4 + 4 + 4 / 2) / 4 / 8)
    assert all(np.isnan(value) for value in question_figures([np.nan, np.nan]).values())
    assert question_figures(np.zeros((3, 0)))["median"].shape == (3,)
    # A distance of exactly 0.2 counts, whatever its last bit is.
    assert float(question_figures([0.1 + 0.1, 0.3 - 0.1])["within"]) == 1.0


def test_subgroups_of_profiles() -> None:
    ages = list(range(20, 60, 2))
    profiles = [
        {"fields": {"age": age, "sex": "f" if age < 40 else "Prefer not to say", "one": 1, "kids": age % 3}}
        for age in ages
    ]
    found = subgroups([*profiles, {"fields": {}}])
    assert set(found) == {"age", "kids"}
    assert Counter(found["age"]) == {"20 to 28": 5, "30 to 38": 5, "40 to 48": 5, "50 to 58": 5, None: 1}
    assert found["kids"][:3] == ["2", "1", "0"]
