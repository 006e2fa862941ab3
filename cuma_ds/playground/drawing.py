"""Where the dots and names of a cultural map stand in its picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from cuma_ds.playground.landscape import Places

WIDTH, HEIGHT, MARGIN = 1000, 720, 50
# Of a name: height, and mean width of a character; how far it stands from its dot.
_LINE, _CHARACTER, _GAP = 17, 8.6, 9


class Label(NamedTuple):
    """Where a name is written, as SVG has it."""

    x: float
    y: float
    anchor: str


class Dot(NamedTuple):
    """One group or person. A group whose name has no room has no label."""

    name: str
    x: float
    y: float
    label: Label | None = None


class Drawing(NamedTuple):
    """A map in the units of its picture."""

    groups: list[Dot]
    people: list[Dot]
    width: int = WIDTH
    height: int = HEIGHT


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)


def drawn(places: Places) -> Drawing:
    """A map with one scale for both axes; names are written where they cover nothing else, the outermost first."""
    groups, people = places.land.xy_G2, places.xy_B2
    points = np.concatenate([groups, people])
    low, high = points.min(axis=0), points.max(axis=0)
    room = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
    scale = float((room / np.maximum(high - low, 1e-9)).min())
    xy = (points - (low + high) / 2) * scale * np.array([1, -1]) + np.array([WIDTH, HEIGHT]) / 2
    names = [*places.land.names, *("" for _ in people)]
    dots = [Dot(name, round(float(x), 1), round(float(y), 1)) for name, (x, y) in zip(names, xy, strict=True)]
    shown, asked = dots[: len(groups)], dots[len(groups) :]
    taken = [_around(dot, 19) for dot in asked]
    outermost = sorted(shown, key=lambda dot: -((dot.x - WIDTH / 2) ** 2 + (dot.y - HEIGHT / 2) ** 2))
    labels: dict[Dot, Label] = {}
    for dot in outermost:
        others = [_around(other, 6) for other in shown if other is not dot]
        for label, box in _ways(dot):
            inside = box.left >= 0 and box.right <= WIDTH and box.top >= 0 and box.bottom <= HEIGHT
            if inside and not _meets(box, taken) and not _meets(box, others):
                labels[dot] = label
                taken.append(box)
                break
    return Drawing([dot._replace(label=labels.get(dot)) for dot in shown], asked)


def _ways(dot: Dot) -> Iterable[tuple[Label, _Box]]:
    """A name to the right of its dot, to the left, above, or below."""
    wide, half = _CHARACTER * len(dot.name), _LINE / 2
    for x, y, anchor, left in (
        (dot.x + _GAP, dot.y, "start", dot.x + _GAP),
        (dot.x - _GAP, dot.y, "end", dot.x - _GAP - wide),
        (dot.x, dot.y - _GAP - half, "middle", dot.x - wide / 2),
        (dot.x, dot.y + _GAP + half, "middle", dot.x - wide / 2),
    ):
        yield Label(round(x, 1), round(y + 5, 1), anchor), _Box(left, y - half, left + wide, y + half)


def _around(dot: Dot, radius: float) -> _Box:
    return _Box(dot.x - radius, dot.y - radius, dot.x + radius, dot.y + radius)


def _meets(box: _Box, others: Iterable[_Box]) -> bool:
    return any(box.meets(other) for other in others)
