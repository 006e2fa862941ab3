"""A run and an export of release 0.1.0 (tests/golden/0.1.0, made by its own code) open, resume and answer as then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from fresh import link_packages, run_fresh
from safetensors.torch import load_file

from cuma_ds.evaluation.run import evaluate_run
from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.inference.modeling import load_exported
from cuma_ds.inference.open import open_run
from cuma_ds.parallel.stored import find_checkpoint, read_adapters
from cuma_ds.runs import Run

GOLDEN = Path(__file__).parent / "golden" / "0.1.0"
PROFILES = [{"country": "Norway", "age": 38}, {"country": "Ghana", "age": 51}]
PROMPTS = torch.tensor([[4, 30, 31, 5, 40, 41], [4, 60, 61, 62, 5, 40]])


@pytest.fixture
def places(tmp_path) -> list[str]:
    """Settings that point a copy of the golden run to its models, wherever the repository is."""
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    paths = {"model.path": "model", "profiles.encoder": "encoder"}
    return [f"{key}={GOLDEN / name}" for key, name in paths.items()] + [
        f"run.output_dir={tmp_path}",
        f"profiles.cache_dir={tmp_path / 'cache'}",
    ]


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """Logits of the export, and ``state/NAME``: what the release trained in five more steps."""
    return load_file(GOLDEN / "expected.safetensors")


@pytest.mark.multirank
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_of_0_1_0_goes_on_as_it_would_have(world, tmp_path, places, expected) -> None:
    command = ["launchers/train.py", "--config", str(GOLDEN / "recipe.yaml"), "--set", *places]
    (code, output), *_ = ranks.run(world, command)
    assert code == 0, output[-3000:]
    assert "resuming" in output
    state = read_adapters(find_checkpoint(Run(tmp_path / "run").checkpoints))
    assert {f"state/{name}" for name in state} == expected.keys() - {"logits"}
    # With one rank the batches are the release's own. More ranks round differently, and its balance loss depended on
    # their number.
    tolerance = 1e-5 if world == 1 else 2e-2
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[f"state/{name}"], rtol=tolerance, atol=tolerance)


def test_a_run_of_0_1_0_is_evaluated_as_it_was(tmp_path, places) -> None:
    before = json.loads((GOLDEN / "run" / "evaluation" / "report.json").read_text())
    evaluate_run(tmp_path / "run", overrides=places)
    now = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text())
    for split, section in before["splits"].items():
        for row in ("collapse", "before", "trained"):
            for number in ("emd", "accuracy", "entropy", "macro_f1"):
                assert now["splits"][split]["rows"][row][number] == pytest.approx(
                    section["rows"][row][number], abs=1e-5
                )


def test_an_export_of_0_1_0_answers_as_it_did(expected) -> None:
    model = load_exported(GOLDEN / "export", base_model=str(GOLDEN / "model"), encoder=str(GOLDEN / "encoder")).eval()
    with torch.no_grad():
        logits = model(input_ids=PROMPTS, profiles=PROFILES).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)


FRESH = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
golden, out, prompts, profiles = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
places = {"base_model": golden + "/model", "encoder": golden + "/encoder"}
model = AutoModelForCausalLM.from_pretrained(golden + "/export", trust_remote_code=True, **places)
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.tensor(prompts), profiles=profiles).logits}, out)
assert "cuma_ds" not in sys.modules
"""


def test_an_export_of_0_1_0_answers_with_its_own_code_as_it_did(tmp_path, expected) -> None:
    """The folder's modeling_cuma.py, in a Python that has torch and transformers alone."""
    (tmp_path / "ask.py").write_text(FRESH)
    asked = (json.dumps(PROMPTS.tolist()), json.dumps(PROFILES))
    packages = link_packages(tmp_path / "packages")
    done = run_fresh(packages, tmp_path / "ask.py", str(GOLDEN), str(tmp_path / "out"), *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


def test_a_run_of_0_1_0_is_exported(tmp_path, places, expected) -> None:
    recipe = tmp_path / "run" / "config.yaml"
    recipe.write_text(recipe.read_text().replace("tests/golden/0.1.0", str(GOLDEN)))
    write_hf(read_run(tmp_path / "run"), tmp_path / "export")
    opened, exported = open_run(tmp_path / "run"), load_exported(tmp_path / "export")
    with torch.no_grad():
        found = [
            opened.model(input_ids=PROMPTS, profile_embeddings=opened.reader(PROFILES)).logits,
            exported(input_ids=PROMPTS, profiles=PROFILES).logits,
        ]
    for logits in found:
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
