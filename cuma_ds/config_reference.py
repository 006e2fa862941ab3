"""Writes docs/configuration.md from the models of a recipe: ``python -m cuma_ds.config_reference >
docs/configuration.md``.
"""

from __future__ import annotations

import types
from typing import Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from cuma_ds.config import RunConfig, section_model

_HEAD = """\
# Every key of a recipe

<!-- Written by `python -m cuma_ds.config_reference > docs/configuration.md`.
     Edit the descriptions in cuma_ds/config.py and cuma_ds/adapters/config.py, then run that again. -->

One run is one YAML file with these sections; [quickstart.yaml](../launchers/recipes/quickstart.yaml) is one. What a
recipe leaves out has its default. An unknown key, a value of another type and an impossible combination are errors that
name the file, the line and what is allowed. `--config a.yaml b.yaml` merges several files: where two have the same key,
the later wins, and one that names `adapters.method` removes the keys of earlier files that its method does not read
([methods](methods.md)). On the command line `--set section.key=value` wins over all files; values are YAML, so
`adapters.target_modules=[q_proj,v_proj]` is a list and `null` is nothing. `config.yaml` of a run folder is the recipe
as it was run, with every default written out.
"""
_KINDS: dict[object, str] = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
_BOUNDS = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}


def reference() -> str:
    """The whole page, as Markdown."""
    parts = [_HEAD]
    for name in RunConfig.model_fields:
        section = section_model(name)
        about = (section.__doc__ or "").strip().splitlines()[0]
        parts += [f"## {name}\n\n{about}\n", "| key | allowed | default | meaning |\n|---|---|---|---|"]
        parts[-1] += "".join(f"\n{_row(key, inner)}" for key, inner in section.model_fields.items()) + "\n"
    return "\n".join(parts)


def _row(key: str, field: FieldInfo) -> str:
    default = "**needed**" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
    allowed = ", ".join(filter(None, [_kind(field.annotation), _bounds(field)]))
    cells = (f"`{key}`", allowed, default, field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _kind(annotation: object) -> str:
    """What a value may be, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if argument is type(None) else _kind(argument) for argument in arguments)
    if origin is tuple:
        many = "list" if Ellipsis in arguments else f"list of {len(arguments)}"
        return f"{many}: {_kind(arguments[0])}"
    if origin is dict:
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"mapping with {', '.join(f'`{key}`' for key in annotation.model_fields)}"
    return _KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(field: FieldInfo) -> str:
    words = [
        f"{word} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, word in _BOUNDS.items()
        if hasattr(rule, name)
    ]
    words += [f"at least {rule.min_length}" for rule in field.metadata if hasattr(rule, "min_length")]
    return ", ".join(words)


def _yaml(value: object) -> str:
    return (
        yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=1000)
        .strip()
        .removesuffix("...")
        .strip()
    )


if __name__ == "__main__":
    print(reference(), end="")
