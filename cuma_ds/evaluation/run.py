"""From a model and its data to a report: every split asked before and after training, and with profiles swapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuma_ds.data.batch import EncodedExample, encode_example
from cuma_ds.data.lengths import fitting
from cuma_ds.errors import ConfigError, DataError
from cuma_ds.evaluation.chat import chat_losses
from cuma_ds.evaluation.choice import predict_choices
from cuma_ds.evaluation.examples import ChoiceExamples, swap_profiles
from cuma_ds.evaluation.metrics import gather_cells
from cuma_ds.evaluation.pictures import choice_pictures, expert_picture, routing_pictures, subgroup_picture
from cuma_ds.evaluation.references import collapse_reference, has_training_answers, nearest_reference, oracle_reference
from cuma_ds.evaluation.report import Report, write_report
from cuma_ds.evaluation.routing import expert_load
from cuma_ds.evaluation.sections import chat_split, choice_split
from cuma_ds.evaluation.subgroups import subgroups
from cuma_ds.evaluation.subject import Subject, run_subject
from cuma_ds.inference.forward import pad_id_of
from cuma_ds.runs import Run

Array = NDArray[np.float64]

# Called with (what is being run, examples done, examples in all).
Progress = Callable[[str, int, int], None]
# Judged beside the rest of a report: gets the evaluator, returns a section of the summary (by name) and pictures.
Extra = Callable[["Evaluator"], tuple[dict[str, Any], dict[str, str]]]


def evaluate_run(
    run_dir: str | Path, step: int | None = None, overrides: Sequence[str] = (), progress: Progress | None = None
) -> Report:
    """Evaluate one checkpoint of a run and write its report (arguments as in :func:`cuma_ds.evaluation.subject.run_subject`)."""
    return evaluate(run_subject(run_dir, step, overrides=overrides), Run(run_dir).report_folder, progress)


def evaluate(
    subject: Subject, folder: str | Path, progress: Progress | None = None, extras: Sequence[Extra] = ()
) -> Report:
    """Evaluate a model on its data and write a report.

    Args:
        subject: the model and the data.
        folder: where report.json, report.md and the pictures go.
        progress: told how far each pass is.
        extras: what else to judge, e.g. generated answers.

    Raises:
        CumaError: there is nothing to evaluate on, or an extra cannot be done.
    """
    evaluator = Evaluator(subject, Path(folder), progress)
    evaluator.folder.mkdir(parents=True, exist_ok=True)
    summary, pictures = evaluator.chat() if subject.data.kind == "chat" else evaluator.choice()
    for extra in extras:
        section, more = extra(evaluator)
        summary |= section
        pictures |= more
    settings = subject.config.evaluation
    about = {
        "run": subject.name,
        "checkpoint": subject.checkpoint,
        "kind": subject.data.kind,
        "main": evaluator.main,
        "min_answers": settings.min_answers,
        "min_subgroup": settings.min_subgroup,
        "bootstrap": settings.bootstrap,
    }
    return write_report(evaluator.folder, about | summary, pictures)


class Evaluator:
    """One model asked about every split.

    Args:
        subject: the model and the data.
        folder: where pictures go.

    Attributes:
        main: the row of the report that is about the model itself: ``trained``, or ``before`` where nothing was trained.
        splits: names of the splits that hold anything, ``train`` apart.
    """

    def __init__(self, subject: Subject, folder: Path, progress: Progress | None = None) -> None:
        self.folder = folder
        self.progress = progress
        self.main = "before" if subject.untrained is None else "trained"
        self.splits = subject.data.evaluation_splits
        if subject.data.kind not in ("choice", "chat"):
            raise DataError(
                f"data of kind {subject.data.kind!r} cannot be evaluated; allowed: choice questions and conversations"
            )
        if not self.splits:
            raise DataError(
                "there is nothing to evaluate on: the splits test and heldout are empty; hold out more people"
            )
        data = fitting(
            subject.data, subject.renderer, subject.config.data, self.splits,
            lambda needed: f"evaluate with --set data.max_length={needed}, or leave them out with --set data.on_long_prompt=skip",
        )  # fmt: skip
        self.subject = dataclasses.replace(subject, data=data)
        self.splits = data.evaluation_splits

    def choice(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Sections of the summary and pictures, for choice questions."""
        data, settings = self.subject.data, self.subject.config.evaluation
        train = ChoiceExamples.of(data.splits["train"])
        fields = subgroups(data.profiles)
        sections: dict[str, Any] = {}
        summary: dict[str, Any] = {"splits": sections}
        pictures: dict[str, str] = {}
        for name in self.splits:
            examples = ChoiceExamples.of(data.splits[name])
            rows = self._references(train, examples)
            results = self._passes(predict_choices, name, examples.questions, examples.groups)
            rows |= {row: result.probabilities for row, result in results.items()}
            mass = {row: result.letter_mass_M for row, result in results.items()}
            sections[name] = choice_split(examples, rows, fields, settings, self.main, mass)
            unseen = _unseen(train, examples) if name == "test" else []
            if sum(examples.counts[index].sum() for index in unseen) >= settings.min_answers:
                part = examples.only(unseen)
                own = self._references(train, part) | {
                    row: [r.probabilities[i] for i in unseen] for row, r in results.items()
                }
                mass = {row: mass_M[unseen] for row, mass_M in mass.items()}
                sections["unseen"] = choice_split(part, own, fields, settings, self.main, mass)
            if not pictures and sections[name]["cells"]:
                pictures = choice_pictures(self.folder, sections[name], self.main) | subgroup_picture(
                    self.folder, sections[name], self.main
                )
                found = results[self.main]
                if found.gates_MRE is not None:
                    seen = gather_cells(
                        examples.questions, examples.groups, examples.counts, settings.min_answers
                    ).examples
                    summary["routing"], more = self._routing(examples.only(seen), found, seen, fields)
                    pictures |= more
        return summary, pictures

    def chat(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Sections of the summary and pictures, for conversations; groups are drawn from ``min_answers`` conversations on."""
        settings = self.subject.config.evaluation
        fields = subgroups(self.subject.data.profiles)
        sections: dict[str, Any] = {}
        summary: dict[str, Any] = {"splits": sections}
        pictures: dict[str, str] = {}
        for name in self.splits:
            split = self.subject.data.splits[name]
            talks = _as_examples(split)
            results = self._passes(chat_losses, name, talks.questions, talks.groups)
            people = None if talks.people is None else [int(row[0]) for row in talks.people]
            sections[name] = chat_split(results, people, settings.bootstrap)
            found = results[self.main]
            if not pictures and found.gates_MRE is not None:
                seen = gather_cells(talks.questions, talks.groups, talks.counts, settings.min_answers).examples
                if seen:
                    summary["routing"], pictures = self._routing(talks.only(seen), found, seen, fields)
        return summary, pictures

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

    def _references(self, train: ChoiceExamples, examples: ChoiceExamples) -> dict[str, Sequence[Array]]:
        least, embeddings_NP = self.subject.config.evaluation.min_answers, self.subject.embeddings_NP
        rows: dict[str, Sequence[Array]] = {"collapse": collapse_reference(train, examples)}
        if has_training_answers(train, examples, least):
            rows["oracle"] = oracle_reference(train, examples, least)
        if embeddings_NP is not None and set(train.profiles).isdisjoint(examples.profiles):
            rows["nearest"] = nearest_reference(train, examples, embeddings_NP.numpy(), least)
        return rows

    def _passes(
        self, run: Callable[..., Any], split: str, units: Sequence[str], groups: Sequence[str]
    ) -> dict[str, Any]:
        """``run`` (predict_choices or chat_losses) on a split, by row name: before, trained, and swapped where there are profiles."""
        subject, examples = self.subject, self.encode(split)
        twice = subject.data.kind == "choice" and subject.config.data.option_order == "average"
        turned = self.encode(split, options_reversed=True) if twice else None

        def once(label: str, asked: Sequence[EncodedExample], embeddings_NP: Any, **options: Any) -> Any:
            return run(
                subject.model,
                asked,
                embeddings_NP,
                subject.config.evaluation.batch_size,
                pad_id_of(subject.renderer.tokenizer),
                device=subject.device,
                progress=self.tell(f"{split}: {label}"),
                **options,
            )

        def go(label: str, embeddings_NP: Any, **options: Any) -> Any:
            found = once(label, examples, embeddings_NP, **options)
            return (
                found
                if turned is None
                else found.averaged_with(once(f"{label}, reversed", turned, embeddings_NP, **options))
            )

        if subject.untrained is None:
            return {"before": go("as it is", None)}
        with subject.untrained():
            results = {"before": go("before training", None)}
        results["trained"] = go("trained", subject.embeddings_NP, record=True)
        if subject.embeddings_NP is not None:
            own = [example.profile for example in examples]
            swapped = swap_profiles(units, groups, own)
            if swapped != own:
                results["swapped"] = go("profiles swapped", subject.embeddings_NP, profiles=swapped)
        return results

    def _routing(
        self, examples: ChoiceExamples, found: Any, seen: Sequence[int], fields: dict[str, list[str | None]]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The section ``routing`` and its pictures, from examples of groups that may be named (``seen`` among all of the split)."""
        gates_MRE, names = found.gates_MRE[seen], found.routing.router_names
        weights = [float(counts.sum()) for counts in examples.counts]
        pictures = expert_picture(self.folder, names, examples.questions, examples.groups, weights, gates_MRE)
        section, more = routing_pictures(self.folder, expert_load(found.routing), examples, gates_MRE, fields)
        return {"tokens": int(found.routing.tokens), **section}, pictures | more


def check_kind(subject: Subject, kind: str, option: str) -> None:
    """Refuse an option that makes no sense for the data.

    Raises:
        ConfigError: the data is of another kind.
    """
    if subject.data.kind != kind:
        raise ConfigError(f"{option} needs data of kind {kind}, but this is {subject.data.kind}")


def _unseen(train: ChoiceExamples, test: ChoiceExamples) -> list[int]:
    """Examples whose exact profile was never trained on; none where that is true of all of them."""
    known = set(train.profiles)
    found = [index for index, profile in enumerate(test.profiles) if profile not in known]
    return found if len(found) < len(test) else []


def _as_examples(split: Any) -> ChoiceExamples:
    """Conversations as examples of one question with one answer each, for what only asks who was asked."""
    columns = {"profile": split["profile"], "group": split["group"]}
    if "people" in (getattr(split, "column_names", None) or list(split)):
        columns["people"] = split["people"]
    count = len(columns["profile"])
    return ChoiceExamples.of(
        {
            **columns,
            "question_id": [""] * count,
            "question": [""] * count,
            "options": [[""]] * count,
            "counts": [[1]] * count,
        }
    )
