"""Numbers of a run on its main rank: one JSON line a step, TensorBoard, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from cuma_ds.config import TelemetrySection
from cuma_ds.files import write_atomically
from cuma_ds.telemetry.screen import console as user_console

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

# What the bar and the plain lines show of a step's scalars, in this order, where present.
_SHOWN = {
    "loss": "loss {:.4f}",
    "reward": "reward {:.4f}",
    "rewards/accuracies": "accuracy {:.2f}",
    "rewards/margins": "margin {:.3f}",
    "lr": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "people_per_second": "{:,.0f} people/s",
}


class MetricsWriter:
    """Writes a file of metrics and a TensorBoard folder and shows progress; does nothing off the main rank.

    Steps are counted from 1: a row with ``step`` s stands for the s-th optimizer step. Resuming after finished
    steps drops the rows of later steps (and a line cut short by a crash), so every step stands there once.

    Args:
        metrics: the file that gets one JSON line a step; its folder is made if absent.
        tensorboard: the folder of TensorBoard's events.
        config: what to write and how often. Every ``log_every``-th step and the last are written.
        is_main: whether this rank is the one that writes.
        steps: from the optimizer steps already done (0 for a new run) to those of the whole run.
        console: where progress goes; a plain line each tenth of the run where that is not a terminal.
    """

    def __init__(
        self,
        metrics: Path,
        tensorboard: Path,
        config: TelemetrySection,
        is_main: bool,
        steps: range,
        console: Console | None = None,
    ) -> None:
        self._config = config
        self._is_main = is_main
        start_step, self._total_steps = steps.start, steps.stop
        self._tensorboard: SummaryWriter | None = None
        self._progress: Progress | None = None
        self._part: TaskID | None = None
        self._console = console or user_console()
        self._next_tenth = 10 * start_step // max(steps.stop, 1) + 1
        if not is_main:
            return

        metrics.parent.mkdir(parents=True, exist_ok=True)
        drop_rows_after(metrics, start_step)
        self._metrics = metrics
        self._rows = metrics.open("a", encoding="utf-8")
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(tensorboard), purge_step=start_step + 1)
        if config.progress and self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("training"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=steps.stop, completed=start_step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step`` finished steps."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def show(self, name: str, done: int, total: int) -> None:
        """Show below the bar what the step in progress is doing.

        Args:
            name: of a part of a step, e.g. ``rollout``.
            done: how much of it is done.
            total: of how much; 0 where that is not known.
        """
        if self._progress is None:
            return
        if self._part is None:
            self._part = self._progress.add_task(name)
        self._progress.update(self._part, description=name, completed=done, total=total or None)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of one optimizer step; for steps that are due.

        Args:
            step: 1-based.
            scalars: e.g. ``loss``, ``lr``, ``grad_norm``, ``tokens_per_second``; in TensorBoard under ``train/``, in
                the file as they are, with null for what is not finite.
        """
        if not self._is_main:
            return
        values = {name: float(value) for name, value in scalars.items()}
        self._show(step, values)
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"train/{name}", value, step)

    def log_routing(
        self, step: int, names: Sequence[str], load_RE: torch.Tensor | ArrayLike, entropy_R: torch.Tensor | ArrayLike
    ) -> None:
        """Record where tokens went: scalars of every router and, about ten times a run, a picture of all of them.

        Args:
            step: 1-based.
            names: R router names.
            load_RE: share of the routing that went to each expert, float [R, E], rows sum to 1.
            entropy_R: gate entropy of each router in nats, float [R].
        """
        if self._tensorboard is None:
            return
        loads, entropies = _to_numpy(load_RE), _to_numpy(entropy_R)
        for router, name in enumerate(names):
            self._tensorboard.add_scalar(f"routing/{name}/entropy", entropies[router], step)
            for expert, load in enumerate(loads[router]):
                self._tensorboard.add_scalar(f"routing/{name}/load_{expert}", load, step)
        every = self._config.log_every * max(1, self._total_steps // (10 * self._config.log_every))
        if step % every == 0 or step == self._total_steps:
            self._tensorboard.add_figure("routing/load", _load_figure(names, loads), step)

    def close(self) -> None:
        """Flush everything and take the progress bar down; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._is_main:
            self._rows.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drop_after(self, step: int) -> None:
        """Forget the rows of later steps, which will be taken again."""
        if self._is_main:
            self._rows.close()
            drop_rows_after(self._metrics, step)
            self._rows = self._metrics.open("a", encoding="utf-8")

    def is_due(self, step: int) -> bool:
        """Whether step ``step`` (from 1) gets a row, as every ``log_every``-th and the last do; equal on all ranks."""
        return step % self._config.log_every == 0 or step == self._total_steps

    def _show(self, step: int, values: dict[str, float]) -> None:
        if not self._config.progress:
            return
        text = "  ".join(form.format(values[name]) for name, form in _SHOWN.items() if name in values)
        if self._progress is not None:
            self._progress.update(self._task, description=text)
        elif step * 10 >= self._next_tenth * self._total_steps:
            self._next_tenth = 10 * step // self._total_steps + 1
            self._console.print(f"step {step}/{self._total_steps}  {text}", highlight=False, soft_wrap=True)


def drop_rows_after(path: Path, last_step: int) -> None:
    """Remove the JSON lines of later steps, and those that were cut short, from a file that need not exist."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            keeps = json.loads(line)["step"] <= last_step
        except (ValueError, KeyError, TypeError):
            continue
        if keeps:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def last_step(path: Path) -> int:
    """The last step that a file of metrics has a row of; 0 where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    steps = [0]
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            steps.append(int(json.loads(line)["step"]))
    return max(steps)


def _to_numpy(values: torch.Tensor | ArrayLike) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _load_figure(names: Sequence[str], load_RE: NDArray[np.float64]) -> Figure:
    from matplotlib.figure import Figure

    routers, experts = load_RE.shape
    figure = Figure(figsize=(2.5 + 0.4 * experts, 1.2 + 0.18 * routers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(load_RE, aspect="auto", cmap="viridis", vmin=0.0, interpolation="nearest")
    axes.set_xticks(range(experts))
    axes.set_yticks(range(routers), list(names), fontsize=6)
    axes.set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="share of routing")
    return figure
