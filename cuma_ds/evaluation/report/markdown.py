"""A report as Markdown for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from cuma_ds.evaluation.report.legend import legend
from cuma_ds.evaluation.report.model import (
    CONTENDERS,
    ChoiceReport,
    ChoiceSplit,
    Diversity,
    Generation,
    Gradients,
    PreferenceSplit,
    PreferenceSubgroup,
    PreferenceSubgroups,
    Report,
    Routing,
    RoutingInformation,
    Subgroup,
    Subgroups,
    Verdicts,
)
from cuma_ds.evaluation.report.tables import (
    FEW,
    cell,
    heading,
    plain,
    preference_columns,
    score_table,
    size,
    split_tables,
    title,
)

Shown = TypeVar("Shown", Subgroup, PreferenceSubgroup)
# Questions with a table of their own.
_MOST_QUESTIONS = 30
# Subgroups of one field in a table.
_MOST_SUBGROUPS = 20
# Less probability than this on the option letters is warned about.
_LITTLE_MASS = 0.5


def markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """The whole report.

    Args:
        report: the report.
        pictures: file name -> caption.
    """
    lines = [f"# Evaluation of {report.run} ({report.checkpoint})", ""]
    for name, split in report.splits.items():
        lines += [f"## {heading(name, split)}", "", *split_tables(report, split)]
        if isinstance(report, ChoiceReport) and isinstance(split, ChoiceSplit):
            lines += (
                _worst_groups(report, split)
                + _letter_mass(report, split)
                + _questions(report, split)
                + _subgroups(report, split)
            )
        if isinstance(split, PreferenceSplit):
            lines += _differences(report, split) + _groups_of_preferences(report, split)
    lines += [] if report.routing is None else _routing(report.routing)
    lines += [] if report.generation is None else _generation(report.generation)
    lines += [] if report.gradients is None else _gradients(report.gradients)
    lines += ["## How to read this", "", *legend(report)]
    if pictures:
        lines += ["## Pictures", ""]
    for file, caption in pictures.items():
        lines += [f"![{caption}]({file})", "", f"*{caption}*", ""]
    return "\n".join(lines)


def _worst_groups(report: Report, split: ChoiceSplit) -> list[str]:
    """The group that each contender is farthest from."""
    if not split.worst_groups:
        return []
    found = [
        f"{title(report, name)} {worst.group} ({plain(worst.emd, '{:.4f}')}, {worst.answers:,} answers)"
        for name, worst in split.worst_groups.items()
    ]
    return [f"Group with the largest {split.distance}: {'; '.join(found)}.", ""]


def _letter_mass(report: ChoiceReport, split: ChoiceSplit) -> list[str]:
    """How much of the model's probability the numbers are about, and a warning where that is less than half."""
    if not split.letter_mass:
        return []
    said = []
    for name, mass in split.letter_mass.items():
        where = f" (lowest {plain(mass.lowest.mean, '{:.3f}')}, {mass.lowest.group})" if mass.lowest else ""
        said.append(f"{title(report, name)} {plain(mass.mean, '{:.3f}')}{where}")
    lines = [f"Probability of the option letters together, mean over answers: {'; '.join(said)}.", ""]
    main = split.letter_mass.get(report.main)
    if main is not None and main.mean is not None and main.mean < _LITTLE_MASS:
        lines += [
            f"**Warning: the option letters together have a probability of {main.mean:.3f} only. "
            "The model mostly says something else, and all numbers here are about the rest of its answer.**",
            "",
        ]
    return lines


def _questions(report: ChoiceReport, split: ChoiceSplit) -> list[str]:
    """A table of each question where there are several; of those with most answers where there are many."""
    order = sorted(split.questions, key=lambda name: -split.questions[name].answers)
    shown = set(order[:_MOST_QUESTIONS]) if len(order) > 1 else set()
    lines: list[str] = []
    for question in (question for name, question in split.questions.items() if name in shown):
        text = " ".join(question.question.split())
        lines += [f"### {text}", "", size(question), "", *score_table(report, question, FEW), ""]
    if len(order) > _MOST_QUESTIONS:
        lines += [f"The other {len(order) - _MOST_QUESTIONS:,} questions are in report.json.", ""]
    return lines


