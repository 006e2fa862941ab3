"""launchers/compare.py: a study of tiny models from its file to its report, resumed, with failures in the middle."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import IO

import pytest
import yaml
from ranks import ROOT, Fork, environment
from small_runs import recipe

from cuma_ds.errors import ConfigError
from cuma_ds.studies.processes import Processes


class Forked:
    """What :class:`Processes` uses of :class:`subprocess.Popen`, forked from a process that has imported everything."""

    def __init__(self, words: list[str], output: IO[bytes]) -> None:
        self._fork, self._output = Fork(words, environment()), output

    def poll(self) -> int | None:
        code = self._fork.returncode
        if code is not None and self._fork.output.exists():
            self._output.write(self._fork.output.read_bytes())
            self._output.flush()
            self._fork.output.unlink()
        return code

    @property
    def returncode(self) -> int | None:
        return self._fork.returncode


@pytest.fixture
def forked(monkeypatch) -> list[list[str]]:
    """Commands of studies are forked; their words, as they are started."""
    started: list[list[str]] = []

    def start(_: Processes, words: list[str], output: IO[bytes]) -> Forked:
        started.append(list(words))
        module, package, name, *arguments = words
        assert (module, package) == ("-m", "cuma_ds")
        return Forked([f"launchers/{name}.py", *arguments], output)

    monkeypatch.setattr(Processes, "_start", start)
    monkeypatch.chdir(ROOT)
    return started


def write_study(folder: Path, models: tuple[Path, Path], **changes: object) -> Path:
    data = {"valid_fraction": 0.2, "test_fraction": 0.4}
    path = recipe(
        folder, *models, "survey", data={**data, "path": str(ROOT / "tests/data/opinions.jsonl")},
        training={"warmup_steps": 0}, adapters={"target_modules": ["q_proj"]},
    )  # fmt: skip
    lora = ["adapters.method=lora", "adapters.num_experts=1", "adapters.top_k=1", "adapters.balance_weight=0"]
    values = {
        "name": "small",
        "output_dir": str(folder / "studies"),
        "recipes": {"survey": {"config": [str(path)]}},
        "methods": {
            "cuma": {},
            "broken": {"set": ["data.max_length=8"], "learning_rates": [0.01]},
            "lora": {"set": lora, "learning_rates": [0.01]},
        },
        "budgets": [3],
        "tuning": {"learning_rates": [0.01, 0.03], "extend": 0},
        "evaluation": {"set": ["evaluation.min_answers=2", "evaluation.bootstrap=20"], "checkpoints": 3},
        "targets": [0.01],
        **changes,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def test_a_study_goes_from_its_file_to_its_report(tmp_path, tiny_llama, tiny_encoder, launch, forked) -> None:
    file = write_study(tmp_path, (tiny_llama, tiny_encoder))
    planned = launch("compare", "--study", str(file), "--dry-run")
    assert planned.code == 0, planned.err
    assert not forked
    assert "4 runs to do" in planned.out
    assert not (tmp_path / "studies").exists()
    no_time = launch("compare", "--study", str(file), "--minutes", "0")
    assert no_time.code == 0, no_time.err
    assert not forked
    assert "3 runs are missing; the same command goes on" in no_time.out

    done = launch("compare", "--study", str(file))
    assert done.code == 0, done.err + done.out
    folder = tmp_path / "studies" / "small"
    report = json.loads((folder / "report" / "comparison.json").read_text())
    (failed,) = report["failed"]
    assert failed.startswith("survey.broken.3-steps.lr-0.01.seed-0: too long to be read whole")
    assert f"failed: {failed}" in done.out
    (table,) = report["tables"]
    tuned = table["tuned"]["cuma"]
    assert [trial["rate"] for trial in tuned["trials"]] == [0.01, 0.03]
    best = min(tuned["trials"], key=lambda trial: trial["value"])["rate"]
    assert tuned["rate"] == best
    assert tuned["at_edge"]
    run = table["runs"]["cuma"][0]
    assert (run["status"], run["learning_rate"]) == ("trained", best)
    own = json.loads((folder / "runs" / run["name"] / "evaluation" / "report.json").read_text())
    for split in ("test", "heldout"):
        known, found = own["splits"][split]["rows"]["trained"], table["splits"][split]["methods"]["cuma"]["scores"]
        assert found["emd"]["value"] == pytest.approx(known["emd"], abs=2e-5)
        assert found["accuracy"]["value"] == pytest.approx(known["accuracy"], abs=2e-5)
    assert {"collapse", "sampler"} <= table["splits"]["test"]["references"].keys()
    (pair,) = table["splits"]["test"]["differences"]
    assert (pair["first"], pair["second"]) == ("cuma", "lora")
    scores = [table["splits"]["test"]["methods"][name]["scores"]["emd"]["value"] for name in ("cuma", "lora")]
    assert pair["scores"]["emd"]["value"] == pytest.approx(scores[0] - scores[1], abs=2e-6)
    curve = run["curve"]
    assert [point["step"] for point in curve["valid"]] == [1, 2, 3] == curve["steps"]
    assert curve["tokens"][1] > curve["tokens"][0] > 0
    linears, hidden, profile, experts, rank = 2, 32, 16, 4, 4
    assert run["parameters"] == linears * (experts * rank * 2 * hidden + experts * (hidden + profile))
    assert run["train"].startswith("python -m cuma_ds train --config ")
    text = (folder / "report" / "report.md").read_text()
    for part in (
        "# Study small",
        "**cuma**",
        "| cuma − lora |",
        "Failed, and left out",
        "broken (failed)",
        "at the edge",
    ):
        assert part in text
    assert all((folder / "report" / name).stat().st_size > 1000 for name in report["pictures"])
    assert len(report["pictures"]) == 4

    assert sum(" --step 1 2 --splits " in " ".join(words) for words in forked) == 2, "the curves, each in one process"

    # The same command does nothing that is done, and tries what failed again.
    before = len(forked)
    again = launch("compare", "--study", str(file))
    assert again.code == 0, again.err
    assert [words[2] for words in forked[before:]] == ["train"]
    assert "run.name=survey.broken.3-steps.lr-0.01.seed-0" in forked[-1]

    # A run of another configuration in the way, and a report that is gone: the others go on.
    write_study(tmp_path, (tiny_llama, tiny_encoder))
    values = yaml.safe_load(file.read_text())
    values["methods"]["cuma"]["set"] = ["adapters.lora_r=2"]
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    shutil.rmtree(folder / "runs" / "survey.lora.3-steps.lr-0.01.seed-0" / "evaluation")
    before = len(forked)
    other = launch("compare", "--study", str(file), "--methods", "cuma", "lora")
    assert other.code == 0, other.err
    assert "holds a run with adapters.lora_r: 4, but the study says 2; give the study another name" in other.out
    assert [words[2] for words in forked[before:]] == ["evaluate"]
    assert "| cuma (failed) |" in (folder / "report" / "report.md").read_text()

    names = [f"survey.{method}.3-steps.lr-0.01.seed-0" for method in ("cuma", "lora")]
    valid = [str(folder / "valid" / name / "step-3") for name in names]
    shown = launch("compare", "--runs", *valid, "--out", str(tmp_path / "out"))
    assert shown.code == 0, shown.err
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(compared["splits"]) == ["valid"]
    assert len(compared["splits"]["valid"]["differences"]) == 1


# Options, and what the line says.
MISTAKES = {
    "nothing": ([], "compare takes one of --study (a STUDY.yaml) and --runs"),
    "one run": (["--runs", "a"], "--runs compares at least two runs; one was given"),
    "no report": (["--runs", "a", "b"], "error: there is no report in a; evaluate it with launchers/evaluate.py"),
    "twice": (["--runs", "a", "a"], "--runs: one folder is named twice"),
    "a slice of runs": (["--runs", "a", "b", "--seeds", "0"], "--seeds belongs to --study"),
    "no study": (["--study", "nothing"], "cannot read the study nothing: No such file"),
    "another method": (
        ["--study", "STUDY", "--methods", "dora"],
        "--methods dora: the study small has cuma, broken, lo",
    ),
    "another seed": (["--study", "STUDY", "--seeds", "5"], "--seeds 5: the study small has 0"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(options, message, tmp_path, tiny_llama, tiny_encoder, launch) -> None:
    file = write_study(tmp_path, (tiny_llama, tiny_encoder))
    done = launch("compare", *(str(file) if option == "STUDY" else option for option in options))
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_report_of_an_earlier_version_without_predictions_is_one_line(launch) -> None:
    golden = str(ROOT / "tests" / "golden" / "0.1.0" / "run")
    done = launch("compare", "--runs", golden, "elsewhere")
    assert done.code == 2
    assert "predictions.npz cannot be read" in done.err
    assert "evaluate again with launchers/evaluate.py" in done.err
    assert len(done.err.strip().splitlines()) == 1


def commands(folder: Path, script: str) -> tuple[Processes, list[str]]:
    (folder / "script.py").write_text(script)
    return Processes(folder / "study"), [str(folder / "script.py")]


def test_a_command_has_a_log_a_reason_and_a_place_in_the_journal(tmp_path) -> None:
    processes, words = commands(tmp_path, "import sys\nprint('hello')\nsys.exit('error: no data')\n")
    ticks: list[float] = []
    with processes.alone():
        record = processes.run("one", "train", words, lambda: ticks.append(time.monotonic()))
    assert (record.code, record.message) == (1, "no data")
    assert ticks
    assert "hello" in (tmp_path / "study" / "logs" / "one.train.log").read_text()
    (tmp_path / "study" / "journal.jsonl").open("a").write('{"run": "cut sh')
    again = Processes(tmp_path / "study")
    assert again.journal.of("one", "train") == [record]


def test_a_study_is_run_by_one_process_and_what_it_started(tmp_path) -> None:
    processes, _ = commands(tmp_path, "")
    other = Processes(tmp_path / "study")
    with (
        processes.alone(),
        pytest.raises(ConfigError, match=r"study is being run by another process; wait for it"),
        other.alone(),
    ):
        raise AssertionError
    with other.alone():
        pass


def test_stopped_in_the_middle_the_command_is_ended_too(tmp_path) -> None:
    processes, words = commands(tmp_path, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    log = tmp_path / "study" / "logs" / "one.train.log"

    def stop() -> None:
        if log.stat().st_size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), processes.alone():
        processes.run("one", "train", words, stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
