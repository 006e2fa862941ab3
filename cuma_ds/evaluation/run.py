"""From a model and its data to a report: every split asked before and after training, and with profiles swapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from cuma_ds.config import EvaluationSection
from cuma_ds.data.batch import EncodedExample, encode_example, encode_pair
from cuma_ds.data.lengths import Reading, fitting
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rows import Split
from cuma_ds.data.sampling import Limits, sample
from cuma_ds.data.splits import PROBE
from cuma_ds.errors import ConfigError, DataError
from cuma_ds.evaluation.chat import ChatLosses, chat_losses
from cuma_ds.evaluation.choice import ChoicePredictions, predict_choices
from cuma_ds.evaluation.columns import Indices, Ragged
from cuma_ds.evaluation.contenders import Asking, ways_of_asking
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.metrics import gather_cells
from cuma_ds.evaluation.predictions import (
    PREDICTIONS_FILE,
    Predictions,
    collect,
    collect_pairs,
    collect_talks,
    write_predictions,
)
from cuma_ds.evaluation.preference import PairLogps, pair_log_probabilities
from cuma_ds.evaluation.preference_split import preference_split
from cuma_ds.evaluation.references import TrainingAnswers, references
from cuma_ds.evaluation.report.html import PAGES, write_pages
from cuma_ds.evaluation.report.markdown import markdown
from cuma_ds.evaluation.report.model import (
    FORMAT_VERSION,
    REPORT_FILE,
    SPLITS,
    ChatReport,
    ChatSplit,
    ChoiceReport,
    ChoiceSplit,
    PreferenceReport,
    PreferenceSplit,
    Report,
    Routing,
    SampleSize,
    write_json,
)
from cuma_ds.evaluation.report.pictures import (
    choice_pictures,
    expert_picture,
    preference_pictures,
    routing_pictures,
    subgroup_picture,
)
from cuma_ds.evaluation.report.plots import pictures_later
from cuma_ds.evaluation.sections import chat_split, choice_split
from cuma_ds.evaluation.subgroups import subgroups
from cuma_ds.evaluation.subject import Subject, run_subject
from cuma_ds.files import remove_leftovers
from cuma_ds.identity import content_sha256
from cuma_ds.inference.forward import ForwardOptions, pad_id_of
from cuma_ds.locks import locked
from cuma_ds.runs import Run

# Called with (what is being run, examples done, examples in all).
Progress = Callable[[str, int, int], None]
# File name -> caption.
Pictures = dict[str, str]
# Measures something beside the rest: adds its section to the report and returns its pictures.
Extra = Callable[["Evaluator", Report], Pictures]


class Scope(NamedTuple):
    """What is evaluated.

    Attributes:
        splits: names of splits; None stands for all but ``train`` and ``valid``.
        brief: only the model itself and references without a model, no routing, no pictures. For preferences also the
            backbone, which implicit rewards are measured against.
    """

    splits: Sequence[str] | None = None
    brief: bool = False


EVERYTHING = Scope()


class _About(TypedDict):
    format_version: int
    run: str
    checkpoint: str
    main: str
    min_answers: int
    min_subgroup: int
    bootstrap: int


def evaluate_run(
    run_dir: str | Path, step: int | None = None, overrides: Sequence[str] = (), progress: Progress | None = None
) -> Report:
    """Evaluate one checkpoint and write the run's report; arguments as in :func:`.subject.run_subject`."""
    return evaluate(run_subject(run_dir, step, overrides=overrides), Run(run_dir).report_folder, progress)


def evaluate(
    subject: Subject,
    folder: str | Path,
    progress: Progress | None = None,
    extras: Sequence[Extra] = (),
    scope: Scope = EVERYTHING,
) -> Report:
    """Evaluate a model on its data and write a report.

    Args:
        subject: the model and the data.
        folder: where report.json, predictions.npz, report.md, report.html and the pictures go.
        progress: told how far each pass is.
        extras: what else to measure, e.g. of generated answers.
        scope: which people and which contenders.

    Raises:
        CumaError: there is nothing to evaluate on, an extra cannot be done, or another process writes into the folder.
    """
    evaluator = Evaluator(subject, Path(folder), progress, scope)
    with locked(evaluator.folder), pictures_later() as drawn:
        remove_leftovers(evaluator.folder)
        report, pictures = evaluator.report()
        for extra in extras:
            pictures |= extra(evaluator, report)
        write_predictions(evaluator.folder, evaluator.predictions)
        write_json(evaluator.folder, report)
        for name in drawn.write():
            del pictures[name]
        report.pictures = list(pictures)
        write_json(evaluator.folder, report)
        points = report.routing.map.points if report.routing is not None and report.routing.map is not None else ()
        write_pages(evaluator.folder, markdown(report, pictures), points)
    return report


