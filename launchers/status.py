"""Say how far a run is, how fast and how well, why it stopped, and with --verify whether its files are whole."""

from __future__ import annotations

import argparse

from _cli import run_main

from cuma_ds.errors import CheckpointError

EPILOG = """\
examples:
  python launchers/status.py runs/quickstart
  python launchers/status.py runs/quickstart --verify
"""


def main() -> None:
    """Read the folder; nothing in it is changed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run folder, output_dir/name of its recipe")
    parser.add_argument("--verify", action="store_true", help="read every file and check every hash; 2 if one is bad")
    arguments = parser.parse_args()

    from cuma_ds.data.prepared import read_manifest
    from cuma_ds.run_status import problems, status_of
    from cuma_ds.runs import Run
    from cuma_ds.training.schedule import with_steps

    run = Run.open(arguments.run)
    config = run.config()
    if config.training.epochs is not None:
        config = with_steps(config, read_manifest(run.data_folder)["splits"]["train"]["examples"])
    for line in status_of(run, config.training.steps).lines():
        print(line)
    if arguments.verify:
        found = list(problems(run))
        for line in found:
            print(line)
        if found:
            raise CheckpointError(f"{run.folder}: {len(found)} file{'s are' if len(found) > 1 else ' is'} not whole")
        print(f"verified    every file of {run.folder} is whole")


if __name__ == "__main__":
    run_main(main)
