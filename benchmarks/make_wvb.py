"""Write WorldValuesBench-shaped TSV files with random answers, from the benchmark's own codebook: same columns, texts,
codes and gaps.

Answers are drawn per country, so that countries differ; nobody's real answers are in them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

SHARES = {"train": 0.70, "valid": 0.15, "test": 0.15}
CHUNK = 8192


def make(codebook_dir: Path, out: Path, people: int, seed: int = 0, missing: float = 0.036) -> None:
    """Write ``out/{train,valid,test}/*.tsv`` and copy the codebook's three files beside them."""
    codebook = json.loads((codebook_dir / "codebook.json").read_text(encoding="utf-8"))
    metadata = json.loads((codebook_dir / "question_metadata.json").read_text(encoding="utf-8"))
    (out / "dataset_construction").mkdir(parents=True)
    for name in ("codebook.json", "question_metadata.json", "answer_adjustment.json"):
        shutil.copyfile(codebook_dir / name, out / "dataset_construction" / name)
    rng = np.random.default_rng(seed)
    countries = [code for code in _codes(codebook["B_COUNTRY"]) if _ethnicities(codebook, code)][:64]
    demographic = [
        name for name, entry in metadata.items() if entry["use_case"] == "demographic" and name != "D_INTERVIEW"
    ]
    value = [name for name, entry in metadata.items() if entry["use_case"] == "value"]
    scales = {
        name: (int(metadata[name]["answer_scale_min"]), int(metadata[name]["answer_scale_max"])) for name in value
    }
    likely = {
        name: rng.dirichlet(np.ones(high - low + 1), len(countries)).cumsum(axis=1)
        for name, (low, high) in scales.items()
    }
    first = 0
    for split, share in SHARES.items():
        (out / split).mkdir()
        starts = range(first, first + round(share * people), CHUNK)
        first += round(share * people)
        ids = [np.arange(start, min(start + CHUNK, first)) for start in starts]
        _write(
            out / split / f"{split}_demographic_qa.tsv",
            (_who(part, seed, codebook, demographic, countries) for part in ids),
        )
        _write(
            out / split / f"{split}_value_qa.tsv",
            (_answers(part, seed, scales, likely, len(countries), missing) for part in ids),
        )


def _write(file: Path, tables: Iterable[pa.Table]) -> None:
    writer = None
    for table in tables:
        writer = writer or csv.CSVWriter(str(file), table.schema, write_options=csv.WriteOptions(delimiter="\t"))
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _country(ids: np.ndarray, countries: int) -> np.ndarray:
    return ids * 2654435761 % 2**32 % countries


def _who(ids: np.ndarray, seed: int, codebook: Any, columns: list[str], countries: list[str]) -> pa.Table:
    rng, n = np.random.default_rng([seed, 1, int(ids[0])]), len(ids)
    country = _country(ids, len(countries))
    table: dict[str, Any] = {"D_INTERVIEW": ids}
    for name in columns:
        choices = codebook[name]["choices"]
        if name == "B_COUNTRY":
            texts = np.array([choices[code] for code in countries], object)[country]
        elif name == "Q290":
            own = [_ethnicities(codebook, country_code) for country_code in countries]
            texts = np.array(
                [own[c][min(int(x), len(own[c]) - 1)] for c, x in zip(country, rng.exponential(0.8, n), strict=True)],
                object,
            )
        elif codes := _codes(codebook[name]):
            # Some answers are much more common than others.
            rank = np.minimum(rng.exponential(len(codes) / 3, n).astype(int), len(codes) - 1)
            texts = np.array([choices[code] for code in codes], object)[rank]
        else:
            texts = rng.integers(1, 1000, n).astype(str).astype(object)
        gone = [text for code, text in choices.items() if code.startswith("-")]
        if gone and name != "B_COUNTRY":
            texts[rng.random(n) < 0.02] = gone[0]
        table[name] = pa.array(texts, pa.string())
    return pa.table(table)


def _answers(
    ids: np.ndarray,
    seed: int,
    scales: dict[str, tuple[int, int]],
    likely: dict[str, np.ndarray],
    countries: int,
    missing: float,
) -> pa.Table:
    rng, n = np.random.default_rng([seed, 2, int(ids[0])]), len(ids)
    country = _country(ids, countries)
    table: dict[str, Any] = {"D_INTERVIEW": ids}
    for name, (low, high) in scales.items():
        point = low + (rng.random(n)[:, None] > likely[name][country]).sum(axis=1).clip(max=high - low)
        table[name] = pa.array(point, pa.int64(), mask=rng.random(n) < missing)
    return pa.table(table)


def _ethnicities(codebook: Any, country: str) -> list[str]:
    """Codes of ethnic groups are a country's number and three digits."""
    choices = codebook["Q290"]["choices"]
    return [choices[code] for code in _codes(codebook["Q290"]) if code[:-3] == country]


def _codes(entry: Any) -> list[str]:
    return [code for code in entry["choices"] if not code.startswith("-")]


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--codebook", type=Path, required=True, metavar="FOLDER", help="folder with the benchmark's three JSON files"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--people", type=int, default=65_294, help="in all splits together (default %(default)s)")
    arguments = parser.parse_args()
    make(arguments.codebook, arguments.out, arguments.people)


if __name__ == "__main__":
    main()
