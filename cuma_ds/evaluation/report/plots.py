"""The pictures of a report, drawn with matplotlib in colours that stay apart for colour-blind readers.

Shapes: G groups, n options, R routers, E experts.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram, leaves_list, linkage, optimal_leaf_ordering

from cuma_ds.evaluation.report.model import Cell, Reliability, Subgroup
from cuma_ds.files import first_line, write_atomically

Array = NDArray[np.floating]

# Okabe and Ito's palette.
BLUE, VERMILLION, GREY, LIGHT, INK = "#0072B2", "#D55E00", "#9A9A9A", "#E4E4E4", "#222222"
_COLLAPSE = "one global distribution"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def plot_distributions(path: Path, question: str, options: Sequence[str], cells: Sequence[Cell], main: str) -> None:
    """Paired bars of observed and predicted answers, one panel per group; a line marks the global distribution.

    Args:
        path: the picture.
        question, options: what was asked.
        cells: observed and predicted answers of each group.
        main: the contender that is drawn.
    """
    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    width = max(2.35 * columns, 6.4)
    title, answers = _wrap(question, 11 * width), _answers(options, 13 * width)
    model = "trained model" if main == "trained" else "model as it is"
    header, body = 0.65 + 0.2 * title.count("\n"), 1.75 * rows + 0.45 + 0.17 * answers.count("\n")
    figure = new_figure(width, header + body)
    top, bottom = cast(Sequence[SubFigure], figure.subfigures(2, 1, height_ratios=[header, body]))
    top.suptitle(title, fontsize=11.5, x=0.01, ha="left")
    handles = [
        Patch(color=GREY, label="observed, held out"),
        Patch(color=BLUE, label=f"predicted, {model}"),
        Line2D([], [], color=VERMILLION, linewidth=1.8, label=_COLLAPSE),
    ]
    top.legend(handles=handles, loc="lower left", ncols=3, frameon=False, fontsize=9.5)

    panels = np.atleast_1d(bottom.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    place = np.arange(len(options))
    for panel, cell in zip(panels, cells, strict=False):
        panel.bar(place - 0.2, cell.observed, 0.36, color=GREY)
        panel.bar(place + 0.2, cell.predicted[main], 0.36, color=BLUE)
        panel.hlines(cell.predicted["collapse"], place - 0.44, place + 0.44, color=VERMILLION, linewidth=1.8)
        panel.set_title(short(cell.group, 26), fontsize=10)
        panel.set_xticks(place, _marks(len(options)))
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        bare(panel)
        panel.tick_params(labelbottom=True)
    for panel in panels[len(cells) :]:
        panel.remove()
    bottom.supxlabel(answers, fontsize=9.5, x=0.01, ha="left")
    save(figure, path)


def plot_group_emd(
    path: Path, groups: Sequence[str], before: Array, after: Array, collapse: Array, distance: str = "EMD"
) -> None:
    """A line per group from the bare backbone's distance to the trained model's, sorted; many groups take two columns.

    Args:
        path: the picture.
        groups: G names.
        before, after, collapse: distance of each group [G], of the backbone, the trained model and the global
            distribution. The same array twice draws an untrained model by itself.
        distance: its name.
    """
    trained = after is not before
    order = np.argsort(after, kind="stable")
    columns = 2 if len(groups) > 34 else 1
    rows = -(-len(groups) // columns)
    figure = new_figure(4.9 * columns, 0.19 * rows + 1.3)
    panels = np.atleast_1d(figure.subplots(1, columns, sharex=True))
    # The worst groups come first: that is where to look.
    for panel, part in zip(panels, np.array_split(order[::-1], columns), strict=True):
        height = np.arange(len(part))
        panel.hlines(
            height,
            np.minimum(before[part], after[part]),
            np.maximum(before[part], after[part]),
            color=LIGHT,
            linewidth=2.2,
            zorder=1,
        )
        panel.scatter(collapse[part], height, marker="|", s=52, color=VERMILLION, linewidth=1.8, zorder=2)
        if trained:
            panel.scatter(before[part], height, s=26, facecolor="white", edgecolor=GREY, linewidth=1.3, zorder=3)
        panel.scatter(after[part], height, s=28, color=BLUE, zorder=4, clip_on=False)
        panel.set_yticks(height, [short(groups[int(group)], 26) for group in part], fontsize=8.5)
        panel.set_ylim(len(part) - 0.4, -0.6)
        panel.set_xlim(0, 1.05 * max(before.max(), after.max(), collapse.max()))
        panel.grid(axis="x", color=LIGHT, linewidth=0.7)
        panel.set_axisbelow(True)
        bare(panel)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    figure.supxlabel(f"{distance} between predicted and observed answers (0 = equal)", fontsize=10)
    after_label, size = "trained" if trained else "model as it is", 5.5
    handles = [
        Line2D([], [], linestyle="", marker="o", color=BLUE, markersize=size, label=after_label),
        Line2D([], [], linestyle="", marker="|", color=VERMILLION, markersize=9, markeredgewidth=1.8, label=_COLLAPSE),
    ]
    if trained:
        ring = Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=GREY, markersize=size)
        ring.set_label("backbone before training")
        handles.insert(0, ring)
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=9.5,
        columnspacing=1.2,
        handletextpad=0.3,
    )
    save(figure, path)


def plot_expert_use(
    path: Path, groups: Sequence[str], gates_GRE: Array, router_names: Sequence[str], shown: int = 3
) -> None:
    """Heat-maps groups x experts of the routers that tell groups apart best.

    Groups are ordered by hierarchical clustering of their whole routing (all routers), drawn as a tree beside the maps.

    Args:
        gates_GRE: mean gate weight of each group [G, R, E].
        shown: most routers to draw.
    """
    count, _, experts = gates_GRE.shape
    tree = group_tree(gates_GRE)
    order = leaves_list(tree) if tree is not None else np.arange(count)
    chosen = discriminating_routers(gates_GRE, shown)
    cell = 0.30 if experts <= 16 else 4.8 / experts
    width = cell * experts
    figure = new_figure(2.0 + (width + 0.15) * len(chosen) + 1.3, 0.165 * count + 1.5)
    panels = np.atleast_1d(figure.subplots(1, len(chosen) + 1, width_ratios=[width] * len(chosen) + [0.8]))
    top = float(max(gates_GRE[:, chosen].max(), 1e-6))
    for column, router in enumerate(chosen):
        panel: Axes = panels[column]
        image = panel.imshow(
            gates_GRE[order, router], aspect="auto", cmap="Blues", vmin=0.0, vmax=top, interpolation="nearest"
        )
        panel.set_title(router_label(router_names[router]), fontsize=9)
        step = 1 if experts <= 16 else -(-experts // 8)
        panel.set_xticks(range(0, experts, step), [str(expert + 1) for expert in range(0, experts, step)], fontsize=8)
        panel.set_yticks(
            range(count), [short(groups[int(group)], 26) for group in order] if column == 0 else [], fontsize=8.5
        )
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    _draw_tree(panels[-1], tree, count)
    figure.supxlabel("expert", fontsize=10)
    figure.colorbar(
        image,
        ax=list(panels[:-1]),
        location="top",
        label="mean gate weight",
        shrink=0.6 if len(chosen) > 1 else 1.0,
        aspect=30,
        pad=0.01,
    )
    save(figure, path)


def plot_reliability(path: Path, rows: Mapping[str, tuple[Reliability, float]]) -> None:
    """Reliability diagrams side by side: accuracy against confidence of each bin, below them the answers of each bin.

    Args:
        rows: title -> the bins, and the expected calibration error.
    """
    figure = new_figure(3.3 * len(rows) + 0.4, 4.1)
    panels = figure.subplots(2, len(rows), sharex=True, sharey="row", height_ratios=[3, 1], squeeze=False)
    for (top, bottom), (title, (row, error)) in zip(panels.T, rows.items(), strict=True):
        bins = len(row.answers)
        share = np.array(row.answers, dtype=float) / max(sum(row.answers), 1)
        filled = [k for k in range(bins) if row.answers[k]]
        right, sure = (np.array(values, dtype=float)[filled] for values in (row.accuracy, row.confidence))
        top.plot([0, 1], [0, 1], color=GREY, linewidth=1.0, linestyle="--")
        top.vlines(sure, np.minimum(sure, right), np.maximum(sure, right), color=VERMILLION, linewidth=1.2, alpha=0.7)
        top.scatter(sure, right, s=18 + 160 * share[filled], color=BLUE, edgecolor="white", linewidth=0.7, zorder=3)
        top.set_title(f"{title}\nECE {error:.3f}", fontsize=10)
        top.set_xlim(0, 1)
        top.set_ylim(0, 1)
        bottom.bar((np.arange(bins) + 0.5) / bins, share, 0.9 / bins, color=GREY)
        bottom.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        bare(top)
        bare(bottom)
    panels[0, 0].set_ylabel("accuracy", fontsize=10)
    panels[1, 0].set_ylabel("answers", fontsize=10)
    figure.supxlabel("confidence: probability of the predicted option", fontsize=10)
    save(figure, path)


def plot_subgroups(path: Path, fields: Mapping[str, Sequence[Subgroup]], main: str, counted: str = "people") -> None:
    """Accuracy of each subgroup with its 95% interval, field by field, that of all of them together as a line.

    Args:
        fields: subgroups by profile field.
        main: the contender whose accuracy is drawn.
        counted: what ``people`` counts: answers where the data does not say who gave them.
    """
    count = sum(len(rows) + 1.2 for rows in fields.values())
    figure = new_figure(6.4, 0.24 * count + 0.9)
    panels = np.atleast_1d(
        figure.subplots(len(fields), 1, sharex=True, height_ratios=[len(rows) + 0.4 for rows in fields.values()])
    )
    for panel, (field, rows) in zip(panels, fields.items(), strict=True):
        height = np.arange(len(rows))
        accuracies = np.array([row.rows[main].accuracy for row in rows], dtype=float)
        together = np.average(accuracies, weights=[row.answers for row in rows])
        panel.axvline(float(together), color=VERMILLION, linewidth=1.2)
        for place, row in enumerate(rows):
            if (spread := row.rows[main].interval.get("accuracy")) is not None:
                panel.hlines(place, *spread, color=BLUE, linewidth=2.2, alpha=0.4)
        panel.scatter(accuracies, height, s=26, color=BLUE, zorder=3)
        panel.set_yticks(height, [f"{short(row.label, 34)}  ({row.people:,})" for row in rows], fontsize=8.5)
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set_title(field.replace("_", " "), fontsize=10, loc="left")
        panel.grid(axis="x", color=LIGHT, linewidth=0.7)
        panel.set_axisbelow(True)
        bare(panel)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[-1].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.supxlabel(f"accuracy (line: all of a field together; number of {counted} in brackets)", fontsize=10)
    save(figure, path)


def group_tree(gates_GRE: Array) -> NDArray[np.float64] | None:
    """Ward linkage of groups by their whole routing, neighbouring leaves alike; None for a single group."""
    if len(gates_GRE) < 2:
        return None
    vectors = np.asarray(gates_GRE, dtype=np.float64).reshape(len(gates_GRE), -1)
    return optimal_leaf_ordering(linkage(vectors, method="ward"), vectors)


def discriminating_routers(gates_GRE: Array, shown: int) -> list[int]:
    """The routers whose gates vary most between groups, in their own order."""
    spread = np.asarray(gates_GRE, dtype=np.float64).var(axis=0).sum(axis=-1)
    return sorted(int(router) for router in np.argsort(-spread, kind="stable")[:shown])


def _draw_tree(panel: Axes, tree: NDArray[np.float64] | None, count: int) -> None:
    panel.axis("off")
    if tree is None:
        return
    lines = dendrogram(tree, no_plot=True)
    for heights, places in zip(lines["dcoord"], lines["icoord"], strict=True):
        # scipy puts leaf k at 10 k + 5.
        panel.plot(heights, (np.array(places) - 5) / 10, color=GREY, linewidth=0.9)
    panel.set_ylim(count - 0.5, -0.5)
    panel.set_xlim(left=0)


def router_label(name: str) -> str:
    """``layer 3`` over the rest of the module name, or the name where it holds no number."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return short(name, 22)
    return f"layer {int(parts[number]) + 1}\n{short('.'.join(parts[number + 1 :]), 22)}"


