"""Evaluate a model on choice questions, conversations or preferences, before and after training, in one report."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import joined_ranks, run_main, several_ranks, warn_in_one_line

from cuma_ds.errors import ConfigError
from cuma_ds.files import is_hub_id, quiet_transformers
from cuma_ds.telemetry.progress import one_bar, phase
from cuma_ds.telemetry.screen import console, say

if TYPE_CHECKING:
    from cuma_ds.evaluation.run import Extra
    from cuma_ds.evaluation.subject import Subject
    from cuma_ds.parallel.topology import Topology

_EXAMPLES = """\
examples
  the newest checkpoint of a run:
    python launchers/evaluate.py --run runs/quickstart
  an earlier one, naming only groups of at least 100 people:
    python launchers/evaluate.py --run runs/quickstart --step 50 --set evaluation.min_answers=100
  500 people of each split with all of their answers, as a benchmark of millions of answers needs it:
    python launchers/evaluate.py --run runs/wvb --set evaluation.max_people=500
  two checkpoints, each into a folder of its own (reports/steps/step-20 and step-40):
    python launchers/evaluate.py --run runs/quickstart --step 20 40 --out reports/steps
  quickly, the model alone on the people held out for choosing settings (data.valid_fraction):
    python launchers/evaluate.py --run runs/mine --splits valid --brief --out reports/valid
  an exported folder, a PEFT adapter or a model as it is, on prepared data or your own rows:
    python launchers/evaluate.py --export exported --data prepared/wvb --out reports/exported
    python launchers/evaluate.py --adapter lora/profile-1 --data answers.jsonl --out reports/lora
    python launchers/evaluate.py --model models/SmolLM2-135M-Instruct --data answers.jsonl --out reports/bare
  whether it prefers the answers that people prefer, from pairs of a chosen and a rejected answer:
    python launchers/evaluate.py --run runs/quickstart --data preferences.jsonl --out reports/preferences
  conversations: 200 answers before and after training, compared by a judge behind an OpenAI-compatible endpoint:
    python launchers/evaluate.py --run runs/chat --generate 200 --judge-url http://host:8000/v1 --judge-model NAME"""
_KINDS = ("run", "export", "adapter", "model")
_SPLITS = ("valid", "test", "heldout", "heldout_profiles")


def main() -> None:
    """Parse, evaluate, show the table and where the report is."""
    arguments = _parser().parse_args()
    warn_in_one_line()
    _check(arguments)
    _extras(arguments)  # mistakes show before anything is loaded

    from cuma_ds.runs import Run

    with joined_ranks(arguments.run, _overrides(arguments)) as topology, contextlib.ExitStack() as stack:
        folder = Path(arguments.out) if arguments.out else Run(arguments.run).report_folder
        if topology is not None and not topology.is_main:
            # All ranks make the same report. That of the main rank is kept, and it alone asks the judge.
            folder, arguments.judge_url = Path(stack.enter_context(tempfile.TemporaryDirectory())), None
        steps = arguments.step or [None]
        for step in steps:
            _evaluate(arguments, topology, folder / f"step-{step}" if len(steps) > 1 else folder, step)


def _evaluate(arguments: argparse.Namespace, topology: Topology | None, folder: Path, step: int | None) -> None:
    from cuma_ds.evaluation.report.tables import terminal_tables
    from cuma_ds.evaluation.run import Scope, evaluate, written_files

    quiet_transformers()
    extras = _extras(arguments)
    with phase("loading the model"):
        subject = _open(arguments, topology, step)
    with one_bar("evaluating") as tell:

        def progress(what: str, done: int, total: int) -> None:
            tell(what, done, total)
            if done == total:
                say(f"{what}: {total} examples")
                tell("scores and pictures", 0, 0)

        report = evaluate(subject, folder, progress, extras, Scope(arguments.splits, arguments.brief))
    for table in terminal_tables(report):
        console().print(table)
    page, *others = written_files(folder, report)
    say(f"beside the report: {', '.join(file.name for file in others)}")
    say(f"open {page}")


def _check(arguments: argparse.Namespace) -> None:
    given = [kind for kind in _KINDS if getattr(arguments, kind) is not None]
    if len(given) != 1:
        raise ConfigError(f"evaluate takes one of {', '.join(f'--{kind}' for kind in _KINDS)}; {len(given)} were given")
    if given != ["run"]:
        for name in ("data", "out"):
            if getattr(arguments, name) is None:
                raise ConfigError(f"--{given[0]} needs --{name}; only a run knows its own")
    for name, kinds in (("step", ("run",)), ("base", ("export", "adapter")), ("encoder", ("export",))):
        if getattr(arguments, name) is not None and given[0] not in kinds:
            raise ConfigError(f"--{name} belongs to {' and '.join(f'--{kind}' for kind in kinds)}")
    place = arguments.data
    if place is not None and not Path(place).exists() and not is_hub_id(place):
        raise ConfigError(f"--data {place} does not exist; expected a prepared folder, a file of rows, or a hub id")
    if arguments.generate is not None and arguments.generate < 1:
        raise ConfigError(f"--generate is {arguments.generate}; at least one conversation is needed")
    if (arguments.judge_url is None) != (arguments.judge_model is None):
        raise ConfigError("--judge-url and --judge-model belong together: the address and the name of the judge")
    if len(set(arguments.step or ())) < len(arguments.step or ()):
        raise ConfigError(f"--step {' '.join(map(str, arguments.step))} names one checkpoint twice")
    if len(arguments.step or ()) > 1 and several_ranks():
        raise ConfigError(
            "several checkpoints are for one process; start it without deepspeed or torchrun, or name one"
        )
    if arguments.gradients and several_ranks():
        raise ConfigError("--gradients is for one process; start it without deepspeed or torchrun")
    if arguments.judge_url is not None and arguments.generate is None:
        raise ConfigError("--judge-url needs --generate N, the number of answers to compare")


