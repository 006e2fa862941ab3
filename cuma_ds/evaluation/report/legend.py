"""What the names in the tables of a report mean."""

from __future__ import annotations

from cuma_ds.evaluation.report.model import ChatSplit, ChoiceReport, ChoiceSplit, Report

_CHOICE = (
    "{distance}: distance (0 to 1) between the predicted and the observed answers of each question and group, mean "
    "weighted by answers. {distances} One global distribution: everyone gets the average of all training answers "
    "(perfect mean collapse). Oracle: everyone gets the training answers of people like them: of the same profile "
    "where it gave at least {min_answers} answers to the question, else of the same group where that did, else of "
    "everybody. Recovered: share of the way from one global distribution (0) to the oracle (1). {distance}, "
    "questions: the same distance for each question over all people, mean over questions; {distance}, argmax: the "
    "same with the most probable option of everybody instead of the full distribution, as the WorldValuesBench "
    "script does. Entropy: of the predicted distributions, in nats.",
    "Accuracy: share of answers that are the predicted mode; options that tie for the mode share it. Macro-F1: over "
    "option letters, those of all questions counted together. Macro-F1, questions: over the options of each "
    "question, mean over questions. Group accuracy: mean of the groups' own accuracies. σ-inequity: standard "
    "deviation of accuracy between the subgroups of a profile field, mean over fields. ECE: expected calibration "
    "error of the predicted option, 15 bins. Groups behind group accuracy and subgroups behind σ-inequity have at "
    "least {min_subgroup} people.",
    "{both}Groups with fewer than {min_answers} answers to a question have no distance of their own and are not "
    "named; all other numbers count every answer.",
)
_CHAT = "Loss: mean negative log-likelihood of the assistant's tokens, in nats. Perplexity: its exponential."
_DISTANCES = {
    "EMD": ("EMD is the normalised Wasserstein-1 distance, for questions whose options have an order."),
    "TV": (
        "TV is the total variation distance, half the sum of the absolute differences, for questions whose options "
        "have no order."
    ),
}
_WEIGHTED = (
    "Answers count by their survey weights, which are 1 on average over all data. Effective: how many answers of one "
    "and the same weight would be as precise, (sum of weights)² / sum of squared weights."
)
_SWAPPED = (
    "Profiles swapped: the same model and prompts, each asked with the profile embedding of somebody else, of another "
    "group wherever there is one; what this row loses against the trained one is carried by the routing."
)
_NEAREST = "Nearest training profile: a look-up by sentence embedding, without any model."


def legend(report: Report) -> list[str]:
    """The meaning of the names in a report's tables, as lines of Markdown."""
    paragraphs = _choice(report) if isinstance(report, ChoiceReport) else [_CHAT]
    if report.bootstrap:
        splits: list[ChoiceSplit | ChatSplit] = list(report.splits.values())
        knows_people = splits[0].people is not None
        single = "single answers (the data does not say who gave them)"
        who = "people, each with all of their answers" if knows_people else single
        paragraphs.append(f"In brackets: 95% intervals from {report.bootstrap:,} bootstrap samples of {who}.")
    contenders = {name for split in report.splits.values() for name in split.rows}
    paragraphs += [text for name, text in (("swapped", _SWAPPED), ("nearest", _NEAREST)) if name in contenders]
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def _choice(report: ChoiceReport) -> list[str]:
    splits = report.splits.values()
    names = [name for name in _DISTANCES if any(name in split.distance.split() for split in splits)]
    both = "Where a split has questions of both kinds, both distances go into one mean. " if len(names) > 1 else ""
    paragraphs = [
        paragraph.format(
            distance=" and ".join(names),
            distances=" ".join(_DISTANCES[name] for name in names),
            min_subgroup=report.min_subgroup,
            min_answers=report.min_answers,
            both=both,
        )
        for paragraph in _CHOICE
    ]
    return [*paragraphs, _WEIGHTED] if next(iter(splits)).weighted else paragraphs
