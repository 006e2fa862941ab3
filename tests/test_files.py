"""Files are there whole or not at all, names of places are told apart, and transformers is quiet when asked."""

import os
from pathlib import Path

import pytest
from transformers.utils import logging

from cuma_ds import files
from cuma_ds.files import (
    atomic_folder,
    first_line,
    full_path,
    is_hub_id,
    quiet_transformers,
    remove_folder,
    remove_leftovers,
    write_atomically,
)


@pytest.mark.parametrize("content", ["new ä", b"\x00new"])
def test_a_file_is_replaced_whole(content, tmp_path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, "old")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_a_file_whose_writing_stops_is_left_as_it_was(moment, tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_content_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch) -> None:
    done = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(Path(f"/proc/self/fd/{handle}").resolve()))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("moved"), replace(*names)))
    write_atomically(tmp_path / "file", "text")
    assert [place.name if isinstance(place, Path) else place for place in done[1:]] == ["moved", tmp_path.name]
    assert done[0].parent == tmp_path
    done.clear()
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("text")
    names = [place.name if isinstance(place, Path) else place for place in done]
    assert set(names[:2]) == {"inner", "file"}
    assert names[3:] == ["moved", tmp_path.name]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path) -> None:
    with atomic_folder(tmp_path / "deep" / "one") as folder:
        (folder / "file").write_text("text")
        assert not (tmp_path / "deep" / "one").exists()
    assert (tmp_path / "deep" / "one" / "file").read_text() == "text"
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "deep" / "two") as folder:
        (folder / "missing" / "file").write_text("text")
    assert [place.name for place in (tmp_path / "deep").iterdir()] == ["one"]


def test_what_stands_in_a_folders_place_is_left_as_it_is(tmp_path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    (tmp_path / "empty").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError), atomic_folder(tmp_path / name) as folder:
            (folder / "file").write_text("new")
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    texts = [(tmp_path / name).read_text() for name in ("file", "folder/file", "empty/file")]
    assert texts == ["old", "old", "new"]
    assert sorted(place.name for place in tmp_path.iterdir()) == ["empty", "file", "folder"]


def test_an_error_is_one_line() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("x" * 500)) == "x" * 300


@pytest.mark.parametrize(
    ("place", "with_owner", "without"),
    [
        ("owner/name", True, True), ("name", False, True), ("a/b/c", False, False), ("./name", False, False),
        ("/name", False, False), ("~/name", False, False), ("../x", False, False),
    ],
)  # fmt: skip
def test_hub_ids_are_told_from_folders(place, with_owner, without) -> None:
    assert (is_hub_id(place), is_hub_id(place, needs_owner=False)) == (with_owner, without)


def test_folders_get_their_full_path(tmp_path, monkeypatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert full_path("model") == str(tmp_path / "model")
    assert full_path("owner/name") == "owner/name"


def test_transformers_is_quiet_for_a_block_or_from_now_on() -> None:
    logging.enable_progress_bar()  # an earlier test may have turned the bars off for good
    level = logging.get_verbosity()
    with quiet_transformers():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
        with quiet_transformers(bars_only=True):
            pass
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, True)
    restore = quiet_transformers(bars_only=True)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, False)
    restore.close()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path) -> None:
    for name in (".file.0123456789abcdef", ".hidden", "file.0123456789abcdef", ".file.short"):
        (tmp_path / name).touch()
    (tmp_path / ".data.aaaaaaaaaaaaaaaa" / "inner").mkdir(parents=True)
    remove_leftovers(tmp_path, of="other")
    assert len(list(tmp_path.iterdir())) == 5
    remove_leftovers(tmp_path, of="data")
    assert len(list(tmp_path.iterdir())) == 4
    remove_leftovers(tmp_path)
    assert sorted(place.name for place in tmp_path.iterdir()) == [".file.short", ".hidden", "file.0123456789abcdef"]


def test_a_folder_that_is_removed_loses_its_name_first(tmp_path, monkeypatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    remove = files.shutil.rmtree

    def crash(*_: object) -> None:
        assert not (tmp_path / "folder").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(tmp_path / "folder")
    monkeypatch.setattr(files.shutil, "rmtree", remove)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_folder(tmp_path / "folder")