def _extras(arguments: argparse.Namespace) -> list[Extra]:
    from cuma_ds.evaluation.generation import Generation
    from cuma_ds.evaluation.gradients import Interference
    from cuma_ds.inference.sampling import Sampling
    from cuma_ds.judge import JudgeSettings

    judge = None
    if arguments.judge_url is not None:
        judge = JudgeSettings(
            arguments.judge_url,
            arguments.judge_model,
            arguments.judge_key,
            arguments.judge_concurrency,
            arguments.judge_timeout,
            arguments.judge_retries,
            arguments.judge_max_tokens,
        )
    extras: list[Extra] = []
    if arguments.generate is not None:
        extras.append(Generation(arguments.generate, Sampling(arguments.max_new_tokens, arguments.temperature), judge))
    if arguments.gradients:
        extras.append(Interference())
    return extras


def _overrides(arguments: argparse.Namespace) -> list[str]:
    batch_size = [] if arguments.batch_size is None else [f"evaluation.batch_size={arguments.batch_size}"]
    return [*arguments.set, *batch_size]


def _open(arguments: argparse.Namespace, topology: Topology | None, step: int | None) -> Subject:
    from cuma_ds.evaluation.subject import run_subject, subject
    from cuma_ds.inference.open import open_export, open_model, open_peft

    overrides = _overrides(arguments)
    if arguments.run is not None:
        return run_subject(arguments.run, step, arguments.data, overrides, topology)
    if arguments.export is not None:
        opened = open_export(arguments.export, arguments.base, arguments.encoder, overrides)
    elif arguments.adapter is not None:
        opened = open_peft(arguments.adapter, arguments.base, overrides)
    else:
        opened = open_model(arguments.model, overrides)
    return subject(opened, arguments.data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", metavar="FOLDER", help="run folder, output_dir/name of its recipe")
    parser.add_argument(
        "--step", type=int, nargs="+", metavar="N",
        help="checkpoint of the run; default: the newest complete one. With several, each reports into OUT/step-N",
    )  # fmt: skip
    parser.add_argument("--export", metavar="FOLDER", help="folder made by launchers/export.py --format hf")
    parser.add_argument("--adapter", metavar="FOLDER", help="adapter in the format of the peft library")
    parser.add_argument("--model", metavar="FOLDER", help="causal language model as it is, folder or hub id")
    parser.add_argument("--base", metavar="FOLDER", help="base model of an export or adapter, if it has moved")
    parser.add_argument(
        "--encoder", metavar="FOLDER", help="sentence encoder of an export, if it has moved or the export names none"
    )
    parser.add_argument(
        "--data", metavar="PLACE", help="prepared folder, or file of rows; default for a run: its own data"
    )
    parser.add_argument(
        "--splits", nargs="+", choices=_SPLITS, metavar="NAME",
        help=f"which people, of {', '.join(_SPLITS)}; default: all but valid, the people for choosing settings",
    )  # fmt: skip
    parser.add_argument(
        "--brief", action="store_true",
        help="only the model itself: not the backbone before training, not profiles swapped, no routing, no pictures",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FOLDER", help="where the report goes; default for a run: its folder evaluation"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="section.key=value",
        help="override keys of the recipe, e.g. of evaluation",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="prompts per forward, same as --set evaluation.batch_size=N"
    )
    more = parser.add_argument_group("more, each taking its own time")
    more.add_argument(
        "--gradients", action="store_true", help="interference of groups' gradients, a dense LoRA against the experts"
    )
    more.add_argument(
        "--generate",
        type=int,
        metavar="N",
        help="answer N held-out conversations: Distinct-1/2, and win rate with a judge",
    )
    more.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    more.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the most probable token"
    )
    more.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1")
    more.add_argument("--judge-model", metavar="NAME", help="the judge's name there")
    more.add_argument(
        "--judge-key",
        default="OPENAI_API_KEY",
        metavar="VAR",
        help="environment variable with the key (default OPENAI_API_KEY)",
    )
    more.add_argument("--judge-concurrency", type=int, default=8, metavar="N", help="most calls at a time (default 8)")
    more.add_argument("--judge-timeout", type=float, default=60.0, metavar="S", help="seconds of one call (default 60)")
    more.add_argument(
        "--judge-retries",
        type=int,
        default=5,
        metavar="N",
        help="of a call that failed, with growing waits (default 5)",
    )
    more.add_argument("--judge-max-tokens", type=int, default=256, metavar="N", help="longest verdict (default 256)")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run_main(main)
