"""What every launcher shares: a mistake of the user is one line and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

# A rank that is gone is one line of ours. Torch would add C++ frames; it reads this when it is imported.
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")

from cuma_ds.errors import ConfigError, CumaError, Stopped
from cuma_ds.files import first_line, quiet_transformers
from cuma_ds.incident import doing, tracebacks_go_to, unexpected
from cuma_ds.launched import launched
from cuma_ds.strict_json import RepeatedKeyError, read_json
from cuma_ds.telemetry.screen import say_error

# What the commands that start ranks are called, as a program and as a module.
_DEEPSPEED = ("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch")
_LAUNCHERS = (*_DEEPSPEED, "torchrun", "torch.distributed.run")
_WATCH_SECONDS, _LAST_RESORT_SECONDS = 1.0, 3600.0
_MAIN_SPEAKS_SECONDS = 0.5

if TYPE_CHECKING:
    import psutil

    from cuma_ds.inference.sampling import Sampling
    from cuma_ds.inference.talk import Talker
    from cuma_ds.parallel.topology import Topology


def run_main(main: Callable[[], object]) -> NoReturn:
    """Run ``main`` and exit: 0 when it returns, 2 with one line on stderr for any error, 75 where ranks were stopped in
    good order (:class:`~cuma_ds.errors.Stopped`), 130 on Ctrl-C, 143 on SIGTERM.

    Ranks that deepspeed or torchrun started also stop, as on SIGTERM, when that launcher is gone.
    """
    has_launcher = _end_with_launcher()
    doing(Path(sys.argv[0]).stem)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" for letters it does not know
    with _terminable():
        code = _run(main)
    _leave(code, has_launcher)


def _run(main: Callable[[], object]) -> int:
    """Run ``main``; the exit code."""
    try:
        main()
    except CumaError as error:
        return _say(error)
    except KeyboardInterrupt:
        say_error("stopped")
        return 130
    except _Terminated:
        say_error("stopped by SIGTERM")
        return 143
    except Exception as error:
        return _say(unexpected(error))
    return 0


def _say(error: CumaError) -> int:
    """Print an error on one rank; its exit code."""
    if not error.printed_by_main or os.environ.get("RANK", "0") == "0":
        say_error(str(error) if isinstance(error, Stopped) else f"error: {error}")
    else:
        time.sleep(_MAIN_SPEAKS_SECONDS)  # launchers end all ranks once one has left, and the main one says why
    return error.exit_code


class _Terminated(BaseException):
    """SIGTERM arrived. On its way up everything is closed in good order."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM raises :class:`_Terminated`."""

    def terminate(sign: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(code: int, has_launcher: bool) -> NoReturn:
    """Exit with ``code`` for certain. Ranks leave without the interpreter's shutdown, which can fail in two ways.

    Process groups can wait for ranks that stopped too. A thread that comes back from a torch operator meanwhile ends
    the process with "terminate called without an active exception" (pytorch/pytorch#38228).
    """
    distributed = sys.modules.get("torch.distributed")
    if has_launcher or (distributed is not None and distributed.is_initialized()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the disk of a log may be full
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _end_with_launcher() -> bool:
    """Watch the launcher that started this rank, which is told to stop when it is gone; whether there is one.

    A process that was started by hand watches nothing and outlives its shell. ``deepspeed`` is two processes, one above
    the other. When the upper one is killed, the lower one and the ranks would go on.
    """
    if "LOCAL_RANK" not in os.environ:
        return False
    import psutil  # DeepSpeed's own launcher needs it too

    chain = [psutil.Process()]
    try:
        for ancestor in chain[0].parents():
            if not any(Path(word).name in _LAUNCHERS for word in ancestor.cmdline()[:4]):
                break
            chain.append(ancestor)
    except psutil.Error:  # an ancestor of another user is none of our launchers
        pass
    if len(chain) > 1:
        threading.Thread(target=_watch, args=(chain,), name="launcher watch", daemon=True).start()
    return len(chain) > 1


def _watch(chain: list[psutil.Process]) -> None:
    """Send this process SIGTERM once a process of the chain no longer is the child of the next."""
    import psutil

    try:
        while all(child.ppid() == parent.pid for child, parent in pairwise(chain)):
            time.sleep(_WATCH_SECONDS)
    except psutil.Error:  # one of them is gone
        pass
    with contextlib.suppress(OSError):  # the terminal may be gone as well
        say_error(f"rank {os.environ.get('RANK', '0')} stops: its launcher is gone")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_RESORT_SECONDS)  # what the rank was doing heeds no signal
    os._exit(2)


def read_profile(text: str) -> dict[str, object] | str:
    """``--profile``: a JSON object of fields, or a sentence as it is.

    Raises:
        ConfigError: broken JSON or broken text; the profile itself is not repeated in the message.
    """
    check_text("--profile", text)
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        fields = read_json(text)
    except RepeatedKeyError as error:
        raise ConfigError(f"--profile: {error}") from None
    except ValueError as error:
        raise ConfigError(
            f'--profile is broken JSON ({error}); expected e.g. \'{{"country": "Norway", "age": 34}}\''
        ) from None
    if not isinstance(fields, dict):
        raise ConfigError("--profile is a JSON list; expected an object of fields, or a sentence")
    for name, value in fields.items():
        if isinstance(value, dict | list):
            raise ConfigError(
                f"--profile: field {name!r} is a JSON {'list' if isinstance(value, list) else 'object'}; "
                "allowed: text, a number, true, false or null"
            )
    check_text("--profile", json.dumps(fields, ensure_ascii=False))  # JSON can write half of a surrogate pair
    return fields


def check_text(name: str, text: str) -> None:
    """Refuse what no tokenizer takes: bytes that are no UTF-8, and halves of surrogate pairs.

    Raises:
        ConfigError: names the option; the text is not repeated.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} holds characters that are no Unicode text; write it in UTF-8") from None


def warn_in_one_line() -> None:
    """Print warnings as one line, without the place in the code. Those of libraries go where their other lines go."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object) -> None:
        parts = Path(filename).parts
        if "site-packages" in parts and "cuma_ds" not in parts:
            print(f"warning: {message}", file=sys.stderr, flush=True)
        else:
            say_error(f"warning: {message}")

    warnings.showwarning = show


def command(name: str) -> str:
    """How another command is typed by somebody who typed this one, e.g. ``cuma-ds evaluate``."""
    installed = sys.argv[0].startswith("cuma-ds ")
    return f"cuma-ds {name}" if installed else f"python launchers/{name}.py"


def add_recipe_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """``--config`` and ``--set``, as :func:`cuma_ds.recipe.load_config` takes them.

    Args:
        parser: to add to.
        default: recipe where none is given; None where one must be.
    """
    says = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--config", required=default is None, default=[default], nargs="+", metavar="RECIPE",
        help=f"YAML recipe, or the name of one of launchers/recipes/; of several, a later one's keys win{says}",
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="section.key=value", help="override keys of the recipe"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which trained model to load; read by :func:`load_talker`."""
    parser.add_argument("--run", metavar="FOLDER", help="run folder, output_dir/name of its recipe")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of the run; default: the newest complete one")
    parser.add_argument("--export", metavar="FOLDER", help="folder made by launchers/export.py --format hf")
    parser.add_argument("--base", metavar="FOLDER", help="base model of an export, if it has moved")
    parser.add_argument(
        "--encoder", metavar="FOLDER", help="sentence encoder of an export, if it has moved or the export names none"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="allow code that comes with the base model of an export"
    )


def check_model_arguments(command: str, arguments: argparse.Namespace) -> None:
    """Refuse combinations that mean nothing, before anything is loaded."""
    if (arguments.run is None) == (arguments.export is None):
        raise ConfigError(f"{command} takes one of --run (a run folder) and --export (an exported folder)")
    if arguments.step is not None and arguments.run is None:
        raise ConfigError("--step belongs to --run")
    if arguments.run is not None and (arguments.base or arguments.encoder):
        raise ConfigError("--base and --encoder belong to --export; a run names its own")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line. All ranks have the same one, and the main rank alone says what is wrong with it."""
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                stack.enter_context(redirect(nowhere))
        return parser.parse_args()


def several_ranks() -> bool:
    """Whether deepspeed or torchrun started this process as one of several ranks.

    Raises:
        TopologyError: the environment makes no sense.
    """
    return launched().world > 1


@contextlib.contextmanager
def joined_ranks(run: str | None, overrides: Sequence[str] = ()) -> Iterator[Topology | None]:
    """The ranks that deepspeed or torchrun started, with the run's expert-parallel groups; None for one process.

    Only the main rank prints.

    Raises:
        ConfigError: there are several ranks but no run, whose recipe says how ranks hold a model together.
        TopologyError: another rank is lost.
    """
    if not several_ranks():
        yield None
        return
    if run is None:
        raise ConfigError("several ranks need --run; only a run's recipe says how they hold a model together")
    from cuma_ds.parallel.topology import start_processes, with_expert_groups
    from cuma_ds.parallel.watch import watched
    from cuma_ds.runs import Run

    opened = Run.open(run)
    tracebacks_go_to(opened.errors)
    parallel = opened.config(overrides).parallel
    topology = start_processes(parallel.timeout_seconds)
    with contextlib.ExitStack() as stack:
        stack.enter_context(watched(topology, parallel.timeout_seconds))
        if not topology.is_main:
            warnings.simplefilter("ignore")
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield with_expert_groups(topology, parallel.ep_size)


def load_talker(arguments: argparse.Namespace, sampling: Sampling, topology: Topology | None = None) -> Talker:
    """The model that :func:`add_model_arguments` names, ready to be asked.

    Args:
        arguments: of the command line.
        sampling: how answers are generated.
        topology: of ranks that hold the model together; None for one process.
    """
    quiet_transformers()

    from cuma_ds.inference.open import open_export, open_run
    from cuma_ds.inference.talk import Talker

    if topology is not None:
        if arguments.device is not None:
            raise ConfigError("--device is for one process; each of several ranks takes an accelerator of its own")
        return Talker(open_run(arguments.run, arguments.step, topology=topology), sampling)
    device = _device(arguments.device)
    if arguments.run is not None:
        opened = open_run(arguments.run, arguments.step)
    else:
        trust = arguments.trust_remote_code
        opened = open_export(arguments.export, arguments.base, arguments.encoder, trust_remote_code=trust)
    opened.model.to(device)
    return Talker(opened, sampling)


def _device(name: str | None) -> str:
    """``--device``; by default cuda where there is one.

    Raises:
        ConfigError: it cannot be used.
    """
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device} cannot be used: {first_line(error)}") from None
    return device


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on --host {host} --port {port}: {getattr(error, 'strerror', None) or error}"
        ) from None
