"""What the names in the tables of a report mean."""

from __future__ import annotations

from cuma_ds.evaluation.report.model import (
    ChatSplit,
    ChoiceReport,
    ChoiceSplit,
    PreferenceReport,
    PreferenceSplit,
    Report,
)

_CHOICE = (
    "{distance}: distance (0 to 1) between the predicted and the observed answers of each question and group, mean "
    "weighted by answers. {distances} One global distribution: everyone gets the average of all training answers "
    "(perfect mean collapse). Oracle: everyone gets the training answers of people like them: of the same profile "
    "where it gave at least {min_answers} answers to the question, else of the same group where that did, else of "
    "everybody. Recovered: share of the way from one global distribution (0) to the oracle (1). {distance}, "
    "questions: the same distance for each question over all people, mean over questions; {distance}, argmax: the "
    "same with the most probable option of everybody instead of the full distribution, as the WorldValuesBench "
    "script does. Entropy: of the predicted distributions, in nats.",
    "TV: total variation, half the sum of the absolute differences, of the same distributions. 1 − JSD: one less their "
    "Jensen-Shannon distance, the square root of the divergence in nats, as GlobalOpinionQA. Log-score: mean logarithm "
    "of the probability of the answers that were given, in nats; the larger the better, and a probability below 1e-6 "
    "counts as 1e-6. {distance}, worst group: of the group that is farthest away.",
    "Median, at most 0.2, AUC: of the questions' distances over all people the median, the share that is at most 0.2, "
    "and the area under the curve of the share that is at most 0, 0.05, ... 0.4, divided by 0.4 (1: all are 0). The "
    "same with argmax: as the WorldValuesBench script and its notebook count, from one answer per person.",
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
_IMPLICIT_REWARD = (
    "The implicit reward of an answer is log p(answer) under the row's model less log p(answer) under the bare "
    "backbone, summed over the answer's tokens. Accuracy: share of pairs in which the answer that the person preferred "
    "has the larger implicit reward; a tie counts half, so the backbone itself has 0.500 by definition. Margin: mean "
    "implicit reward of the preferred answer less that of the other one, in nats."
)
_LIKELIHOOD = (
    "Likelihood: share of pairs in which the preferred answer is the more probable one, whatever the backbone says of "
    "them; long answers are improbable, so this depends on which answer is longer. Likelihood per token: the same with "
    "the mean log-probability of an answer's tokens."
)
_START = "Start policy: the model that this run began from."
_AGAINST_START = (
    "Accuracy against start: as accuracy, with the implicit reward taken against the start policy instead of the "
    "backbone. It tells what this run itself has learned."
)
_NAMED_PEOPLE = "Subgroups with fewer than {min_answers} people are not named; all other numbers count every pair."
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
_DISTRIBUTIONS = (
    "Answers are those of published distributions: their shares times the people asked (1,000 where a table does not "
    "say how many)."
)
_HELDOUT_QUESTIONS = (
    "Questions held out: nobody's answers to them were learned from. One global distribution has nothing to go by "
    "there and is uniform, and there is no oracle."
)
_SWAPPED = (
    "Profiles swapped: the same model and prompts, each asked with the profile embedding of somebody else, of another "
    "group wherever there is one; what this row loses against the trained one is carried by the routing."
)
_FLOOR = (
    "Noise floor: so few people never answer exactly as their population does. Taking the observed answers for the "
    "truth, the truth itself is that far on average from the answers of as many people drawn from it, and the answers "
    "of as many other people, a perfect sampler, are that far from them. A model that gives whole distributions cannot "
    "be expected below the first, one that samples answers not below the second."
)
_NEAREST = "Nearest training profile: a look-up by sentence embedding, without any model."


def legend(report: Report) -> list[str]:
    """The meaning of the names in a report's tables, as lines of Markdown."""
    splits: list[ChoiceSplit | ChatSplit | PreferenceSplit] = list(report.splits.values())
    contenders = {name for split in splits for name in split.rows}
    if isinstance(report, ChoiceReport):
        paragraphs = _choice(report)
    elif isinstance(report, PreferenceReport):
        paragraphs = _preference(report)
    else:
        paragraphs = [_CHAT]
    if report.bootstrap:
        knows_people = splits[0].people is not None
        said = "pairs" if isinstance(report, PreferenceReport) else "answers"
        single = f"single {said} (the data does not say who gave them)"
        who = f"people, each with all of their {said}" if knows_people else single
        if isinstance(splits[0], ChoiceSplit) and splits[0].distributions is not None:
            who = "published distributions"
        paragraphs.append(f"In brackets: 95% intervals from {report.bootstrap:,} bootstrap samples of {who}.")
    known = (("start", _START), ("swapped", _SWAPPED), ("nearest", _NEAREST))
    paragraphs += [text for name, text in known if name in contenders]
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def _preference(report: PreferenceReport) -> list[str]:
    trained = [] if report.main == "before" else [_IMPLICIT_REWARD]
    named = _NAMED_PEOPLE.format(min_answers=report.min_answers)
    against = [_AGAINST_START] if any("start" in split.rows for split in report.splits.values()) else []
    return [*trained, *against, _LIKELIHOOD, named]


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
    if any(split.distributions is not None for split in splits):
        paragraphs.append(_DISTRIBUTIONS)
    if "heldout_questions" in report.splits:
        paragraphs.append(_HELDOUT_QUESTIONS)
    weighted = [_WEIGHTED] if next(iter(splits)).weighted else []
    return [*paragraphs, *weighted, *([_FLOOR] if any(split.floor for split in splits) else [])]
