"""A small survey whose counts are known, and a run on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folder import make_run

FAITH = "How important is religion in your life?"
TRUST = "Can most people be trusted?"
OPTIONS = {FAITH: ["Very", "Rather", "Not"], TRUST: ["Yes", "No"]}
# People of each country; fewer than LEAST are not told of.
PEOPLE = {"Norway": 40, "Ghana": 35, "Peru": 31, "Fiji": 4}
LEAST = 30


def villagers() -> list[dict]:
    """Each person answers both questions; answers depend on the country and on the number of the person."""
    rows = []
    for country, people in PEOPLE.items():
        for number in range(people):
            fields = {"country": country, "age": 20 + number, "gender": "female" if number % 2 else "male"}
            for question, options in OPTIONS.items():
                answer = (number * (1 + list(PEOPLE).index(country)) // 3) % len(options)
                rows.append(
                    {"profile": fields, "question": question, "options": options, "answer": options[answer]}
                    | {"question_id": question[:5], "person_id": f"{country}-{number}"}
                )
    return rows


def village_run(folder: Path, tiny_llama: Path, tiny_encoder: Path) -> Path:
    """A run on them."""
    source = folder / "villagers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in villagers()))
    sections = {"evaluation": {"min_answers": LEAST}}
    return make_run(folder / "village", tiny_llama, tiny_encoder, {}, source=source, **sections)[0]


def own_shares(question: str, **fields: object) -> list[float]:
    """Counted row by row: what the people with these fields answered."""
    rows = [row for row in villagers() if row["question"] == question]
    answers = [row["answer"] for row in rows if all(row["profile"][name] == value for name, value in fields.items())]
    return [pytest.approx(answers.count(option) / len(answers)) for option in OPTIONS[question]]
