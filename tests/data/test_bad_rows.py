"""Rows that are wrong are refused by file and line, or left out, counted and named (data.on_bad_row)."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path

import pytest
from conftest import character_tokenizer

from cuma_ds.config import DataSection
from cuma_ds.data import load_data
from cuma_ds.data.lengths import Reading, fitting
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.sources import files
from cuma_ds.errors import DataError, ModelError

PROFILE = {"country": "Norway", "age": 30}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
QUESTION = {"profile": PROFILE, "question": "Good?", "options": ["Yes", "No"], "question_id": "q"}
GOOD = {
    "choice": {**QUESTION, "answer": 0},
    "distribution": {**QUESTION, "shares": [0.5, 0.5]},
    "chat": {"profile": PROFILE, "messages": TURNS},
    "preference": {"profile": PROFILE, "prompt": "Hi", "chosen": "Hello", "rejected": "No"},
}
# Each is wrong by itself; the first one stands before any good row.
BAD = {
    "choice": [{"question": None}, {"answer": 7}, {"options": ["Yes"]}, {"profile": {}}, {"person_id": [1]}, {"x": 1}],
    "distribution": [{"shares": [1]}, {"shares": [0.5, -1]}, {"weight": -1}, {"profile": 3}],
    "chat": [{"messages": []}, {"messages": TURNS[:1]}, {"profile": ""}, {"person_id": 1.5}],
    "preference": [{"chosen": "No"}, {"prompt": 3}, {"margin": "much"}, {"profile": None}],
}
TEXT = ["{", "[1]", '{"profile": "\\ud800"}', "nothing"]


def written(path: Path, kind: str) -> tuple[list[dict], list[int]]:
    """A file in which every second row is wrong; the good rows, and the lines of the wrong ones."""
    lines, good, wrong = [], [], []
    for bad in [*BAD[kind], *TEXT]:
        lines.append(bad if isinstance(bad, str) else json.dumps({**GOOD[kind], **bad}))
        wrong.append(len(lines))
        good.append({**GOOD[kind], "profile": {"country": "Norway", "age": 30 + len(lines)}})
        lines.append(json.dumps(good[-1]))
    path.write_text("\n".join(lines) + "\n")
    return good, wrong


def section(path: Path, **more: object) -> DataSection:
    return DataSection(path=str(path), heldout_fraction=0.0, **more)


@pytest.mark.parametrize("kind", list(GOOD))
def test_wrong_rows_are_left_out_counted_and_named_and_nothing_of_them_stays(kind, tmp_path, monkeypatch) -> None:
    good, wrong = written(tmp_path / "rows.jsonl", kind)
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    for bytes_at_once in (files.CHUNK_BYTES, 1):  # all lines together, and each alone
        monkeypatch.setattr(files, "CHUNK_BYTES", bytes_at_once)
        with pytest.raises(DataError, match=rf"rows\.jsonl:{wrong[0]}: "):
            load_data(section(tmp_path / "rows.jsonl"))
        with pytest.warns(UserWarning, match=f"left out {len(wrong)} wrong row") as said:
            left = load_data(section(tmp_path / "rows.jsonl", on_bad_row="skip"))
        assert ", ".join(f"rows.jsonl:{line}" for line in wrong) in str(said[0].message)
        assert "\n" not in str(said[0].message)
        assert left.manifest["skipped"] == {"wrong rows": len(wrong)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            alone = load_data(section(tmp_path / "good.jsonl", on_bad_row="skip"))
        assert alone.manifest["skipped"] == {}
        assert left.profiles == alone.profiles
        people = sum(len(split) for split in left.splits.values())
        assert people == sum(len(split) for split in alone.splits.values()) == len(good)
        assert all("question" not in part.to_list()[:1] or part.question(0) for part in left.splits.values())


def test_rows_that_contradict_each_other_are_refused_in_any_case(tmp_path) -> None:
    for name, second in {
        "options": {**GOOD["choice"], "options": ["No", "Yes"]},
        "kind": GOOD["chat"],
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(GOOD["choice"]) + "\n" + json.dumps(second) + "\n")
        with pytest.raises(DataError, match=rf"{name}\.jsonl:2: "):
            load_data(section(path, on_bad_row="skip"))


def test_where_all_rows_are_wrong_there_is_nothing_to_learn_from(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n{\n")
    with (
        pytest.warns(UserWarning, match=r"rows\.jsonl:1, rows\.jsonl:2; the first: .*broken JSON"),
        pytest.raises(DataError, match=r"holds no rows; .*left out: 2 wrong rows"),
    ):
        load_data(section(tmp_path / "rows.jsonl", on_bad_row="skip"))


def test_a_file_that_cannot_be_read_on_is_refused_in_any_case(tmp_path) -> None:
    whole = gzip.compress((json.dumps(GOOD["choice"]) + "\n").encode() * 50)
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        load_data(section(tmp_path / "rows.jsonl.gz", on_bad_row="skip"))


@pytest.mark.parametrize("kind", ["choice", "chat", "preference"])
def test_rows_that_cannot_be_written_as_a_prompt_are_left_out_and_counted(kind, tmp_path, caplog) -> None:
    """By a template that fails with an error of Python's own on one of three questions."""
    template = "{% for m in messages %}{% if 'Never' in m.content %}{{ m.content + 1 }}{% endif %}{{ m.content }}"
    template += "{{ 'x' if m.role == 'assistant' }}{% endfor %}"
    rows = []
    for number, asked in enumerate(["Good", "Never", "Fine"] * 8):
        text = {"choice": {"question": asked, "question_id": asked}, "chat": {}, "preference": {"prompt": asked}}[kind]
        if kind == "chat":
            text = {"messages": [{"role": "user", "content": asked}, TURNS[1]]}
        rows.append({**GOOD[kind], **text, "profile": {"country": "Norway", "age": 20 + number}})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, reading = load_data(section(tmp_path / "rows.jsonl")), Reading(Renderer(character_tokenizer(template), 500))
    broken = [number for number, row in enumerate(data.splits["train"].to_list()) if "Never" in json.dumps(row)]
    assert broken
    with pytest.raises(ModelError, match=rf"row {broken[0]} of split train: .*template .*refuses a conversation"):
        fitting(data, reading, section(tmp_path / "rows.jsonl"), ["train"], str)
    left = fitting(data, reading, section(tmp_path / "rows.jsonl", on_bad_row="skip"), ["train"], str)
    kept = [row for number, row in enumerate(data.splits["train"].to_list()) if number not in broken]
    assert left.splits["train"].to_list() == kept
    assert left.manifest["skipped"] == {"examples that cannot be written as a prompt": len(broken)}
    assert f"{len(broken)} of {len(data.splits['train'])} rows of split train (row {broken[0]}" in caplog.text
