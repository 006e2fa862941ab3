"""Check the machines of a hostfile before a run: names and slots, ssh without a password, same folder and versions."""

from __future__ import annotations

import argparse

from _cli import run_main

EPILOG = """\
example:
  python launchers/check_hosts.py --hostfile hosts && deepspeed --hostfile hosts launchers/train.py --config RECIPE
"""


def main() -> None:
    """Read the hostfile, ask every host."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hostfile", required=True, help="as for deepspeed; see launchers/hostfile.example")
    parser.add_argument(
        "--timeout", type=int, default=20, metavar="SECONDS", help="for each host to take the connection (default 20)"
    )
    parser.add_argument("--ssh_port", type=int, help="as for deepspeed")
    arguments = parser.parse_args()

    from cuma_ds.parallel.hosts import check_hosts, read_hostfile

    slots = read_hostfile(arguments.hostfile)
    check_hosts(list(slots), arguments.timeout, arguments.ssh_port)
    ranks = sum(slots.values())
    print(f"{len(slots)} host{'s' if len(slots) > 1 else ''} with {ranks} ranks in all: {', '.join(slots)}")


if __name__ == "__main__":
    run_main(main)
