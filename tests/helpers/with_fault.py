"""One rank of a launcher in which one function misbehaves; started by a test.

Arguments: what is wrong as JSON, then the launcher and its arguments. ``function`` is ``module:name`` or
``module:Class.name``. At its ``call``-th call (from 1) on ``rank``, it does what ``do`` says, and works otherwise.
Ranks in ``late`` wait for two seconds before that call. A signal goes to the rank itself; with ``launcher`` to the
command that started the ranks instead, with ``also_siblings`` to all ranks. ``noted`` is a file that gets the time.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as launchers/_cli.py does

import psutil
import torch

from cuma_ds.errors import ModelError

LAUNCHERS = {"torch.distributed.run", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}


def misbehave(what: dict, work, arguments, keywords):
    """What the function does instead."""
    do = what["do"]
    if do in ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1"):
        for pid in targets(what):
            os.kill(pid, getattr(signal, do))
    elif do == "hang":
        time.sleep(10_000)
    elif do == "raise":
        kinds = {"KeyError": KeyError, "RuntimeError": RuntimeError, "ModelError": ModelError}
        raise kinds[what.get("error", "RuntimeError")]("Ghana, 34")
    elif do == "no space":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif do == "truncate":  # the file that was written loses its second half, and the machine dies
        result = work(*arguments, **keywords)
        file = next(Path(one) for one in arguments if isinstance(one, str | Path))
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
        return result
    elif do == "nan":
        result = work(*arguments, **keywords)
        return dataclasses.replace(result, sum=result.sum * torch.nan)
    return work(*arguments, **keywords)


def targets(what: dict) -> list[int]:
    """Which processes a signal goes to; this one comes last."""
    me = psutil.Process()
    if what.get("launcher"):
        return [[one.pid for one in me.parents() if set(one.cmdline()[:4]) & LAUNCHERS][-1]]
    siblings = me.parent().children() if what.get("also_siblings") else []
    return [*(one.pid for one in siblings if one.pid != me.pid), me.pid]


def install(what: dict) -> None:
    """Wrap the function. Modules that imported it by name get the wrapped one, too."""
    module_name, _, path = what["function"].partition(":")
    owner = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for one in classes:
        owner = getattr(owner, one)
    work, calls = getattr(owner, name), 0

    def wrapped(*arguments, **keywords):
        nonlocal calls
        calls += 1
        rank = int(os.environ.get("RANK", "0"))
        if rank in what.get("late", []) and calls in what.get("calls", [what.get("call", 1)]):
            time.sleep(2)
        wrong = rank in what.get("ranks", [what.get("rank", 0)])
        if wrong and calls in what.get("calls", [what.get("call", 1)]):
            if "noted" in what:
                with open(what["noted"], "a") as file:
                    file.write(f"{time.time()}\n")
            return misbehave(what, work, arguments, keywords)
        return work(*arguments, **keywords)

    setattr(owner, name, wrapped)
    for module in list(sys.modules.values()):
        if not classes and getattr(module, "__dict__", {}).get(name) is work:
            setattr(module, name, wrapped)


if __name__ == "__main__":
    fault, launcher, *rest = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # by deepspeed
    sys.path.insert(0, str(Path(launcher).parent))
    for loaded in ("cuma_ds.training.run", "cuma_ds.evaluation.run"):
        importlib.import_module(loaded)
    install(json.loads(fault))
    sys.argv = [launcher, *rest]
    runpy.run_path(launcher, run_name="__main__")
