"""One process group at a time: the commands of a study, their logs, and the journal of what was run."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ValidationError

from cuma_ds.errors import ConfigError, CumaError

# Seconds between two looks at a running command, and until one that was asked to end is ended.
_LOOK, _PATIENCE = 0.5, 30.0


class Record(BaseModel):
    """A command that was run.

    Attributes:
        run: name of the run.
        what: train, or the kind of evaluation.
        command: as it can be typed.
        seconds: wall time.
        code: exit code.
        message: its error, in one line; None where it ended well.
    """

    run: str
    what: str
    command: str
    seconds: float
    code: int
    message: str | None = None


class Journal:
    """All commands of a study that have ended, in a file with one JSON line for each.

    Args:
        file: need not exist.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.records: list[Record] = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            try:
                self.records.append(Record.model_validate_json(line))
            except ValidationError:
                continue  # cut short by a crash

    def add(self, record: Record) -> None:
        """Keep one more."""
        self.records.append(record)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.model_dump(), ensure_ascii=False) + "\n")

    def of(self, run: str, what: str) -> list[Record]:
        """The commands of one kind for one run, in their order."""
        return [record for record in self.records if (record.run, record.what) == (run, what)]


class Processes:
    """Starts a study's commands.

    Args:
        folder: the study's folder; gets ``journal.jsonl`` and ``logs/``.
    """

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "journal.jsonl")
        self.logs = folder / "logs"
        self._held: int | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process runs this study; its commands keep it so if this process is killed.

        Raises:
            ConfigError: another one does.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self._held = os.open(self.logs / ".running", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._held)
            raise ConfigError(f"the study {self.logs.parent} is being run by another process; wait for it") from None
        try:
            yield
        finally:
            os.close(self._held)
            self._held = None

    def command(self, name: str, arguments: Sequence[str], ranks: int) -> list[str]:
        """The words of a command of ``python -m cuma_ds``: one process, or ``ranks`` on this machine."""
        words = ["-m", "cuma_ds", name, *arguments]
        group = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return [*(group if ranks > 1 else []), *words]

    def typed(self, words: Sequence[str]) -> str:
        """A command as it can be typed."""
        return shlex.join(["python", *words])

    def run(self, name: str, what: str, words: Sequence[str], tick: Callable[[], None]) -> Record:
        """Run a command to its end.

        Args:
            name: of the run.
            what: kind of command.
            words: as :meth:`command` returns them.
            tick: called now and then while it runs.

        Returns:
            What the journal keeps.
        """
        log, start = self.logs / f"{name}.{what}.log", time.monotonic()
        with log.open("ab") as output:
            began = output.tell()
            process = self._start(words, output)
            try:
                while process.poll() is None:
                    tick()
                    time.sleep(_LOOK)
            finally:
                _end(process)
        code = int(process.returncode)
        message = None if code == 0 else _reason(log, began, code)
        seconds = time.monotonic() - start
        record = Record(run=name, what=what, command=self.typed(words), seconds=seconds, code=code, message=message)
        self.journal.add(record)
        return record

    def _start(self, words: Sequence[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a process group of its own."""
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(_threads(words)), **os.environ},
            start_new_session=True,
            pass_fds=() if self._held is None else (self._held,),
        )


class CommandFailed(CumaError):
    """A command of a study ended with an error; the study goes on without its run."""


def _threads(words: Sequence[str]) -> int:
    ranks = int(words[words.index("--nproc_per_node") + 1]) if "--nproc_per_node" in words else 1
    return max(1, (os.cpu_count() or 1) // ranks)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process group that this process started, first politely."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            continue


def _reason(log: Path, began: int, code: int) -> str:
    """The error of a command in one line, from what it wrote after ``began`` bytes of its log."""
    with log.open("rb") as file:
        file.seek(began)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")]
    if said:
        return said[-1].removeprefix("error: ")
    return f"{'killed by signal' if code < 0 else 'exit code'} {abs(code)}; see {log}"
