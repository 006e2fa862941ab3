"""Malformed input of every kind is refused in one line with code 2 and changes nothing. The campaign has more of it."""

from __future__ import annotations

import pytest
from broken_inputs import World, cases
from refusals import build_world, copy_of, one

KINDS = ("recipe", "data", "checkpoint", "profile", "model", "call", "environment")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return build_world(tmp_path_factory.mktemp("malformed") / "world")


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_case_of_each_kind(kind, world, tmp_path) -> None:
    case = next(case for case in cases(seed=2) if case.kind == kind and not case.fresh)
    found = one(case, copy_of(world, tmp_path / "case"), "1", world_size=1)
    assert found["faults"] == [], found


def test_a_damaged_model_leaves_no_run_folder_so_that_the_corrected_recipe_starts(world, tmp_path) -> None:
    case = next(case for case in cases(seed=2) if case.name == "weights cut short")
    copy = copy_of(world, tmp_path / "case")
    whole = (copy / "model" / "model.safetensors").read_bytes()
    assert one(case, copy, "1", world_size=1)["faults"] == []
    assert not (copy / "runs" / "fresh").exists()
    (copy / "model" / "model.safetensors").write_bytes(whole)
    fixed = case._replace(change=lambda world: None)
    assert "codes [0]" in one(fixed, copy, "1", world_size=1)["faults"][0]
    assert (copy / "runs" / "fresh" / "checkpoints" / "step-2").is_dir()


def test_what_is_wrong_about_a_refusal_is_seen(world, tmp_path) -> None:
    """A command that works is no refusal."""
    case = cases(seed=2)[0]._replace(
        command=("launchers/status.py", "{world}/runs/done"), change=lambda world: None, variables={}, fresh=False
    )
    found = one(case, copy_of(world, tmp_path / "case"), "1", world_size=1)
    assert found["faults"] == ["codes [0]", "0 lines of errors"]
