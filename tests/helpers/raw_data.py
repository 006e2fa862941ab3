"""Small raw files in the formats of the benchmarks: the same columns and types, words and answers of our own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

NO_ANSWER = {"-1": "Don´t know", "-2": "No answer", "-4": "Not asked", "-5": "Missing; Not available"}
COUNTRIES = {
    "8": "Albania",
    "422": "Lebanon",
    "20": "Andorra",
    "32": "Argentina",
    "51": "Armenia",
    "36": "Australia",
    "76": "Brazil",
}
CHOICES: dict[str, dict[str, str]] = {
    "B_COUNTRY": COUNTRIES,
    "D_INTERVIEW": {},
    "X003R": {"1": "16-24 years", "2": "25-34 years", "3": "35 and over"},
    "Q260": {"1": "Male", "2": "Female"},
    "Q275": {
        "0": "Early childhood education (ISCED 0) / no education",
        "1": "Primary education (ISCED 1)",
        "6": "Bachelor (ISCED 6)",
    },
    "Q273": {"1": "Married", "6": "Single"},
    "Q289": {"0": "Do not belong to a denomination", "5": "Muslim", "7": "Buddhist"},
    "Q290": {"8001": "AL: First group", "32001": "AR: White", "32002": "AR: Light brown"},
    "Q279": {"1": "Full time (30 hours a week or more)", "6": "Student"},
    # A plain scale, one whose codes are out of order, one with a code that is dropped, one with two codes for one
    # point.
    "Q1": {"1": "Very good", "2": "Rather good", "3": "Not good"},
    "Q56": {"1": "More", "2": "Less", "3": "The same"},
    "Q111": {"1": "Trees", "2": "Roads", "3": "Neither"},
    "Q241": {"0": "It is against it", "1": "Not needed", "2": "2", "3": "3", "4": "Needed"},
}
SCALES = {"Q1": (1, 3), "Q56": (1, 3), "Q111": (1, 2), "Q241": (1, 4)}
ADJUSTMENT = {"Q56": {"2": "3", "3": "2"}, "Q111": {"3": ""}, "Q241": {"0": "1"}}
PROFILE = ["B_COUNTRY", "X003R", "Q260", "Q275", "Q273", "Q289", "Q290", "Q279"]


def draw(seed: int, what: str, name: object) -> float:
    """Where the split puts a person, row, unit (country) or profile between 0 and 1, see docs/data_formats.md."""
    return int(hashlib.sha256(f"{seed}\0{what}\0{name}".encode()).hexdigest()[:16], 16) / 2**64


def write_codebook(folder: Path) -> None:
    """The three JSON files of WorldValuesBench."""
    folder.mkdir(parents=True, exist_ok=True)
    codebook = {
        name: {"question": name, "question_instruction": "", "type": "", "choices": {**choices, **NO_ANSWER}}
        for name, choices in CHOICES.items()
    }
    codebook["D_INTERVIEW"]["choices"] = {}
    metadata = {
        name: {
            "question": f"What about {name}?",
            "category": "",
            "use_case": "value" if name in SCALES else "demographic",
            "answer_scale_min": SCALES[name][0] if name in SCALES else "",
            "answer_scale_max": SCALES[name][1] if name in SCALES else "",
            "answer_data_type": "ordinal" if name in SCALES else "non_ordinal",
        }
        for name in CHOICES
    }
    for name, content in (("codebook", codebook), ("question_metadata", metadata), ("answer_adjustment", ADJUSTMENT)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def survey_people(count: int, seed: int = 0) -> pd.DataFrame:
    """Codes as in the WVS-7 CSV, some of them missing; columns nobody asked for among them."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"version": "5-0-0", "A_YEAR": 2018, "D_INTERVIEW": 10_000 + rng.permutation(count)})
    for name, choices in CHOICES.items():
        if name != "D_INTERVIEW":
            # Everybody answers one question and names a country.
            codes = np.array([*map(int, choices), *([-2] if name not in ("B_COUNTRY", "Q1") else [])])
            frame[name] = rng.choice(codes, count)
    return frame


def write_survey(folder: Path, people: pd.DataFrame) -> None:
    """The raw CSV beside the JSON files."""
    write_codebook(folder)
    people.to_csv(folder / "WVS_Cross-National_Wave_7_csv_v5_0.csv", index=False)


def adjusted(name: str, code: int) -> int | None:
    """What the benchmark's script makes of a value code; None for no answer."""
    if code < 0:
        return None
    target = ADJUSTMENT.get(name, {}).get(str(code), str(code))
    return int(target) if target else None


