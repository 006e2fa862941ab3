"""Train adapters as a recipe says: on one process, or started by deepspeed or torchrun on many."""

from __future__ import annotations

import argparse
import os

# One OpenMP thread per core and rank, unless the user knows better; must stand before torch is imported.
if (ranks := os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1").isdecimal() and int(ranks) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(ranks))))

from _cli import add_recipe_arguments, command, run_main, warn_in_one_line

from cuma_ds.config import RunConfig
from cuma_ds.errors import CumaError
from cuma_ds.recipe import load_config
from cuma_ds.telemetry.screen import let_libraries_speak, say, set_libraries_aside

EPILOG = """\
examples:
  python launchers/train.py --config launchers/recipes/quickstart.yaml
  deepspeed --num_accelerators 2 launchers/train.py --config launchers/recipes/quickstart.yaml
  deepspeed --hostfile hosts launchers/train.py --config RECIPE --set training.steps=500 parallel.ep_size=4

The run lands in run.output_dir/run.name. The same command again resumes it from its last checkpoint,
on any number of ranks. The screen shows what the run does; what libraries print is in its folder logs.
"""


def main() -> None:
    """Parse, join the other ranks, train."""
    arguments = _parser().parse_args()
    warn_in_one_line()
    if arguments.verbose:
        let_libraries_speak()
    else:
        set_libraries_aside()

    config: RunConfig | None = None
    mistake: CumaError | None = None
    try:
        config = load_config(arguments.config, arguments.set)
    except CumaError as error:
        mistake = error

    from cuma_ds.parallel.agreement import agreement
    from cuma_ds.parallel.topology import (
        check_ep_size,
        leave_processes,
        start_processes,
        with_expert_groups,
    )
    from cuma_ds.parallel.watch import watched

    seconds = config.parallel.timeout_seconds if config is not None else 120
    topology = start_processes(seconds)
    with watched(topology, seconds):
        with agreement(mistake):
            if config is not None:
                check_ep_size(topology, config.parallel.ep_size)
        assert config is not None
        from cuma_ds.training.run import train

        folder = train(config, with_expert_groups(topology, config.parallel.ep_size))
        leave_processes()
    if topology.is_main:
        say(f"to judge it: {command('evaluate')} --run {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--verbose", action="store_true",
        help="show what DeepSpeed, transformers and others print, too; by default that goes to logs/ of the run",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run_main(main)