def _marks(count: int) -> list[str]:
    return [LETTERS[k] if count <= len(LETTERS) else str(k + 1) for k in range(count)]


def _answers(options: Sequence[str], width: float) -> str:
    named = [f"{mark}  {short(option, 70)}" for mark, option in zip(_marks(len(options)), options, strict=True)]
    lines = [named[0]]
    for item in named[1:]:
        if len(lines[-1]) + len(item) + 5 <= width:
            lines[-1] += "     " + item
        else:
            lines.append(item)
    return "\n".join(lines)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, laid out so that nothing overlaps."""
    return Figure(figsize=(width, height), dpi=170, layout="constrained")


def bare(axes: Axes) -> None:
    """Leave away the lines that say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8.5, color=GREY)


def short(text: str, length: int) -> str:
    """The text in one line of at most ``length`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _wrap(text: str, width: float) -> str:
    # A dollar sign would switch matplotlib to mathematics.
    return textwrap.fill(text, int(width))


class Pictures(NamedTuple):
    """Figures that are complete but not yet written, with their files."""

    waiting: list[tuple[Figure, Path]]

    def write(self) -> list[str]:
        """Write each as a PNG, complete or not at all; returns the names of those that could not be drawn.

        A warning names them. The numbers of a report do not depend on them.
        """
        failed = []
        for figure, path in self.waiting:
            try:
                _write(figure, path)
            except Exception as error:
                warnings.warn(f"{path.name} could not be drawn: {first_line(error)}", stacklevel=2)
                failed.append(path.name)
        self.waiting.clear()
        return failed


_later: ContextVar[Pictures | None] = ContextVar("pictures", default=None)


@contextlib.contextmanager
def pictures_later() -> Iterator[Pictures]:
    """Inside, :func:`save` keeps figures instead of writing them, for the time when all numbers are on the disk."""
    pictures = Pictures([])
    token = _later.set(pictures)
    try:
        yield pictures
    finally:
        _later.reset(token)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, now or as :func:`pictures_later` says."""
    later = _later.get()
    if later is None:
        _write(figure, path)
    else:
        later.waiting.append((figure, path))


def _write(figure: Figure, path: Path) -> None:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar sign is a dollar sign
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor="white")
    write_atomically(path, picture.getvalue())
