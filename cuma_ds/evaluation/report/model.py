"""What report.json holds. It is built from these classes, written by one function and read by attribute.

Groups with fewer answers than ``min_answers`` are counted and named nowhere. A key that does not apply is not written:
``routing``, ``generation`` and ``gradients`` stand there where they were measured, ``effective_answers`` where answers
have weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from cuma_ds.errors import DataError
from cuma_ds.files import write_atomically

REPORT_FILE = "report.json"
# 3: the oracle is that of the group, and nominal questions are judged by total variation.
FORMAT_VERSION = 3
# Reports of release 0.1.0, which lack some keys.
_EARLIER = (2,)
CONTENDERS = {
    "collapse": "one global distribution",
    "oracle": "own training answers (oracle)",
    "nearest": "nearest training profile's answers",
    "before": "backbone before training",
    "start": "start policy",
    "trained": "trained",
    "swapped": "trained, profiles swapped",
}
FLOORS = {
    "truth": "noise floor: the truth itself",
    "sampler": "noise floor: a perfect sampler",
}
SPLITS = {
    "valid": "People held out for choosing settings",
    "test": "Held-out people of groups seen in training",
    "unseen": "Held-out people whose exact profile was never trained on (zero-shot)",
    "heldout": "Groups held out entirely (zero-shot)",
    "heldout_profiles": "Profiles held out entirely (zero-shot)",
    "heldout_questions": "Questions held out entirely (zero-shot)",
    "probe": "WVB-probe",
}

# None stands for what JSON cannot hold: no number, or infinity.
Number = float | None
# Answers; a sum of survey weights keeps two decimals.
Count = int | float
# Ends of a 95% bootstrap interval.
Interval = tuple[Number, Number]


def number(value: float | None) -> Number:
    """A number that JSON can hold, to six decimals."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


class ChoiceScores(BaseModel):
    """Scores of one contender on choice questions. ``emd`` is the distance that the split's ``distance`` names.

    Attributes:
        similarity: one less the Jensen-Shannon distance (square root of the divergence in nats).
        log_score: mean logarithm of the probability of the answers that were given, in nats, each at least ln 1e-6.
        emd_worst_group: distance of the group that is farthest away.
        questions_median, questions_within, questions_auc: of the distances of the questions (whose mean is
            ``emd_questions``) the median, the share of at most 0.2, and the area under the curve of the share that lies
            within 0, 0.05, ... 0.4, divided by 0.4.
        argmax_median, argmax_within, argmax_auc: the same of ``emd_argmax``, as WorldValuesBench reports.
        interval: 95% bootstrap interval of each score that has one.
    """

    emd: Number = None
    total_variation: Number = None
    similarity: Number = None
    log_score: Number = None
    emd_worst_group: Number = None
    questions_median: Number = None
    questions_within: Number = None
    questions_auc: Number = None
    argmax_median: Number = None
    argmax_within: Number = None
    argmax_auc: Number = None
    emd_questions: Number = None
    emd_argmax: Number = None
    accuracy: Number = None
    macro_f1: Number = None
    macro_f1_questions: Number = None
    group_accuracy: Number = None
    inequity: Number = None
    entropy: Number = None
    calibration_error: Number = None
    recovered: Number = None
    interval: dict[str, Interval] = {}


class ChatScores(BaseModel):
    """Scores of one contender on conversations: nats per assistant token, and its exponential."""

    loss: Number = None
    perplexity: Number = None
    interval: dict[str, Interval] = {}


class PreferenceScores(BaseModel):
    """Scores of one contender on preferences. The implicit reward of an answer is log p - log p of the bare backbone.

    Attributes:
        accuracy: share of pairs whose chosen answer has the larger implicit reward; a tie counts half.
        margin: mean implicit reward of the chosen less that of the rejected answer, in nats.
        likelihood: share of pairs whose chosen answer is the more probable one.
        likelihood_per_token: the same with the mean log-probability of a token.
        accuracy_start: as ``accuracy``, against the start policy instead of the bare backbone.
        interval: 95% bootstrap interval of each score that has one.
    """

    accuracy: Number = None
    margin: Number = None
    likelihood: Number = None
    likelihood_per_token: Number = None
    accuracy_start: Number = None
    interval: dict[str, Interval] = {}


class SampleSize(BaseModel):
    """How much of a split was evaluated: people drawn at random, then answers (conversations, pairs) of theirs."""

    people: int
    of_people: int
    answers: int
    of_answers: int
    seed: int


class Compared(BaseModel):
    """How many cells (question, group) are compared or left out, and the answers in them."""

    cells: int
    answers: Count


