"""What every launcher shares: a mistake of the user is one line and exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from cuma_ds.errors import ConfigError, CumaError


def run_main(main: Callable[[], object]) -> NoReturn:
    """Run ``main`` and exit: 0 when it returns, 2 with one line on stderr for a :class:`CumaError`, 130 on Ctrl-C."""
    try:
        main()
    except CumaError as error:
        if not error.printed_by_main or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        _leave(130)
    sys.exit(0)


def _leave(code: int) -> NoReturn:
    """Exit with ``code`` for certain: process groups of peers that stopped too can abort or block an orderly shutdown."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def read_profile(text: str) -> dict[str, Any] | str:
    """``--profile``: a JSON object of fields, or a sentence as it is.

    Raises:
        ConfigError: broken JSON; the profile itself is not repeated in the message.
    """
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f'--profile is broken JSON ({error}); expected e.g. \'{{"country": "Norway", "age": 34}}\'') from None
    if not isinstance(fields, dict):
        raise ConfigError("--profile is a JSON list; expected an object of fields, or a sentence")
    return fields


def warn_in_one_line() -> None:
    """Print warnings meant for the user as one line, without the place in the code."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr, flush=True)
