"""From files and overrides to a recipe; every mistake names the file, line, key and what was allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cuma_ds.adapters.config import unread_keys
from cuma_ds.config import CHANGED_SINCE_0_1_0, LENGTHS, NEW_SINCE_0_1_0, RunConfig, section_model
from cuma_ds.errors import ConfigError, nearest
from cuma_ds.resources import resource_folder

# A key of a recipe, from its section inwards.
Key = tuple[str, ...]


def load_config(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] | None = None) -> RunConfig:
    """Read a recipe, or several that are merged from left to right, and apply ``section.key=value`` overrides.

    Args:
        paths: YAML files, or names of recipes that come with the package. Where two files have the same key, the later
            wins. A file that names ``adapters.method`` also removes the keys of earlier files that its method does not
            read.
        overrides: e.g. ``["training.steps=20"]``; values are YAML, and win over the files.

    Raises:
        ConfigError: one line with file, line and key for the first thing that is wrong.
    """
    files = [find_recipe(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    values: dict[str, object] = {}
    places: dict[Key, str] = {}
    for file in files:
        _merge(values, places, *_read_recipe(file))
    return make_config(values, overrides, places, " + ".join(map(str, files)))


def find_recipe(path: str | Path, study: bool = False) -> Path:
    """The file that ``--config`` means: a path, or the short name of a recipe that comes with the package.

    Short names have no suffix, and the folder of the recipe in front of them: ``quickstart``, ``paper/task/ca-dpo``.

    Args:
        path: as the user wrote it.
        study: a study is meant, which stands among the recipes. The error then lists studies alone.

    Raises:
        ConfigError: neither a file nor such a name.
    """
    file, folder = Path(path), resource_folder("recipes")
    if file.is_file() or file.is_absolute() or file.suffix in (".yaml", ".yml"):
        return file
    known = {str(one.relative_to(folder).with_suffix("")): one for one in sorted(folder.rglob("*.yaml"))}
    if str(file) not in known:
        what, plural = ("study", "studies") if study else ("recipe", "recipes")
        names = [name for name, one in known.items() if _is_study(one) == study]
        raise ConfigError(
            f"cannot read the {what} {path}: No such file or directory{nearest(str(file), names)}; "
            f"{plural} that come with the package: {', '.join(names)}"
        )
    return known[str(file)]


def _is_study(file: Path) -> bool:
    """Whether a file that comes with the package is a study, which names recipes."""
    return any(line.startswith("recipes:") for line in file.read_text(encoding="utf-8").splitlines())


def _read_recipe(file: Path) -> tuple[dict[str, object], dict[Key, str]]:
    """The sections of one file, and where each key stands."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise ConfigError(f"cannot read the recipe {file}: {reason}") from None
    try:
        values, lines = read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError(f"{file}{line}: broken YAML: {problem}") from None
    if not isinstance(values, dict):
        sections = ", ".join(RunConfig.model_fields)
        raise ConfigError(f"{file}:1: a recipe is a mapping of sections ({sections}), not {type(values).__name__}")
    return values, {key: f"{file}:{line}" for key, line in lines.items()}


def _merge(
    values: dict[str, object], places: dict[Key, str], more: dict[str, object], more_places: dict[Key, str]
) -> None:
    """Add the keys of a later file to those of earlier ones. Below ``section.key`` nothing is merged: the value is
    replaced.
    """
    for section, keys in more.items():
        before = values.get(section)
        if keys is None and section in values:
            continue  # a section without keys changes nothing
        replaced: set[Key] = {(section,)}
        if isinstance(before, dict) and isinstance(keys, dict):
            replaced = {(section, str(key)) for key in keys}
            before = {key: value for key, value in before.items() if not _gives_way(section, key, keys)}
            keys = before | keys
        values[section] = keys
        for place in [place for place in places if place[:1] in replaced or place[:2] in replaced]:
            del places[place]
    places.update(more_places)


def _gives_way(section: str, key: str, later: Mapping[str, object]) -> bool:
    """Whether a key of an earlier file is taken away by what a later one says.

    ``training.epochs`` and ``training.steps`` take each other's place. ``adapters.method`` removes the keys that its
    method does not read, or decides by itself.
    """
    if key in later:
        return False
    if section == "adapters":
        return key in unread_keys(str(later.get("method", "")))
    return section == "training" and key in LENGTHS and any(later.get(name) is not None for name in LENGTHS)


def load_started(path: str | Path, overrides: Sequence[str] | None = None) -> RunConfig:
    """The recipe in a run folder. Keys that the release of the run did not have get the value that says what it did.

    Arguments and errors as in :func:`load_config`.
    """
    config = load_config(path, overrides)
    sections: dict[str, BaseModel] = {}
    for (section, key), released in (NEW_SINCE_0_1_0 | CHANGED_SINCE_0_1_0).items():
        now = sections.get(section, getattr(config, section))
        if key not in now.model_fields_set:  # a run folder's recipe has every key of its release written out
            sections[section] = now.model_copy(update={key: released})
    return config.model_copy(update=sections)


