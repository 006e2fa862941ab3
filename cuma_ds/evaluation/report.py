"""One report of a model: report.json for programs, report.md and pictures for people.

A summary is plain JSON: ``run``, ``checkpoint``, ``kind``, ``main`` (the row that is about the model), ``min_answers``, ``bootstrap`` and
``splits``, each split with its ``rows`` of numbers; where they were asked for also ``routing``, ``generation`` and ``gradients``.
Groups with fewer answers than ``min_answers`` are counted there and named nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cuma_ds.errors import DataError
from cuma_ds.files import write_atomically

# 3: the oracle is that of the group, and nominal questions are judged by total variation.
FORMAT_VERSION = 3
ROWS = {
    "collapse": "one global distribution",
    "oracle": "own training answers (oracle)",
    "nearest": "nearest training profile's answers",
    "before": "backbone before training",
    "trained": "trained",
    "swapped": "trained, profiles swapped",
}
SPLITS = {
    "test": "Held-out people of groups seen in training",
    "unseen": "Held-out people whose exact profile was never trained on (zero-shot)",
    "heldout": "Groups held out entirely (zero-shot)",
    "heldout_profiles": "Profiles held out entirely (zero-shot)",
}
_Columns = dict[str, tuple[str, str]]
# {distance} stands for what the questions of a table are judged by: EMD, TV, or EMD and TV.
_DISTRIBUTIONS: _Columns = {
    "emd": ("{distance}", "{:.4f}"),
    "recovered": ("recovered", "{:.2f}"),
    "emd_questions": ("{distance}, questions", "{:.4f}"),
    "emd_argmax": ("{distance}, argmax", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
}
_ANSWERS: _Columns = {
    "accuracy": ("accuracy", "{:.3f}"),
    "macro_f1": ("macro-F1", "{:.3f}"),
    "macro_f1_questions": ("macro-F1, questions", "{:.3f}"),
    "group_accuracy": ("group accuracy", "{:.3f}"),
    "inequity": ("σ-inequity", "{:.3f}"),
    "calibration_error": ("ECE", "{:.3f}"),
}
_LOSSES: _Columns = {"loss": ("loss", "{:.4f}"), "perplexity": ("perplexity", "{:.3f}")}
_TABLES: dict[str, list[_Columns]] = {"choice": [_DISTRIBUTIONS, _ANSWERS], "chat": [_LOSSES]}
_TERMINAL: dict[str, _Columns] = {
    "choice": {key: (_DISTRIBUTIONS | _ANSWERS)[key] for key in ("emd", "recovered", "accuracy", "entropy")},
    "chat": _LOSSES,
}
_WITH_INTERVAL = ("emd", "recovered", "accuracy", "macro_f1", "loss", "perplexity")
_LEGEND = {
    "choice": (
        "{distance}: distance (0 to 1) between the predicted and the observed answers of each question and group, mean weighted by "
        "answers. {distances} One global distribution: everyone gets the average of all training answers (perfect mean collapse). "
        "Oracle: everyone gets the training answers of people like them: of the same profile where it gave at least {min_answers} answers "
        "to the question, else of the same group where that did, else of everybody. Recovered: share of the way from one global "
        "distribution (0) to the oracle (1). {distance}, questions: the same distance for each question over all people, mean over "
        "questions; {distance}, argmax: the same with the most probable option of everybody instead of the full distribution, as the "
        "WorldValuesBench script does. Entropy: of the predicted distributions, in nats.",
        "Accuracy: share of answers that are the predicted mode; options that tie for the mode share it. Macro-F1: over option letters, "
        "those of all questions counted together. Macro-F1, questions: over the options of each question, mean over questions. Group "
        "accuracy: mean of the groups' own accuracies. σ-inequity: standard deviation of accuracy between the subgroups of a profile "
        "field, mean over fields. ECE: expected calibration error of the predicted option, 15 bins. Groups behind group accuracy and "
        "subgroups behind σ-inequity have at least {min_subgroup} people.",
    ),
    "chat": ("Loss: mean negative log-likelihood of the assistant's tokens, in nats. Perplexity: its exponential.",),
}
_DISTANCES = {
    "EMD": "EMD is the normalised Wasserstein-1 distance, for questions whose options have an order.",
    "TV": "TV is the total variation distance, half the sum of the absolute differences, for questions whose options have no order.",
}
_MOST_SUBGROUPS = 20


# Less probability than this on the option letters is warned about.
_LITTLE_MASS = 0.5
# What every report has beside its rows.
_KEYS = ("run", "checkpoint", "kind", "main", "min_answers", "min_subgroup", "bootstrap", "splits")


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

    @property
    def files(self) -> list[Path]:
        """Everything that was written."""
        return [self.folder / name for name in ("report.md", "report.json", *self.pictures)]

    def tables(self) -> list[Table]:
        """One table per split, for a terminal."""
        return [_terminal_table(self.summary, name, split) for name, split in self.summary["splits"].items()]


def write_report(folder: Path, summary: dict[str, Any], pictures: dict[str, str]) -> Report:
    """Write report.json and report.md beside the pictures, each complete or not at all."""
    summary = {"format_version": FORMAT_VERSION, **summary, "pictures": list(pictures)}
    write_atomically(folder / "report.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(folder / "report.md", markdown(summary, pictures))
    return Report(folder, summary, pictures)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The content of ``folder/report.json`` as :func:`write_report` wrote it; None where there is no such file.

    Raises:
        DataError: the file is damaged or of another format.
    """
    file = folder / "report.json"
    if not file.is_file():
        return None
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{file.name} cannot be read ({reason}); evaluate again with launchers/evaluate.py") from None
    version = summary.get("format_version") if isinstance(summary, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file.name} has report format {version}, not {FORMAT_VERSION}; evaluate again with launchers/evaluate.py"
        )
    missing = [key for key in _KEYS if key not in summary]
    if missing:
        raise DataError(f"{file.name} lacks {', '.join(missing)}; evaluate again with launchers/evaluate.py")
    return summary