def _largest(subgroups: Sequence[Shown]) -> list[Shown]:
    """The subgroups of most people, as many as a table shows, in their order."""
    order = sorted(range(len(subgroups)), key=lambda place: -subgroups[place].people)
    return [subgroups[place] for place in sorted(order[:_MOST_SUBGROUPS])]


def _subgroups(report: ChoiceReport, split: ChoiceSplit) -> list[str]:
    counted = "people" if split.people is not None else "answers"
    lines: list[str] = []
    for field, part in split.subgroups.items():
        if not part.shown:
            continue
        shown = _largest(part.shown)
        names = [name for name in ("collapse", "before", report.main) if name in shown[0].rows]
        head = [counted, *(f"{what}, {title(report, name)}" for what in ("accuracy", split.distance) for name in names)]
        lines += [f"### Subgroups by {field.replace('_', ' ')}", "", f"| | {' | '.join(head)} |"]
        lines += ["|---|" + "---:|" * len(head)]
        for row in shown:
            cells = [cell(row.rows[name], "accuracy", "{:.3f}") for name in names]
            cells += [cell(row.rows[name], "emd", "{:.4f}") for name in names]
            lines.append(f"| {row.label} | {row.people:,} | {' | '.join(cells)} |")
        notes = _subgroup_notes(part, len(shown), f"{report.min_answers} {counted}")
        lines += ["", *([notes, ""] if notes else [])]
    return lines


