"""Rewards that a recipe of a test names, and that go wrong where a test wants it."""

from __future__ import annotations

import os
from pathlib import Path


def characters(prompts, completions, profiles, **columns) -> list[float]:
    """A number that depends on the whole text and on who asked."""
    people = [len(profile["sentence"]) for profile in profiles]
    return [sum(map(ord, text)) % 7 + 0.1 * (person % 5) for text, person in zip(completions, people, strict=True)]


def rarely(prompts, completions, profiles, **columns) -> list[float | None]:
    """None for about a third of the completions."""
    return [None if sum(map(ord, text)) % 3 == 0 else float(len(text)) for text in completions]


def wrong(prompts, completions, profiles, **columns) -> list[float] | None:
    """Right for the calls that the file named by WRONG_AFTER allows; then as WRONG_HOW says."""
    counter = Path(f"{os.environ['WRONG_AFTER']}-{os.environ.get('RANK', '0')}")
    left = int(counter.read_text()) if counter.is_file() else 2
    counter.write_text(str(left - 1))
    found = characters(prompts, completions, profiles, **columns)
    if left > 0 or os.environ.get("RANK", "0") != "0":
        return found
    match os.environ["WRONG_HOW"]:
        case "raises":
            raise KeyError("no such key")
        case "nan":
            return [*found[:-1], float("nan")]
        case "length":
            return found[:-1]
    return found
