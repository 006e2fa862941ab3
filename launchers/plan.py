"""Plan a run from shapes alone: does it fit, how fast is it, what goes over the wire, and what should be set."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import add_recipe_arguments, run_main

if TYPE_CHECKING:
    from cuma_ds.planning.cost import Hardware, Work
    from cuma_ds.planning.plan import Planner

EPILOG = """\
examples:
  python launchers/plan.py --propose --model-config llama-70b --gpus 64
  python launchers/plan.py --propose --model-config FOLDER --gpus 2 --memory-gb 24 --gpus-per-node 2
  python launchers/plan.py --config launchers/recipes/quickstart.yaml --model-config llama-70b --gpus 8
  python launchers/plan.py --config RECIPE --model-config FOLDER/config.json --gpus 8 64 512 --length 2048 --plot p.png
  python launchers/plan.py --config RECIPE --model-config A.json B.json --gpus 64 --json > plan.json
  python launchers/plan.py --config paper/backbone/qwen3-8b paper/task/ca-grpo paper/method/cuma-r64 \\
    --model-config qwen3-8b --profile-dim 1024 --gpus 8

The recipe gives adapters, dtype, quantisation, DeepSpeed configuration, ep_size, dispatch and micro batch. Its
model.path is not read. Memory and bytes follow from shapes (docs/scale.md), seconds from the hardware that you assume
below. The whole run is cut as the recipe cuts it: training.steps, or training.epochs of --examples; for grpo with its
rollouts.

--propose chooses shard group, quantisation, ep_size and micro batch, and prints them beside the recipe as it is:
"smallest" is the smallest shard group with the weakest quantisation that fit, "fastest" what is faster by 5% or more. A
step is that of the recipe, in the largest micro batches that fit; with --micro-batch it is as many sequences on each
GPU.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser, default="large")
    parser.add_argument(
        "--model-config", required=True, nargs="+", metavar="JSON",
        help="config.json of the backbone, or its folder; no weights; or a name in launchers/model_configs/",
    )  # fmt: skip
    parser.add_argument("--gpus", required=True, type=_positive, nargs="+", metavar="N", help="ranks to plan for")
    proposal = parser.add_argument_group("what to set")
    proposal.add_argument("--propose", action="store_true", help="print what to set instead of planning the recipe")
    proposal.add_argument(
        "--quantisation", nargs="+", choices=("none", "int8", "nf4"), metavar="KIND",
        help="propose one of these; default: that of the recipe, or a stronger one",
    )  # fmt: skip
    proposal.add_argument(
        "--shard-group", type=_group, metavar="N", help="propose this one alone: a number of ranks, machine or world"
    )
    proposal.add_argument("--write", type=Path, metavar="FILE", help="write the DeepSpeed JSON of the last row to FILE")
    work = parser.add_argument_group("work of one rank and forward")
    work.add_argument(
        "--micro-batch",
        type=_positive,
        metavar="B",
        help="sequences; default: training.micro_batch_size, which for dpo counts pairs; with --propose see below",
    )
    work.add_argument("--length", type=_positive, metavar="S", help="tokens of a sequence; default: data.max_length")
    kept = "positions with logits; default: all (choice questions: one for each different length in a micro batch)"
    work.add_argument("--kept-logits", type=_positive, metavar="K", help=kept)
    work.add_argument(
        "--accumulation", type=_positive, default=1, metavar="A", help="micro steps of one optimizer step (default: 1)"
    )
    work.add_argument(
        "--profile-dim", type=_positive, default=384, metavar="P", help="width of the profile embeddings (default: 384)"
    )
    work.add_argument(
        "--examples",
        type=_positive,
        metavar="N",
        help="training examples, for training.epochs (default: data.max_examples)",
    )
    gpu = parser.add_argument_group("hardware, per GPU (defaults: an 80 GB H100 with NVLink and 400 Gbit/s)")
    gpu.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N")
    gpu.add_argument("--memory-gb", type=_amount, default=80.0, metavar="GB")
    gpu.add_argument(
        "--reserved-gb", type=_amount, default=2.0, metavar="GB", help="CUDA context, NCCL, fragmentation (default: 2)"
    )
    gpu.add_argument(
        "--tflops", type=_amount, default=989.0, metavar="T", help="peak in the backbone's dtype (default: 989)"
    )
    gpu.add_argument(
        "--efficiency",
        type=_amount,
        default=0.4,
        metavar="SHARE",
        help="share of the peak that is reached (default: 0.4)",
    )
    gpu.add_argument(
        "--intra-gbps", type=_amount, default=300.0, metavar="GB/s", help="to GPUs of the same machine (default: 300)"
    )
    gpu.add_argument("--inter-gbps", type=_amount, default=40.0, metavar="GB/s", help="to other machines (default: 40)")
    gpu.add_argument(
        "--memory-gbps", type=_amount, default=3350.0, metavar="GB/s", help="of the GPU's own memory (default: 3350)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (bytes, seconds) instead of tables")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="also draw memory and speed against the number of GPUs"
    )
    return parser


