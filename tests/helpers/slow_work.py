"""One of two ranks; started by a test. Rank 1 works longer than the ranks wait for each other, and then fails once."""

from __future__ import annotations

import json
import time

from cuma_ds.errors import CumaError, DataError
from cuma_ds.parallel import agreement
from cuma_ds.parallel.agreement import together
from cuma_ds.parallel.topology import start_processes, wait_for_peers_at_most

agreement._SECONDS = 0.5
topology = start_processes(60)
wait_for_peers_at_most(2)


def work() -> str:
    time.sleep(5 * topology.rank)
    return f"rank {topology.rank}"


def fails() -> None:
    if topology.rank == 1:
        time.sleep(1)
        raise DataError("nothing here")


said = [together(work)]
try:
    together(fails)
except CumaError as error:
    said += [type(error).__name__, str(error)]
said.append(together(work))
print(json.dumps(said), flush=True)
