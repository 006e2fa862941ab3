"""Pictures of routing: expert load, information about profile fields, the map of profiles, interference of gradients.

Shapes: N profiles, R routers, E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list

from cuma_ds.evaluation.report.model import RouterLoad
from cuma_ds.evaluation.report.plots import (
    BLUE,
    INK,
    LIGHT,
    VERMILLION,
    bare,
    group_tree,
    new_figure,
    router_label,
    save,
    short,
)
from cuma_ds.evaluation.routing import Information

Array = NDArray[np.floating]

# Okabe and Ito's palette, in an order whose first members stay apart in grey as well.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")


def plot_load(path: Path, routers: Sequence[RouterLoad]) -> None:
    """A heat-map routers x experts of their share of the tokens, and the entropies of load and gates beside it."""
    load_RE = np.array([router.load for router in routers])
    count, experts = load_RE.shape
    places, labels = _router_axis([router.router for router in routers])
    figure = new_figure(2.2 + 0.34 * max(experts, 8) + 2.6, max(2.6, 0.12 * count + 1.6))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[0.34 * max(experts, 8), 2.4])
    image = left.imshow(
        load_RE,
        aspect="auto",
        cmap="Blues",
        vmin=0.0,
        vmax=max(2 / experts, float(load_RE.max())),
        interpolation="nearest",
    )
    left.set_xticks(
        range(0, experts, max(1, experts // 8)),
        [str(e + 1) for e in range(0, experts, max(1, experts // 8))],
        fontsize=8.5,
    )
    left.set_yticks(places, labels, fontsize=8.5)
    left.set_xlabel("expert", fontsize=10)
    left.set_ylabel("layer" if labels and labels[0].isdigit() else "router", fontsize=10)
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=left, location="top", shrink=0.8, aspect=30, pad=0.02)
    bar.set_label(f"share of assignments (even: {1 / experts:.1%})", fontsize=9.5)
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    height = np.arange(count)
    right.plot(
        [router.load_entropy for router in routers], height, color=BLUE, linewidth=1.6, label="load, over experts"
    )
    gate = np.array([router.gate_entropy for router in routers]) / np.log(max(experts, 2))
    right.plot(gate, height, color=VERMILLION, linewidth=1.6, label="gate, per token")
    right.set_xlim(0, 1.03)
    right.set_xlabel("entropy / log E", fontsize=10)
    right.grid(axis="x", color=LIGHT, linewidth=0.7)
    right.tick_params(axis="y", length=0, labelleft=False)
    bare(right)
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    save(figure, path)


def plot_information(
    path: Path, router_names: Sequence[str], profile: Information, fields: Mapping[str, Information]
) -> None:
    """Information between expert and profile field along the routers, above what shuffled labels give."""
    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    place = np.arange(len(router_names))
    axes.fill_between(place, 0, profile.value_R, color=LIGHT, linewidth=0, label="whole profile (upper bound)")
    for color, (field, information) in zip(PALETTE, fields.items(), strict=False):
        axes.plot(place, information.corrected_R, color=color, linewidth=1.8, label=short(field.replace("_", " "), 24))
        if information.null_R is not None and information.high_R is not None:
            axes.plot(place, information.high_R - information.null_R, color=color, linewidth=0.9, linestyle=":")
    ticks, labels = _router_axis(router_names)
    axes.set_xticks(ticks, labels)
    axes.set_xlim(0, max(len(router_names) - 1, 1))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("layer" if labels and labels[0].isdigit() else "router", fontsize=10)
    axes.set_ylabel("mutual information with\nthe chosen expert (nats)", fontsize=10)
    bare(axes)
    handles, names = axes.get_legend_handles_labels()
    if any(information.null_R is not None for information in fields.values()):
        handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=":"))
        names.append("95% of shuffled labels")
    figure.legend(handles, names, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def plot_map(
    path: Path,
    xy_N2: Array,
    sizes_N: Array,
    names: Sequence[str],
    values: tuple[str, Array] | None,
    fields: Mapping[str, Sequence[str | None]],
) -> None:
    """Profiles by their routing: one panel coloured by a number, one for each field coloured by its labels.

    Args:
        xy_N2: places on the map.
        sizes_N: answers of each profile, drawn as area.
        names: written beside the points, where there is room; "" for none.
        values: legend and number of each profile.
        fields: label of each profile, by field; fields of at most eight labels.
    """
    kinds: list[str | None] = [*([] if values is None else [None]), *fields]
    columns = max(len(kinds), 1) if len(kinds) < 4 else 2
    rows = -(-max(len(kinds), 1) // columns)
    side = 7.4 if columns == 1 else 4.9
    width, height = np.ptp(xy_N2, axis=0) + 1e-9
    figure = new_figure(side * columns, side * float(np.clip(1.1 * height / width, 0.5, 0.95)) * rows + 0.5)
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    area = 14 + 60 * np.sqrt(sizes_N / max(float(np.max(sizes_N)), 1.0))
    dots = {"edgecolor": "white", "linewidth": 0.6, "zorder": 3}
    for panel, field in zip(panels, kinds or [None], strict=False):
        if field is None and values is None:
            panel.scatter(*xy_N2.T, s=area, color=BLUE, **dots)
        elif field is None and values is not None:
            shown = panel.scatter(*xy_N2.T, s=area, c=values[1], cmap="cividis", **dots)
            bar = figure.colorbar(shown, ax=panel, location="top", shrink=0.7, aspect=35, pad=0.01)
            bar.set_label(short(values[0], 90), fontsize=9.5)
            bar.ax.tick_params(labelsize=8.5)
        elif field is not None:
            labels = sorted({label for label in fields[field] if label is not None})
            for color, label in zip(PALETTE, labels, strict=False):
                inside = np.array([other == label for other in fields[field]])
                panel.scatter(*xy_N2[inside].T, s=area[inside], color=color, label=short(label, 26), **dots)
            panel.set_title(field.replace("_", " "), fontsize=10.5, loc="left")
            panel.legend(frameon=False, fontsize=8, markerscale=0.9, handletextpad=0.2, loc="best")
        panel.set_aspect("equal", adjustable="datalim")
        panel.margins(0.09)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_color(LIGHT)
    for panel in panels[max(len(kinds), 1) :]:
        panel.remove()
    if any(names):
        figure.draw_without_rendering()
        _write_names(figure, panels[0], xy_N2, area, names)
    save(figure, path)


def plot_interference(path: Path, groups: Sequence[str], cosines: Mapping[str, Array]) -> None:
    """Heat-maps of the cosine between groups' gradients, one per kind of adapter, groups in one order."""
    first = next(iter(cosines.values()))
    tree = group_tree(np.asarray(first)[:, None, :])
    order = leaves_list(tree) if tree is not None else np.arange(len(groups))
    cell = min(0.32, 4.2 / len(groups))
    figure = new_figure(1.9 + len(cosines) * (cell * len(groups) + 0.35) + 0.9, cell * len(groups) + 2.0)
    panels = np.atleast_1d(figure.subplots(1, len(cosines), sharey=True))
    for column, (panel, (title, cosine_GG)) in enumerate(zip(panels, cosines.items(), strict=True)):
        image = panel.imshow(
            np.asarray(cosine_GG)[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest"
        )
        off = np.asarray(cosine_GG)[~np.eye(len(groups), dtype=bool)]
        panel.set_title(
            f"{title}\nconflicting pairs {np.mean(off < 0):.0%}, mean |cos| {np.abs(off).mean():.2f}", fontsize=9.5
        )
        panel.set_xticks(range(len(groups)), [short(groups[int(g)], 16) for g in order], rotation=90, fontsize=8.5)
        if column == 0:
            panel.set_yticks(range(len(groups)), [short(groups[int(g)], 20) for g in order], fontsize=8.5)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.7, aspect=25, pad=0.02)
    bar.set_label("cosine of gradients", fontsize=9.5)
    save(figure, path)


