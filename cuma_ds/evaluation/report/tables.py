"""The tables of a report: all scores as Markdown, the most important ones for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from cuma_ds.evaluation.report.model import (
    CONTENDERS,
    FLOORS,
    SPLITS,
    ChatScores,
    ChatSplit,
    ChoiceScores,
    ChoiceSplit,
    PreferenceScores,
    PreferenceSplit,
    Report,
    Scored,
)

# Score -> head of its column and format. {distance} stands for the distance that the questions are judged by.
Columns = dict[str, tuple[str, str]]
_DISTRIBUTIONS: Columns = {
    "emd": ("{distance}", "{:.4f}"),
    "recovered": ("recovered", "{:.2f}"),
    "emd_questions": ("{distance}, questions", "{:.4f}"),
    "emd_argmax": ("{distance}, argmax", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
}
_AGREEMENT: Columns = {
    "total_variation": ("TV", "{:.4f}"),
    "similarity": ("1 − JSD", "{:.4f}"),
    "log_score": ("log-score", "{:.4f}"),
    "emd_worst_group": ("{distance}, worst group", "{:.4f}"),
}
_QUESTIONS: Columns = {
    "questions_median": ("{distance}, median", "{:.4f}"),
    "questions_within": ("at most 0.2", "{:.1%}"),
    "questions_auc": ("AUC", "{:.3f}"),
    "argmax_median": ("argmax, median", "{:.4f}"),
    "argmax_within": ("argmax, at most 0.2", "{:.1%}"),
    "argmax_auc": ("argmax, AUC", "{:.3f}"),
}
_ANSWERS: Columns = {
    "accuracy": ("accuracy", "{:.3f}"),
    "macro_f1": ("macro-F1", "{:.3f}"),
    "macro_f1_questions": ("macro-F1, questions", "{:.3f}"),
    "group_accuracy": ("group accuracy", "{:.3f}"),
    "inequity": ("σ-inequity", "{:.3f}"),
    "calibration_error": ("ECE", "{:.3f}"),
}
_LOSSES: Columns = {"loss": ("loss", "{:.4f}"), "perplexity": ("perplexity", "{:.3f}")}
_REWARDS: Columns = {"accuracy": ("accuracy", "{:.3f}"), "margin": ("margin", "{:.3f}")}
_LIKELIHOODS: Columns = {
    "likelihood": ("likelihood", "{:.3f}"),
    "likelihood_per_token": ("likelihood per token", "{:.3f}"),
}
_AGAINST_START: Columns = {"accuracy_start": ("accuracy against start", "{:.3f}")}
FEW: Columns = {key: (_DISTRIBUTIONS | _ANSWERS)[key] for key in ("emd", "recovered", "accuracy", "entropy")}
_WITH_INTERVAL = (
    "emd",
    "recovered",
    "log_score",
    "macro_f1",
    "loss",
    "perplexity",
    *_REWARDS,
    *_LIKELIHOODS,
    *_AGAINST_START,
)
# Scores that a terminal has no room for.
_IN_REPORT = ("likelihood_per_token", "accuracy_start")

# A split, or a part of one.
Part = Scored | ChatSplit | PreferenceSplit
Scores = ChoiceScores | ChatScores | PreferenceScores


def split_tables(report: Report, split: Part) -> list[str]:
    """The size of a split and all scores of its contenders, as lines of Markdown."""
    lines = [size(split), ""]
    for columns in _all_columns(report, split):
        # Reports of earlier releases lack some scores.
        if any(getattr(scores, key) is not None for scores in _rows(split).values() for key in columns):
            lines += [*score_table(report, split, columns), ""]
    return lines


def score_table(report: Report, part: Part, columns: Columns) -> list[str]:
    """Some scores of the contenders of a split or of one question, as lines of Markdown."""
    lines = ["| | " + " | ".join(_heads(part, columns)) + " |", "|---|" + "---:|" * len(columns)]
    for name, scores in (_rows(part) | _floors(part, columns)).items():
        bold = "**" if name == report.main else ""
        cells = " | ".join(cell(scores, key, form) for key, (_, form) in columns.items())
        lines.append(f"| {bold}{title(report, name)}{bold} | {cells} |")
    return lines


def heading(name: str, split: Part) -> str:
    """The title of a split: which people were held out, or which published distributions."""
    title = SPLITS[name]
    if isinstance(split, ChoiceSplit) and split.distributions is not None:
        return title.replace("People", "Distributions").replace("people", "distributions")
    return title


def terminal_tables(report: Report) -> list[Table]:
    """One table per split, for a terminal."""
    tables = []
    for name, split in report.splits.items():
        columns = FEW if report.kind == "choice" else _all_columns(report, split)[0]
        columns = {score: column for score, column in columns.items() if score not in _IN_REPORT}
        table = Table(title=heading(name, split), caption=size(split), title_justify="left", caption_justify="left")
        table.add_column("")
        for head in _heads(split, columns):
            table.add_column(head, justify="right")
        for contender, scores in (_rows(split) | _floors(split, columns)).items():
            cells = (plain(getattr(scores, key), form) for key, (_, form) in columns.items())
            table.add_row(title(report, contender), *cells, style="bold" if contender == report.main else None)
        tables.append(table)
    return tables


def size(part: Part) -> str:
    """How many people, answers and groups a split or a question has, in words."""
    people = getattr(part, "people", None)
    people = _drawn(part) + ("" if people is None else f"{people:,} people, ")
    if isinstance(part, ChoiceSplit) and part.distributions is not None:
        people += f"{part.distributions:,} published distributions, "
    if isinstance(part, ChatSplit):
        return f"{people}{part.conversations:,} conversations, {part.tokens:,} assistant tokens."
    if isinstance(part, PreferenceSplit):
        lengths = (plain(part.chosen_tokens, "{:.1f}"), plain(part.rejected_tokens, "{:.1f}"))
        return (
            f"{people}{part.pairs:,} pairs; chosen answers have {lengths[0]} tokens on average, rejected {lengths[1]}."
        )
    effective = "" if part.effective_answers is None else f" ({part.effective_answers:,} effective)"
    text = (
        f"{people}{part.answers:,} answers{effective}; {part.distance} over {part.compared.answers:,} of them in "
        f"{part.groups:,} group{'' if part.groups == 1 else 's'}."
    )
    left_out = getattr(part, "left_out", None)
    if left_out is not None and left_out.cells:
        text += f" Left out there as too small: {left_out.cells:,} ({left_out.answers:,} answers)."
    return text


def _drawn(part: Part) -> str:
    """What was left out at random, in words; nothing where all of the split was evaluated."""
    sample = getattr(part, "sample", None)
    if sample is None:
        return ""
    what = {ChatSplit: "conversations", PreferenceSplit: "pairs"}.get(type(part), "answers")
    if isinstance(part, ChoiceSplit) and part.distributions is not None:
        return f"Sample (seed {sample.seed}): {sample.answers:,} of {sample.of_answers:,} distributions. "
    return (
        f"Sample (seed {sample.seed}): {sample.people:,} of {sample.of_people:,} people, "
        f"{sample.answers:,} of {sample.of_answers:,} {what}. "
    )


def title(report: Report, contender: str) -> str:
    """A contender in words."""
    return "the model as it is" if contender == "before" == report.main else (CONTENDERS | FLOORS)[contender]


def cell(scores: Scores, key: str, form: str) -> str:
    """One score, with its interval where that is shown."""
    text = plain(getattr(scores, key), form)
    spread = scores.interval.get(key) if key in _WITH_INTERVAL else None
    # A score that does not depend on which people were drawn needs no interval.
    if spread is None or spread[0] == spread[1]:
        return text
    return f"{text} [{plain(spread[0], form)}, {plain(spread[1], form)}]"


def plain(value: float | None, form: str) -> str:
    """A number as a table shows it; a dash where there is none."""
    return "–" if value is None else form.format(value)


def preference_columns(rows: Mapping[str, PreferenceScores]) -> Columns:
    """The scores that contenders on preferences have: without anything trained there is no implicit reward."""
    columns = _REWARDS | _LIKELIHOODS if len(rows) > 1 else _LIKELIHOODS
    return columns | _AGAINST_START if "start" in rows else columns


def _all_columns(report: Report, split: Part) -> list[Columns]:
    if isinstance(split, PreferenceSplit):
        return [preference_columns(split.rows)]
    return [_DISTRIBUTIONS, _AGREEMENT, _QUESTIONS, _ANSWERS] if report.kind == "choice" else [_LOSSES]


def _rows(part: Part) -> dict[str, Scores]:
    return dict(part.rows)


def _floors(part: Part, columns: Columns) -> dict[str, Scores]:
    """The rows of the noise floor that have any of these scores."""
    floors = part.floor if isinstance(part, ChoiceSplit) else {}
    return {name: row for name, row in floors.items() if any(getattr(row, key) is not None for key in columns)}


def _heads(part: Part, columns: Columns) -> list[str]:
    distance = part.distance if isinstance(part, Scored) else ""
    return [head.format(distance=distance) for head, _ in columns.values()]
