"""The pictures of a comparison: scores and paired differences, learning curves, learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from cuma_ds.evaluation.report.model import SPLITS
from cuma_ds.evaluation.report.plots import GREY, INK, LIGHT, VERMILLION, bare, new_figure, save, short
from cuma_ds.studies.report.markdown import columns
from cuma_ds.studies.report.model import Compared, Curve, Estimate, RunsReport, StudyReport, Table

# Okabe and Ito's palette, in an order that stays apart; one colour for a method in all pictures.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#9A9A9A")
_AXES = (("steps", "optimizer steps"), ("tokens", "tokens"), ("seconds", "seconds of training"))


def study_pictures(folder: Path, report: StudyReport) -> dict[str, str]:
    """Draw a study; returns file name -> caption."""
    methods = list(dict.fromkeys(method for table in report.tables for method in table.runs))
    colour = {method: _COLOURS[place % len(_COLOURS)] for place, method in enumerate(methods)}
    pictures: dict[str, str] = {}
    for table in report.tables:
        start = f"{table.recipe}-{table.steps}"
        where = f"{table.recipe}, {table.steps:,} steps"
        for name, split in table.splits.items():
            if split.examples:
                pictures |= _scores(
                    folder / f"{start}-{name}.png", split, f"{where}. {SPLITS.get(name, name)}.", colour
                )
        pictures |= _curves(folder / f"{start}-learning.png", table, where, colour)
        pictures |= _rates(folder / f"{start}-rates.png", table, where, colour)
    return pictures


def runs_pictures(folder: Path, report: RunsReport) -> dict[str, str]:
    """Draw a comparison of runs; returns file name -> caption."""
    colour = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(report.runs)}
    pictures: dict[str, str] = {}
    for name, split in report.splits.items():
        if split.examples:
            pictures |= _scores(folder / f"{name}.png", split, f"{SPLITS.get(name, name)}.", colour)
    return pictures


def _scores(path: Path, split: Compared, where: str, colour: Mapping[str, str]) -> dict[str, str]:
    """The first score of every method, and the paired differences beside it."""
    score, (head, _) = next(iter(columns(split).items()))
    methods, pairs = list(split.methods), split.differences
    figure = new_figure(9.2, 1.35 + 0.34 * max(len(methods), len(pairs), 2))
    left, right = figure.subplots(1, 2)
    for reference, style in (("collapse", "--"), ("oracle", ":")):
        value = split.references.get(reference, {}).get(score)
        if value is not None:
            left.axvline(value, color=GREY, linestyle=style, linewidth=1.2, label=reference)
    for place, method in enumerate(methods):
        _point(left, place, split.methods[method].scores[score], colour[method])
    _rows(left, methods)
    left.set_xlabel(head, fontsize=9.5)
    if left.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    right.axvline(0, color=INK, linewidth=1.0)
    for place, pair in enumerate(pairs):
        clear = pair.scores[score].clear
        _point(right, place, pair.scores[score], VERMILLION if clear else GREY)
    _rows(right, [f"{short(pair.first, 18)} − {short(pair.second, 18)}" for pair in pairs])
    right.set_xlabel(f"difference in {head}", fontsize=9.5)
    save(figure, path)
    return {
        path.name: f"{where} {head} of each method and paired differences, with 95% intervals over people; small marks "
        "are seeds. A difference is red where its interval excludes zero and all seeds agree."
    }


def _point(axes: Axes, place: float, one: Estimate, colour: str) -> None:
    if one.value is None:
        return
    if one.interval is not None and one.interval[0] is not None and one.interval[1] is not None:
        axes.hlines(place, one.interval[0], one.interval[1], color=colour, linewidth=2.4, alpha=0.45)
    known = [value for value in one.seeds if value is not None]
    if len(known) > 1:
        axes.scatter(known, np.full(len(known), place + 0.2), marker="|", s=26, color=colour, linewidth=1.0)
    axes.scatter([one.value], [place], s=32, color=colour, zorder=3)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short(name, 40) for name in names], fontsize=8.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    bare(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _curves(path: Path, table: Table, where: str, colour: Mapping[str, str]) -> dict[str, str]:
    """Training loss, and the score on valid at checkpoints, against steps, tokens and seconds."""
    curves = {
        method: [run.curve for run in runs if run.curve is not None and run.curve.steps]
        for method, runs in table.runs.items()
    }
    curves = {method: found for method, found in curves.items() if found}
    if not curves:
        return {}
    valid = any(len(curve.valid) > 1 for found in curves.values() for curve in found)
    figure = new_figure(10.4, 5.4 if valid else 2.9)
    panels = figure.subplots(2 if valid else 1, 3, squeeze=False, sharey="row")
    for column, (axis, label) in enumerate(_AXES):
        for method, found in curves.items():
            for curve in found:
                _draw_loss(panels[-1, column], curve, axis, colour[method])
                if valid:
                    known = [(getattr(point, "step" if axis == "steps" else axis), point.value)
                             for point in curve.valid if point.value is not None]  # fmt: skip
                    panels[0, column].plot(*zip(*known, strict=True), color=colour[method], marker="o", markersize=4)
        panels[-1, column].set_xlabel(label, fontsize=9.5)
    panels[-1, 0].set_ylabel("training loss", fontsize=9.5)
    if valid:
        panels[0, 0].set_ylabel("on valid", fontsize=9.5)
    for panel in panels.ravel():
        panel.grid(color=LIGHT, linewidth=0.7)
        panel.set_axisbelow(True)
        bare(panel)
    handles = [Line2D([], [], color=colour[method], linewidth=2, label=short(method, 30)) for method in curves]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(5, len(handles)), frameon=False, fontsize=9)
    save(figure, path)
    what = (
        "The score on the people for choosing settings at checkpoints, and the training loss" if valid else "The loss"
    )
    return {
        path.name: f"{where}. {what} along each run, one line a seed. All methods learn from the same examples in the "
        "same steps; the loss is a running mean."
    }


def _draw_loss(panel: Axes, curve: Curve, axis: str, colour: str) -> None:
    """The running mean of the training loss over a tenth of the run."""
    loss = np.array([np.nan if value is None else value for value in curve.loss], dtype=np.float64)
    window = max(1, len(loss) // 10)
    smooth = np.array([np.nanmean(loss[max(0, place - window + 1) : place + 1]) for place in range(len(loss))])
    panel.plot(getattr(curve, axis), smooth, color=colour, linewidth=1.5)


def _rates(path: Path, table: Table, where: str, colour: Mapping[str, str]) -> dict[str, str]:
    """What each learning rate reached on valid."""
    tuned = {method: one for method, one in table.tuned.items() if len(one.trials) > 1}
    if not tuned:
        return {}
    figure = new_figure(5.4, 3.1)
    axes = figure.subplots()
    for method, one in tuned.items():
        known = [(trial.rate, trial.value) for trial in one.trials if trial.value is not None]
        if not known:
            continue
        axes.plot(*zip(*known, strict=True), color=colour[method], marker="o", markersize=4, label=short(method, 30))
        best = next((value for rate, value in known if rate == one.rate), None)
        if best is not None:
            axes.scatter(one.rate or 0.0, best, s=90, facecolor="none", edgecolor=colour[method], linewidth=1.4)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", fontsize=9.5)
    axes.set_ylabel("on valid", fontsize=9.5)
    axes.grid(color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    bare(axes)
    axes.legend(frameon=False, fontsize=8.5)
    save(figure, path)
    return {
        path.name: f"{where}. What each learning rate reached on the people for choosing it; the chosen one is ringed."
    }
