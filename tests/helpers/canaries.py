"""Answers of made-up people whose profiles hold words that stand nowhere else, and a search for these words."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

COUNTRIES = ("Norway", "Ghana", "Japan")
# A country of one person, and of another who is held out of no split of their own.
SMALL = "Qanariland"
# People of large countries with a faith that few have.
FEW = (3, 4, 5, 6, 10, 11)
QUESTIONS = {"Can most people be trusted?": ["Yes", "No"], "Is work important?": ["Very", "Rather", "Not at all"]}
# In each word that must not leave the data.
CANARY = "qanari"


def write_answers(file: Path, people: int = 60) -> Path:
    """JSON lines of ``people`` people with a nickname each, two of them of a small country."""
    chance = random.Random(0)
    rows = []
    for person in range(people):
        country = SMALL if person in (7, 20) else COUNTRIES[person % 3]
        profile = {"country": country, "age": 20 + person % 4 * 15, "nickname": f"Qanari{person}bird"}
        profile["faith"] = "Qanarism" if person in FEW else ("Buddhist", "Muslim")[person % 2]
        for question, options in QUESTIONS.items():
            lean = person % 3 / 3
            answer = options[0] if chance.random() < 0.2 + lean else chance.choice(options)
            rows.append({"profile": profile, "person_id": f"qanari-id-{person}", "question": question,
                         "question_id": question[:4], "options": options, "answer": answer})  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def found_in(places: Iterable[Path], allowed: Iterable[Path] = ()) -> list[str]:
    """Where a canary stands: names of files and folders, and their content, also inside archives."""
    free = tuple(allowed)
    found = []
    for place in places:
        for file in [place, *sorted(place.rglob("*"))]:
            if any(file.is_relative_to(one) for one in free):
                continue
            if CANARY in file.name.lower():
                found.append(f"name of {file}")
            if file.is_file() and CANARY in _content(file):
                found.append(str(file))
    return found


def _content(file: Path) -> str:
    content = file.read_bytes().lower()
    if zipfile.is_zipfile(file):
        with np.load(file, allow_pickle=False) as arrays:
            content += b" ".join(str(arrays[name].tolist()).lower().encode() for name in arrays.files)
    return content.decode("latin-1") + content.replace(b"\0", b"").decode("latin-1")
