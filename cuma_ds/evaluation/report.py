"""One report of a run: report.json for programs, report.md and pictures for people.

A summary is plain JSON: ``run``, ``checkpoint``, ``kind``, ``min_answers`` and ``splits``, each split with its ``rows`` of numbers.
Groups with fewer answers than ``min_answers`` are counted there and named nowhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from cuma_ds.evaluation.chat import ChatLosses
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.metrics import (
    Cells,
    emd,
    gather_cells,
    mean_by_group,
    mean_collapse_recovered,
    predicted_distributions,
    score,
)
from cuma_ds.evaluation.plots import plot_distributions, plot_expert_use, plot_group_emd

Array = NDArray[np.float64]

FORMAT_VERSION = 1
ROWS = {
    "collapse": "one global distribution",
    "oracle": "own training answers (oracle)",
    "before": "backbone before training",
    "trained": "trained",
    "swapped": "trained, profiles swapped",
}
SPLITS = {
    "test": "Held-out people of groups seen in training",
    "heldout": "Groups held out entirely (zero-shot)",
}
_COLUMNS = {
    "choice": {
        "emd": ("EMD", "{:.4f}"),
        "recovered": ("recovered", "{:.2f}"),
        "accuracy": ("accuracy", "{:.3f}"),
        "entropy": ("entropy", "{:.3f}"),
    },
    "chat": {"loss": ("loss", "{:.4f}"), "perplexity": ("perplexity", "{:.3f}")},
}
_LEGEND = {
    "choice": (
        "EMD: normalised Wasserstein-1 distance (0 to 1) between predicted and observed answers of each question and group, weighted by "
        "answers. One global distribution: everyone gets the average of all training answers (perfect mean collapse). Oracle: each profile "
        "gets the distribution of its own training answers. Recovered: share of the way from the first (0) to the second (1). Accuracy: "
        "share of answers that are the predicted mode. Entropy: of the predicted distributions, in nats."
    ),
    "chat": "Loss: mean negative log-likelihood of the assistant's tokens, in nats. Perplexity: its exponential.",
}
# Pictures stay readable: the groups with most answers, the questions with most answers.
_MOST_GROUPS, _MOST_QUESTIONS, _MOST_DIFFERENT = 100, 3, 8


@dataclass(frozen=True)
class Report:
    """What :func:`write_report` wrote.

    Attributes:
        folder: where report.json, report.md and the pictures are.
        summary: the content of report.json.
        pictures: file name -> caption.
    """

    folder: Path
    summary: dict[str, Any]
    pictures: dict[str, str]

    def tables(self) -> list[Table]:
        """One table per split, for a terminal."""
        return [_terminal_table(self.summary["kind"], name, split) for name, split in self.summary["splits"].items()]


def choice_split(examples: ChoiceExamples, rows: Mapping[str, Sequence[Array]], min_answers: int) -> dict[str, Any]:
    """Numbers of one split of choice questions, overall, per question and per (question, group).

    Args:
        examples: the split.
        rows: option probabilities of every example, by row name (keys of :data:`ROWS`).
        min_answers: cells with fewer answers are left out.
    """
    cells = gather_cells(examples.questions, examples.groups, examples.counts, min_answers)
    questions = list(dict.fromkeys(key[0] for key in cells.keys))
    predicted = {name: predicted_distributions(cells, row, examples.counts) for name, row in rows.items()}
    return {
        **_scored(cells, examples, rows),
        "left_out": {"cells": cells.left_out, "answers": int(cells.left_out_answers)},
        "questions": {
            question: {
                "question": examples.texts[question][0],
                "options": examples.texts[question][1],
                **_scored(cells.of_question(question), examples, rows),
            }
            for question in questions
        },
        "cells": [
            {
                "question_id": question,
                "group": group,
                "answers": int(cells.answers[index]),
                "observed": _rounded(cells.observed[index]),
                "predicted": {name: _rounded(row[index]) for name, row in predicted.items()},
                "emd": {name: round(float(emd(row[index], cells.observed[index])), 6) for name, row in predicted.items()},
            }
            for index, (question, group) in enumerate(cells.keys)
        ],
    }


def chat_split(rows: Mapping[str, ChatLosses]) -> dict[str, Any]:
    """Numbers of one split of conversations: loss and perplexity by row name."""
    some = next(iter(rows.values()))
    return {
        "conversations": len(some.tokens),
        "tokens": int(some.tokens.sum()),
        "rows": {name: {"loss": _number(row.loss), "perplexity": _number(_exp(row.loss))} for name, row in rows.items()},
    }


def choice_pictures(folder: Path, split: Mapping[str, Any], trained: str = "trained") -> dict[str, str]:
    """Draw predicted against observed answers and the EMD of each group from a split made by :func:`choice_split`.

    Returns:
        File name -> caption.
    """
    pictures = {}
    largest = sorted(split["questions"], key=lambda question: -split["questions"][question]["answers"])[:_MOST_QUESTIONS]
    for number, question in enumerate(largest, start=1):
        cells = [cell for cell in split["cells"] if cell["question_id"] == question]
        cells = sorted(cells, key=lambda cell: -cell["emd"]["collapse"])[:_MOST_DIFFERENT]
        name = f"distributions-{number}.png"
        asked = split["questions"][question]
        plot_distributions(
            folder / name,
            asked["question"],
            asked["options"],
            [cell["group"] for cell in cells],
            np.array([cell["observed"] for cell in cells]),
            np.array([cell["predicted"][trained] for cell in cells]),
            np.array(cells[0]["predicted"]["collapse"]),
        )
        pictures[name] = f"Predicted and observed answers of the {len(cells)} groups that differ most from the global distribution."
    if split["cells"]:
        groups, answers = _largest_groups(split["cells"])
        rows = {row: _emd_by_group(split["cells"], row) for row in ("before", trained, "collapse")}
        plot_group_emd(folder / "emd-by-group.png", groups, *(np.array([row[group] for group in groups]) for row in rows.values()))
        pictures["emd-by-group.png"] = "EMD of each group before and after training, worst first." + _shown(groups, answers)
    return pictures


def expert_picture(
    folder: Path,
    names: Sequence[str],
    questions: Sequence[str],
    groups: Sequence[str],
    weights: Sequence[float],
    gates_MRE: NDArray[np.float32],
) -> dict[str, str]:
    """Draw which experts serve which group, from M examples of groups that may be named.

    Groups are compared on the questions that all of them answered (on the one with most groups if there is none), so that
    differences come from who asks, not from what is asked.

    Args:
        names: R router names.
        questions, groups, weights: of each example.
        gates_MRE: mean gate weight of each example [M, R, E].
    """
    asked: dict[str, set[str]] = {}
    size: dict[str, float] = {}
    for question, group, weight in zip(questions, groups, weights, strict=True):
        asked.setdefault(question, set()).add(group)
        size[group] = size.get(group, 0.0) + weight
    if len(size) < 2:
        return {}
    common = {question for question, who in asked.items() if len(who) == len(size)} or {
        max(asked, key=lambda question: len(asked[question]))
    }
    rows = [index for index, question in enumerate(questions) if question in common]
    means = mean_by_group(gates_MRE[rows], [groups[index] for index in rows], np.array([weights[index] for index in rows]))
    chosen = sorted(means, key=lambda group: -size[str(group)])[:_MOST_GROUPS]
    plot_expert_use(folder / "experts-by-group.png", [str(group) for group in chosen], np.stack([means[group] for group in chosen]), names)
    caption = "Experts used by each group in the routers that tell groups apart best; groups with similar routing stand together."
    return {"experts-by-group.png": caption + _shown(chosen, means)}


def write_report(folder: Path, summary: dict[str, Any], pictures: dict[str, str]) -> Report:
    """Write report.json and report.md beside the pictures, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = {"format_version": FORMAT_VERSION, **summary, "pictures": list(pictures)}
    _write(folder / "report.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _write(folder / "report.md", markdown(summary, pictures))
    return Report(folder, summary, pictures)


def markdown(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The report as Markdown."""
    kind = summary["kind"]
    lines = [f"# Evaluation of {summary['run']} ({summary['checkpoint']})", ""]
    for name, split in summary["splits"].items():
        lines += [f"## {SPLITS[name]}", "", _size(split), "", *_markdown_table(kind, split["rows"]), ""]
        questions = split.get("questions", {})
        if len(questions) > 1:
            for question in questions.values():
                text = " ".join(question["question"].split())
                lines += [f"### {text}", "", _size(question), "", *_markdown_table(kind, question["rows"]), ""]
    lines += ["## How to read this", "", _LEGEND[kind], ""]
    if kind == "choice":
        lines += [f"Groups with fewer than {summary['min_answers']} answers to a question are left out and not named.", ""]
    if any("swapped" in split["rows"] for split in summary["splits"].values()):
        lines += [
            "Profiles swapped: the same model and prompts, each asked with the profile embedding of another group; what this row loses "
            "against the trained one is carried by the routing.",
            "",
        ]
    if pictures:
        lines += ["## Pictures", ""]
    for file, caption in pictures.items():
        lines += [f"![{caption}]({file})", "", f"*{caption}*", ""]
    return "\n".join(lines)


def _scored(cells: Cells, examples: ChoiceExamples, rows: Mapping[str, Sequence[Array]]) -> dict[str, Any]:
    scores = {name: score(cells, row, examples.counts) for name, row in rows.items()}
    table = {}
    for name, values in scores.items():
        recovered = mean_collapse_recovered(scores["collapse"].emd, scores["oracle"].emd, values.emd) if "oracle" in scores else None
        table[name] = {
            "emd": _number(values.emd),
            "recovered": _number(recovered),
            "accuracy": _number(values.accuracy),
            "entropy": _number(values.entropy),
        }
    return {"groups": len({group for _, group in cells.keys}), "answers": int(cells.answers.sum()), "rows": table}


def _emd_by_group(cells: Sequence[Mapping[str, Any]], row: str) -> dict[Any, Any]:
    values = np.array([cell["emd"][row] for cell in cells])
    return mean_by_group(values, [cell["group"] for cell in cells], np.array([cell["answers"] for cell in cells]))


def _largest_groups(cells: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, int]]:
    answers: dict[str, int] = {}
    for cell in cells:
        answers[cell["group"]] = answers.get(cell["group"], 0) + cell["answers"]
    return sorted(answers, key=lambda group: -answers[group])[:_MOST_GROUPS], answers


def _shown(some: Sequence[Any], every: Mapping[Any, Any]) -> str:
    return "" if len(some) == len(every) else f" The {len(some)} of {len(every)} groups with most answers are shown."


def _size(split: Mapping[str, Any]) -> str:
    if "conversations" in split:
        return f"{split['conversations']:,} conversations, {split['tokens']:,} assistant tokens."
    text = f"{split['groups']:,} group{'s' if split['groups'] != 1 else ''}, {split['answers']:,} answers."
    left_out = split.get("left_out", {"cells": 0})
    if left_out["cells"]:
        text += f" Left out as too small: {left_out['cells']:,} ({left_out['answers']:,} answers)."
    return text


def _markdown_table(kind: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = _COLUMNS[kind]
    lines = ["| | " + " | ".join(title for title, _ in columns.values()) + " |", "|---|" + "---:|" * len(columns)]
    for name, values in rows.items():
        bold = "**" if name == "trained" else ""
        lines.append(f"| {bold}{ROWS[name]}{bold} | " + " | ".join(_cell(values[key], form) for key, (_, form) in columns.items()) + " |")
    return lines


def _terminal_table(kind: str, name: str, split: Mapping[str, Any]) -> Table:
    columns = _COLUMNS[kind]
    table = Table(title=SPLITS[name], caption=_size(split), title_justify="left", caption_justify="left")
    table.add_column("")
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    for row, values in split["rows"].items():
        cells = (_cell(values[key], form) for key, (_, form) in columns.items())
        table.add_row(ROWS[row], *cells, style="bold" if row == "trained" else None)
    return table


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _rounded(values: Array) -> list[float]:
    return [round(float(value), 6) for value in values]


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
