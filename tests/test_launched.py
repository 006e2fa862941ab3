"""The variables by which launchers place a rank: what they say, and values that make no sense."""

from __future__ import annotations

import pytest

from cuma_ds.errors import TopologyError
from cuma_ds.launched import Launched, launched

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
RIGHT = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def bare(monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_what_launchers_set_is_read_and_without_one_there_is_one_process(monkeypatch) -> None:
    assert launched() == Launched(0, 1, 0, None)
    for name, value in RIGHT.items():
        monkeypatch.setenv(name, value)
    assert launched() == Launched(3, 4, 1, 29500)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in NAMES if name != "MASTER_ADDR" for value in ("", "x", "-1", "1.5", "²")),
        ("RANK", "4"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536"),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_named(name, value, monkeypatch) -> None:
    for known, right in {**RIGHT, name: value}.items():
        monkeypatch.setenv(known, right)
    with pytest.raises(TopologyError, match=rf"the environment variable {name} is '{value}'; allowed: a whole number"):
        launched()


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_several_ranks_need_to_know_where_they_meet(name, monkeypatch) -> None:
    for known, right in RIGHT.items():
        if known != name:
            monkeypatch.setenv(known, right)
    with pytest.raises(TopologyError, match=rf"WORLD_SIZE is 4, but {name} is not set"):
        launched()
