"""Prepare a survey of 100,000 respondents and more from its SPSS and Stata file: print time and peak memory of writing
the first map and of preparing, and check the counts against pandas.

The files are made from the embedded World Values Survey answers (make_survey.py); making them is not timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pandas as pd
from make_survey import people, write
from prepare_wvb import measure

QUESTIONS = ("e143", "pov")


def main() -> None:
    """Parse, make, suggest, prepare, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=120_000, help="default %(default)s")
    arguments = parser.parse_args()
    frame, labels = people(arguments.people)
    with tempfile.TemporaryDirectory() as scratch:
        for suffix in (".sav", ".dta"):
            file, table = write(frame, labels, Path(scratch) / f"survey{suffix}"), Path(scratch) / f"map{suffix}.yaml"
            start = [sys.executable, "launchers/prepare_data.py", "survey", "--file", str(file), "--map", str(table)]
            suggested = measure([*start, "--suggest"])
            out = Path(scratch) / f"prepared{suffix}"
            prepared = measure([*start, "--out", str(out), "--weights"])
            compare(out, frame)
            for what, (seconds, peak) in (("map", suggested), ("preparation", prepared)):
                print(
                    f"{suffix}, {arguments.people:,} people, {what}: {seconds:.1f} s, peak memory {peak / 1e9:.2f} GB"
                )


def compare(prepared: Path, frame: pd.DataFrame) -> None:
    """Check people and sums of weights of every option against pandas' own reading of the codes."""
    from cuma_ds.data.prepared import PreparedData

    data = PreparedData.load(prepared)
    codes = frame[["w", *QUESTIONS]].melt("w", value_name="code").query("code > 0")
    codes["w"] /= codes["w"].mean()
    expected = codes.groupby(["variable", "code"])["w"].agg(["size", "sum"])
    found = pd.DataFrame(
        [
            (row["question_id"], float(option), answers, weight)
            for split in data.splits.values()
            for row in split
            for option, (answers, weight) in enumerate(zip(row["answers"], row["counts"], strict=True), start=1)
        ],
        columns=["variable", "code", "size", "sum"],
    )  # fmt: skip
    pd.testing.assert_frame_equal(found.groupby(["variable", "code"]).sum(), expected, check_dtype=False)


if __name__ == "__main__":
    main()
