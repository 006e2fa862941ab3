"""The command ``cuma-ds``: every launcher under one name, from any folder.

``cuma-ds train --config quickstart`` is ``python launchers/train.py --config quickstart`` without a checkout. Several
ranks start as ``deepspeed --module cuma_ds train --config ...`` or ``torchrun ... -m cuma_ds train --config ...``.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

from cuma_ds.resources import resource_folder

# What each command is called, and the launcher that it runs.
COMMANDS = {
    "train": "train",
    "evaluate": "evaluate",
    "generate": "generate",
    "serve": "serve",
    "export": "export",
    "prepare": "prepare_data",
    "plan": "plan",
    "compare": "compare",
    "status": "status",
    "playground": "playground",
    "check-hosts": "check_hosts",
}
# How the launchers' own help spells a command.
_IN_HELP = re.compile(r"(?:python )?(launchers/)?(\w+)\.py\b")
_RANKS_IN_HELP = re.compile(r"(deepspeed (?:--\w+ \S+ )*)launchers/(\w+)\.py")


def main() -> None:
    """Run the launcher that the first argument names, with the others.

    Exit code 2 for a command that does not exist, with those that do.
    """
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("--local_rank"):  # deepspeed writes it before the command
        arguments.pop(0)
    known = {name: file for name, stem in COMMANDS.items() if (file := launcher(stem)).exists()}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(known))
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name not in known:
        print(f"error: cuma-ds has no command {name!r}; there are {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"cuma-ds {name}", *rest]
    sys.path.insert(0, str(known[name].parent))  # launchers share a module
    asks_for_help = not {"-h", "--help"}.isdisjoint(rest)
    with _spelled_as_typed() if asks_for_help else contextlib.nullcontext():
        runpy.run_path(str(known[name]), run_name="__main__")


def launcher(stem: str) -> Path:
    """The file of a launcher."""
    return resource_folder("launchers") / f"{stem}.py"


def as_typed(text: str) -> str:
    """The launchers' help, with commands as somebody without a checkout types them."""
    names = {stem: name for name, stem in COMMANDS.items()}

    def command(found: re.Match[str]) -> str:
        return f"cuma-ds {names[found[2]]}" if found[2] in names else found[0]

    text = _RANKS_IN_HELP.sub(lambda found: f"{found[1]}--module cuma_ds {names.get(found[2], found[2])}", text)
    text = re.sub(r"launchers/recipes/([\w/-]+)\.yaml", r"\1", _IN_HELP.sub(command, text))
    return text.replace("launchers/recipes/", "the packaged recipes")


@contextlib.contextmanager
def _spelled_as_typed() -> Iterator[None]:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        print(as_typed(printed.getvalue()), end="")


def _help(known: dict[str, Path]) -> str:
    """What the commands do, in the words of the launchers."""
    recipes = sorted(file.stem for file in resource_folder("recipes").glob("*.yaml"))
    lines = ["usage: cuma-ds COMMAND ...", ""]
    width = max(map(len, known)) + 2
    for name, file in known.items():
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<{width}}{about.splitlines()[0]}")
    lines += [
        "",
        "cuma-ds COMMAND --help teaches each. Several ranks, on one machine or many:",
        "  deepspeed --num_accelerators 2 --module cuma_ds train --config RECIPE",
        f"Recipes that --config takes by name: {', '.join(recipes)}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