def main() -> None:
    """Parse, plan, print."""
    arguments = _parser().parse_args()

    from cuma_ds.planning.cost import Hardware, Work
    from cuma_ds.planning.plan import Planner
    from cuma_ds.planning.skeleton import read_model_config
    from cuma_ds.recipe import load_config
    from cuma_ds.training.schedule import with_steps
    from cuma_ds.training.start import with_start

    config = load_config(arguments.config, arguments.set)
    if config.model.init_from is not None and Path(config.model.init_from).expanduser().exists():
        config = with_start(config)  # else the recipe alone says what is trained
    examples = arguments.examples or config.data.max_examples
    knows_steps = config.training.epochs is None or examples is not None
    if examples is not None:
        config = with_steps(config, examples)
    length = arguments.length or config.data.max_length
    of_unit = 2 if config.training.objective == "dpo" else 1
    shape = Work(
        sequences=arguments.micro_batch or config.training.micro_batch_size * of_unit,
        length=length,
        kept=min(arguments.kept_logits or length, length),
        accumulation=arguments.accumulation,
    )
    hardware = Hardware(
        gpus_per_node=arguments.gpus_per_node,
        memory=arguments.memory_gb * 1e9,
        reserved=arguments.reserved_gb * 1e9,
        flops=arguments.tflops * 1e12,
        efficiency=arguments.efficiency,
        intra_bandwidth=arguments.intra_gbps * 1e9,
        inter_bandwidth=arguments.inter_gbps * 1e9,
        memory_bandwidth=arguments.memory_gbps * 1e9,
    )
    planners = {
        _name(path): Planner(config, read_model_config(_model_config(path)), arguments.profile_dim)
        for path in arguments.model_config
    }
    if arguments.propose:
        _propose(arguments, planners, shape, hardware)
    else:
        _plan(arguments, planners, shape, hardware, knows_steps)


def _plan(
    arguments: argparse.Namespace, planners: dict[str, Planner], shape: Work, hardware: Hardware, knows_steps: bool
) -> None:
    """Plan the recipe as it is."""
    from cuma_ds.planning.report import plot_plans, print_plans, print_whole_runs
    from cuma_ds.planning.whole_run import whole_run

    plans, runs = {}, {}
    for name, planner in planners.items():
        plans[name] = [planner.plan(gpus, shape, hardware) for gpus in sorted(set(arguments.gpus))]
        if knows_steps:
            runs[name] = [whole_run(planner, plan.gpus, shape.length, hardware) for plan in plans[name]]
    if arguments.plot:
        plot_plans(plans, hardware, arguments.plot)
    if arguments.json:
        planned = {name: [plan.as_dict() for plan in rows] for name, rows in plans.items()}
        for name, whole in runs.items():
            for row, run in zip(planned[name], whole, strict=True):
                row["whole_run"] = run.as_dict()
        print(json.dumps(planned, indent=2))
        return
    print_plans(plans, hardware)
    if knows_steps:
        print_whole_runs(runs, next(iter(planners.values())).config)
    else:
        print("whole run: give --examples, of which the recipe takes training.epochs")
    if arguments.plot:
        print(f"plot: {arguments.plot}")


def _propose(arguments: argparse.Namespace, planners: dict[str, Planner], shape: Work, hardware: Hardware) -> None:
    """Print what to set."""
    from cuma_ds.files import write_atomically
    from cuma_ds.planning.proposal import QUANTISATIONS, Ask, propose
    from cuma_ds.planning.report import plot_proposals, print_proposals

    proposals = {}
    for name, planner in planners.items():
        own = QUANTISATIONS.index(planner.config.model.quantisation)
        kinds = arguments.quantisation or QUANTISATIONS[own:]
        ask = Ask(
            name,
            0,
            hardware,
            shape.length,
            shape if arguments.micro_batch else None,
            sorted(kinds, key=QUANTISATIONS.index),
            arguments.shard_group,
        )
        proposals[name] = [propose(planner, replace(ask, gpus=gpus)) for gpus in sorted(set(arguments.gpus))]
    if arguments.write:
        last = list(proposals.values())[-1][-1][-1]
        write_atomically(arguments.write, json.dumps(last.deepspeed, indent=2) + "\n")
    if arguments.plot:
        plot_proposals(proposals, arguments.plot)
    if arguments.json:
        told = {name: [[one.as_dict() for one in row] for row in rows] for name, rows in proposals.items()}
        print(json.dumps(told, indent=2))
        return
    print_proposals(proposals, hardware)


def _name(path: str) -> str:
    """What a backbone is called in the output."""
    file = Path(path)
    return (file.parent.name if file.name == "config.json" else file.name.removesuffix(".json")) or path


def _model_config(path: str) -> Path:
    """The file of ``--model-config``, also by the name of one that comes with this repository."""
    from cuma_ds.resources import resource_folder

    known = resource_folder("model_configs") / f"{path}.json"
    return known if not Path(path).exists() and known.is_file() else Path(path)


def _group(text: str) -> int | str:
    return text if text in ("world", "machine") else _positive(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    run_main(main)
