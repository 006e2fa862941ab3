"""Export what was trained: a folder for transformers, with or without the base model, plain LoRA for profiles, or an
adapter of PEFT.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import read_profile, run_main, warn_in_one_line

from cuma_ds.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from cuma_ds.export.lora import LoraReport, LoraRow, LoraSummary
    from cuma_ds.inference.modeling import Profile

# Of more adapters than this, those that lose most are shown; of more than that, the command for vLLM names the first.
_MOST_LINES, _MOST_MODULES = 20, 4

_EXAMPLES = """\
examples
  a folder that AutoModelForCausalLM loads with torch and transformers alone:
    python launchers/export.py --run runs/quickstart --format hf --out exported
  the same with the base model inside:
    python launchers/export.py --run runs/quickstart --format hf-merged-repo --out exported
  plain LoRA adapters for PEFT, vLLM and SGLang, one for each profile, with the measured cost of freezing the router:
    python launchers/export.py --run runs/quickstart --format lora --out lora --profile '{"country": "Norway"}' \\
        --name Norway --profile '{"country": "Jordan"}' --name Jordan
  many at once, from a file with one line a profile, {"profile": {"country": "Norway"}, "name": "Norway"}:
    python launchers/export.py --run runs/quickstart --format lora --profiles people.jsonl --out lora
  what methods dora and p_tuning_v2 trained, as PEFT loads it (method full has --format hf, without our code):
    python launchers/export.py --run runs/dora --format peft --out adapter
  a checkpoint of the authors' research code:
    python launchers/export.py --from-reference FOLDER --base MODEL_FOLDER --format hf --out exported"""


def main() -> None:
    """Parse, read, write, say what was written."""
    arguments = _parser().parse_args()

    warn_in_one_line()

    profiles, names = _named_profiles(arguments)
    if (arguments.run is None) == (arguments.from_reference is None):
        raise ConfigError("export takes one of --run (a run folder) and --from-reference (the authors' checkpoint)")
    if arguments.from_reference is not None and arguments.base is None:
        raise ConfigError("--from-reference needs --base, the model folder its adapters were trained on")
    if arguments.run is not None and (arguments.base or arguments.encoder):
        raise ConfigError("--base and --encoder belong to --from-reference; a run names its own")
    if arguments.run is not None:
        from cuma_ds.export.plain import check_format, is_plain, write_plain

        check_format(arguments.run, arguments.format)
        if is_plain(arguments.run):
            _refuse_profiles(profiles)
            what = "an adapter for PEFT" if arguments.format == "peft" else "a model for transformers"
            print(_written(write_plain(arguments.run, arguments.out, arguments.step), what))
            return
    if arguments.run is None and arguments.format in ("lora", "peft"):
        raise ConfigError(f"--format {arguments.format} needs --run")
    if arguments.format == "lora":
        from cuma_ds.export.lora import write_lora

        step, prompts = arguments.step, arguments.calibration
        _show_loras(write_lora(arguments.run, profiles, arguments.out, step, prompts, names), arguments.out)
        return
    _refuse_profiles(profiles)
    from cuma_ds.export.hf import read_run, write_hf
    from cuma_ds.export.reference import read_reference

    trained = (
        read_run(arguments.run, arguments.step)
        if arguments.run is not None
        else read_reference(arguments.from_reference, arguments.base, arguments.encoder)
    )
    folder = write_hf(trained, arguments.out, merged=arguments.format == "hf-merged-repo")
    print(_written(folder, f"{len(trained.state)} adapter tensors"))


def _named_profiles(arguments: argparse.Namespace) -> tuple[list[Profile], list[str]]:
    """The profiles of the command line and of a file, and their names: one for each, or none at all."""
    from cuma_ds.export.names import NamedProfile, read_profiles

    if arguments.name and len(arguments.name) != len(arguments.profile):
        raise ConfigError(
            f"{len(arguments.name)} --name for {len(arguments.profile)} --profile; give one name for each, or none"
        )
    names = arguments.name or [None] * len(arguments.profile)
    wanted = [NamedProfile(read_profile(text), name) for text, name in zip(arguments.profile, names, strict=True)]
    if arguments.profiles is not None:
        wanted += read_profiles(arguments.profiles)
    named = [one.name for one in wanted if one.name is not None]
    if named and len(named) < len(wanted):
        raise ConfigError(f"{len(named)} of {len(wanted)} profiles have a name; name each of them, or none")
    return [one.profile for one in wanted], named


def _refuse_profiles(profiles: Sequence[object]) -> None:
    if profiles:
        raise ConfigError(
            "--profile and --profiles belong to --format lora; an hf export takes every profile when it is called"
        )


def _show_loras(report: LoraReport, out: str) -> None:
    """Print what each adapter loses, all of them together, and how vLLM serves them."""
    from rich.console import Console

    rows, summary = report["profiles"], report["summary"]
    say = partial(Console().print, highlight=False, markup=False, soft_wrap=True)
    if len(rows) <= _MOST_LINES:
        for row in rows:
            say(f"{row['name']}: rank {row['rank']}, {_divergence(row)}")
    else:
        worst = sorted(rows, key=lambda row: row.get("kl_mean", 0.0), reverse=True)[:_MOST_LINES]
        Console().print(_table(worst, f"the {_MOST_LINES} of {len(rows)} adapters that lose most"))
    if len(rows) > 1:
        say(f"all {summary['adapters']} adapters: {summary['exact']} exact{_together(summary)}")
    say(f"{out}: {len(rows)} LoRA adapter(s) and report.json")
    if "max_lora_rank" in summary:
        modules = [f"{row['name']}={Path(out, row['name'])}" for row in rows[:_MOST_MODULES]]
        more = f" ... (and {len(rows) - _MOST_MODULES} more)" if len(rows) > _MOST_MODULES else ""
        say(
            f"for vLLM: vllm serve {report['base']} --enable-lora --max-lora-rank {summary['max_lora_rank']} "
            f"--lora-modules {' '.join(modules)}{more}"
        )
    else:
        say("for vLLM: none; an adapter has a higher rank than it takes (512)")


def _together(summary: LoraSummary) -> str:
    if "kl_mean" not in summary:
        return ""
    text = f"; of the others KL {summary['kl_mean']:.4f} nats per token (at most {summary['kl_max']:.4f})"
    if "emd_mean" in summary:
        text += f", {summary['distance']} {summary['emd_mean']:.4f} (at most {summary['emd_max']:.4f})"
    return text


def _table(rows: Sequence[LoraRow], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("adapter")
    for name in ("rank", "KL", "at most", rows[0].get("distance", ""), "at most"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (row.get(key) for key in ("kl_mean", "kl_max", "emd_mean", "emd_max"))
        cells = ("exact" if number is None else f"{number:.4f}" for number in numbers)
        table.add_row(row["name"], str(row["rank"]), *cells)
    return table


def _written(folder: Path, what: str) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{folder}: {what}, {size / 1e6:.1f} MB in all"


def _divergence(row: LoraRow) -> str:
    """What a plain LoRA loses, in words."""
    if row["exact"]:
        return "exact: the router does not look at the token"
    text = f"gate averaged over prompts: KL {row['kl_mean']:.4f} nats per token (at most {row['kl_max']:.4f})"
    if "emd_mean" in row:
        text += (
            f", {row['distance']} between the answer distributions {row['emd_mean']:.4f} (at most {row['emd_max']:.4f})"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", metavar="FOLDER", help="run folder, output_dir/name of its recipe")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of the run; default: the newest complete one")
    parser.add_argument("--from-reference", metavar="FOLDER", help="a checkpoint of the authors' code instead of a run")
    parser.add_argument("--base", metavar="FOLDER", help="base model of --from-reference")
    parser.add_argument(
        "--encoder", metavar="FOLDER", help="sentence encoder of --from-reference; none: embeddings only"
    )
    parser.add_argument(
        "--format", required=True, choices=("hf", "hf-merged-repo", "lora", "peft"), help="what to write"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--profile", action="append", default=[], metavar="JSON", help="whom a LoRA is for: fields or text; repeatable"
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="name of the adapter of each --profile, in their order; default: profile-1, ... (nobody is named)",
    )
    parser.add_argument(
        "--profiles", metavar="FILE", help='many profiles: JSON lines {"profile": {...}, "name": "..."}, name optional'
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=int, default=64, metavar="N", help="training prompts the router is averaged over (lora)"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
