"""A report as one page that holds its pictures, needs no network, and lets tables be sorted."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from cuma_ds.evaluation.report.model import MapPoint
from cuma_ds.files import write_atomically

PAGES = ("report.html", "report.md")
# Of the drawing of the map, and the room around its points.
_WIDTH, _HEIGHT, _MARGIN = 1000, 620, 40


class Point(NamedTuple):
    """One profile on the map, in the units of its drawing."""

    name: str
    x: float
    y: float


def write_pages(folder: Path, text: str, points: Sequence[MapPoint] = ()) -> list[Path]:
    """Write a report as Markdown and as a page, from the same text. Arguments as of :func:`html`."""
    pages = [folder / name for name in PAGES]
    for page, content in zip(pages, (html(text, folder, points), text), strict=True):
        write_atomically(page, content)
    return pages


def html(text: str, folder: Path, points: Sequence[MapPoint] = ()) -> str:
    """A page of a report's Markdown.

    Args:
        text: as report.md has it. HTML in it, such as in the name of a group, is shown and not followed.
        folder: of its pictures, which the page holds. One that is not there is left out.
        points: of the map of profiles.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    sections: list[tuple[str, str]] = []
    title = "Report"
    for number, token in enumerate(tokens):
        words = tokens[number + 1].content if number + 1 < len(tokens) else ""
        if token.type == "heading_open" and token.tag == "h1":
            title = words
        elif token.type == "heading_open" and token.tag == "h2":
            sections.append((_anchor(words), words))
            token.attrSet("id", sections[-1][0])
        for picture in (inner for inner in token.children or () if inner.type == "image"):
            _embed(picture, folder)
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="table" tabindex="0"><table>').replace("</table>", "</table></div>")
    body = re.sub(
        r"<p>(<img [^>]*>)</p>\n<p><em>(.*?)</em></p>", r"<figure>\1<figcaption>\2</figcaption></figure>", body
    )
    page = Environment(autoescape=True).from_string(files(__package__).joinpath("page.html").read_text("utf-8"))
    placed = _placed(points)
    sections += [("map", "Map")] if placed else []
    return page.render(title=title, sections=sections, body=Markup(body), points=placed)  # rendered without its HTML


def _anchor(words: str) -> str:
    return re.sub(r"\W+", "-", words.lower()).strip("-")


def _embed(picture: Token, folder: Path) -> None:
    """Put the picture's bytes in the place of its name."""
    file = folder / Path(str(picture.attrGet("src") or "")).name
    if file.suffix == ".png" and file.is_file():
        picture.attrSet("src", "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode())
    else:
        picture.attrSet("src", "data:,")


def _placed(points: Sequence[MapPoint]) -> list[Point]:
    """The points, spread over the drawing with one scale for both axes."""
    if not points:
        return []
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*((p.x, p.y) for p in points), strict=True))
    scale = min((_WIDTH - 2 * _MARGIN) / max(right - left, 1e-9), (_HEIGHT - 2 * _MARGIN) / max(high - low, 1e-9))
    x0, y0 = _WIDTH / 2 - scale * (left + right) / 2, _HEIGHT / 2 + scale * (low + high) / 2
    return [Point(p.group, round(x0 + scale * p.x, 1), round(y0 - scale * p.y, 1)) for p in points]