def markdown(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The report as Markdown."""
    lines = [f"# Evaluation of {summary['run']} ({summary['checkpoint']})", ""]
    for name, split in summary["splits"].items():
        lines += [f"## {SPLITS[name]}", "", *split_tables(summary, split)]
        lines += _letter_mass(summary, split) + _questions(summary, split) + _subgroups(summary, split)
    for key, section in _SECTIONS.items():
        if key in summary:
            lines += section(summary[key])
    lines += ["## How to read this", "", *legend(summary)]
    if pictures:
        lines += ["## Pictures", ""]
    for file, caption in pictures.items():
        lines += [f"![{caption}]({file})", "", f"*{caption}*", ""]
    return "\n".join(lines)


def split_tables(summary: Mapping[str, Any], split: Mapping[str, Any]) -> list[str]:
    """The size of a split of a report and all numbers of its rows, as lines of Markdown."""
    lines = [_size(split), ""]
    for columns in _TABLES[summary["kind"]]:
        lines += [*_table(summary, split, columns), ""]
    return lines


def _letter_mass(summary: Mapping[str, Any], split: Mapping[str, Any]) -> list[str]:
    """How much of the model's probability the numbers are about, and a warning where that is less than half."""
    found = split.get("letter_mass", {})
    if not found:
        return []
    said = []
    for name, mass in found.items():
        lowest = mass["lowest"]
        where = f" (lowest {lowest['mean']:.3f}, {lowest['group']})" if lowest else ""
        said.append(f"{_title(summary, name)} {mass['mean']:.3f}{where}")
    lines = [f"Probability of the option letters together, mean over answers: {'; '.join(said)}.", ""]
    main = found.get(summary["main"], {"mean": 1.0})["mean"]
    if main < _LITTLE_MASS:
        lines += [
            f"**Warning: the option letters together have a probability of {main:.3f} only. The model mostly says something else, and all "
            "numbers here are about the rest of its answer.**",
            "",
        ]
    return lines


def _questions(summary: Mapping[str, Any], split: Mapping[str, Any]) -> list[str]:
    questions = split.get("questions", {})
    if len(questions) < 2:
        return []
    lines = []
    for question in questions.values():
        text = " ".join(question["question"].split())
        lines += [f"### {text}", "", _size(question), "", *_table(summary, question, _TERMINAL["choice"]), ""]
    return lines


def _subgroups(summary: Mapping[str, Any], split: Mapping[str, Any]) -> list[str]:
    lines = []
    for field, part in split.get("subgroups", {}).items():
        shown = sorted(part["shown"], key=lambda row: -row["people"])[:_MOST_SUBGROUPS]
        if not shown:
            continue
        names = [name for name in ("collapse", "before", summary["main"]) if name in shown[0]["rows"]]
        rows = {name: _title(summary, name) for name in names}
        counted = "people" if split["people"] is not None else "answers"
        accuracies, distances = (
            [f"{what}, {title}" for title in rows.values()] for what in ("accuracy", split["distance"])
        )
        head = [counted, *accuracies, *distances]
        lines += [
            f"### Subgroups by {field.replace('_', ' ')}",
            "",
            f"| | {' | '.join(head)} |",
            "|---|" + "---:|" * len(head),
        ]
        for row in part["shown"]:
            if row not in shown:
                continue
            accuracy = [_cell(row["rows"][name], "accuracy", "{:.3f}") for name in rows]
            distance = [_cell(row["rows"][name], "emd", "{:.4f}") for name in rows]
            lines.append(f"| {row['label']} | {row['people']:,} | {' | '.join(accuracy + distance)} |")
        hidden, more = part["left_out"], len(part["shown"]) - len(shown)
        notes = [f"The {len(shown)} of {len(part['shown'])} largest are shown."] if more else []
        notes += [f"{hidden} with fewer than {summary['min_answers']} {counted} are left out."] if hidden else []
        lines += ["", *([" ".join(notes), ""] if notes else [])]
    return lines


def _routing(section: Mapping[str, Any]) -> list[str]:
    routers = section["routers"]
    mean = {
        key: sum(router[key] for router in routers) / len(routers) for key in ("load_entropy", "gate_entropy", "unused")
    }
    lines = [
        "## Routing",
        "",
        f"Over {section['tokens']:,} tokens and {len(routers)} routers: entropy of the expert load {mean['load_entropy']:.2f} of log E "
        f"(1 = every expert gets the same), entropy of a token's gate {mean['gate_entropy']:.2f} nats (0 = one expert answers), "
        f"{mean['unused']:.1f} of {len(routers[0]['load'])} experts per router nearly unused.",
        "",
    ]
    information = section.get("information")
    if information:
        lines += [
            "| mutual information with the chosen expert (nats, mean over routers) | measured | shuffled labels | above shuffled |"
        ]
        lines += ["|---|---:|---:|---:|", f"| whole profile | {_mean(information['profile']):.4f} | – | – |"]
        for field, found in information["fields"].items():
            shuffled = "–" if found["shuffled"] is None else f"{_mean(found['shuffled']):.4f}"
            above = "–" if found["shuffled"] is None else f"{_mean(found['corrected']):.4f}"
            lines.append(f"| {field.replace('_', ' ')} | {_mean(found['value']):.4f} | {shuffled} | {above} |")
        lines += [
            "",
            "A field that tells every profile apart is as informative as the whole profile and has no shuffled labels.",
            "",
        ]
    return lines


def _generation(section: Mapping[str, Any]) -> list[str]:
    lines = ["## Generated answers", "", f"To {section['requests']:,} held-out conversations.", ""]
    lines += ["| | Distinct-1 | Distinct-2 | words |", "|---|---:|---:|---:|"]
    for name, row in section["rows"].items():
        cells = (
            _plain(row[key], form)
            for key, form in (("distinct_1", "{:.4f}"), ("distinct_2", "{:.4f}"), ("words", "{:.1f}"))
        )
        lines.append(f"| {ROWS[name]} | {' | '.join(cells)} |")
    lines += ["", "Distinct-n: different n-grams of words over all n-grams. The answers are in answers.jsonl.", ""]
    judge = section.get("judge")
    if judge:
        spread = judge["interval"]
        rate = "none" if judge["win_rate"] is None else f"{judge['win_rate']:.1%}"
        rate += f" [{spread[0]:.1%}, {spread[1]:.1%}]" if spread else ""
        lines += [
            f"Win rate of the trained model against its backbone, by {judge['model']}: **{rate}** (ties count half).",
            "",
            "| pairs | wins | losses | ties | failed | unreadable |",
            "|---:|---:|---:|---:|---:|---:|",
            "| "
            + " | ".join(f"{judge[key]:,}" for key in ("pairs", "win", "loss", "tie", "failed", "unreadable"))
            + " |",
            "",
            f"Every pair was asked in both orders; {judge['disagreed']:,} of the ties are pairs whose two verdicts disagree. Failed "
            "calls and verdicts that could not be read are no results."
            + _order(judge["first_preferred"])
            + _temperature(judge),
            "",
        ]
    return lines


def _order(first: float | None) -> str:
    return (
        ""
        if first is None
        else f" Of the verdicts that preferred an answer, {first:.0%} preferred the one shown first."
    )


def _temperature(judge: Mapping[str, Any]) -> str:
    return (
        " The judge refuses temperature 0; its verdicts may differ from run to run."
        if "temperature" in judge["refused"]
        else ""
    )


def _gradients(section: Mapping[str, Any]) -> list[str]:
    lines = ["## Gradient interference", "", f"Cosines between the gradients of {len(section['groups'])} groups.", ""]
    lines += ["| adapters | conflicting pairs | mean cosine | mean absolute cosine |", "|---|---:|---:|---:|"]
    for kind, row in section["rows"].items():
        lines.append(f"| {kind} | {row['conflicting']:.0%} | {row['mean']:.3f} | {row['mean_absolute']:.3f} |")
    return [*lines, ""]


_SECTIONS = {"routing": _routing, "generation": _generation, "gradients": _gradients}


def legend(summary: Mapping[str, Any]) -> list[str]:
    """What the names in the tables of a report mean, as lines of Markdown."""
    kind, splits = summary["kind"], summary["splits"].values()
    names = [name for name in _DISTANCES if any(name in split.get("distance", "").split() for split in splits)]
    about = {
        "distance": " and ".join(names),
        "distances": " ".join(_DISTANCES[name] for name in names),
        "min_subgroup": summary["min_subgroup"],
        "min_answers": summary["min_answers"],
    }
    lines = []
    for paragraph in _LEGEND[kind]:
        lines += [paragraph.format(**about), ""]
    if kind == "choice":
        both = "Where a split has questions of both kinds, both distances go into one mean. " if len(names) > 1 else ""
        lines += [
            f"{both}Groups with fewer than {summary['min_answers']} answers to a question have no distance of their own and are not named; "
            "all other numbers count every answer.",
            "",
        ]
    some = next(iter(summary["splits"].values()))
    if some.get("weighted"):
        lines += [
            "Answers count by their survey weights, which are 1 on average over all data. Effective: how many answers of one "
            "and the same weight would be as precise, (sum of weights)² / sum of squared weights.",
            "",
        ]
    if summary["bootstrap"]:
        who = (
            "people, each with all of their answers"
            if some["people"] is not None
            else "single answers (the data does not say who gave them)"
        )
        lines += [f"In brackets: 95% intervals from {summary['bootstrap']:,} bootstrap samples of {who}.", ""]
    if any("swapped" in split["rows"] for split in summary["splits"].values()):
        lines += [
            "Profiles swapped: the same model and prompts, each asked with the profile embedding of somebody else, of another group "
            "wherever there is one; what this row loses against the trained one is carried by the routing.",
            "",
        ]
    if any("nearest" in split["rows"] for split in summary["splits"].values()):
        lines += ["Nearest training profile: a look-up by sentence embedding, without any model.", ""]
    return lines


def _size(split: Mapping[str, Any]) -> str:
    people = f"{split['people']:,} people, " if split.get("people") is not None else ""
    if "conversations" in split:
        return f"{people}{split['conversations']:,} conversations, {split['tokens']:,} assistant tokens."
    compared = split["compared"]
    effective = f" ({split['effective_answers']:,} effective)" if "effective_answers" in split else ""
    text = (
        f"{people}{split['answers']:,} answers{effective}; {split['distance']} over {compared['answers']:,} of them in "
        f"{split['groups']:,} group{_s(split['groups'])}."
    )
    left_out = split.get("left_out", {"cells": 0})
    if left_out["cells"]:
        text += f" Left out there as too small: {left_out['cells']:,} ({left_out['answers']:,} answers)."
    return text


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _title(summary: Mapping[str, Any], row: str) -> str:
    return "the model as it is" if row == "before" == summary["main"] else ROWS[row]


def _table(summary: Mapping[str, Any], part: Mapping[str, Any], columns: _Columns) -> list[str]:
    """The rows of a split, or of one question."""
    lines = ["| | " + " | ".join(_heads(part, columns)) + " |", "|---|" + "---:|" * len(columns)]
    for name, values in part["rows"].items():
        bold = "**" if name == summary["main"] else ""
        cells = " | ".join(_cell(values, key, form) for key, (_, form) in columns.items())
        lines.append(f"| {bold}{_title(summary, name)}{bold} | {cells} |")
    return lines


def _heads(part: Mapping[str, Any], columns: _Columns) -> list[str]:
    return [title.format(distance=part.get("distance")) for title, _ in columns.values()]


def _terminal_table(summary: Mapping[str, Any], name: str, split: Mapping[str, Any]) -> Table:
    columns = _TERMINAL[summary["kind"]]
    table = Table(title=SPLITS[name], caption=_size(split), title_justify="left", caption_justify="left")
    table.add_column("")
    for title in _heads(split, columns):
        table.add_column(title, justify="right")
    for row, values in split["rows"].items():
        cells = (_plain(values.get(key), form) for key, (_, form) in columns.items())
        table.add_row(_title(summary, row), *cells, style="bold" if row == summary["main"] else None)
    return table


def _cell(values: Mapping[str, Any], key: str, form: str) -> str:
    text = _plain(values.get(key), form)
    spread: Sequence[float] | None = values.get("interval", {}).get(key) if key in _WITH_INTERVAL else None
    # What does not depend on who was drawn needs no interval.
    return (
        text
        if spread is None or spread[0] == spread[1]
        else f"{text} [{form.format(spread[0])}, {form.format(spread[1])}]"
    )


def _plain(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
