"""A comparison as Markdown for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cuma_ds.evaluation.report.model import CONTENDERS, FLOORS, SPLITS
from cuma_ds.evaluation.report.tables import plain
from cuma_ds.studies.report.model import Compared, Estimate, Measured, Reached, RunsReport, StudyReport, Table, Tuned

# Score -> head of its column and format, by kind of data; the first is what methods are judged by.
_SCORES: dict[str, dict[str, tuple[str, str]]] = {
    "choice": {
        "emd": ("{distance}", "{:.4f}"),
        "recovered": ("recovered", "{:.2f}"),
        "emd_worst_group": ("{distance}, worst group", "{:.4f}"),
        "log_score": ("log-score", "{:.4f}"),
        "accuracy": ("accuracy", "{:.3f}"),
        "entropy": ("entropy", "{:.3f}"),
    },
    "chat": {"loss": ("loss", "{:.4f}")},
    "preference": {
        "accuracy": ("accuracy", "{:.3f}"),
        "margin": ("margin", "{:.3f}"),
        "likelihood": ("likelihood", "{:.3f}"),
    },
}
# Scores of which more is better.
_HIGHER = {"recovered", "log_score", "accuracy", "margin", "likelihood"}
_HOW_TO_READ = (
    "Every comparison is over the same people: the examples that all of its runs have, answered by the same people. "
    "In brackets: 95% intervals from {bootstrap:,} bootstrap samples of people, each drawn with all of their answers; "
    "of a difference, both methods are judged by the same drawn people in every sample (paired). The intervals say how "
    "far other people of the same kind could move a number. How far another seed moves it stands beside: ± is the "
    "standard deviation over seeds. A difference is bold where its interval excludes zero and every seed has its sign.",
    "Lower is better for distances and losses, higher for recovered, log-score, accuracy, margin and likelihood. "
    "Recovered: share of the way from one global distribution (0, mean collapse) to the groups' own training answers "
    "(1). Noise floor: what as many answers, drawn from the truth itself, would score. Log-score: mean log-probability "
    "of the answers, in nats. Swapped: the distance when each profile is replaced by that of somebody else, at the "
    "router alone.",
)
_COSTS = (
    "Trained: parameters that an optimizer steps on. Training: the steps alone, from metrics.jsonl; process: from "
    "start to end, model loading included. Memory: peak of the main rank, resident (and on the GPU). Unused: experts "
    "per router with less than a tenth of an even share. Profile: mutual information between the chosen expert and "
    "the profile. Conflicting: pairs of groups whose gradients point apart, on the experts and on a dense LoRA of as "
    "many active ranks."
)


def study_markdown(report: StudyReport) -> str:
    """The whole report of a study."""
    lines = [f"# Study {report.name}", ""]
    lines += [f"    {report.command}", ""]
    lines += [f"{report.wall_seconds / 60:,.0f} minutes of commands on {report.machine}.", ""]
    lines += _left(report)
    for table in report.tables:
        lines += [f"## {table.recipe}, {table.steps:,} steps", ""]
        for name, split in table.splits.items():
            lines += [f"### {SPLITS.get(name, name)}", "", *_split(split, report.main)]
        lines += _tuning(table) + _time(table) + _costs(table)
    lines += ["## How to read this", ""]
    for paragraph in (*_HOW_TO_READ, _COSTS):
        lines += [paragraph.format(bootstrap=report.bootstrap), ""]
    return "\n".join(lines + _pictures(report.pictures) + _commands(report))


def runs_markdown(report: RunsReport) -> str:
    """The whole comparison of some runs."""
    lines = ["# Comparison of runs", "", *(f"- {name}: {place}" for name, place in report.runs.items()), ""]
    for name, split in report.splits.items():
        lines += [f"## {SPLITS.get(name, name)}", "", *_split(split, None)]
    lines += ["## How to read this", ""]
    for paragraph in _HOW_TO_READ:
        lines += [paragraph.format(bootstrap=report.bootstrap), ""]
    return "\n".join(lines + _pictures(report.pictures))


def columns(split: Compared) -> dict[str, tuple[str, str]]:
    """Score -> head and format of its column, of the scores that the methods have."""
    scores = {name for one in split.methods.values() for name in one.scores}
    distance = split.distance or "distance"
    return {
        score: (head.format(distance=distance), form)
        for score, (head, form) in _SCORES[split.kind].items()
        if score in scores
    }


def size(split: Compared) -> str:
    """What is compared, in words; says so where examples or questions differ."""
    people = "" if split.people is None else f" of {split.people:,} people"
    text = f"{split.examples:,} examples{people}, {split.questions:,} question{'' if split.questions == 1 else 's'}."
    if split.left_out:
        text += (
            f" **{split.left_out:,} other examples are left out: not all runs were asked them, or other people "
            "answered.**"
        )
    return text


def estimate(one: Estimate | None, form: str) -> str:
    """A score with its interval and spread over seeds."""
    if one is None or one.value is None:
        return "–"
    text = form.format(one.value)
    if one.interval is not None and one.interval[0] != one.interval[1]:
        text += f" [{plain(one.interval[0], form)}, {plain(one.interval[1], form)}]"
    known = [value for value in one.seeds if value is not None]
    if len(known) > 1:
        mean = sum(known) / len(known)
        spread = (sum((value - mean) ** 2 for value in known) / (len(known) - 1)) ** 0.5
        text += f" ± {form.format(spread).lstrip('+')}"
    return text


def _split(split: Compared, main: str | None) -> list[str]:
    lines = [size(split), ""]
    if not split.examples:
        return [*lines, "The runs share no example, so there is nothing to compare.", ""]
    shown = columns(split)
    lines += _head(["", *(head for head, _ in shown.values())])
    for name, scores in split.references.items():
        cells = (plain(scores.get(score), form) for score, (_, form) in shown.items())
        lines.append(f"| {(CONTENDERS | FLOORS)[name]} | {' | '.join(cells)} |")
    for name, method in split.methods.items():
        bold = "**" if name == main else ""
        cells = (estimate(method.scores.get(score), form) for score, (_, form) in shown.items())
        lines.append(f"| {bold}{name}{bold} | {' | '.join(cells)} |")
    if not split.differences:
        return [*lines, ""]
    lines += ["", *_head(["difference", *(head for head, _ in shown.values())])]
    for one in split.differences:
        signed = (_signed(one.scores.get(score), form) for score, (_, form) in shown.items())
        lines.append(f"| {one.first} − {one.second} | {' | '.join(signed)} |")
    return [*lines, "", *_verdict(split), ""]


def _signed(one: Estimate | None, form: str) -> str:
    """A difference, bold where it is clear."""
    text = estimate(one, form.replace(":", ":+"))
    return f"**{text}**" if one is not None and one.clear else text


def _verdict(split: Compared) -> list[str]:
    """The differences of the first score in words."""
    score, (head, _) = next(iter(columns(split).items()))
    said = []
    for one in split.differences:
        value = one.scores.get(score)
        if value is None or value.value is None:
            continue
        better = one.first if (value.value > 0) == (score in _HIGHER) else one.second
        other = one.second if better == one.first else one.first
        said.append(
            f"{better} is better than {other}" if value.clear else f"{one.first} and {one.second} cannot be told apart"
        )
    return [f"By {head}: {'; '.join(said)}."] if said else []


def _left(report: StudyReport) -> list[str]:
    lines = []
    if report.failed:
        lines += ["**Failed, and left out of everything below; the same command tries them again:**", ""]
        lines += [*(f"- {line}" for line in report.failed), ""]
    if report.missing:
        lines += [f"**Not run yet: {len(report.missing)}.** The same command goes on.", ""]
    return lines


def _tuning(table: Table) -> list[str]:
    if not table.tuned:
        return []
    lines = ["### Learning rates", "", "What each rate reached on the people held out for choosing it.", ""]
    rates = sorted({trial.rate for tuned in table.tuned.values() for trial in tuned.trials})
    lines += _head(["", "steps", *(f"{rate:g}" for rate in rates), "chosen"])
    for method, tuned in table.tuned.items():
        cells = [_trial(tuned, rate) for rate in rates]
        chosen = "–" if tuned.rate is None else f"{tuned.rate:g}{' (at the edge)' if tuned.at_edge else ''}"
        lines.append(f"| {method} | {tuned.steps:,} | {' | '.join(cells)} | {chosen} |")
    lines.append("")
    edge = [method for method, tuned in table.tuned.items() if tuned.at_edge]
    if edge:
        lines += [
            f"**The best rate of {', '.join(edge)} is at the edge of what was tried: a better one may lie beyond.** "
            "Raise tuning.extend.",
            "",
        ]
    return lines


def _trial(tuned: Tuned, rate: float) -> str:
    trials = {trial.rate: trial for trial in tuned.trials}
    if rate not in trials:
        return ""
    text = "failed" if trials[rate].value is None else plain(trials[rate].value, "{:.4f}")
    return f"**{text}**" if rate == tuned.rate else text


def _time(table: Table) -> list[str]:
    lines: list[str] = []
    if table.at_equal_time:
        methods = list(table.at_equal_time)
        lines += ["### Time", "", *_head(["", *methods])]
        cells = [plain(table.at_equal_time[method], "{:.4f}") for method in methods]
        lines.append(f"| on valid after {table.equal_seconds or 0:,.0f} s of training | {' | '.join(cells)} |")
        for target, reached in table.reached.items():
            lines.append(f"| until {target} | {' | '.join(when(reached.get(one)) for one in methods)} |")
        lines.append("")
    return lines


def when(reached: Reached | None) -> str:
    """When a target was reached; says how many seeds did, unless all."""
    if reached is None or reached.seconds is None:
        return "not reached"
    some = f" ({reached.seeds} of {reached.of} seeds)" if reached.seeds < reached.of else ""
    return f"{'≤ ' if reached.at_most else ''}{reached.seconds:,.0f} s{some}"


def _costs(table: Table) -> list[str]:
    runs = [(method, run) for method, group in table.runs.items() for run in group]
    shown: dict[str, list[str]] = {
        "seed": [str(run.seed) for _, run in runs],
        "rate": [plain(run.learning_rate, "{:g}") for _, run in runs],
        "trained": [_count(run.parameters) for _, run in runs],
        "training": [plain(run.train_seconds, "{:,.0f} s") for _, run in runs],
        "process": [plain(run.wall_seconds, "{:,.0f} s") for _, run in runs],
        "tokens": [plain(run.tokens, "{:,.0f}") for _, run in runs],
        "memory": [plain(run.memory_gib, "{:.2f} GiB") for _, run in runs],
        "GPU memory": [plain(run.gpu_memory_gib, "{:.2f} GiB") for _, run in runs],
        "swapped": [plain(run.swapped, "{:.4f}") for _, run in runs],
        "unused": [plain(run.unused, "{:.1f}") for _, run in runs],
        "profile": [plain(run.profile_information, "{:.3f} nats") for _, run in runs],
        "conflicting": [_conflicting(run) for _, run in runs],
        "Distinct-1": [plain(run.distinct_1, "{:.4f}") for _, run in runs],
        "Distinct-2": [plain(run.distinct_2, "{:.4f}") for _, run in runs],
        "words": [plain(run.words, "{:.1f}") for _, run in runs],
    }
    shown = {head: cells for head, cells in shown.items() if set(cells) != {"–"}}
    lines = ["### Runs", "", *_head(["", *shown])]
    for place, (method, run) in enumerate(runs):
        name = method if run.status == "trained" else f"{method} ({run.status})"
        lines.append(f"| {name} | {' | '.join(cells[place] for cells in shown.values())} |")
    if table.equal_lengths:
        said = ", ".join(f"{method} {plain(value, '{:.4f}')}" for method, value in table.equal_lengths.items())
        lines += ["", f"Distinct-2 of answers cut to equal lengths, conversation by conversation: {said}."]
    return [*lines, ""]


def _conflicting(run: Measured) -> str:
    return "; ".join(f"{plain(share, '{:.0%}')} {kind}" for kind, share in run.conflicting.items()) or "–"


def _count(parameters: int | None) -> str:
    return "–" if parameters is None else f"{parameters / 1e6:.2f} M"


def _pictures(pictures: Mapping[str, str]) -> list[str]:
    lines = ["## Pictures", ""] if pictures else []
    for file, caption in pictures.items():
        lines += [f"![{caption}]({file})", "", f"*{caption}*", ""]
    return lines


def _commands(report: StudyReport) -> list[str]:
    lines = ["## Commands", "", "Each run by itself; the study starts them one after another.", ""]
    for table in report.tables:
        lines += [f"    {run.train}" for group in table.runs.values() for run in group if run.status == "trained"]
    return [*lines, ""]


def _head(cells: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |", "|---|" + "---:|" * (len(cells) - 1)]
