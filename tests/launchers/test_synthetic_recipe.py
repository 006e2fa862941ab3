"""The recipe synthetic on a small random backbone: mean collapse of methods that do not see who is asking, and its
recovery.
"""

from __future__ import annotations

import pytest
import yaml
from ranks import run_recipes
from word_models import save_word_encoder, save_word_llama, word_tokenizer

from cuma_ds.config import DataSection
from cuma_ds.data import load_data
from cuma_ds.evaluation.report.model import ChoiceReport
from cuma_ds.evaluation.run import evaluate_run
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

# About 53,000 trained parameters each.
METHODS = {
    "cuma": {"method": "cuma", "lora_r": 4, "num_experts": 8},
    "lora": {"method": "lora", "lora_r": 36},
    "mixlora": {"method": "mixlora", "lora_r": 4, "num_experts": 8},
    "hydralora": {"method": "hydralora", "lora_r": 8, "num_experts": 8},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, ChoiceReport]:
    """The recipe's report by method, with a tiny model and encoder in the place of the real ones."""
    folder = tmp_path_factory.mktemp("synthetic")
    data = load_data(DataSection(source="synthetic"), "wvs")
    asked = [" ".join([row["question"], *row["options"]]) for row in data.splits["train"]]
    tokenizer = word_tokenizer([*asked, *data.sentences])
    llama, encoder = save_word_llama(folder / "llama", tokenizer), save_word_encoder(folder / "encoder", tokenizer)
    recipes = []
    for name, adapters in METHODS.items():
        values = yaml.safe_load(load_config("synthetic").to_yaml())
        values["run"] = {"name": name, "output_dir": str(folder / "runs")}
        values["model"]["path"] = str(llama)
        values["profiles"] |= {"encoder": str(encoder), "cache_dir": str(folder / "cache")}
        values["adapters"] = {
            "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
            "lora_alpha": 4.0 * adapters["lora_r"],
            **adapters,
        }
        values["data"] |= {"questions": None, "max_length": 256}
        values["training"] |= {"steps": 120 if name == "cuma" else 80, "learning_rate": 5e-3}
        values["telemetry"]["tensorboard"] = False
        recipes.append(folder / f"{name}.yaml")
        recipes[-1].write_text(yaml.safe_dump(values))
    run_recipes(1, recipes)
    found = {name: evaluate_run(folder / "runs" / name, overrides=["evaluation.bootstrap=0"]) for name in METHODS}
    assert all(isinstance(report, ChoiceReport) for report in found.values())
    return found


def recovered(report: ChoiceReport) -> float:
    value = report.splits["test"].rows["trained"].recovered
    assert value is not None
    return value


def test_the_mixture_recovers_the_modes(reports) -> None:
    assert recovered(reports["cuma"]) >= 0.9


@pytest.mark.parametrize("method", ["lora", "mixlora", "hydralora"])
def test_methods_that_do_not_see_the_profile_collapse(reports, method) -> None:
    """By construction: the likelihood of everybody's answers is largest at their average."""
    assert abs(recovered(reports[method])) <= 0.1
    cells = reports[method].splits["test"].cells
    first = cells[0].predicted["trained"]
    assert all(cell.predicted["trained"] == first for cell in cells if cell.question_id == cells[0].question_id)


def test_the_oracle_is_the_truth(reports) -> None:
    """Exactly: its distance is 0, and each cell's observed answers are the truth's shares."""
    for name in ("test", "heldout"):
        rows = reports["cuma"].splits[name].rows
        assert rows["collapse"].emd > 0.3
        assert name == "heldout" or rows["oracle"].emd == 0


def test_a_stranger_is_answered_by_the_word_that_tells_the_mode(reports) -> None:
    """Held-out groups have names that were never trained on, and a word that other groups of their mode share."""
    rows = reports["cuma"].splits["heldout"].rows
    assert rows["trained"].emd < 0.6 * rows["collapse"].emd


def test_methods_are_of_one_size(reports, tmp_path_factory) -> None:
    base = next(tmp_path_factory.getbasetemp().glob("synthetic*"))
    sizes = {}
    for name in METHODS:
        run = Run.open(base / "runs" / name)
        sizes[name] = sum(tensor.numel() for tensor in run.trained(run.config(), None).adapters.values())
    assert max(sizes.values()) <= 1.1 * min(sizes.values())
