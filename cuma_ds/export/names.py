"""Whom plain LoRA adapters are for, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cuma_ds.errors import ConfigError, nearest
from cuma_ds.inference.modeling import Profile
from cuma_ds.strict_json import read_json

# Letters of any script, digits, dots, underscores and hyphens: a folder everywhere, and one word in a shell.
_NAME = re.compile(r"[^\W_][\w.-]{0,59}")
_KEYS = ("profile", "name")


class NamedProfile(NamedTuple):
    """A profile, and the name of its adapter; None for a number."""

    profile: Profile
    name: str | None


def adapter_names(count: int, names: Sequence[str]) -> list[str]:
    """The folders of ``count`` adapters: ``names``, or ``profile-1`` and so on where there are none.

    Raises:
        ConfigError: there are more or fewer names, one stands twice, or one is no name of a folder.
    """
    if not names:
        return [f"profile-{number}" for number in range(1, count + 1)]
    if len(names) != count:
        raise ConfigError(f"there are {len(names)} names for {count} profiles; name each of them (--name), or none")
    seen: set[str] = set()
    for name in names:
        if not _NAME.fullmatch(name) or name.casefold().endswith((".", ".json")):
            raise ConfigError(
                f"the name {name!r} cannot be the name of a folder; allowed are at most 60 letters, digits, '-', '_' "
                "and '.', with a letter or a digit first"
            )
        if name.casefold() in seen:  # some file systems know one case alone
            raise ConfigError(f"the name {name!r} stands twice; each adapter needs a name of its own")
        seen.add(name.casefold())
    return list(names)


def read_profiles(file: str | Path) -> list[NamedProfile]:
    """The profiles of a file with one JSON object a line: ``{"profile": fields or a sentence, "name": optional}``.

    Raises:
        ConfigError: names the file and the line; a profile is not repeated.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"--profiles {file} is not UTF-8 text; expected one JSON object a line") from None
    except OSError as error:
        raise ConfigError(f"--profiles {file} cannot be read: {error.strerror or error}") from None
    found = [_named(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ConfigError(f'--profiles {file} is empty; expected lines like {{"profile": {{"country": "Norway"}}}}')
    return found


def _named(line: str, where: str) -> NamedProfile:
    try:
        row = read_json(line)
    except ValueError as error:
        raise ConfigError(f"{where} is broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise ConfigError(f'{where} is no JSON object; expected {{"profile": ..., "name": ...}}, the name optional')
    for key in row.keys() - set(_KEYS):
        raise ConfigError(f"{where}: there is no key {key!r}{nearest(key, _KEYS)}; expected profile and name")
    profile, name = row.get("profile"), row.get("name")
    if not isinstance(profile, dict | str):
        raise ConfigError(f"{where}: profile must be an object of fields or a sentence")
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{where}: name is {name!r}, expected a text")
    return NamedProfile(profile, name)
