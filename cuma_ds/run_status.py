"""What a run folder tells about its run: how far it is, how fast, how well, why it stopped, and whether it is whole."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from cuma_ds.errors import CumaError
from cuma_ds.files import first_line
from cuma_ds.locks import Holder, holder_of, is_alive
from cuma_ds.parallel.stored import newest_whole, read_state, stored_steps
from cuma_ds.runs import Run

# Rows of metrics behind a rate.
_ROWS = 20


class RunStatus(NamedTuple):
    """A run as its folder shows it.

    Attributes:
        done, steps: optimizer steps with a row of metrics, and those of the recipe.
        checkpoint: the newest whole checkpoint; None where there is none.
        holder: who trains it now; None where nobody does.
        ended: what the run said when it ended; None where it was killed or has not ended.
        row: the last row of metrics; empty where there is none.
        seconds: of one step, over the last rows; None where that is not known.
        age: seconds since the last row was written; None where there is none.
    """

    done: int
    steps: int
    checkpoint: Path | None
    holder: Holder | None
    ended: str | None
    row: dict[str, float]
    seconds: float | None
    age: float | None

    def lines(self) -> Iterator[str]:
        """In words, a line each."""
        yield f"progress    step {self.done} of {self.steps} ({self.done / self.steps:.0%}){self._left()}"
        saved = "none" if self.checkpoint is None else str(self.checkpoint)
        yield f"checkpoint  {saved}"
        if self.holder is not None:
            since = "" if self.age is None else f"; the last row is {_duration(self.age)} old"
            yield f"state       running: {self.holder}{since}"
        elif self.ended is not None:
            yield f"state       {self.ended}"
        else:
            yield "state       not running, and it did not say why: it was killed, or its machine failed"
        rates = {"tokens_per_second": "tokens/s", "people_per_second": "people/s", "memory_gib": "GiB"}
        said = [f"{self.row[key]:,.0f} {unit}" for key, unit in rates.items() if key in self.row]
        if self.seconds is not None:
            said.insert(0, f"{self.seconds:.3g} s a step")
        yield f"throughput  {', '.join(said) or 'no row yet'}"
        yield f"health      {self._health()}"

    def _left(self) -> str:
        if self.holder is None or self.seconds is None or self.done >= self.steps:
            return ""
        return f", about {_duration(self.seconds * (self.steps - self.done))} left"

    def _health(self) -> str:
        counts = {
            name.removeprefix("health/").replace("_", " "): value
            for name, value in self.row.items()
            if name.startswith("health/")
        }
        loss = f"loss {self.row['loss']:.4g}" if self.row.get("loss") is not None else "no loss yet"
        return ", ".join([loss, *(f"{value:.0f} {name}" for name, value in counts.items())])


def status_of(run: Run, steps: int) -> RunStatus:
    """Read a run folder, while it is written, too.

    Args:
        run: that was started.
        steps: of the whole run.
    """
    rows = _last_rows(run.metrics)
    holder = holder_of(run.folder)
    try:
        checkpoint, _ = newest_whole(run.checkpoints, content=False)
    except CumaError:
        checkpoint = None
    seconds = [row["seconds"] for row in rows if isinstance(row.get("seconds"), float)]
    return RunStatus(
        done=int(rows[-1]["step"]) if rows else 0,
        steps=steps,
        checkpoint=checkpoint,
        holder=holder if holder is not None and is_alive(run.folder) else None,
        ended=_ended(run.outcome),
        row={name: value for name, value in rows[-1].items() if value is not None} if rows else {},
        seconds=sum(seconds) / len(seconds) if seconds else None,
        age=max(0.0, time.time() - os.stat(run.metrics).st_mtime) if rows else None,
    )


def problems(run: Run) -> Iterator[str]:
    """Everything in a run folder that is damaged or missing, a line each. Every file is read and every hash checked."""
    config = run.config()
    parts: dict[str, Callable[[], object]] = {
        "identity": run.identity,
        "data": run.data,
        "profiles": lambda: run.profiles(config),
        "start": run.check_start,
        "contents": lambda: run.check_own_data(run.data(), run.profiles(config), run.identity()),
    }
    for step in stored_steps(run.checkpoints):
        parts[f"step {step}"] = partial(read_state, run.checkpoints / f"step-{step}")
    if run.reference_file.exists():
        parts["reference"] = lambda: _opens(run.reference_file)
    seen = set()
    for part in parts.values():
        try:
            part()
        except (CumaError, OSError, SafetensorError) as error:
            if (line := first_line(error)) not in seen:
                yield line
            seen.add(line)
    for file in (run.metrics, run.completions):
        yield from _broken_lines(file)
    for folder in sorted(run.checkpoints.glob("*.damaged*")):
        yield f"{folder} was damaged and has been set aside; it may be removed"


def _opens(file: Path) -> None:
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            stored.get_tensor(name)


def _broken_lines(file: Path) -> Iterator[str]:
    if file.exists():
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                yield f"{file}:{number} is damaged; the next start of the run drops the line"


def _last_rows(file: Path) -> list[dict[str, float]]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-_ROWS:]
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        rows.append(row)
    return rows


def _ended(file: Path) -> str | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return f"{values['said']} ({values['time']})"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
