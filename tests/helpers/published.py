"""Small files in the form of published tables: the same columns and spellings, words and numbers of our own."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

# As GlobalOpinionQA writes them: a Python list and the text of a defaultdict, shares with two digits, names of samples.
OPINIONS: list[dict[str, Any]] = [
    {
        "question": 'Is tea, in your country, a "good" thing?\nOr a bad one?',
        "selections": {
            "Peru": [0.6, 0.31, 0.1],
            "Laos (Current national sample)": [0.25, 0.25, 0.5],
            "Laos (Old national sample)": [0.9, 0.1, 0.0],
            "Chad (Non-national sample)": [0.5, 0.5, 0.0],
            "S. Korea": [0.75, 0.2, 0.05],
        },
        "options": ["Good", "Bad", "DK/Refused"],
        "source": "GAS",
    },
    {
        "question": "How many cups?",
        "selections": {"Peru": [0.2, 0.3, 0.5], "Laos": [0.1, 0.1, 0.1], "S. Korea": [0.0, 0.0, 0.0]},
        "options": [1.0, 2.0, "Many's the cup"],
        "source": "WVS",
    },
    {"question": "", "selections": {"Peru": [0.5, 0.5]}, "options": ["Yes", "No"], "source": "WVS"},
]


def write_opinions(file: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """The CSV of GlobalOpinionQA."""
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, ["question", "selections", "options", "source"])
        table.writeheader()
        for row in OPINIONS if rows is None else rows:
            selections = row["selections"]
            if isinstance(selections, dict):
                selections = str(defaultdict(list, selections))
            table.writerow({**row, "selections": selections, "options": str(row["options"])})
    return file


def subpop_lines() -> list[dict[str, Any]]:
    """Questions with a plain scale, a middle option that is listed last, options outside the scale, and no order."""
    asked: dict[str, tuple[list[str], list[float], list[float]]] = {
        "spend_W1": (["Too little", "About right", "Too much", "Refused"], [1.0, 2.0, 3.0], [0.2, 0.5, 0.3]),
        "safer_W1": (["Safer", "More dangerous", "Neither", "Refused"], [1.0, 2.0, 1.5], [0.1, 0.6, 0.3]),
        "trust_W2": (["A lot", "A little", "It depends", "Refused"], [1.0, 2.0, -1.0], [0.6, 0.2, 0.2]),
        "first_W2": (["Tea", "Coffee", "Milk", "Refused"], [1, 1, 1], [0.5, 0.25, 0.25]),
    }
    groups = [("SEX", "Male"), ("SEX", "Female"), ("POLPARTY", "Democrat"), ("RELIG", "Hindu")]
    lines = []
    for number, (attribute, group) in enumerate(groups):
        for key, (options, ordinal, shares) in asked.items():
            turned = shares[number % 2 :] + shares[: number % 2]
            lines.append(
                {"qkey": key, "attribute": attribute, "group": group, "question": f"About {key}?", "options": options}
                | {"ordinal": ordinal, "responses": turned, "refusal_rate": 0.01 * number}
            )
    return lines


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    """One object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
