"""One self-contained Python file out of the package's own modules, so that the equation is written once."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from types import ModuleType

from cuma_ds.adapters.config import CumaConfig

# In their order in the file. A module imports nothing from another of these: they are in one namespace.
_MODULES = (
    "cuma_ds.errors",
    "cuma_ds.files",
    "cuma_ds.identity",
    "cuma_ds.adapters.config",
    "cuma_ds.ops.reference",
    "cuma_ds.adapters.pairs",
    "cuma_ds.adapters.mixture",
    "cuma_ds.adapters.context",
    "cuma_ds.adapters.balance",
    "cuma_ds.adapters.experts",
    "cuma_ds.adapters.router",
    "cuma_ds.adapters.layer",
    "cuma_ds.adapters.model",
    "cuma_ds.adapters.inject",
    "cuma_ds.strict_json",
    "cuma_ds.sentence_format",
    "cuma_ds.profiles.linearize",
    "cuma_ds.profiles.encoder",
    "cuma_ds.inference.modeling",
)
_HEAD = '''"""CuMA (arXiv 2601.04885): a frozen language model and LoRA experts, routed by token and profile.

Made by cuma-ds {version} from its own modules, joined in one file that needs torch and transformers only.
Licence: Apache-2.0.
"""

from __future__ import annotations

'''


def modeling_source() -> str:
    """The text of ``modeling_cuma.py``: the imports of all modules, then each module without its own."""
    import cuma_ds

    imports: dict[str, set[str]] = {"dataclasses": {"dataclass"}, "typing": {"Literal"}}
    parts = []
    for name in _MODULES:
        module = import_module(name)
        body = _plain_config() if name == CumaConfig.__module__ else _body(module, imports)
        parts.append(f"# From {name.replace('.', '/')}.py\n\n{body}")
    head = _HEAD.format(version=cuma_ds.__version__)
    lines = [
        f"from {place} import {', '.join(sorted(names))}" if names else place
        for place, names in sorted(imports.items())
    ]
    return head + "\n".join(lines) + "\n\n\n" + "\n\n\n".join(parts) + "\n"


def _body(module: ModuleType, imports: dict[str, set[str]]) -> str:
    """A module's source without docstring and top-level imports; those of other packages are added to ``imports``."""
    text = inspect.getsource(module)
    lines: list[str | None] = list(text.splitlines())
    for index, node in enumerate(ast.parse(text).body):
        is_docstring = index == 0 and isinstance(node, ast.Expr)
        if isinstance(node, ast.Import):
            imports.update({f"import {alias.name}": set() for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            place = node.module or ""
            if place != "__future__" and not place.startswith("cuma_ds"):
                imports.setdefault(place, set()).update(ast.unparse(alias) for alias in node.names)
        elif not is_docstring:
            continue
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line is not None).strip()


def _plain_config() -> str:
    """:class:`CumaConfig` as a plain dataclass: an export's values were checked when they were written."""
    lines = ["GateNorm = str", "Method = str", "", "", "@dataclass(frozen=True)", "class CumaConfig:"]
    lines += ['    """What the mixture looks like; the keys of ``adapters`` in adapter_config.json."""', ""]
    annotations = CumaConfig.__annotations__
    lines += [f"    {name}: {annotations[name]} = {field.default!r}" for name, field in CumaConfig.model_fields.items()]
    for name in ("scaling", "has_router", "uses_profiles"):
        lines += ["", inspect.getsource(getattr(CumaConfig, name).fget).rstrip()]
    return "\n".join(lines)
