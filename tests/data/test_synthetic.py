"""The benchmark of known truth: separations, quotas, and that reports take the truth for the oracle."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data
from cuma_ds.data.sources.synthetic import GROUPS_PER_MODE, PEOPLE, TRADITIONS, separation, truth
from cuma_ds.errors import ConfigError, DataError
from cuma_ds.recipe import make_config


def load(**section: object) -> PreparedData:
    return load_data(DataSection.model_validate({"source": "synthetic", **section}), "wvs")


@pytest.mark.parametrize("modes", range(2, 9))
@pytest.mark.parametrize("apart", [3.0, 10.0, 30.0])
def test_modes_are_as_far_apart_as_asked(modes, apart) -> None:
    """Up to the rounding of shares to whole people."""
    counts = truth(modes, apart)
    assert (counts.sum(axis=-1) == PEOPLE).all()
    assert separation(counts) == pytest.approx(apart, rel=0.1)
    # Every option of a question is the favourite of one mode.
    assert (np.sort(counts.argmax(axis=-1), axis=0) == np.arange(modes)[:, None]).all()


def test_separation_is_the_papers_ratio() -> None:
    """Against covariances of people who answer as the truth says, a million draws for each mode."""
    counts = truth(3, 5.0)
    generator = np.random.default_rng(0)
    answers = [
        np.stack([generator.choice(3, 1_000_000, p=shares / PEOPLE) for shares in mode], axis=1) for mode in counts
    ]
    pooled = np.linalg.inv(np.mean([np.cov(people.T) for people in answers], axis=0))
    means = [people.mean(axis=0) for people in answers]
    distances = [(one - other) @ pooled @ (one - other) for one, other in combinations(means, 2)]
    assert separation(counts) == pytest.approx(min(distances) / counts.shape[1], rel=0.01)


def test_every_group_answers_exactly_as_its_mode(tmp_path) -> None:
    data = load(modes=4)
    counts = truth(4, 10.0)
    mode_of = [TRADITIONS.index(str(profile["fields"]["tradition"])) for profile in data.profiles]
    assert np.bincount(mode_of).tolist() == [GROUPS_PER_MODE] * 4
    questions = ["family", "work", "religion", "nature"]
    seen = 0
    for name, times in (("train", 1), ("valid", 1), ("test", 1), ("heldout", 3)):
        for row in data.splits[name]:
            asked = counts[mode_of[row["profile"]], questions.index(row["question_id"])]
            assert row["counts"] == (times * asked).tolist()
            seen += times
    assert seen == 3 * 24 * 4


def test_people_of_one_group_do_not_answer_alike() -> None:
    """Answers of a person to two questions are independent given the group, as the separation assumes."""
    data = load(heldout_fraction=0.0)
    rows = [row for row in data.splits["train"] if row["profile"] == 0]
    by_person = np.full((PEOPLE, 4), -1)
    for question, row in enumerate(rows):
        by_person[row["people"], question] = np.repeat(np.arange(4), row["counts"])
    assert (by_person >= 0).all()
    correlations = np.corrcoef(by_person.T)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 3 / np.sqrt(PEOPLE)


def test_no_person_of_training_is_tested() -> None:
    data = load()
    people = {name: {person for row in split for person in row["people"]} for name, split in data.splits.items()}
    assert not people["train"] & (people["test"] | people["heldout"])
    assert not set(data.splits["train"]["group"]) & set(data.splits["heldout"]["group"])


def test_names_do_not_tell_the_mode() -> None:
    """A word of the profile does, and all groups of a mode share it; starts and ends of names are spread over modes."""
    by_mode: dict[str, list[str]] = {}
    for profile in load(modes=8).profiles:
        by_mode.setdefault(str(profile["fields"]["tradition"]), []).append(str(profile["fields"]["country"]))
    names = [name for group in by_mode.values() for name in group]
    assert len(set(names)) == len(names) == 8 * GROUPS_PER_MODE
    assert all(
        len({name[-3:] for name in group}) > 1 and len({name[:3] for name in group}) > 1 for group in by_mode.values()
    )


def test_the_truth_is_the_same_for_every_seed_and_the_held_out_groups_are_not() -> None:
    one, other = load(split_seed=0), load(split_seed=1)
    assert one.sentences == other.sentences
    assert one.manifest["heldout_groups"] != other.manifest["heldout_groups"]


def test_a_prepared_folder_remembers_what_it_was_made_by(tmp_path) -> None:
    load(modes=3).save(tmp_path / "three")
    assert len(load(modes=3, path=str(tmp_path / "three")).splits["train"]) > 0
    with pytest.raises(DataError, match=r"was prepared with modes 3, but the recipe says data.modes: 4"):
        load(path=str(tmp_path / "three"))


def test_keys_of_the_benchmark_belong_to_it() -> None:
    with pytest.raises(ConfigError, match=r"data: modes is 3, but only source synthetic reads it; leave it out"):
        make_config({"model": {"path": "m"}, "adapters": {"method": "lora"}, "data": {"modes": 3}})
    with pytest.raises(ConfigError, match=r"data.modes is 9"):
        make_config(
            {"model": {"path": "m"}, "adapters": {"method": "lora"}, "data": {"source": "synthetic", "modes": 9}}
        )
    with pytest.raises(DataError, match=r"there is no question 'famly'.*did you mean 'family'"):
        load(questions=["famly"])
