"""The pictures of a report on preferences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from cuma_ds.evaluation.report.model import Interval, Number, PreferenceScores, PreferenceSubgroup
from cuma_ds.evaluation.report.plots import BLUE, GREY, INK, LIGHT, VERMILLION, bare, new_figure, save, short

_COLOURS = {"trained": BLUE, "swapped": VERMILLION}


class Share(NamedTuple):
    """A share of pairs, with its 95% interval where there is one.

    Attributes:
        contender: decides the colour.
        label: what is written beside it.
    """

    contender: str
    label: str
    value: Number
    interval: Interval | None


def plot_shares(path: Path, splits: Mapping[str, Sequence[Share]], what: str) -> None:
    """A dot with its interval for each share, one panel per split, and a line where guessing is.

    Args:
        path: the picture.
        splits: title of a split -> its shares, from the top down.
        what: what they are shares of.
    """
    rows = sum(len(shares) for shares in splits.values())
    figure = new_figure(6.4, 0.36 * rows + 0.35 * len(splits) + 0.7)
    heights = [len(shares) + 0.4 for shares in splits.values()]
    panels = np.atleast_1d(figure.subplots(len(splits), 1, sharex=True, height_ratios=heights))
    for panel, (title, shares) in zip(panels, splits.items(), strict=True):
        _guess(panel)
        for place, share in enumerate(shares):
            colour = _COLOURS.get(share.contender, GREY)
            if share.interval is not None:
                panel.hlines(place, *share.interval, color=colour, linewidth=2.6, alpha=0.45)
            if share.value is not None:
                panel.scatter([share.value], [place], s=42, color=colour, zorder=3)
                panel.annotate(
                    f"{share.value:.1%}", (share.value, place), xytext=(0, 6), textcoords="offset points",
                    ha="center", fontsize=8.5, color=INK,
                )  # fmt: skip
        panel.set_yticks(range(len(shares)), [share.label for share in shares], fontsize=9)
        panel.set_ylim(len(shares) - 0.5, -0.8)
        panel.set_title(title, fontsize=10, loc="left")
        _tidy(panel)
    figure.supxlabel(f"{what}; dashed: guessing", fontsize=9.5)
    save(figure, path)


def plot_group_shares(
    path: Path, fields: Mapping[str, Sequence[PreferenceSubgroup]], main: str, score: str, what: str
) -> None:
    """The share of each subgroup with its interval, and marks for the start policy and for swapped profiles.

    Args:
        path: the picture.
        fields: subgroups by profile field.
        main: the contender whose dot has an interval.
        score: which attribute of :class:`PreferenceScores` is drawn.
        what: that score in words.
    """
    count = sum(len(rows) + 1.2 for rows in fields.values())
    figure = new_figure(6.4, 0.22 * count + 1.1)
    heights = [len(rows) + 0.4 for rows in fields.values()]
    panels = np.atleast_1d(figure.subplots(len(fields), 1, sharex=True, height_ratios=heights))
    drawn = set()
    for panel, (field, rows) in zip(panels, fields.items(), strict=True):
        _guess(panel)
        for place, row in enumerate(rows):
            spread = row.rows[main].interval.get(score)
            if spread is not None:
                panel.hlines(place, *spread, color=BLUE, linewidth=2.2, alpha=0.4)
            for contender, mark in _marks(main).items():
                value = _value(row.rows.get(contender), score)
                if value is not None:
                    panel.add_line(mark.line([value], [place]))
                    drawn.add(contender)
        panel.autoscale_view()
        panel.set_yticks(range(len(rows)), [f"{short(row.label, 34)}  ({row.people:,})" for row in rows], fontsize=8.5)
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set_title(field.replace("_", " "), fontsize=10, loc="left")
        _tidy(panel)
    handles = [mark.line() for contender, mark in _marks(main).items() if contender in drawn]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel(f"{what}; dashed: guessing; number of people in brackets", fontsize=9.5)
    save(figure, path)


class _Mark(NamedTuple):
    """How matplotlib draws a contender's share."""

    label: str
    marker: str
    color: str
    edge: str
    size: float
    width: float

    def line(self, x: Sequence[float] = (), y: Sequence[float] = ()) -> Line2D:
        """The mark at some places."""
        return Line2D(
            x, y, linestyle="", marker=self.marker, color=self.color, markeredgecolor=self.edge,
            markersize=self.size, markeredgewidth=self.width, label=self.label, zorder=3,
        )  # fmt: skip


def _marks(main: str) -> dict[str, _Mark]:
    return {
        "start": _Mark("start policy", "o", "white", GREY, 5.5, 1.3),
        "swapped": _Mark("profiles swapped", "|", VERMILLION, VERMILLION, 9.0, 1.8),
        main: _Mark("trained" if main == "trained" else "the model as it is", "o", BLUE, BLUE, 5.5, 1.0),
    }


def _value(scores: PreferenceScores | None, score: str) -> Number:
    return None if scores is None else getattr(scores, score)


def _guess(panel: Axes) -> None:
    panel.axvline(0.5, color=GREY, linewidth=1.0, linestyle="--", zorder=1)


def _tidy(panel: Axes) -> None:
    panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.grid(axis="x", color=LIGHT, linewidth=0.7)
    panel.set_axisbelow(True)
    bare(panel)
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)
