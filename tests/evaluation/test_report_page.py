"""The page of a report: whole, safe, and the same as its Markdown."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from cuma_ds.evaluation.report.html import PAGES, html, write_pages
from cuma_ds.evaluation.report.model import MapPoint

PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
TEXT = """# Evaluation of runs/survey (step 9)

## Held-out people

12 people, 40 answers.

| | EMD | accuracy |
|---|---:|---:|
| one global distribution | 0.0763 | 0.402 |
| **trained** | 0.0174 [0.0150, 0.0201] | 0.475 |
| <script>alert(1)</script> | – | 0.300 |

## Pictures

![EMD by group](emd.png)

*EMD by group*

![gone](gone.png)
"""


class Page(HTMLParser):
    """Tags with their attributes, and the cells of tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(tmp_path) -> Page:
    (tmp_path / "emd.png").write_bytes(PICTURE)
    points = [MapPoint(group="Norway", x=0, y=0), MapPoint(group='"><b>Jordan', x=3, y=1)]
    pages = write_pages(tmp_path, TEXT, points)
    assert [file.name for file in pages] == list(PAGES)
    assert (tmp_path / "report.md").read_text() == TEXT
    return Page((tmp_path / "report.html").read_text())


def test_tables_are_those_of_the_markdown(page) -> None:
    rows = [line.strip("| ") for line in TEXT.splitlines() if line.startswith("|") and "---" not in line]
    written = [cell.strip().strip("*") for row in rows for cell in re.split(r" \| |^\| ", row)]
    assert [cell for cell in page.cells if cell] == [cell for cell in written if cell]
    assert [dict(head).get("style") for head in page.of("th")] == [None, "text-align:right", "text-align:right"]


def test_nothing_is_loaded_and_nothing_in_the_data_is_followed(page) -> None:
    sources = [attributes["src"] for attributes in page.of("img")]
    assert sources == ["data:image/png;base64," + base64.b64encode(PICTURE).decode(), "data:,"]
    assert not page.of("link")
    assert not page.of("b")
    assert len(page.of("script")) == 1  # the page's own
    assert "src" not in page.of("script")[0]
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_sections_can_be_reached_and_points_have_names(page) -> None:
    targets = [link["href"].removeprefix("#") for link in page.of("a")]
    assert targets == ["held-out-people", "pictures", "map"]
    assert [head["id"] for head in page.of("h2")] == targets
    points = page.of("circle")
    assert [point["aria-label"] for point in points] == ["Norway", '"><b>Jordan']
    assert all(0 <= float(point["cx"]) <= 1000 and 0 <= float(point["cy"]) <= 620 for point in points)
    assert float(points[0]["cx"]) < float(points[1]["cx"])
    assert float(points[0]["cy"]) > float(points[1]["cy"])  # y grows upwards on the map


def test_one_point_and_no_point(tmp_path) -> None:
    assert "<circle" not in html(TEXT, tmp_path)
    assert 'cx="500.0" cy="310.0"' in html(TEXT, tmp_path, [MapPoint(group="Norway", x=7, y=-2)])


def in_browser(page: str, actions: str, folder, *options: str) -> Page:
    """What a browser shows of a page after some actions."""
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    file = folder / "acted.html"
    file.write_text(page.replace("</body>", f"<script>{actions}</script></body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    command += [*options, "--dump-dom", file.as_uri()]
    return Page(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


def test_a_browser_sorts_by_the_column_that_is_pressed(tmp_path) -> None:
    page = html(TEXT, tmp_path, [MapPoint(group="Norway", x=0, y=0)])
    press = "document.querySelectorAll('th button')[1].click();"
    for presses, order in ((1, ["trained", "one global distribution"]), (2, ["one global distribution", "trained"])):
        shown = in_browser(page, press * presses, tmp_path)
        rows = [shown.cells[place] for place in (3, 6, 9)]
        assert rows == [*order, "<script>alert(1)</script>"]  # without a number: last in both directions
        head = shown.of("th")[1]
        assert head["aria-sort"] == ("ascending" if presses == 1 else "descending")


def test_a_browser_tells_the_name_of_a_point(tmp_path) -> None:
    page = html(TEXT, tmp_path, [MapPoint(group="Norway", x=0, y=0), MapPoint(group="Peru", x=1, y=0)])
    actions = """
        document.querySelectorAll('circle')[1].focus();
        const told = document.createElement('td');
        told.textContent = document.querySelector('output').textContent;
        document.body.append(told);
        const wide = document.createElement('td');
        wide.textContent = document.documentElement.scrollWidth <= window.innerWidth;
        document.body.append(wide);"""
    assert in_browser(page, actions, tmp_path, "--window-size=500,900").cells[-2:] == ["Peru", "true"]
