"""An error that nobody expected is one line that repeats no data, and a file that its owner alone can read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cuma_ds import incident
from cuma_ds.incident import doing, ended, outcome_goes_to, tracebacks_go_to, unexpected


@pytest.fixture(autouse=True)
def as_before(tmp_path):
    yield
    tracebacks_go_to(None)
    outcome_goes_to(None)


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_the_line_names_kind_and_step_and_the_file_has_the_rest(tmp_path) -> None:
    tracebacks_go_to(tmp_path / "errors")
    doing("step 7")
    line = str(unexpected(raised(KeyError("Ghana, 34"))))
    assert line.startswith("KeyError in step 7 (traceback: ")
    assert "Ghana" not in line
    file = Path(re.search(r"traceback: (.*)\)", line)[1])
    assert file.parent == tmp_path / "errors"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text().endswith("\nKeyError\n")
    assert "in raised" in file.read_text()
    assert "Ghana" not in file.read_text()


def test_the_file_has_the_errors_that_led_to_it_and_messages_of_the_machine_alone(tmp_path) -> None:
    tracebacks_go_to(tmp_path)
    try:
        try:
            raise OSError(28, "No space left")
        except OSError as error:
            raise ValueError("Ghana, 34") from error
    except ValueError as error:
        unexpected(error)
    (file,) = tmp_path.glob("error-*")
    said = file.read_text()
    assert said.index("OSError: [Errno 28] No space left") < said.index("which led to") < said.index("\nValueError\n")
    assert "Ghana, 34" not in said.replace('raise ValueError("Ghana, 34")', "")


def test_messages_of_the_machine_are_repeated(tmp_path) -> None:
    tracebacks_go_to(tmp_path)
    assert "RuntimeError in step 7: CUDA out of memory (" in str(
        unexpected(raised(RuntimeError("CUDA out of memory\nmore")))
    ).replace(incident.now_doing(), "step 7")


def test_how_it_ended_is_written_once(tmp_path) -> None:
    file = tmp_path / "outcome.json"
    file.write_text("old")
    outcome_goes_to(file)
    assert not file.exists()
    ended("complete")
    ended("something else")
    assert json.loads(file.read_text())["said"] == "complete"


def test_a_command_that_fails_unexpectedly_ends_with_2_and_one_line(launch, tmp_path, monkeypatch) -> None:
    def fail(self, *_: object) -> None:
        raise ValueError("Ghana, 34")

    monkeypatch.setattr("cuma_ds.runs.Run.open", fail)
    said = launch("status", str(tmp_path))
    assert said.code == 2
    assert re.fullmatch(r"error: ValueError in .* \(traceback: \S+\)\n", said.err), said.err
