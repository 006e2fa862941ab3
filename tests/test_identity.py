"""Model, encoder and data of a run are told apart by their content, not by their place or name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from commands import TRAIN, one_line
from ranks import run
from run_folder import OPINIONS, make_run
from safetensors.torch import load_file, save_file
from small_runs import recipe
from transformers import AutoModelForCausalLM

from cuma_ds import identity, load_exported
from cuma_ds.config import ModelSection, RunConfig
from cuma_ds.errors import CheckpointError, ModelError
from cuma_ds.evaluation.subject import run_subject
from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.export.weights import copy_weights
from cuma_ds.identity import model_fingerprint
from cuma_ds.inference.open import open_run
from cuma_ds.parallel.streaming import plan_streaming
from cuma_ds.profiles import ProfileEncoder, ProfileTable
from cuma_ds.recipe import load_config
from cuma_ds.training.inputs import prepare_run


@pytest.fixture
def places(tmp_path, tiny_llama, tiny_encoder) -> dict[str, Path]:
    """Copies of backbone, encoder and data that may be changed."""
    shutil.copytree(tiny_llama, tmp_path / "llama")
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    shutil.copy(OPINIONS, tmp_path / "opinions.jsonl")
    return {"model": tmp_path / "llama", "encoder": tmp_path / "encoder", "data": tmp_path / "opinions.jsonl"}


@pytest.fixture
def started(tmp_path, places) -> RunConfig:
    """A run with one checkpoint."""
    folder, _, _ = make_run(tmp_path / "runs" / "one", places["model"], places["encoder"], {}, source=places["data"])
    return load_config(folder / "config.yaml")


def other_weights(folder: Path, seed: int = 99) -> None:
    """Another model of the same shape in the same folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)


