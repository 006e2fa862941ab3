"""``profiles.keep_text: false``: the run folder keeps embeddings and numbers, and everything else goes on as ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from canaries import COUNTRIES, found_in, write_answers
from commands import TRAIN, all_tensors, one_line
from ranks import run, run_recipes
from small_runs import metrics, recipe

from cuma_ds.errors import ConfigError
from cuma_ds.evaluation.report.model import ChoiceReport
from cuma_ds.evaluation.run import evaluate_run
from cuma_ds.inference.open import open_export, open_run
from cuma_ds.parallel.stored import find_checkpoint
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

LEAST = ["evaluation.min_answers=8", "evaluation.bootstrap=20"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_llama, tiny_encoder) -> dict[bool, Path]:
    """The same recipe with and without texts, trained."""
    folder = tmp_path_factory.mktemp("texts")
    data = {
        "path": str(write_answers(folder / "answers.jsonl", people=90)),
        "test_fraction": 0.4,
        "heldout_fraction": 0.0,
    }
    found = {}
    for keep in (True, False):
        profiles = {"keep_text": keep}
        path = recipe(folder, tiny_llama, tiny_encoder, f"keep-{keep}", data=data, profiles=profiles,
                      checkpoint={"every": 3, "keep_last": 2})  # fmt: skip
        found[keep] = path
    run_recipes(1, list(found.values()))
    return found


def refused(path: Path, what: str, *changes: str) -> None:
    one_line(run(1, [TRAIN, "--config", str(path), *(["--set", *changes] if changes else [])]), what)


def final(path: Path) -> dict[str, torch.Tensor]:
    return all_tensors(find_checkpoint(Run(load_config(path).run_dir).checkpoints))


def test_what_is_learned_is_the_same_and_no_profile_is_kept(pair) -> None:
    kept, bare = (load_config(pair[keep]) for keep in (True, False))
    assert [row["loss"] for row in metrics(bare)] == [row["loss"] for row in metrics(kept)]
    expected, found = final(pair[True]), final(pair[False])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found_in([kept.run_dir], [kept.run_dir / "data", kept.run_dir / "profiles.safetensors"]) == []
    assert found_in([bare.run_dir]) == []
    words = b"".join(file.read_bytes() for file in bare.run_dir.rglob("*") if file.is_file())
    for country in COUNTRIES:
        assert country.encode() not in words
        assert country.encode() in b"".join(file.read_bytes() for file in (kept.run_dir / "data").iterdir())
    tables = [Run(one.run_dir).profiles(one) for one in (kept, bare)]
    assert torch.equal(tables[0].embeddings, tables[1].embeddings)


def test_it_resumes_and_can_not_be_switched_afterwards(pair, tmp_path) -> None:
    bare = load_config(pair[False])
    before = final(pair[False])
    for name in ("step-6", "latest"):
        place = bare.run_dir / "checkpoints" / name
        place.rename(tmp_path / name)
    run_recipes(1, [pair[False]])
    assert all(torch.equal(tensor, before[name]) for name, tensor in final(pair[False]).items())
    for keep in (True, False):
        refused(pair[keep], "profiles.keep_text", f"profiles.keep_text={str(not keep).lower()}")


def test_reports_are_the_same_but_for_the_names_of_groups(pair, tmp_path) -> None:
    reports = {keep: evaluate_run(load_config(pair[keep]).run_dir, overrides=LEAST) for keep in (True, False)}
    splits = {keep: report.splits["test"] for keep, report in reports.items() if isinstance(report, ChoiceReport)}
    kept, bare = ({name: row.model_dump(exclude={"interval", "inequity"}) for name, row in splits[keep].rows.items()}
                  for keep in (True, False))  # fmt: skip
    assert bare.keys() == kept.keys()
    # Inequity is that of all fields, of which one is left.
    for name in kept.keys() - {"swapped"}:  # who is told whose profile depends on the order of names
        assert bare[name] == pytest.approx(kept[name], abs=2e-6, nan_ok=True), name
    assert splits[False].compared == splits[True].compared
    assert {cell.group for cell in splits[True].cells} == set(COUNTRIES)
    assert all(cell.group.startswith("group ") for cell in splits[False].cells)
    numbers = [
        [(cell.emd["trained"], cell.emd["oracle"], cell.observed) for cell in splits[keep].cells]
        for keep in (True, False)
    ]
    assert sorted(map(repr, numbers[0])) == sorted(map(repr, numbers[1]))
    assert reports[False].routing.map is not None
    assert found_in([load_config(pair[False]).run_dir]) == []


def test_it_is_exported_asked_and_started_from(pair, tmp_path, launch) -> None:
    folder = load_config(pair[False]).run_dir
    assert launch("export", "--run", str(folder), "--format", "hf", "--out", str(tmp_path / "hf")).code == 0
    about = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert about["profiles"]["fields"] == ["country", "age", "nickname", "faith"]
    profiles = [{"country": "Norway", "age": 35}]
    whole, own = open_export(tmp_path / "hf"), open_run(folder)
    assert torch.equal(whole.reader(profiles), own.reader(profiles))
    lora = ["--format", "lora", "--profile", '{"country": "Norway"}', "--calibration", "4"]
    assert launch("export", "--run", str(folder), *lora, "--out", str(tmp_path / "lora")).code == 0
    assert found_in([tmp_path / "hf", tmp_path / "lora"]) == []
    assert launch("status", str(folder), "--verify").code == 0
    start = {"init_from": str(folder)}
    values = load_config(pair[True])
    path = recipe(tmp_path, Path(values.model.path), Path(values.profiles.encoder), "again", model=start,
                  data={"path": values.data.path, "test_fraction": 0.4, "heldout_fraction": 0.0})  # fmt: skip
    run_recipes(1, [path])


@pytest.mark.parametrize(
    ("change", "what"),
    [("data.profile_in_prompt=true", "data.profile_in_prompt"), ("training.group_field=country", "group_field"),
     ("adapters.method=few_shot", "few_shot")],
)  # fmt: skip
def test_what_needs_the_text_says_so(pair, change, what) -> None:
    with pytest.raises(ConfigError, match=f"profiles.keep_text is false, but .*{what}"):
        load_config(pair[False], [change])


def test_its_data_is_no_data_for_others(pair, tmp_path, launch) -> None:
    folder = load_config(pair[False]).run_dir
    said = "keep_text: false, which has no profiles to read"
    refused(pair[True], said, f"data.path={folder / 'data'}", "run.name=elsewhere")
    said = launch("evaluate", "--run", str(folder), "--data", str(folder / "data"), "--out", str(tmp_path / "out"))
    assert said.code == 2
    assert "has no profiles to read" in said.err
    (folder / "profiles.safetensors").rename(tmp_path / "away")
    refused(pair[False], "has no profiles to read")
