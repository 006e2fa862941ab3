"""What every launcher shares: a mistake of the user is one line and exit code 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from cuma_ds.errors import CumaError


def run_main(main: Callable[[], object]) -> NoReturn:
    """Run ``main`` and exit: 0 when it returns, 2 with one line on stderr for a :class:`CumaError`, 130 on Ctrl-C."""
    try:
        main()
    except CumaError as error:
        if not error.printed_by_main or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(0)
