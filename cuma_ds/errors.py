"""Mistakes a user can mend: launchers print them in one line and exit with code 2, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CumaError(Exception):
    """Base of every error a user can fix. The message is one line: what, where, what was allowed.

    Attributes:
        printed_by_main: all ranks have this error and rank 0 prints it for them.
        exit_code: of a command that ends with it.
    """

    printed_by_main = False
    exit_code = 2


class ConfigError(CumaError):
    """A recipe, an override or an option that cannot work."""


class DataError(CumaError):
    """Input data that cannot be read or used as asked."""


class ModelError(CumaError):
    """A model, encoder or adapter that is missing or does not fit."""


class CheckpointError(CumaError):
    """A checkpoint or run folder that is missing, incomplete or belongs to something else."""


class Stopped(CumaError):
    """The work was told to stop and did so in good order; the same command goes on with it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class TopologyError(CumaError):
    """A world size, expert-parallel size or ZeRO stage that cannot hold what was asked."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