READERS = {
    "train": prepare_run,
    "evaluate": lambda config: run_subject(config.run_dir),
    "export": lambda config: read_run(config.run_dir),
    "generate and serve": lambda config: open_run(config.run_dir),
}


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CHANGES = {
    "weights": (other_weights, "other weights"),
    "configuration": (
        lambda folder: edit(folder / "config.json", rms_norm_eps=0.1),
        r"another configuration \(config.json\)",
    ),
    "template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        "another tokenizer or chat template",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_backbone_that_changed_in_its_place_is_refused_by_every_reader(what, started, places) -> None:
    for read in READERS.values():
        read(started)
    change, words = CHANGES[what]
    change(places["model"])
    for name, read in READERS.items():
        with pytest.raises(
            CheckpointError, match=f"llama holds {words} than .*one was trained with; restore"
        ) as refused:
            read(started)
        assert "\n" not in str(refused.value), name


def test_keys_that_change_no_answer_and_places_and_names_do_not_matter(started, places, tmp_path) -> None:
    edit(
        places["model"] / "config.json",
        transformers_version="9.9",
        use_cache=False,
        dtype="bfloat16",
        _name_or_path="x",
    )
    moved = {name: place.rename(tmp_path / f"renamed-{place.name}") for name, place in places.items()}
    values = started.model_dump()
    values["model"]["path"], values["profiles"]["encoder"] = str(moved["model"]), str(moved["encoder"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        renamed = RunConfig.model_validate(
            values | {"data": values["data"] | {"path": str(tmp_path / "opinions.jsonl")}}
        )
        shutil.copy(moved["data"], tmp_path / "opinions.jsonl")
        for read in READERS.values():
            prepare_run(renamed)
            read(renamed)
    (tmp_path / "opinions.jsonl").unlink()
    with pytest.warns(
        UserWarning, match=r"data.path: there is nothing at .*opinions.jsonl any more; .* goes on with what it was"
    ):
        prepare_run(renamed)


def test_an_encoder_or_data_file_that_changed_between_two_starts_is_refused_and_restored_goes_on(
    started, places
) -> None:
    whole = places["data"].read_text()
    places["data"].write_text(whole.replace("Norway", "Sweden"))
    with pytest.raises(
        CheckpointError, match=r"data.path: opinions.jsonl in .* has changed since .*; restore it to resume, or choose"
    ):
        prepare_run(started)
    places["data"].write_text(whole)
    prepare_run(started)
    tensors = load_file(places["encoder"] / "model.safetensors")
    save_file(
        {name: tensor + 0.01 for name, tensor in tensors.items()},
        places["encoder"] / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"profiles.encoder: .* is another encoder than"):
        prepare_run(started)
    save_file(tensors, places["encoder"] / "model.safetensors", {"format": "pt"})
    prepare_run(started)


def test_a_prepared_folder_that_was_made_again_differently_is_refused(tmp_path, places, launch) -> None:
    def prepare_again(seed: int) -> None:
        shutil.rmtree(tmp_path / "prepared", ignore_errors=True)
        done = launch(
            "prepare_data",
            "jsonl",
            "--root",
            str(places["data"]),
            "--out",
            str(tmp_path / "prepared"),
            "--seed",
            str(seed),
        )
        assert done.code == 0, done.err

    prepare_again(0)
    values = {
        "run": {"output_dir": str(tmp_path)}, "model": {"path": str(places["model"]), "dtype": "float32"},
        "profiles": {"encoder": str(places["encoder"])}, "data": {"path": str(tmp_path / "prepared")},
        "adapters": {"num_experts": 2, "top_k": 1, "target_modules": ["q_proj"]},
    }  # fmt: skip
    config = RunConfig.model_validate(values)
    prepare_run(config)
    prepare_again(0)
    prepare_run(config)
    prepare_again(1)
    with pytest.raises(CheckpointError, match=r"data.path: \w+.arrow in .*prepared has changed since"):
        prepare_run(config)


def test_embeddings_of_a_prepared_folder_are_used_by_training_where_its_encoder_made_them(
    tmp_path, places, launch, monkeypatch
) -> None:
    arguments = [
        "--root",
        str(places["data"]),
        "--out",
        str(tmp_path / "prepared"),
        "--encoder",
        str(places["encoder"]),
    ]
    assert launch("prepare_data", "jsonl", *arguments, "--cache-dir", str(tmp_path / "cache")).code == 0
    asked = []
    embed = ProfileEncoder.__call__
    monkeypatch.setattr(
        ProfileEncoder, "__call__", lambda self, sentences: asked.extend(sentences) or embed(self, sentences)
    )

    def start(name: str) -> ProfileTable:
        values = {
            "run": {"name": name, "output_dir": str(tmp_path)},
            "model": {"path": str(places["model"]), "dtype": "float32"},
            "profiles": {"encoder": str(places["encoder"]), "cache_dir": str(tmp_path / f"cache-{name}")},
            "data": {"path": str(tmp_path / "prepared")},
            "adapters": {"num_experts": 2, "top_k": 1, "target_modules": ["q_proj"]},
        }  # fmt: skip
        prepare_run(RunConfig.model_validate(values))
        return ProfileTable.load(tmp_path / name / "profiles.safetensors")

    table = start("one")
    assert asked == []
    assert torch.equal(table.embeddings, ProfileTable.load(tmp_path / "prepared" / "profiles.safetensors").embeddings)
    edit(places["encoder"] / "config.json", hidden_act="relu")
    assert not torch.equal(start("two").embeddings, table.embeddings)
    assert sorted(asked) == sorted(table.sentences)


def test_a_raw_file_that_changed_is_noticed_in_runs_of_release_0_1_0_too(started, places) -> None:
    (started.run_dir / "identity.json").unlink()
    places["data"].write_text(places["data"].read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"data.path: opinions.jsonl in .* has changed since"):
        prepare_run(started)
    assert not (started.run_dir / "identity.json").exists()


@pytest.mark.multirank
def test_other_weights_are_one_line_on_two_ranks(tmp_path, tiny_llama, tiny_encoder) -> None:
    shutil.copytree(tiny_llama, tmp_path / "llama")
    path = recipe(tmp_path, tmp_path / "llama", tiny_encoder, "two", training={"steps": 2, "warmup_steps": 0})
    assert [code for code, _ in run(2, [TRAIN, "--config", str(path)])] == [0, 0]
    other_weights(tmp_path / "llama")
    one_line(
        run(2, [TRAIN, "--config", str(path), "--set", "training.steps=3"], timeout=120),
        "model.path",
        "holds other weights than",
    )


def test_an_export_refuses_another_base_of_the_same_shape(started, places, tmp_path, launch) -> None:
    folder = write_hf(read_run(started.run_dir), tmp_path / "export")
    shutil.copytree(places["model"], tmp_path / "other" / "llama")
    other_weights(tmp_path / "other" / "llama")
    with pytest.raises(ModelError, match="holds other weights than the base model these adapters were trained on"):
        load_exported(folder, base_model=str(tmp_path / "other" / "llama"))
    asked = launch(
        "generate",
        "--export",
        str(folder),
        "--base",
        str(tmp_path / "other" / "llama"),
        "--prompt",
        "x",
        "--profile",
        "A nurse.",
    )
    assert (asked.code, asked.err.count("\n")) == (2, 1)
    shutil.copytree(places["model"], tmp_path / "moved")
    load_exported(folder, base_model=str(tmp_path / "moved"))
    about = json.loads((folder / "adapter_config.json").read_text())
    assert about["base"].pop("fingerprint").keys() == {"weights", "config"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="names no fingerprint of its base model"):
        load_exported(folder)


def test_fingerprints_do_not_depend_on_how_weights_are_cut_into_files(tmp_path, tiny_llama) -> None:
    whole = model_fingerprint(tiny_llama)
    assert whole.keys() == {"weights", "config", "tokenizer"}
    shutil.copytree(tiny_llama, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    assert copy_weights(tiny_llama, tmp_path / "sharded", 9000) > 3
    assert model_fingerprint(tmp_path / "sharded") == whole
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert model_fingerprint(tmp_path / "half")["weights"] != whole["weights"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_every_change_of_all_of_one_tensor_and_of_first_and_last_numbers_is_seen_with_bounded_reads(
    name, tmp_path, monkeypatch
) -> None:
    tensors = {f"layer.{number}": torch.randn(300, 1000) for number in range(3)}

    def fingerprint() -> str:
        if name.endswith(".bin"):
            torch.save(tensors, tmp_path / name)
        else:
            save_file(tensors, tmp_path / name)
        return model_fingerprint(tmp_path)["weights"]

    monkeypatch.setattr(identity, "_SAMPLED_BYTES", 300_000)
    known = fingerprint()
    assert fingerprint() == known
    files = identity.weight_files(tmp_path)
    sizes = (
        [stored.size for stored in identity.stored_tensors(files[0]).values()]
        if name.endswith("safetensors")
        else [3_600_000]
    )
    assert sum(length for size in sizes for _, length in identity._blocks(size, 300_000 // len(sizes))) <= 300_000
    for place in ((0, 0), (299, 999)):
        tensors["layer.1"][place] += 1
        changed = fingerprint()
        assert changed != known
        known = changed
    tensors["layer.2"] *= 1.0001
    assert fingerprint() != known


def test_of_two_layouts_in_one_folder_all_read_the_one_that_transformers_reads(tmp_path, tiny_llama) -> None:
    """model.safetensors beside a sharded index and pytorch_model.bin of other weights."""
    folder, other = tmp_path / "both", tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    other_weights(other)
    shutil.copytree(tiny_llama, folder)
    known = model_fingerprint(folder)
    for file in ("model.safetensors.index.json", *(f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))):
        assert not (folder / file).exists()
    shards = load_file(other / "model.safetensors")
    save_file(dict(list(shards.items())[:9]), folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(dict(list(shards.items())[9:]), folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    weight_map = {name: f"model-{1 + (place >= 9):05d}-of-00002.safetensors" for place, name in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.save(shards, folder / "pytorch_model.bin")

    read = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = load_file(tiny_llama / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    (tmp_path / "copy").mkdir()
    copy_weights(folder, tmp_path / "copy")
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert copied.keys() == expected.keys()
    assert all(torch.equal(copied[name], tensor) for name, tensor in expected.items())
    plan = plan_streaming(ModelSection(path=str(folder), dtype="float32"))
    assert {place.file for _, places in plan.tensors for place in places} == {str(folder / "model.safetensors")}
    assert model_fingerprint(folder) == known
