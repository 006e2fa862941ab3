"""A small survey in the files that institutes keep: codes with labels in several scripts, weights, rounds, notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyreadstat

LABELS = {
    "cntry": {1: "Perú", 2: "ລາວ", 3: "تشاد"},
    "sex": {1: "男", 2: "女", 9: "わからない"},
    "tea": {1: "Agree", 2: "Neither", 3: "Disagree", 8: "Don't know", 9: "Refused"},
    "bus": {1: "очень плохо", 10: "очень хорошо", -1: "Нет ответа", -2: "Отказ"},
}
TEXTS = {"cntry": "Country", "sex": "性別", "age": "Age", "tea": "Чай — это хорошо?", "bus": "Как автобус?"}


def frame(count: int = 400) -> pd.DataFrame:
    """People of three countries; some who say nothing, and a column of notes."""
    rng = np.random.default_rng(7)
    found = pd.DataFrame(
        {
            "idno": 1000.0 + rng.permutation(count),
            "round": rng.choice([1.0, 2.0], count),
            "pspwght": rng.lognormal(size=count),
            "cntry": rng.choice([1.0, 2.0, 3.0], count),
            "sex": rng.choice([1.0, 2.0, 9.0, np.nan], count),
            "age": rng.integers(15, 90, count).astype(float),
            "tea": rng.choice([1.0, 2.0, 3.0, 8.0, 9.0, np.nan], count),
            "bus": rng.choice([*range(1, 11), -1.0, -2.0], count),
            "note": rng.choice(["a long story", "", "another"], count),
        }
    )
    found.loc[3, ["tea", "bus"]] = [9.0, -1.0]
    found.loc[5, "pspwght"] = 0.0
    return found


def save(folder: Path, suffix: str = ".sav", table: pd.DataFrame | None = None) -> Path:
    table = frame() if table is None else table
    file = folder / f"survey{suffix}"
    labels: Any = LABELS
    if suffix == ".sav":
        missing: Any = {"tea": [{"lo": 8, "hi": 9}], "bus": [-2]}
        pyreadstat.write_sav(
            table, str(file), column_labels=TEXTS, variable_value_labels=labels, missing_ranges=missing,
            variable_measure={"tea": "ordinal", "sex": "nominal"},
        )  # fmt: skip
    elif suffix == ".dta":
        pyreadstat.write_dta(table, str(file), column_labels=TEXTS, variable_value_labels=labels)
    elif suffix == ".csv":
        table.to_csv(file, index=False)
    else:
        table.to_parquet(file)
    return file