def write_benchmark(folder: Path, people: pd.DataFrame, splits: dict[str, list[int]]) -> None:
    """TSV files as the benchmark's script writes them: texts for who, numbers with gaps for what."""
    write_codebook(folder / "dataset_construction")
    who = people[["D_INTERVIEW", *PROFILE]].copy()
    for name in PROFILE:
        texts = {**CHOICES[name], **NO_ANSWER}
        who[name] = [texts[str(code)] for code in people[name]]
    what = people[["D_INTERVIEW"]].copy()
    for name in SCALES:
        what[name] = [adjusted(name, code) for code in people[name]]
        what[name] = what[name].astype("Int64") if name == "Q1" else what[name]
    for split, rows in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        who.iloc[rows].to_csv(folder / split / f"{split}_demographic_qa.tsv", sep="\t", index=False)
        what.iloc[rows].to_csv(folder / split / f"{split}_value_qa.tsv", sep="\t", index=False)


def alignment_row(number: int, **changes: Any) -> dict[str, Any]:
    """A row of Community Alignment v1.1: two turns, four answers each."""
    row: dict[str, Any] = {
        "conversation_id": f"c{number}",
        "assigned_lang": "en",
        "annotator_id": f"a{number % 9}",
        "is_pregenerated_first_prompt": number % 2 == 0,
        "annotator_age": ["18-34", "55+"][number % 2],
        "annotator_gender": ["male", "female"][number % 2],
        "annotator_education_level": "Some post-secondary",
        "annotator_political": "",
        "annotator_ethnicity": "Prefer not to say",
        "annotator_country": ["india", "united states", "Italy"][number % 9 % 3],
    }
    for turn, there in (("first", True), ("second", True), ("third", False), ("fourth", False)):
        row[f"{turn}_turn_prompt"] = f'{turn} question {number % 4},\nwith "quotes"' if there else None
        for letter in "abcd":
            row[f"{turn}_turn_response_{letter}"] = (
                f"{turn} answer {letter} to {number % 4}<|end_of_text|>" if there else None
            )
        row[f"{turn}_turn_preferred_response"] = f"response_{'abcd'[number % 3]}" if there else None
    return {**row, **changes}


def write_alignment(file: Path, rows: list[dict[str, Any]]) -> Path:
    """One CSV."""
    pd.DataFrame(rows).to_csv(file, index=False)
    return file


def prism_user(number: int, **changes: Any) -> dict[str, Any]:
    """A row of PRISM's survey."""
    return {
        "user_id": f"user{number}",
        "survey_only": False,
        "age": ["18-24 years old", "65+ years old"][number % 2],
        "gender": ["Female", "Non-binary / third gender"][number % 2],
        "education": "University Bachelors Degree",
        "employment_status": "Prefer not to say",
        "marital_status": "Never been married",
        "religion": {"self_described": "none", "categorised": "Non-religious", "simplified": "No Affiliation"},
        "ethnicity": {"self_described": "white", "categorised": "White", "simplified": "White"},
        "location": {
            "birth_country": "Kenya",
            "reside_country": ["Kenya", "Chile", "France"][number % 3],
            "birth_region": "Africa",
        },
        **changes,
    }


def prism_conversation(number: int, user: int, **changes: Any) -> dict[str, Any]:
    """A conversation of two turns: three models answer first, then one of them twice."""
    history = []
    for turn, answers in ((0, 3), (1, 2)):
        history.append(
            {
                "turn": turn,
                "role": "user",
                "content": f"Prompt {turn} of {number}",
                "model_name": None,
                "if_chosen": None,
            }
        )
        for place in range(answers):
            history.append(
                {
                    "turn": turn,
                    "role": "model",
                    "content": f"Answer {place} in turn {turn} of {number}",
                    "model_name": f"m{place}",
                    "score": 50 + place + 10 * (place == number % 2),
                    "if_chosen": place == number % 2,
                    "within_turn_id": place,
                }
            )
    return {"conversation_id": f"k{number}", "user_id": f"user{user}", "conversation_history": history, **changes}


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    """One object per line; texts as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return file


def write_prism(folder: Path, users: list[Any], conversations: list[Any]) -> Path:
    """Both files."""
    write_jsonl(folder / "survey.jsonl", users)
    write_jsonl(folder / "conversations.jsonl", conversations)
    return folder
