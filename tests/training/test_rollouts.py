"""Runs of objective grpo: any number of ranks and any interruption end where one process ends."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import run, run_recipes
from single_grpo import train_single_grpo
from small_runs import metrics, recipe

from cuma_ds.errors import CumaError
from cuma_ds.parallel.stored import find_checkpoint, read_adapters
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run
from cuma_ds.training.inputs import prepare_run

pytestmark = pytest.mark.multirank

TRAINING = {"objective": "grpo", "steps": 4, "global_batch_size": 5, "micro_batch_size": 32}
GRPO = {"rewards": ["own_rewards:characters"], "group_size": 4, "scale_rewards": "batch"}


def grpo_recipe(folder: Path, tiny_llama: Path, tiny_encoder: Path, name: str, **sections: dict) -> Path:
    values = {
        "training": TRAINING | sections.pop("training", {}),
        "grpo": GRPO | sections.pop("grpo", {}),
        "rollout": {"max_new_tokens": 6, "keep": 100, **sections.pop("rollout", {})},
    }
    return recipe(folder, tiny_llama, tiny_encoder, name, **values, **sections)


def kept(path: Path) -> list[dict]:
    return [json.loads(line) for line in Run(load_config(path).run_dir).completions.read_text().splitlines()]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_adapters(find_checkpoint(Run(load_config(path).run_dir).checkpoints))


def assert_same(path: Path, other: Path, tolerance: float = 1e-5) -> None:
    rows, others = metrics(load_config(path)), metrics(load_config(other))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, expected in zip(rows, others, strict=True):
        for name in ("loss", "reward", "grad_norm", "completions/mean_length"):
            assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    found = tensors(path)
    for name, tensor in tensors(other).items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def test_two_and_three_ranks_equal_one_process(tmp_path, tiny_llama, tiny_encoder) -> None:
    one = grpo_recipe(tmp_path, tiny_llama, tiny_encoder, "one")
    run_recipes(1, [one])
    placements = {
        2: [{"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}, {"deepspeed_config": "zero3"}],
        3: [{"deepspeed_config": "zero2_sharded_backbone"}],
    }
    for world, parallels in placements.items():
        paths = [
            grpo_recipe(tmp_path, tiny_llama, tiny_encoder, f"w{world}-{number}", parallel=parallel)
            for number, parallel in enumerate(parallels)
        ]
        run_recipes(world, paths)
        for path in paths:
            assert_same(path, one)
            assert [line for line in kept(one) if line in kept(path)] == kept(path)


EQUAL_TO_A_LOOP = {
    "iterations": {"grpo": {"iterations": 2, "epsilon": 0.01}, "training": {"learning_rate": 0.05}},
    "base": {"grpo": {"kl_weight": 0.5, "reference": "base"}, "rollout": {"temperature": 0.8}},
    "start": {"grpo": {"kl_weight": 0.5, "reference": "start"}},
}


@pytest.mark.parametrize("name", EQUAL_TO_A_LOOP)
def test_a_run_equals_a_loop_written_by_hand(name, tmp_path, tiny_llama, tiny_encoder) -> None:
    """Same completions, losses, divergences from a separately loaded reference, and tensors."""
    path = grpo_recipe(tmp_path, tiny_llama, tiny_encoder, name, **copy.deepcopy(EQUAL_TO_A_LOOP[name]))
    run_recipes(1, [path])
    config = load_config(path)
    expected = train_single_grpo(config)
    rows = metrics(config)
    step = config.grpo.iterations
    for rollout, texts in enumerate(expected.texts):
        written = [line["completion"] for line in kept(path) if line["step"] == rollout * step + 1]
        assert sorted(written) == sorted(texts)
    assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-4, abs=1e-5)
    if config.grpo.kl_weight:
        assert [row["kl"] for row in rows] == pytest.approx(expected.kls, rel=1e-4, abs=1e-6)
        assert max(expected.kls) > 1e-3
    else:
        assert max(row["clip_ratio/region_mean"] for row in rows) > 0
    found = tensors(path)
    for key, tensor in expected.state.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_the_reference_is_the_policy_that_a_run_started_from(tmp_path, tiny_llama, tiny_encoder) -> None:
    """On one process, and on two ranks with the trained parameters held in other ways."""
    parallels = {
        "whole": {"deepspeed_config": "zero1"},
        "sharded": {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2},
        "zero3": {"deepspeed_config": "zero3"},
    }
    without = {"adapters": {"balance_weight": 0.0}}
    trained = recipe(tmp_path, tiny_llama, tiny_encoder, "trained", **copy.deepcopy(without))
    run_recipes(1, [trained])
    options = {"grpo": {"kl_weight": 0.5}, "model": {"init_from": str(load_config(trained).run_dir)}, **without}
    paths = {
        name: grpo_recipe(tmp_path, tiny_llama, tiny_encoder, name, parallel=parallel, **copy.deepcopy(options))
        for name, parallel in parallels.items()
    }
    run_recipes(1, [paths["whole"]])
    run_recipes(2, [paths["sharded"], paths["zero3"]])
    expected = train_single_grpo(load_config(paths["whole"]), start=tensors(trained))
    assert max(expected.kls) > 1e-3
    for path in paths.values():
        assert [row["kl"] for row in metrics(load_config(path))] == pytest.approx(expected.kls, rel=1e-4, abs=1e-6)
        found = tensors(path)
        for name, tensor in expected.state.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
        assert max(float((found[name] - tensor).abs().max()) for name, tensor in tensors(trained).items()) > 1e-3


KILLS = int(os.environ.get("KILLS", "2"))


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path, tiny_llama, tiny_encoder) -> None:
    """Two ranks, in the middle of generating and of an update by turns, at another place each time. What the advantages
    remember goes on, too.
    """
    options = {
        "parallel": {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2},
        "training": {"steps": 2 * KILLS + 2, "micro_batch_size": 8, "group_field": "country"},
        "grpo": {"rewards": ["own_rewards:rarely"], "advantage": "history", "robust": "groupdro"},
        "evaluation": {"min_answers": 8},
        "checkpoint": {"every": 1, "keep_last": 1},
    }
    whole, broken = (
        grpo_recipe(tmp_path, tiny_llama, tiny_encoder, name, **copy.deepcopy(options)) for name in ("whole", "broken")
    )
    run_recipes(2, [whole])
    helper = str(Path(__file__).parents[1] / "helpers" / "train_and_die.py")
    for kill in range(KILLS):
        # 6 tokens, so 5 forwards after the prompts; 2 micro batches, so 2 backwards.
        for place, calls in ((("Decoder", "advance"), 5), (("AdapterEngine", "backward"), 2)):
            count = calls + 1 + kill % calls  # in the second step that is taken
            for code, _ in run(2, [helper, json.dumps([str(broken), place, count])]):
                assert code == -signal.SIGKILL
    run_recipes(2, [broken])
    assert_same(broken, whole, tolerance=0)
    assert kept(broken) == kept(whole)
    assert [row["step"] for row in metrics(load_config(broken))] == list(range(1, 2 * KILLS + 3))


WRONG = {
    "raises": "reward own_rewards:wrong raised KeyError: 'no such key' (own_rewards.py:",
    "nan": "reward own_rewards:wrong returned 'nan' for completion 11 of 12 (counted from 0); a finite number is ",
    "length": "reward own_rewards:wrong returned 11 entries for 12 completions",
}


@pytest.mark.parametrize("how", WRONG)
def test_a_reward_that_goes_wrong_stops_the_run_in_one_line_and_nothing_is_lost(
    how, tmp_path, tiny_llama, tiny_encoder, monkeypatch
) -> None:
    """In the third rollout of two ranks, on one of them; the same command goes on when the reward is mended."""
    monkeypatch.setenv("WRONG_AFTER", str(tmp_path / "left"))
    monkeypatch.setenv("WRONG_HOW", how)
    whole = grpo_recipe(tmp_path, tiny_llama, tiny_encoder, "whole")
    path = grpo_recipe(tmp_path, tiny_llama, tiny_encoder, "mended", grpo={"rewards": ["own_rewards:wrong"]})
    command = ["launchers/train.py", "--config", str(path)]
    (first, printed), (second, silent) = run(2, command)
    assert (first, second) == (2, 2)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert WRONG[how] in errors[0]
    assert "error" not in silent
    assert "Traceback" not in printed + silent
    assert find_checkpoint(Run(load_config(path).run_dir).checkpoints).name == "step-2"
    monkeypatch.setenv("WRONG_HOW", "not")
    assert [code for code, _ in run(2, command)] == [0, 0]
    run_recipes(2, [whole])
    assert_same(path, whole, tolerance=0)


def test_rewards_can_be_none_and_a_group_can_have_a_name(tmp_path, tiny_llama, tiny_encoder) -> None:
    path = grpo_recipe(
        tmp_path, tiny_llama, tiny_encoder, "named",
        training={"group_field": "country", "steps": 2}, grpo={"rewards": ["own_rewards:rarely"]},
        evaluation={"min_answers": 8},
    )  # fmt: skip
    run_recipes(2, [path])
    rows = metrics(load_config(path))
    assert all(0.1 < row["completions/left_out"] < 0.7 for row in rows)
    lines = kept(path)
    assert all((line["rewards"]["own_rewards.rarely"] is None) <= (line["advantage"] == 0) for line in lines)
    assert any(line["rewards"]["own_rewards.rarely"] is None for line in lines)
    assert all(set(line) == {"step", "row", "completion", "rewards", "advantage"} for line in lines)
    seconds = {"rollout_seconds", "update_seconds", "generated_tokens_per_second"}
    assert seconds <= rows[0].keys()
    named = {name for row in rows for name in row if name.startswith("reward/")}
    data = Run(load_config(path).run_dir).data()
    answers = Counter(data.profiles[row["profile"]]["fields"]["country"] for row in data.splits["train"])
    assert named < {f"reward/{country}" for country in answers}
    assert named <= {f"reward/{country}" for country, count in answers.items() if count >= 8}
    assert named


def test_a_step_whose_completions_are_all_masked_changes_nothing(tmp_path, tiny_llama, tiny_encoder) -> None:
    """But for the balance loss, and a line says so."""
    path = grpo_recipe(
        tmp_path, tiny_llama, tiny_encoder, "masked",
        training={"steps": 2}, grpo={"mask_truncated": True}, rollout={"max_new_tokens": 1},
        adapters={"balance_weight": 0.0},
    )  # fmt: skip
    ((code, printed),) = run(1, ["launchers/train.py", "--config", str(path)])
    assert code == 0, printed
    assert "step 1: all completions were cut at rollout.max_new_tokens 1" in printed
    row, _ = metrics(load_config(path))
    assert (row["loss"], row["grad_norm"]) == (0.0, 0.0)


def test_prompts_that_leave_no_room_for_an_answer_are_named_before_the_first_step(
    tmp_path, tiny_llama, tiny_encoder
) -> None:
    path = grpo_recipe(tmp_path, tiny_llama, tiny_encoder, "long", rollout={"max_new_tokens": 150})
    ((code, printed),) = run(1, ["launchers/train.py", "--config", str(path)])
    assert code == 2
    assert "rows of split train" in printed
    assert "data.max_length is 256, of which 150 are for an answer" in printed
    assert not load_config(path).run_dir.exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"grpo": {"rewards": ["fluency"]}}, "there is no reward 'fluency'"),
        (
            {"grpo": {"rewards": ["judge"]}, "judge": {"url": "http://localhost:9", "model": "none"}},
            "reward 'judge' is ",
        ),
        ({"training": {"group_field": "nationality"}}, "no profile has the field 'nationality'"),
        ({"training": {"objective": "dpo"}, "grpo": None, "rollout": None}, "objective dpo learns from preferences"),
    ],
)
def test_a_recipe_that_is_refused_leaves_no_run_folder(tmp_path, tiny_llama, tiny_encoder, sections, said) -> None:
    """So that it can be corrected and started under the same name."""
    values = {"training": TRAINING, "grpo": GRPO, "rollout": {"max_new_tokens": 6}}
    merged = {name: {**values.get(name, {}), **(own or {})} for name, own in {**values, **sections}.items()}
    kept_sections = {name: one for name, one in merged.items() if sections.get(name, {}) is not None}
    config = load_config(recipe(tmp_path, tiny_llama, tiny_encoder, "refused", **kept_sections))
    with pytest.raises(CumaError, match=said):
        prepare_run(config)
    assert not config.run_dir.exists()