def written_files(folder: Path, report: Report) -> list[Path]:
    """What :func:`evaluate` wrote."""
    return [folder / name for name in (*PAGES, REPORT_FILE, PREDICTIONS_FILE, *report.pictures)]


class Evaluator:
    """One model asked about every split.

    Args:
        subject: the model and the data.
        folder: where pictures go.
        progress: told how far each pass is.
        scope: which people and which contenders.

    Attributes:
        main: the contender that is the model itself: ``trained``, or ``before`` where nothing was trained.
        splits: names of the splits that are evaluated.
        brief: as in :class:`Scope`.
        predictions: what each contender predicted, by split, once asked.
        samples: how much of each split is evaluated, where that is not all of it.
    """

    def __init__(
        self, subject: Subject, folder: Path, progress: Progress | None = None, scope: Scope = EVERYTHING
    ) -> None:
        self.folder = folder
        self.progress = progress
        self.main = "before" if subject.untrained is None else "trained"
        self.predictions: dict[str, Predictions] = {}
        self.brief = scope.brief
        self.splits = _chosen_splits(subject, scope.splits)
        data, self.samples = sampled(subject.data, self.splits, subject.config.evaluation)
        data = fitting(
            data, Reading(subject.renderer), subject.config.data, self.splits,
            lambda needed: (
                f"evaluate with --set data.max_length={needed}, "
                "or leave them out with --set data.on_long_prompt=skip"
            ),
        )  # fmt: skip
        self.subject = dataclasses.replace(subject, data=data)
        self.splits = [name for name in self.splits if len(data.splits[name])]

    def report(self) -> tuple[Report, Pictures]:
        """The report on data of this kind, and its pictures."""
        if self.subject.data.kind == "choice":
            return self.choice()
        return self.chat() if self.subject.data.kind == "chat" else self.preference()

    def choice(self) -> tuple[ChoiceReport, Pictures]:
        """The report on choice questions, and its pictures."""
        data, settings = self.subject.data, self.subject.config.evaluation
        train = TrainingAnswers.of(data.splits["train"], settings.min_answers)
        embeddings_NP = None if self.subject.embeddings_NP is None else self.subject.embeddings_NP.numpy()
        fields = subgroups(data.profiles)
        splits: dict[str, ChoiceSplit] = {}
        routing, pictures = None, Pictures()
        for name in self.splits:
            examples = ChoiceExamples.of(data.splits[name])
            answers = self._choices(name, examples)
            models = {contender: Ragged.of(found.probabilities) for contender, found in answers.items()}
            mass = {contender: found.letter_mass_M for contender, found in answers.items()}
            contenders = references(train, examples, embeddings_NP) | models
            self.predictions[name] = collect(examples, contenders)
            splits[name] = choice_split(examples, contenders, fields, settings, self.main, mass)
            self._say_sample(name, splits[name])
            unseen = _unseen(train, examples) if name == "test" else np.zeros(0, np.int64)
            part = examples.only(unseen)
            if part.counts.values_F.sum() >= settings.min_answers:
                models = {contender: shares.take(unseen) for contender, shares in models.items()}
                mass = {contender: mass_M[unseen] for contender, mass_M in mass.items()}
                contenders = references(train, part, embeddings_NP) | models
                splits["unseen"] = choice_split(part, contenders, fields, settings, self.main, mass)
            if not self.brief and not pictures and splits[name].cells:
                pictures = choice_pictures(self.folder, splits[name], self.main)
                pictures |= subgroup_picture(self.folder, splits[name], self.main)
                routing, more = self._routing(examples, answers[self.main], fields)
                pictures |= more
        report = ChoiceReport(kind="choice", splits=splits, **self._about())
        if routing is not None:
            report.routing = routing
        return report, pictures

    def chat(self) -> tuple[ChatReport, Pictures]:
        """The report on conversations, and its pictures; groups are drawn from ``min_answers`` conversations on."""
        settings = self.subject.config.evaluation
        fields = subgroups(self.subject.data.profiles)
        splits: dict[str, ChatSplit] = {}
        routing, pictures = None, Pictures()
        for name in self.splits:
            talks = _as_examples(self.subject.data.splits[name])
            losses = self._losses(name, talks)
            people = None if talks.people is None else [int(row[0]) for row in talks.people]
            self.predictions[name] = collect_talks(talks, losses)
            splits[name] = chat_split(losses, people, settings.bootstrap)
            self._say_sample(name, splits[name])
            if not pictures:
                routing, pictures = self._routing(talks, losses[self.main], fields)
        report = ChatReport(kind="chat", splits=splits, **self._about())
        if routing is not None:
            report.routing = routing
        return report, pictures

    def preference(self) -> tuple[PreferenceReport, Pictures]:
        """The report on preferences, and its pictures."""
        settings = self.subject.config.evaluation
        fields = subgroups(self.subject.data.profiles)
        splits: dict[str, PreferenceSplit] = {}
        routing, pictures = None, Pictures()
        for name in self.splits:
            split = self.subject.data.splits[name]
            pairs = _as_examples(split, [content_sha256(prompt)[:16] for prompt in split["prompt"]])
            found = self._log_probabilities(name, pairs)
            self.predictions[name] = collect_pairs(pairs, found)
            splits[name] = preference_split(pairs, found, fields, settings, self.main)
            self._say_sample(name, splits[name])
            if routing is None:
                routing, pictures = self._routing(_as_examples(split), found[self.main], fields)
        if not self.brief:
            pictures = preference_pictures(self.folder, splits, self.main) | pictures
        report = PreferenceReport(kind="preference", splits=splits, **self._about())
        if routing is not None:
            report.routing = routing
        return report, pictures

    def encode(self, split: str, options_reversed: bool = False) -> list[EncodedExample]:
        """All rows of a split as token ids, options in the recipe's order or the other way round."""
        subject = self.subject
        renderer = subject.renderer.with_options_reversed() if options_reversed else subject.renderer
        return [
            encode_example(row, renderer, subject.data.sentences, subject.config.data)
            for row in subject.data.splits[split]
        ]

    def tell(self, what: str) -> Callable[[int, int], None] | None:
        """A progress function of (done, in all) for one piece of work."""
        told = self.progress
        return None if told is None else lambda done, total: told(what, done, total)

    def _say_sample(self, name: str, split: ChoiceSplit | ChatSplit | PreferenceSplit) -> None:
        """Keys that do not apply are not written, so this one is set where something was left out."""
        if name in self.samples:
            split.sample = self.samples[name]

    def _about(self) -> _About:
        settings = self.subject.config.evaluation
        return {
            "format_version": FORMAT_VERSION,
            "run": self.subject.name,
            "checkpoint": self.subject.checkpoint,
            "main": self.main,
            "min_answers": settings.min_answers,
            "min_subgroup": settings.min_subgroup,
            "bootstrap": settings.bootstrap,
        }

    def _choices(self, split: str, examples: ChoiceExamples) -> dict[str, ChoicePredictions]:
        """What the models answer, by contender."""
        subject, pad_id = self.subject, pad_id_of(self.subject.renderer.tokenizer)
        batch_size, average = subject.config.evaluation.batch_size, subject.config.data.option_order == "average"
        encoded, turned = self.encode(split), self.encode(split, options_reversed=True) if average else []
        found = {}
        for name, one in self._ways(examples).items():
            table = one.embeddings_NP
            with one.model_as():
                told = self._options(one, f"{split}: {one.label}")
                answers = predict_choices(subject.model, encoded, table, batch_size, pad_id, **told)
                if average:
                    told = self._options(one, f"{split}: {one.label}, reversed")
                    more = predict_choices(subject.model, turned, table, batch_size, pad_id, **told)
                    answers = answers.averaged_with(more)
            found[name] = answers
        return found

    def _losses(self, split: str, talks: ChoiceExamples) -> dict[str, ChatLosses]:
        """The models' losses, by contender."""
        subject, pad_id = self.subject, pad_id_of(self.subject.renderer.tokenizer)
        encoded, batch_size, found = self.encode(split), subject.config.evaluation.batch_size, {}
        for name, one in self._ways(talks).items():
            with one.model_as():
                told = self._options(one, f"{split}: {one.label}")
                found[name] = chat_losses(subject.model, encoded, one.embeddings_NP, batch_size, pad_id, **told)
        return found

    def _log_probabilities(self, split: str, pairs: ChoiceExamples) -> dict[str, PairLogps]:
        """The models' log-probabilities of both answers of each pair, by contender."""
        subject, pad_id = self.subject, pad_id_of(self.subject.renderer.tokenizer)
        rows, batch_size, found = subject.data.splits[split], subject.config.evaluation.batch_size, {}
        encoded = [encode_pair(row, subject.renderer, subject.data.sentences) for row in rows]
        for name, one in self._ways(pairs).items():
            with one.model_as():
                told = self._options(one, f"{split}: {one.label}")
                table = one.embeddings_NP
                found[name] = pair_log_probabilities(subject.model, encoded, table, batch_size, pad_id, **told)
        return found

    def _ways(self, examples: ChoiceExamples) -> dict[str, Asking]:
        """How each contender that is a model is asked."""
        ways = ways_of_asking(self.subject, examples)
        if not self.brief:
            return ways
        kept = {self.main, "before"} if self.subject.data.kind == "preference" else {self.main}
        return {name: one._replace(record=False) for name, one in ways.items() if name in kept}

    def _options(self, one: Asking, what: str) -> ForwardOptions:
        return {
            "device": self.subject.device,
            "profiles": one.profiles,
            "record": one.record,
            "progress": self.tell(what),
        }

    def _routing(
        self,
        examples: ChoiceExamples,
        found: ChoicePredictions | ChatLosses | PairLogps,
        fields: dict[str, list[str | None]],
    ) -> tuple[Routing | None, Pictures]:
        """The section ``routing`` and its pictures, from the examples of groups that may be named; None without any."""
        least = self.subject.config.evaluation.min_answers
        seen = gather_cells(examples.questions, examples.groups, examples.counts, least).examples
        if found.gates_MRE is None or not seen:
            return None, {}
        gates_MRE, examples = found.gates_MRE[seen], examples.only(seen)
        weights = examples.counts.sums().tolist()
        names = found.routing.router_names
        pictures = expert_picture(self.folder, names, examples.questions, examples.groups, weights, gates_MRE)
        section, more = routing_pictures(self.folder, found.routing, examples, gates_MRE, fields, least)
        return section, pictures | more


