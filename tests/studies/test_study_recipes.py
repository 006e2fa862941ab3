"""The studies that come with the package: methods of the sizes that their files say, and what is still to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from cuma_ds.planning.skeleton import Setup
from cuma_ds.studies.plan import plan
from cuma_ds.studies.processes import Processes
from cuma_ds.studies.study import Expected, Task, load_study, run_config
from cuma_ds.studies.work import Work, part_of

STUDIES = Path(__file__).parents[2] / "launchers" / "recipes" / "studies"
# The shape of SmolLM2-135M, and the width of MiniLM's embeddings.
SMOLLM = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
WIDTH = 384


@pytest.mark.parametrize("name", ["quick", "mean_collapse"])
def test_methods_have_the_sizes_that_the_file_says_and_are_within_three_percent(name) -> None:
    study, text = load_study(f"studies/{name}"), (STUDIES / f"{name}.yaml").read_text()
    sizes = {}
    for method in study.methods:
        config = run_config(study, Task("immigration", method, study.budgets[0], 0, 0.001))
        assert config.data.profile_in_prompt
        width = WIDTH if config.adapters.uses_profiles else 0
        sized = config.model_copy(update={"adapters": config.adapters.model_copy(update={"profile_dim": width})})
        trained = Setup(SMOLLM, sized).build().trained_parameters()
        sizes[method] = sum(one.parameter.numel() for one in trained)
    assert sizes["cuma"] == sizes["lora"] == 3_916_800
    assert all(f"{size:,}" in text for size in sizes.values()), sizes
    assert all(abs(size / sizes["cuma"] - 1) < 0.03 for size in sizes.values())


def test_a_plan_says_what_is_to_do_and_how_long_it_takes(tmp_path) -> None:
    study = load_study("studies/quick")
    expected = Expected(seconds_per_step=3.0, seconds_per_start=10.0, machine="a toaster")
    study = study.model_copy(update={"output_dir": str(tmp_path), "expected": expected, "seeds": (0, 1)})
    part = part_of(study, recipes=None, methods=["lora"], budgets=None, seeds=None)
    found = plan(Work(study, Processes(study.folder)), part)
    names = [row.name for row in found.rows]
    assert names == [*(f"immigration.lora.12-steps.lr-{rate}.seed-0" for rate in ("0.001", "0.003")),
                     "immigration.lora.12-steps.seed-1"]  # fmt: skip
    assert [row.seconds for row in found.rows] == [12 * 3.0 + 30.0] * 3
    assert found.notes[0].startswith("3 runs to do, about 3 minutes: steps measured in this study where there are any")
    assert "else 3 s a step as the study says (on a toaster)" in found.notes[0]
    assert found.notes[1].startswith("Up to 1 trials more")