class LowestMass(BaseModel):
    """The cell in which the option letters have the least probability."""

    question_id: str
    group: str
    mean: Number


class LetterMass(BaseModel):
    """Probability of the option letters together, mean over answers."""

    mean: Number
    lowest: LowestMass | None


class WorstGroup(BaseModel):
    """The group that a contender is farthest from, among those that may be named."""

    group: str
    answers: Count
    emd: Number


class Reliability(BaseModel):
    """Accuracy, mean confidence and answers of each bin of confidence."""

    accuracy: list[Number]
    confidence: list[Number]
    answers: list[Count]


class Subgroup(BaseModel):
    """The people of one label of a profile field. ``rows`` is by contender."""

    label: str
    people: int
    answers: Count
    rows: dict[str, ChoiceScores]


class Subgroups(BaseModel):
    """The subgroups of one profile field that are large enough to be named, and how many are not."""

    shown: list[Subgroup]
    left_out: int


class Scored(BaseModel):
    """A part of a split: its size, and scores by contender in ``rows``.

    Attributes:
        distance: what the questions are judged by, ``EMD``, ``TV`` or ``EMD and TV``.
        effective_answers: how many answers of one and the same weight would be as precise; None without weights.
        compared: what ``emd`` is about.
    """

    distance: str = "EMD"
    groups: int
    answers: Count
    effective_answers: Number = None
    compared: Compared
    rows: dict[str, ChoiceScores]


class QuestionScores(Scored):
    """Scores of one question."""

    question: str
    options: list[str]


class Cell(BaseModel):
    """Observed and predicted answers of one group to one question; ``predicted`` and ``emd`` are by contender."""

    question_id: str
    group: str
    answers: Count
    observed: list[Number]
    predicted: dict[str, list[Number]]
    emd: dict[str, Number]


class ChoiceSplit(Scored):
    """One split of choice questions.

    Attributes:
        people: None where the data does not say who answered.
        distributions: published distributions, of which intervals are made; None where there are people's answers.
        sample: None where all of the split was evaluated.
        letter_mass: by contender that is a model.
        differences: the main contender less each other one, over the same people.
        floor: expected scores of the ``truth`` (the observed distributions) against as many answers drawn from it, and
            of a perfect ``sampler`` that draws as many answers itself.
        worst_groups: by contender.
    """

    people: int | None
    distributions: int | None = None
    sample: SampleSize | None = None
    weighted: bool = False
    letter_mass: dict[str, LetterMass] = {}
    differences: dict[str, ChoiceScores]
    floor: dict[str, ChoiceScores] = {}
    worst_groups: dict[str, WorstGroup] = {}
    left_out: Compared
    reliability: dict[str, Reliability]
    subgroups: dict[str, Subgroups]
    questions: dict[str, QuestionScores]
    cells: list[Cell]


class ChatSplit(BaseModel):
    """One split of conversations; ``rows`` is by contender, ``tokens`` counts the assistant's."""

    conversations: int
    people: int | None
    sample: SampleSize | None = None
    tokens: int
    rows: dict[str, ChatScores]


class PreferenceSubgroup(BaseModel):
    """The people of one label of a profile field. ``rows`` is by contender."""

    label: str
    people: int
    pairs: int
    rows: dict[str, PreferenceScores]


class PreferenceSubgroups(BaseModel):
    """The subgroups of one profile field that are large enough to be named, and how many are not."""

    shown: list[PreferenceSubgroup]
    left_out: int


class PreferenceSplit(BaseModel):
    """One split of preferences.

    Attributes:
        chosen_tokens, rejected_tokens: mean length of the answers, end-of-turn marker included.
        rows: by contender.
        differences: the main contender less each other one, over the same people.
        subgroups: by profile field.
    """

    pairs: int
    people: int
    sample: SampleSize | None = None
    chosen_tokens: Number
    rejected_tokens: Number
    rows: dict[str, PreferenceScores]
    differences: dict[str, PreferenceScores]
    subgroups: dict[str, PreferenceSubgroups]


class RouterLoad(BaseModel):
    """How evenly one router uses its experts, over the tokens of all distinct prompts.

    Attributes:
        load: share of the top-k assignments of each expert.
        load_entropy: of that, divided by log E; 1 = perfectly even.
        gate_entropy: mean over tokens, nats; 0 = one expert answers.
        unused: experts with less than a tenth of an even share.
    """

    router: str
    load: list[float]
    load_entropy: float
    gate_entropy: float
    unused: int


class FieldInformation(BaseModel):
    """Information between expert and profile field by router, in nats: measured, with shuffled labels, above those."""

    value: list[float]
    shuffled: list[float] | None
    shuffled_95: list[float] | None
    corrected: list[float]