def _chosen_splits(subject: Subject, asked: Sequence[str] | None) -> list[str]:
    """The names of the splits to evaluate, in the order of the data.

    Raises:
        ConfigError: one that was asked for is empty.
        DataError: there is nothing to evaluate on.
    """
    data = subject.data
    if asked is None:
        if not data.evaluation_splits:
            raise DataError(
                "there is nothing to evaluate on: the splits test and heldout are empty; hold out more people"
            )
        return data.evaluation_splits
    for name in asked:
        if not len(data.splits.get(name, ())):
            hint = "; hold out people with data.valid_fraction" if name == "valid" else ""
            filled = ", ".join(name for name, split in data.splits.items() if len(split) and name != "train")
            raise ConfigError(f"--splits {name}: there is nobody in this split{hint}; this data has {filled}")
    return [name for name in SPLITS if name in asked]


def sampled(
    data: PreparedData, splits: Sequence[str], settings: EvaluationSection
) -> tuple[PreparedData, dict[str, SampleSize]]:
    """The data with at most ``max_people`` people and ``max_examples`` answers of theirs in each of ``splits``.

    Returns:
        The data, and the size of each sample that is smaller than its split.
    """
    limits = Limits(settings.max_people, settings.max_examples, settings.sample_seed)
    if limits.people is None and limits.examples is None:
        return data, {}
    # The probe is a sample itself. Its figures are compared with those of others.
    drawn = {name: sample(data.splits[name], limits) for name in splits if name != PROBE}
    sizes = {
        name: SampleSize(
            people=one.people,
            of_people=one.of_people,
            answers=one.answers,
            of_answers=one.of_answers,
            seed=settings.sample_seed,
        )
        for name, one in drawn.items()
        if one.answers < one.of_answers
    }
    return dataclasses.replace(data, splits=data.splits | {name: one.split for name, one in drawn.items()}), sizes


def check_kind(subject: Subject, kind: str, option: str) -> None:
    """Refuse an option that makes no sense for the data.

    Raises:
        ConfigError: the data is of another kind.
    """
    if subject.data.kind != kind:
        raise ConfigError(f"{option} needs data of kind {kind}, but this is {subject.data.kind}")


def _unseen(train: TrainingAnswers, test: ChoiceExamples) -> Indices:
    """Examples whose exact profile was never trained on; none where that is true of all of them."""
    unseen_M = ~train.knows(test.profiles)
    return np.flatnonzero(unseen_M & (not unseen_M.all()))


def _as_examples(split: Split, questions: Sequence[str] | None = None) -> ChoiceExamples:
    """Conversations or preferences as examples with one answer each, of one question unless ``questions`` are given."""
    columns: dict[str, Sequence] = {
        name: split[name] for name in ("profile", "group", "people") if name in split.column_names
    }
    count = len(split)
    return ChoiceExamples.of(
        {
            **columns,
            "question_id": [""] * count if questions is None else questions,
            "question": [""] * count,
            "options": [[""]] * count,
            "counts": [[1]] * count,
        }
    )
