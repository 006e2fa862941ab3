"""GlobalOpinionQA (Anthropic/llm_global_opinions): how people of each country answered, one CSV row a question."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from cuma_ds.data.raw import ReadOptions, Rows
from cuma_ds.data.sources.delimited import csv_columns, find_csv, require_columns
from cuma_ds.data.sources.gather import read_records
from cuma_ds.data.sources.no_answer import means_no_answer
from cuma_ds.data.sources.published import on_scale
from cuma_ds.data.sources.records import Converted, Row
from cuma_ds.errors import DataError

_COLUMNS = ["question", "selections", "options"]
# "Germany (Current national sample)": the surveys of Pew say what their sample stands for.
_SAMPLE = re.compile(r"(.+?)\s*\(([^)]*) sample\)")
_SHORTENED = {
    "S. Korea": "South Korea", "S. Africa": "South Africa", "Czech Rep.": "Czech Republic",
    "Slovak Rep.": "Slovakia", "Palest. ter.": "Palestinian territories", "Dominican Rep.": "Dominican Republic",
}  # fmt: skip


def read(path: str, options: ReadOptions) -> Rows:
    """Read distributions, one for each question and country.

    Options for no answer are left out, and the shares of the others add up to 1 again. The file says neither whether
    options have an order (``nominal``) nor how many people were asked. Samples that do not stand for a nation are left
    out, and a current sample replaces an old one.

    Args:
        path: the CSV file (also gzipped), or a folder that holds exactly one.
        options: how to read.

    Raises:
        DataError: no or several CSV files, a missing column, a cell that holds something else.
    """
    file = _find(Path(path))
    require_columns(file, csv_columns(file), _COLUMNS)
    return read_records(find_csv(file, _COLUMNS), convert_question, options)


def convert_question(record: Row, where: str) -> Converted:
    """One row per country; countries whose shares do not fit the question or do not add up to 1 are left out."""
    if not all(record.get(column) for column in _COLUMNS):
        return Converted([], skipped="questions without text, options or answers")
    # The second is defaultdict(<class 'list'>, {...}).
    listed, selections = _literal(record["options"]), _literal(re.sub(r"^[^{]*|[^}]*$", "", str(record["selections"])))
    if not isinstance(listed, list) or not isinstance(selections, dict):
        what = "options is no list" if not isinstance(listed, list) else "selections is no dict of countries"
        raise DataError(f"{where}: {what}; save the file as it is published")
    options, countries = [str(option) for option in listed], _countries(selections)
    kept = [None if means_no_answer(option) else float(place) for place, option in enumerate(options)]
    rows: list[Row] = []
    for country, shares in countries.items():
        scale = on_scale(options, shares, kept)
        if scale is not None:
            row: Row = {"profile": {"country": country}, "question": record["question"], "scale": "nominal"}
            rows.append({**row, "options": scale.options, "shares": scale.shares})
    return Converted(rows, skipped=None if len(rows) == len(countries) else "questions with unusable shares")


def _countries(selections: dict[str, object]) -> dict[str, object]:
    """Shares by country, of national samples."""
    found: dict[str, object] = {}
    for name, shares in selections.items():
        match = _SAMPLE.fullmatch(name)
        country, sample = (match[1], match[2].lower()) if match else (name, "")
        country = _SHORTENED.get(country, country)
        if "non-national" not in sample and not ("old" in sample and country in found):
            found[country] = shares
    return found


def _literal(text: object) -> object:
    """What a Python literal stands for; None for any other text."""
    try:
        return ast.literal_eval(str(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _find(path: Path) -> Path:
    files = [path] if path.is_file() else sorted(path.glob("*.csv")) + sorted(path.glob("*.csv.gz"))
    if len(files) != 1:
        raise DataError(f"{path} is no CSV file and holds {len(files)}; name global_opinions.csv")
    return files[0]
