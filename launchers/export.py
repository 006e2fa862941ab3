"""Export what was trained: a folder for transformers, with or without the base model, plain LoRA for profiles, or an
adapter of PEFT.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import read_profile, run_main, warn_in_one_line

from cuma_ds.errors import ConfigError

if TYPE_CHECKING:
    from cuma_ds.export.lora import LoraRow

_EXAMPLES = """\
examples
  a folder that AutoModelForCausalLM loads with torch and transformers alone:
    python launchers/export.py --run runs/quickstart --format hf --out exported
  the same with the base model inside:
    python launchers/export.py --run runs/quickstart --format hf-merged-repo --out exported
  plain LoRA adapters for PEFT, vLLM and SGLang, one for each profile, with the measured cost of freezing the router:
    python launchers/export.py --run runs/quickstart --format lora --profile '{"country": "Norway"}' --out lora
  what methods dora and p_tuning_v2 trained, as PEFT loads it (method full has --format hf, without our code):
    python launchers/export.py --run runs/dora --format peft --out adapter
  a checkpoint of the authors' research code:
    python launchers/export.py --from-reference FOLDER --base MODEL_FOLDER --format hf --out exported"""


def main() -> None:
    """Parse, read, write, say what was written."""
    arguments = _parser().parse_args()

    warn_in_one_line()

    profiles = [read_profile(text) for text in arguments.profile]
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

        report = write_lora(arguments.run, profiles, arguments.out, arguments.step, arguments.calibration)
        for number, row in enumerate(report["profiles"], start=1):
            print(f"profile-{number}: rank {row['rank']}, {_divergence(row)}")
        print(f"{arguments.out}: {len(report['profiles'])} LoRA adapter(s) and report.json")
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


def _refuse_profiles(profiles: Sequence[object]) -> None:
    if profiles:
        raise ConfigError("--profile belongs to --format lora; an hf export takes every profile when it is called")


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
        "--calibration", type=int, default=64, metavar="N", help="training prompts the router is averaged over (lora)"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
