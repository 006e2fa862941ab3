"""Runs Python commands in forks of one process that has imported everything already: a fraction of a second each
instead of many.

Reads one JSON request a line and answers with one: {"cwd", "arguments": [script, ...] or ["-c", code], "out", "err",
"input", "background", "parse_only"} -> {"code"} or, in the background, {"pid"}; {"stop": pid} ends one. With
``parse_only`` a command leaves when it has parsed its arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401
import openai  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
import uvicorn  # noqa: F401

import cuma_ds.evaluation.run
import cuma_ds.export.lora
import cuma_ds.serving.app
import cuma_ds.training.run  # noqa: F401


def child(request: dict[str, Any]) -> int:
    """The command itself; its exit code."""
    os.chdir(request["cwd"])
    for stream, name, mode in (
        (0, request["input"], os.O_RDONLY),
        (1, request["out"], os.O_WRONLY),
        (2, request["err"], os.O_WRONLY),
    ):
        os.dup2(os.open(name, mode | (os.O_CREAT if stream else 0)), stream)
    torch.set_num_threads(1)
    if request["parse_only"]:
        parse = argparse.ArgumentParser.parse_args
        argparse.ArgumentParser.parse_args = lambda self, *given: sys.exit(None if parse(self, *given) else 1)
    script, *arguments = request["arguments"]
    try:
        if script == "-c":
            sys.argv, sys.path[0] = ["-c"], ""
            exec(compile(arguments[0], "<block>", "exec"), {"__name__": "__main__"})
        elif script == "-m":
            sys.argv, sys.path[0] = arguments, ""
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent.absolute())
            runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def handle(request: dict[str, Any]) -> dict[str, int]:
    """Answer one request."""
    if "stop" in request:
        os.kill(request["stop"], signal.SIGKILL)
        return {"code": os.waitpid(request["stop"], 0)[1]}
    pid = os.fork()
    if not pid:
        os._exit(child(request))
    if request["background"]:
        return {"pid": pid}
    return {"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


def main() -> None:
    """Until the input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        channel.write(json.dumps(handle(json.loads(line))) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