def make_config(
    values: dict[str, object],
    overrides: Sequence[str] | None = None,
    places: dict[Key, str] | None = None,
    where: str = "the settings",
) -> RunConfig:
    """A recipe that stands in no file, with overrides applied.

    Args:
        values: sections of keys.
        overrides: as in :func:`load_config`.
        places: where each key stands, for messages.
        where: what to name as the place of all other keys.

    Raises:
        ConfigError: as in :func:`load_config`.
    """
    places = {} if places is None else places
    for override in overrides or []:
        _apply_override(values, override, places)
    # A section without keys is one with defaults.
    values = {
        section: {} if keys is None and section in RunConfig.model_fields else keys for section, keys in values.items()
    }
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, places, where)) from None


class _TextLoader(yaml.SafeLoader):
    """Scalars stay the text they are, and the settings' types say what it means.

    YAML 1.1 would read 010 as 8, NO as false, 1:30 as 90 and 1e-3 as text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the base class
        first: [
            (tag, pattern) for tag, pattern in resolvers if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(text: str) -> tuple[object, dict[Key, int]]:
    """What a YAML text holds: mappings, lists, null, and text for everything else.

    Returns:
        The value, and the line of each key, from 1.

    Raises:
        yaml.YAMLError: broken YAML, or a key that stands twice in one mapping.
    """
    loader = _TextLoader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Key, int] = {}
        _find_keys(node, (), lines)
        return (None if node is None else loader.construct_document(node)), lines
    except RecursionError:
        raise yaml.YAMLError from None
    finally:
        loader.dispose()


def _find_keys(node: yaml.Node | None, prefix: Key, lines: dict[Key, int]) -> None:
    """Add the line of each key below ``node``."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _find_keys(item, (*prefix, str(number)), lines)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key, line = (*prefix, str(key_node.value)), key_node.start_mark.line + 1
            if key in lines:
                problem = f"key {'.'.join(key)!r} stands twice, in lines {lines[key]} and {line}; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            lines[key] = line
            _find_keys(value_node, key, lines)


def _apply_override(values: dict[str, object], override: str, places: dict[Key, str]) -> None:
    key, equals, raw = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot or not section or not name or "." in name:
        raise ConfigError(f"--set {override}: expected section.key=value, e.g. training.steps=20")
    try:
        value, _ = read_yaml(raw)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError(f"--set {override}: the value is not valid YAML: {problem}") from None
    inner = values.setdefault(section, {})
    if not isinstance(inner, dict):
        inner = values[section] = {}
    # The command line takes the place of the recipe alone, not of itself.
    for other in [other for other in inner if _gives_way(section, other, {name: value})]:
        if not places.get((section, other), "").startswith("--set "):
            del inner[other]
    inner[name] = value
    places[(section, name)] = f"--set {override}"


def _first_problem(error: ValidationError, places: dict[Key, str], path: str) -> str:
    problem = error.errors()[0]
    location = tuple(str(part) for part in problem["loc"])
    known_location = location
    while known_location and known_location not in places:
        known_location = known_location[:-1]
    where = places.get(known_location, path)
    key = ".".join(location)
    kind = problem["type"]
    if kind == "extra_forbidden":
        allowed = _keys_at(location[:-1])
        what = f"section {location[0]!r}" if len(location) > 1 else "the recipe"
        return f"{where}: unknown key {key!r}{nearest(location[-1], allowed)}; {what} allows: {', '.join(allowed)}"
    if kind == "missing":
        return f"{where}: key {key!r} is missing{_describe(location)}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{where}: {key + ': ' if key else ''}{message}"
    value = problem.get("input")
    return f"{where}: {key} is {_shown(value)}: {message}{_describe(location)}{_suggest(location, value)}"


def _shown(value: object) -> str:
    """A value as it stands in a recipe: numbers bare, other text in quotes."""
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return repr(value)
    return str(value)


def _field_at(location: Key) -> FieldInfo | None:
    if len(location) >= 2 and location[0] in RunConfig.model_fields:
        return section_model(location[0]).model_fields.get(location[1])
    return None


def _keys_at(location: Key) -> list[str]:
    if location and location[0] in RunConfig.model_fields:
        return list(section_model(location[0]).model_fields)
    return list(RunConfig.model_fields)


def _describe(location: Key) -> str:
    field = _field_at(location)
    return f" ({field.description})" if field is not None and field.description else ""


def _suggest(location: Key, value: object) -> str:
    field = _field_at(location)
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)] if field is not None else []
    return nearest(value, choices) if isinstance(value, str) else ""