def _differences(report: Report, split: PreferenceSplit) -> list[str]:
    """How much the model's own scores are above those of the other rows."""
    if not split.differences:
        return []
    columns = preference_columns(split.rows)
    columns = {score: column for score, column in columns.items() if score != "accuracy_start"}
    lines = [f"| {title(report, report.main)}, less | {' | '.join(head for head, _ in columns.values())} |"]
    lines += ["|---|" + "---:|" * len(columns)]
    for name, scores in split.differences.items():
        cells = (cell(scores, score, form.replace(":", ":+")) for score, (_, form) in columns.items())
        lines.append(f"| {title(report, name)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _groups_of_preferences(report: Report, split: PreferenceSplit) -> list[str]:
    """One score of the largest subgroups of each field, by contender."""
    score = "likelihood_per_token" if report.main == "before" else "accuracy"
    lines: list[str] = []
    for field, part in split.subgroups.items():
        if not part.shown:
            continue
        shown = _largest(part.shown)
        names = [name for name in shown[0].rows if name != "before" or name == report.main]
        head = ["people", "pairs", *(f"{score.replace('_', ' ')}, {title(report, name)}" for name in names)]
        lines += [f"### Subgroups by {field.replace('_', ' ')}", "", f"| | {' | '.join(head)} |"]
        lines += ["|---|" + "---:|" * len(head)]
        for row in shown:
            cells = [f"{row.people:,}", f"{row.pairs:,}", *(cell(row.rows[name], score, "{:.3f}") for name in names)]
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
        notes = _subgroup_notes(part, len(shown), f"{report.min_answers} people")
        lines += ["", *([notes, ""] if notes else [])]
    return lines


def _subgroup_notes(part: Subgroups | PreferenceSubgroups, shown: int, least: str) -> str:
    notes = [f"The {shown} of {len(part.shown)} largest are shown."] if len(part.shown) > shown else []
    notes += [f"{part.left_out} with fewer than {least} are left out."] if part.left_out else []
    return " ".join(notes)


def _routing(section: Routing) -> list[str]:
    routers = section.routers
    load_entropy = _mean([router.load_entropy for router in routers])
    gate_entropy = _mean([router.gate_entropy for router in routers])
    unused = _mean([router.unused for router in routers])
    lines = [
        "## Routing",
        "",
        f"Over {section.tokens:,} tokens and {len(routers)} routers: entropy of the expert load {load_entropy:.2f} of "
        f"log E (1 = every expert gets the same), entropy of a token's gate {gate_entropy:.2f} nats (0 = one expert "
        f"answers), {unused:.1f} of {len(routers[0].load)} experts per router nearly unused.",
        "",
    ]
    return lines if section.information is None else lines + _information(section.information)


def _information(information: RoutingInformation) -> list[str]:
    lines = [
        "| mutual information with the chosen expert (nats, mean over routers) "
        "| measured | shuffled labels | above shuffled |",
        "|---|---:|---:|---:|",
        f"| whole profile | {_mean(information.profile):.4f} | – | – |",
    ]
    for field, found in information.fields.items():
        shuffled = "–" if found.shuffled is None else f"{_mean(found.shuffled):.4f}"
        above = "–" if found.shuffled is None else f"{_mean(found.corrected):.4f}"
        lines.append(f"| {field.replace('_', ' ')} | {_mean(found.value):.4f} | {shuffled} | {above} |")
    last = "A field that tells every profile apart is as informative as the whole profile and has no shuffled labels."
    return [*lines, "", last, ""]


def _generation(section: Generation) -> list[str]:
    lines = ["## Generated answers", "", f"To {section.requests:,} held-out conversations.", ""]
    lines += _diversities(section.rows)
    lines += ["Distinct-n: different n-grams of words over all n-grams. The answers are in answers.jsonl.", ""]
    equal = {name: row.equal for name, row in section.rows.items() if row.equal is not None}
    if equal:
        lines += ["With every answer cut to the words of the shortest answer to the same conversation:", ""]
        lines += _diversities(equal)
    return lines if section.judge is None else lines + _verdicts(section.judge)


def _diversities(rows: Mapping[str, Diversity]) -> list[str]:
    lines = ["| | Distinct-1 | Distinct-2 | words |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        cells = (plain(row.distinct_1, "{:.4f}"), plain(row.distinct_2, "{:.4f}"), plain(row.words, "{:.1f}"))
        lines.append(f"| {CONTENDERS[name]} | {' | '.join(cells)} |")
    return [*lines, ""]


def _verdicts(judge: Verdicts) -> list[str]:
    rate = "none" if judge.win_rate is None else f"{judge.win_rate:.1%}"
    if judge.interval is not None:
        rate += f" [{plain(judge.interval[0], '{:.1%}')}, {plain(judge.interval[1], '{:.1%}')}]"
    counts = (judge.pairs, judge.win, judge.loss, judge.tie, judge.failed, judge.unreadable)
    first, more = judge.first_preferred, ""
    if first is not None:
        more = f" Of the verdicts that preferred an answer, {first:.0%} preferred the one shown first."
    if "temperature" in judge.refused:
        more += " The judge refuses temperature 0; its verdicts may differ from run to run."
    return [
        f"Win rate of the trained model against its backbone, by {judge.model}: **{rate}** (ties count half).",
        "",
        "| pairs | wins | losses | ties | failed | unreadable |",
        "|---:|---:|---:|---:|---:|---:|",
        "| " + " | ".join(f"{count:,}" for count in counts) + " |",
        "",
        f"Every pair was asked in both orders; {judge.disagreed:,} of the ties are pairs whose two verdicts disagree. "
        f"Failed calls and verdicts that could not be read are no results.{more}",
        "",
    ]


def _gradients(section: Gradients) -> list[str]:
    lines = ["## Gradient interference", "", f"Cosines between the gradients of {len(section.groups)} groups.", ""]
    lines += ["| adapters | conflicting pairs | mean cosine | mean absolute cosine |", "|---|---:|---:|---:|"]
    for kind, row in section.rows.items():
        lines.append(f"| {kind} | {row.conflicting:.0%} | {row.mean:.3f} | {row.mean_absolute:.3f} |")
    return [*lines, ""]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
