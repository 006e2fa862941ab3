"""Nothing is left on the CPU when the model is on a device: shown on a device that exists in name only."""

from __future__ import annotations

import json
import subprocess
import sys

from ranks import ROOT, environment
from run_folder import make_run


def test_training_evaluation_asking_serving_and_export_are_the_same_on_a_device(
    tmp_path, tiny_llama, tiny_encoder
) -> None:
    settings = {"min_answers": 2, "bootstrap": 5}
    run, _, _ = make_run(tmp_path / "run", tiny_llama, tiny_encoder, {}, evaluation=settings)
    (tmp_path / "model.json").write_text(json.dumps({"path": str(tiny_llama)}))
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "on_device.py"), str(run), str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment() | {"CUMA_DS_OPS": "reference", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same:") > 20