def _router_axis(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """A tick for about every fifth layer; layer numbers where there is one router per layer."""
    labels = [router_label(name).splitlines() for name in names]
    layers = [label[0].removeprefix("layer ") if label[0].startswith("layer ") else "" for label in labels]
    step = max(1, round(len(names) / 8))
    places = list(range(0, len(names), step))
    if all(layers) and len(set(layers)) == len(layers):
        return places, [layers[place] for place in places]
    return places, [short(" ".join(labels[place]), 18) for place in places]


def _write_names(figure: Figure, panel: Axes, xy_N2: Array, area_N: Array, names: Sequence[str]) -> None:
    """Write each name on the side of its point where it covers least; names that fit nowhere are left out."""
    pixels = panel.transData.transform(xy_N2)
    scale = figure.dpi / 72
    radius = np.sqrt(area_N) / 2 * scale
    taken = [Bbox.from_bounds(x - r, y - r, 2 * r, 2 * r) for (x, y), r in zip(pixels, radius, strict=True)]
    inside = panel.get_window_extent()
    for index in np.argsort(-area_N, kind="stable"):
        if not names[index]:
            continue
        text = panel.text(0, 0, short(names[index], 22), fontsize=7.2, color=INK, zorder=4)
        size = text.get_window_extent()
        (x, y), gap = pixels[index], radius[index] + 1.5 * scale
        corners = [
            (x + gap, y - size.height / 2), (x - gap - size.width, y - size.height / 2),
            (x - size.width / 2, y + gap), (x - size.width / 2, y - gap - size.height),
            (x + 0.7 * gap, y + 0.7 * gap), (x + 0.7 * gap, y - 0.7 * gap - size.height),
            (x - 0.7 * gap - size.width, y + 0.7 * gap), (x - 0.7 * gap - size.width, y - 0.7 * gap - size.height),
        ]  # fmt: skip
        boxes = [Bbox.from_bounds(*corner, size.width, size.height) for corner in corners]
        fits = [box for box in boxes if _within(box, inside) and not any(box.overlaps(other) for other in taken)]
        if not fits:
            text.remove()
            continue
        x, y = panel.transData.inverted().transform((fits[0].x0, fits[0].y0 + size.height * 0.22))
        text.set_position((float(x), float(y)))
        taken.append(fits[0])


def _within(box: Bbox, outer: Bbox) -> bool:
    return bool(box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1)
