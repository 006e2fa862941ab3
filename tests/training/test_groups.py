"""Groups of people that metrics name, and those that are too small for it."""

from __future__ import annotations

import pytest
from small_runs import DATA

from cuma_ds.config import RunConfig
from cuma_ds.data import load_data
from cuma_ds.errors import ConfigError
from cuma_ds.training.groups import Groups


def config(field: str | None, least: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "adapters": {"method": "lora"},
            "data": {"source": "jsonl", "path": str(DATA)},
            "training": {"group_field": field},
            "evaluation": {"min_answers": least},
        }
    )


def test_groups_with_enough_answers_have_names_and_the_others_are_one(tmp_path) -> None:
    given = config("country", 8)
    data = load_data(given.data, given.profiles.template)
    groups = Groups.of(given, data)
    countries = [profile["fields"]["country"] for profile in data.profiles]
    train = data.splits["train"]
    answers = {
        country: sum(int(sum(row["counts"])) for row in train if countries[row["profile"]] == country)
        for country in set(countries)
    }
    assert set(groups.names) == {country for country, count in answers.items() if count >= 8}
    assert 0 < len(groups.names) < len(answers), "there must be both kinds of groups for this test to mean something"
    for country, place in zip(countries, groups.of_profile_N, strict=True):
        expected = groups.names.index(country) if country in groups.names else len(groups.names)
        assert place == expected


def test_no_field_no_groups_and_an_unknown_field_is_named() -> None:
    given = config(None, 1)
    data = load_data(given.data, given.profiles.template)
    assert Groups.of(given, data) is None
    with pytest.raises(ConfigError, match=r"no profile has the field 'contry' \(did you mean 'country'\?\)"):
        Groups.of(config("contry", 1), data)