class RoutingInformation(BaseModel):
    """Information between the expert and the whole profile, and by profile field."""

    profile: list[float]
    fields: dict[str, FieldInformation]


class MapPoint(BaseModel):
    """One profile on the map."""

    group: str
    x: float
    y: float


class CulturalMap(BaseModel):
    """Profiles in the plane, near each other where their routing is alike."""

    method: str
    fidelity: Number
    points: list[MapPoint]


class Routing(BaseModel):
    """Where tokens were routed; ``information`` and ``map`` need three profiles that may be named."""

    tokens: int
    routers: list[RouterLoad]
    information: RoutingInformation | None = None
    map: CulturalMap | None = None


class Diversity(BaseModel):
    """Distinct-1, Distinct-2 and mean number of words of generated answers.

    Attributes:
        equal: the same of answers that are cut to the length of the shortest answer to the same conversation. Long
            answers repeat words, so Distinct-n of answers of different lengths cannot be compared.
    """

    distinct_1: Number
    distinct_2: Number
    words: Number
    equal: Diversity | None = None


class Verdicts(BaseModel):
    """What a judge said of pairs of answers, and the win rate with its interval over people.

    Attributes:
        disagreed: ties in which the two orders of a pair did not agree.
        first_preferred: of the verdicts that preferred an answer, the share that preferred the one shown first.
        failures: kind of failure -> calls.
        refused: arguments that the judge does not take.
    """

    model: str
    pairs: int
    win: int
    loss: int
    tie: int
    failed: int
    unreadable: int
    disagreed: int
    win_rate: Number
    interval: Interval | None
    first_preferred: Number = None
    failures: dict[str, int] = {}
    refused: list[str] = []


class Generation(BaseModel):
    """Generated answers to held-out conversations; ``rows`` is by contender."""

    split: str
    requests: int
    rows: dict[str, Diversity]
    judge: Verdicts | None = None


class Cosines(BaseModel):
    """Cosines between the gradients of groups, and the share of pairs with a negative one."""

    conflicting: float
    mean: float
    mean_absolute: float
    cosines: list[list[float]]


class Gradients(BaseModel):
    """Gradient interference between groups; ``rows`` is by kind of adapters."""

    split: str
    groups: list[str]
    rows: dict[str, Cosines]


class _Report(BaseModel):
    """What every report has.

    Attributes:
        run, checkpoint: what was evaluated.
        main: the contender that is the model itself: ``trained``, or ``before`` where nothing was trained.
        min_answers, min_subgroup, bootstrap: of the recipe's section ``evaluation``.
        pictures: names of the files beside it.
    """

    format_version: int = FORMAT_VERSION
    run: str
    checkpoint: str
    kind: str
    main: str
    min_answers: int
    min_subgroup: int
    bootstrap: int
    routing: Routing | None = None
    generation: Generation | None = None
    gradients: Gradients | None = None
    pictures: list[str] = []


class ChoiceReport(_Report):
    """A report on choice questions."""

    kind: Literal["choice"]
    splits: dict[str, ChoiceSplit]


class ChatReport(_Report):
    """A report on conversations."""

    kind: Literal["chat"]
    splits: dict[str, ChatSplit]


class PreferenceReport(_Report):
    """A report on preferences."""

    kind: Literal["preference"]
    splits: dict[str, PreferenceSplit]


Report = ChoiceReport | ChatReport | PreferenceReport
_ANY: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])
_REQUIRED = [name for name, field in ChoiceReport.model_fields.items() if field.is_required()]


def write_json(folder: Path, report: Report) -> Path:
    """Write the report, complete or not at all."""
    file = folder / REPORT_FILE
    values = report.model_dump(mode="json", exclude_unset=True)
    write_atomically(file, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return file


def read_report(folder: Path, earlier: bool = True) -> Report | None:
    """The report in a folder; None where there is none.

    Args:
        folder: holds report.json.
        earlier: also take reports of earlier releases, whose ``oracle`` is that of the exact profile.

    Raises:
        DataError: the file is damaged, or something else.
    """
    file = folder / REPORT_FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _unreadable(f"cannot be read ({reason})") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION and not (earlier and version in _EARLIER):
        raise _unreadable(f"has report format {version}, not {FORMAT_VERSION}")
    if missing := [key for key in _REQUIRED if key not in values]:
        raise _unreadable(f"lacks {', '.join(missing)}")
    try:
        return _ANY.validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"][1:])) or "kind"
        raise _unreadable(f"holds something else at {place}: {problem['msg']}") from None


def _unreadable(what: str) -> DataError:
    return DataError(f"{REPORT_FILE} {what}; evaluate again with launchers/evaluate.py")
