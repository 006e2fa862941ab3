"""What the user sees, and what libraries print: two things once the second has a place of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ranks import ROOT, environment

NOISY = """
import os, sys, warnings
sys.path.insert(0, "launchers")
from pathlib import Path
from _cli import warn_in_one_line
from cuma_ds.telemetry import screen
from cuma_ds.telemetry.progress import phase, shown

warn_in_one_line()
warnings.simplefilter("always")
file = Path(sys.argv[1])
print("a library, before")
if "aside" in sys.argv:
    screen.set_libraries_aside()
print("a library, in Python")
os.write(2, b"a library, in C++\\n")
screen.say("ours [bold]as it is[/bold] :smile:")
warnings.warn_explicit("of a library", UserWarning, "/x/site-packages/torch/a.py", 1)
warnings.warn_explicit("of ours", UserWarning, "/x/site-packages/cuma_ds/a.py", 1)
if "refused" not in sys.argv:
    screen.libraries_go_to(file)
print("a library, later")
with phase("loading"):
    for _ in shown(range(3), "parts", visible=True):
        print("a library, in a phase")
screen.say_error("error: ours")
"""


def noisy(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NOISY, str(file), *words]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=True)


def test_libraries_print_to_a_file_and_we_to_the_screen(tmp_path) -> None:
    file = tmp_path / "run" / "logs" / "rank-0.log"
    done = noisy(file, "aside")
    assert done.stdout.splitlines() == ["a library, before", "ours [bold]as it is[/bold] :smile:", "loading"]
    assert done.stderr.splitlines() == ["warning: of ours", "error: ours"]
    head, *lines = file.read_text().splitlines()
    assert head.startswith("--- started 20")
    assert lines.count("a library, in a phase") == 3
    assert set(lines) == {
        "a library, in Python", "a library, in C++", "warning: of a library", "a library, later",
        "a library, in a phase",
    }  # fmt: skip
    assert file.stat().st_mode & 0o077 == 0
    noisy(file, "aside")
    assert file.read_text().count("--- started") == 2, "a second start adds to it"


def test_a_start_that_is_refused_leaves_no_file_and_nothing_of_libraries_on_the_screen(tmp_path) -> None:
    done = noisy(tmp_path / "run" / "logs" / "rank-0.log", "aside", "refused")
    assert [line for line in done.stdout.splitlines() if "library" in line] == ["a library, before"]
    assert "library" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unless_they_are_set_aside_libraries_print_to_the_screen(tmp_path) -> None:
    done = noisy(tmp_path / "log")
    assert done.stdout.count("a library, in a phase") == 3
    assert "warning: of a library" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert noisy(tmp_path / "file" / "rank-0.log", "aside").stderr.splitlines()[-1] == "error: ours"
