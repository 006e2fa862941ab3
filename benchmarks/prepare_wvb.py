"""Prepare WorldValuesBench-sized data (15 million answers) and print time, peak memory of all processes together and
folder size.

The raw files are made from the benchmark's own codebook with random answers (make_wvb.py); making them is not timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from make_wvb import make

ROOT = Path(__file__).parents[1]


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds, and the largest sum of resident bytes over the command and its children, looked at 20 times a second."""
    start, peak = time.perf_counter(), 0
    running = subprocess.Popen(command, cwd=ROOT)
    process = psutil.Process(running.pid)
    while running.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.05)
    if running.returncode:
        sys.exit(running.returncode)
    return time.perf_counter() - start, peak


def main() -> None:
    """Parse, make, prepare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--codebook", type=Path, required=True, metavar="FOLDER", help="folder with the benchmark's three JSON files"
    )
    parser.add_argument(
        "--people", type=int, default=65_294, help="default %(default)s: 15 million answers to 239 questions"
    )
    parser.add_argument(
        "--raw",
        type=Path,
        metavar="FOLDER",
        help="where the raw files are, or will be made; default: a temporary folder",
    )
    parser.add_argument("--encoder", metavar="FOLDER", help="also embed the profiles")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        raw, out = arguments.raw or Path(scratch) / "raw", Path(scratch) / "prepared"
        if not raw.exists():
            make(arguments.codebook, raw, arguments.people)
        command = [sys.executable, "launchers/prepare_data.py", "wvb", "--root", str(raw), "--out", str(out)]
        if arguments.encoder:
            command += ["--encoder", arguments.encoder, "--cache-dir", str(Path(scratch) / "cache")]
        seconds, peak = measure(command)
        splits = json.loads((out / "manifest.json").read_text())["splits"]
        answers, examples = (sum(split[key] for split in splits.values()) for key in ("answers", "examples"))
        profiles = sum(1 for _ in (out / "profiles.jsonl").open(encoding="utf-8"))
        size = sum(file.stat().st_size for file in out.iterdir())
    print(
        f"answers {answers:,}  examples {examples:,}  profiles {profiles:,}{'  embedded' if arguments.encoder else ''}"
    )
    print(f"time {seconds:.1f} s  peak memory {peak / 1e9:.2f} GB  folder {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
