"""zero2_sharded_overlap gathers layers while the one before computes, by the order of events on CPUs."""

from __future__ import annotations

import itertools
import json

import pytest
from ranks import run
from small_runs import recipe

from cuma_ds.parallel.ds_config import DS_CONFIGS

Events = list[tuple[str, str, dict[str, str]]]

# name: elements that are gathered ahead of their use, elements within which a layer is kept; None as in the file.
CASES = {"as-shipped": None, "one-ahead": (1, 0), "none-ahead": (0, 0)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory, tiny_llama, tiny_encoder) -> dict[str, list[dict[str, Events]]]:
    """Of each case and rank, the events of the last step."""
    folder, paths = tmp_path_factory.mktemp("ahead"), []
    settings = json.loads((DS_CONFIGS / "zero2_sharded_overlap.json").read_text())
    for name, case in CASES.items():
        if case is not None:
            sizes = {"prefetch_bucket_size": case[0], "max_reuse_distance": case[1]}
            settings["frozen_backbone"] |= sizes
        (folder / f"{name}.json").write_text(json.dumps(settings))
        parallel = {"deepspeed_config": str(folder / f"{name}.json")}
        paths.append(str(recipe(folder, tiny_llama, tiny_encoder, name, parallel=parallel)))
    said: list[list[dict[str, Events]]] = []
    for rank, (code, output) in enumerate(run(2, ["tests/helpers/order_of_gathering.py", json.dumps(paths)])):
        assert code == 0, output[-3000:]
        line = next(line for line in output.splitlines() if line.startswith(f"counted {rank} "))
        said.append(json.loads(line.removeprefix(f"counted {rank} ")))
    return {name: [rank[case] for rank in said] for case, name in enumerate(CASES)}


def forward(rank: dict[str, Events]) -> list[tuple[str, dict[str, str], dict[str, str]]]:
    """Modules in the order they ran, with the states when each starts and when it ends."""
    starts = [(name, states) for event, name, states in rank["forward"] if event == "start"]
    ends = {name: states for event, name, states in rank["forward"] if event == "end"}
    names = [name for name, _ in starts]
    assert len(names) == len(set(names)) > 15
    return [(name, states, ends[name]) for name, states in starts]


@pytest.mark.multirank
def test_each_layer_is_on_its_way_while_the_one_before_computes(seen) -> None:
    for name in ("as-shipped", "one-ahead"):
        for rank in seen[name]:
            modules = forward(rank)
            for (_, started, ended), (following, *_) in itertools.pairwise(modules):
                assert started[following] in ("INFLIGHT", "AVAILABLE"), following
                assert ended[following] in ("INFLIGHT", "AVAILABLE"), following
            if name == "one-ahead":  # the shipped bucket takes this whole small model at once
                on_their_way = [one[1][two[0]] for one, two in itertools.pairwise(modules)]
                assert on_their_way.count("INFLIGHT") > len(on_their_way) / 2


@pytest.mark.multirank
def test_without_gathering_ahead_no_layer_is_on_its_way(seen) -> None:
    for rank in seen["none-ahead"]:
        modules = forward(rank)
        for (name, started, ended), (following, *_) in itertools.pairwise(modules):
            assert started[name] == "AVAILABLE"
            assert started[following] == ended[following] == "NOT_AVAILABLE", following


@pytest.mark.multirank
def test_no_more_is_gathered_ahead_than_the_bucket_takes(seen) -> None:
    """Beside the module itself there are the bucket and room for the largest one, which one more may exceed."""
    for rank in seen["one-ahead"]:
        numbers = rank["numbers"]
        largest = max(numbers.values())
        bucket = CASES["one-ahead"][0]
        assert 3 * largest + bucket < sum(numbers.values())
        for name, started, _ in forward(rank):
            gathered = [other for other, state in started.items() if state != "NOT_AVAILABLE" and other != name]
            assert sum(numbers[other] for other in gathered) <= 2 * largest + bucket, (name, gathered)


@pytest.mark.multirank
def test_the_backward_pass_gathers_ahead_too(seen) -> None:
    def in_flight(name: str) -> int:
        return sum("INFLIGHT" in states.values() for rank in seen[name] for _, _, states in rank["backward"])

    assert in_flight("one-ahead") > 10
    assert in_flight("none-ahead") == 0
