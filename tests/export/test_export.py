"""Exports: the same logits and the same words without this package, for PEFT, and from the authors' checkpoints."""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from authors import AUTHORS, write_authors_checkpoint
from conftest import character_tokenizer
from fresh import link_packages, run_fresh
from ranks import ROOT
from run_folder import content, lively, make_run
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from cuma_ds import load_exported
from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.config import ModelSection
from cuma_ds.errors import CheckpointError, ConfigError, CumaError, DataError, ModelError
from cuma_ds.evaluation.report.model import CONTENDERS, SPLITS
from cuma_ds.evaluation.run import evaluate_run
from cuma_ds.export.hf import Trained, read_run, write_hf
from cuma_ds.export.lora import summary, write_lora
from cuma_ds.export.reference import read_reference
from cuma_ds.export.source import modeling_source
from cuma_ds.export.weights import copy_weights
from cuma_ds.inference.open import open_run

IDS = torch.tensor([[0, 0, 40, 41, 42, 43], [50, 51, 52, 53, 54, 55], [0, 60, 61, 62, 63, 64]])
MASK = (IDS != 0).long()
PROFILES = [{"country": "Norway", "age": 38}, {"country": "Ghana"}, "A person who likes the sea."]
BATCH = {"input_ids": IDS, "attention_mask": MASK}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def save_tiny(folder: Path, kind: str, tied: bool) -> Path:
    """A random two-layer model of one family."""
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    sizes = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 5,
        "tie_word_embeddings": tied, "initializer_range": 0.2,
    }  # fmt: skip
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM), "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    }  # fmt: skip
    config, model = classes[kind]
    torch.manual_seed(0)
    model(config(**sizes)).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


FAMILIES = [(kind, tied) for kind in ("llama", "qwen3", "mistral", "gemma2") for tied in (False, True)]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> dict[tuple[str, bool], Path]:
    folder = tmp_path_factory.mktemp("backbones")
    return {
        (kind, tied): save_tiny(folder / f"{kind}-{'tied' if tied else 'untied'}", kind, tied)
        for kind, tied in FAMILIES
    }


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return link_packages(tmp_path_factory.mktemp("fresh") / "packages")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder):
    return make_run(
        tmp_path_factory.mktemp("runs") / "opinions", tiny_llama, tiny_encoder, {"router": "mlp", "router_hidden": 8}
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run) -> Path:
    return write_hf(read_run(run[0]), tmp_path_factory.mktemp("exports") / "hf")


FRESH = """
import json, sys
from unittest import mock
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
results = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = load_file(sys.argv[1])
    embeddings = inputs.pop("embeddings")
    with torch.no_grad():
        results[folder + "/logits"] = model(**inputs, profile_embeddings=embeddings).logits.float().contiguous()
        exact = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        results[folder + "/exact"] = exact(**inputs, profile_embeddings=embeddings).logits
        brain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        for units in (False, True):  # mixed in float32, and in bfloat16 as on CPUs that multiply it
            with mock.patch('torch.cpu.get_capabilities', return_value={'avx512_bf16': units}):
                found = brain(**inputs, profile_embeddings=embeddings).logits
                results[folder + f"/bf16 {units}"] = found.float().contiguous()
    results[folder + "/words"] = model.generate(
        **inputs, profile_embeddings=embeddings, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.mul_(0.9)
        model.save_pretrained(folder + "-again")
        again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
        one, other = (each(**inputs, profile_embeddings=embeddings).logits for each in (model, again))
    assert torch.equal(one, other) and (one.float() - results[folder + "/logits"]).abs().max() > 1e-3
save_file(results, sys.argv[1] + ".out")
print(sorted({name.split(".")[0] for name in sys.modules} & {"cuma_ds", "deepspeed", "pydantic", "datasets", "peft"}))
"""


@pytest.mark.sixteen_bit
def test_every_family_in_a_fresh_environment_with_torch_and_transformers_alone(
    tmp_path, backbones, packages, monkeypatch
) -> None:
    """Logits to 1e-5 (float32) and 1e-2 (bfloat16), words equal, for four families with tied and untied embeddings."""
    embeddings = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    save_file({**BATCH, "embeddings": embeddings}, tmp_path / "inputs")
    expected = {}
    for index, (family, backbone) in enumerate(backbones.items()):
        config = CumaConfig(
            num_experts=4,
            top_k=2,
            lora_r=2,
            profile_dim=16,
            target_modules=("q_proj", "v_proj", "up_proj"),
            shared_a=bool(index % 2),
            router_input=("token_and_profile", "profile")[index // 2 % 2],
            gate_temperature=(1.0, 0.5)[index // 2 % 2],
        )
        base = ModelSection(path=str(backbone), dtype="float32")
        model = lively(inject_adapters(AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32), config))
        model.set_profile_standardisation(torch.randn(9, 16, generator=torch.Generator().manual_seed(2)), 3.0)
        out = tmp_path / f"out-{family[0]}-{family[1]}"
        write_hf(
            Trained(config, dict(model.adapter_state()), base, {"encoder": None, "template": "generic"}),
            out,
            merged=index % 2 == 0,
        )
        with torch.no_grad():
            expected[f"{out}/logits"] = model(**BATCH, profile_embeddings=embeddings).logits
            expected[f"{out}/words"] = model.generate(**BATCH, profile_embeddings=embeddings, **GREEDY)
            brain = inject_adapters(AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16), config)
            brain.load_adapter_state(model.adapter_state())
            for units in (False, True):
                monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=units: {"avx512_bf16": there})
                expected[f"{out}/bf16 {units}"] = brain.eval()(**BATCH, profile_embeddings=embeddings).logits.float()
    script = tmp_path / "script.py"
    script.write_text(FRESH)
    done = run_fresh(
        packages, script, str(tmp_path / "inputs"), *sorted({key.rpartition("/")[0] for key in expected}), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[]", "the export must need neither this package nor what it brings"
    results = load_file(tmp_path / "inputs.out")
    for key, tensor in expected.items():
        if key.endswith("words"):
            assert torch.equal(results[key], tensor), key
        else:
            tolerance = 1e-5 if key.endswith("logits") else 1e-2
            real = MASK.bool()
            torch.testing.assert_close(
                results[key][real], tensor[real], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_profiles_as_fields_and_text_equal_their_embeddings_in_forward_beams_and_samples(
    run, exported, tiny_encoder
) -> None:
    from cuma_ds.profiles import ProfileEncoder, linearize

    _, trained, _ = run
    model = load_exported(exported)
    embeddings = ProfileEncoder(str(tiny_encoder))([linearize(profile) for profile in PROFILES])
    with torch.no_grad():
        expected = trained(**BATCH, profile_embeddings=embeddings).logits
        torch.testing.assert_close(model(**BATCH, profiles=PROFILES).logits, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(**BATCH, profile_embeddings=embeddings).logits, expected, rtol=1e-6, atol=1e-6)
        one = model(**BATCH, profiles=PROFILES[:1]).logits
        torch.testing.assert_close(
            one, trained(**BATCH, profile_embeddings=embeddings[:1].expand(3, -1)).logits, rtol=1e-6, atol=1e-6
        )
    assert (one[1] - expected[1]).abs().max() > 1e-2, "profiles must matter for this comparison to mean something"
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}):
        torch.manual_seed(5)
        words = model.generate(**BATCH, profiles=PROFILES, **(GREEDY | options))
        torch.manual_seed(5)
        assert torch.equal(words, trained.generate(**BATCH, profile_embeddings=embeddings, **(GREEDY | options))), (
            options
        )
    alone = model.generate(IDS[1:2], profiles=PROFILES[1:2], **GREEDY)
    assert torch.equal(model.generate(**BATCH, profiles=PROFILES, **GREEDY)[1:2], alone)


def test_a_run_is_called_as_its_export_is(run, exported) -> None:
    opened = open_run(run[0])
    with torch.no_grad():
        found = opened.model(**BATCH, profile_embeddings=opened.reader(PROFILES)).logits
        assert torch.equal(found, load_exported(exported)(**BATCH, profiles=PROFILES).logits)


def test_merged_export_needs_no_base_folder(tmp_path, backbones, tiny_encoder, run) -> None:
    base = tmp_path / "base"
    copy_of = load_file(backbones["llama", False] / "model.safetensors")
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((backbones["llama", False] / name).read_bytes())
    save_file(copy_of, base / "model.safetensors", metadata={"format": "pt"})
    folder, trained, _ = make_run(tmp_path / "runs" / "moving", base, tiny_encoder, {})
    merged = write_hf(read_run(folder), tmp_path / "merged", merged=True)
    light = write_hf(read_run(folder), tmp_path / "light")
    base.rename(tmp_path / "elsewhere")
    embeddings = torch.randn(3, 16)
    with torch.no_grad():
        expected = trained(**BATCH, profile_embeddings=embeddings).logits
        assert torch.equal(load_exported(merged)(**BATCH, profile_embeddings=embeddings).logits, expected)
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_exported(light)
        found = load_exported(light, base_model=str(tmp_path / "elsewhere"))
        assert torch.equal(found(**BATCH, profile_embeddings=embeddings).logits, expected)


def test_an_export_moves_together_with_its_base_and_encoder(tmp_path, backbones, tiny_encoder) -> None:
    shutil.copytree(backbones["llama", False], tmp_path / "base")
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    folder, _, _ = make_run(tmp_path / "runs" / "moving", tmp_path / "base", tmp_path / "encoder", {})
    write_hf(read_run(folder), tmp_path / "light")
    with torch.no_grad():
        expected = load_exported(tmp_path / "light")(**BATCH, profiles=PROFILES).logits
        (tmp_path / "there").mkdir()
        for name in ("base", "encoder", "light"):
            (tmp_path / name).rename(tmp_path / "there" / name)
        assert torch.equal(load_exported(tmp_path / "there" / "light")(**BATCH, profiles=PROFILES).logits, expected)
    (tmp_path / "there" / "base").rename(tmp_path / "there" / "other")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_exported(tmp_path / "there" / "light")


@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
def test_weights_are_copied_bit_by_bit_in_shards(shard_bytes, tmp_path, backbones) -> None:
    original = load_file(backbones["llama", False] / "model.safetensors")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    count = copy_weights(backbones["llama", False], first, shard_bytes)
    assert count == len(list(first.glob("*.safetensors")))
    assert (count > 3) == (shard_bytes == 9000)
    assert copy_weights(first, second) == 1
    copied: dict[str, torch.Tensor] = {}
    for file in first.glob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= shard_bytes
        copied |= tensors
    for result in (copied, load_file(second / "model.safetensors")):
        assert result.keys() == original.keys()
        assert all(torch.equal(result[name], original[name]) for name in original)


def test_methods_without_profiles_are_exported_too(tmp_path, tiny_llama, tiny_encoder) -> None:
    for method, adapters in {
        "lora": {"num_experts": 1, "top_k": 1, "balance_weight": 0.0},
        "mixlora": {},
        "hydralora": {},
    }.items():
        folder, trained, _ = make_run(
            tmp_path / "runs" / method, tiny_llama, tiny_encoder, {"method": method, **adapters}
        )
        model = load_exported(write_hf(read_run(folder), tmp_path / method))
        with torch.no_grad():
            assert torch.equal(model(**BATCH).logits, trained(**BATCH).logits)
        with pytest.raises(ModelError, match="take none"):
            model(**BATCH, profiles=PROFILES)


def test_the_travelling_code_is_the_packages_own_without_clashes() -> None:
    tree = ast.parse(modeling_source())
    names = Counter(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    names += Counter(target.id for target in assigned if isinstance(target, ast.Name))
    assert [name for name, count in names.items() if count > 1] == []
    for name in ("AdaptedLinear", "Router", "demographic_gate", "mixture", "CumaForCausalLM"):
        assert names[name] == 1
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any((module or "").startswith(("cuma_ds", "pydantic", "deepspeed")) for module in modules)


def test_the_model_card_tells_data_people_metrics_risk_and_licence(tmp_path, run, tiny_llama) -> None:
    folder, _, _ = run
    (tiny_llama / "README.md").write_text("---\nlicense: llama-tiny\n---\n")
    try:
        card = (write_hf(read_run(folder), tmp_path / "card") / "README.md").read_text()
    finally:
        (tiny_llama / "README.md").unlink()
    people = json.loads((folder / "data" / "manifest.json").read_text())["splits"]["train"]["people"]
    assert f"| training | {people} |" in card
    for part in ("license: llama-tiny", "Not evaluated yet", "stereotypes by construction", "jsonl (choice questions)"):
        assert part in card
    assert "trust_remote_code=True" in card
    assert "Norway\n" not in card


def numbers_in(card: str) -> dict[str, dict[str, dict[str, str]]]:
    """Heading of a split -> row -> column -> cell, of the tables under "Evaluation"."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    split, columns = "", []
    for line in card.partition("## Evaluation\n")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        if line.startswith("### "):
            split = line.removeprefix("### ")
        elif line.startswith("| |"):
            columns = cells[1:]
        elif line.startswith("| "):
            found.setdefault(split, {}).setdefault(cells[0], {}).update(zip(columns, cells[1:], strict=True))
    return found


def test_the_numbers_of_a_model_card_are_those_of_the_runs_report(tmp_path, run) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    report = content(evaluate_run(folder, overrides=["evaluation.min_answers=2", "evaluation.bootstrap=20"]))
    card = (write_hf(read_run(folder), tmp_path / "card") / "README.md").read_text()
    shown = numbers_in(card)
    assert list(shown) == [SPLITS[name] for name in report["splits"]]
    columns = {
        "EMD": ("emd", 4),
        "recovered": ("recovered", 2),
        "accuracy": ("accuracy", 3),
        "ECE": ("calibration_error", 3),
    }
    for name, split in report["splits"].items():
        rows = [CONTENDERS[row] for row in split["rows"]]
        assert list(shown[SPLITS[name]])[: len(rows)] == rows
        assert all(row.startswith("noise floor") for row in list(shown[SPLITS[name]])[len(rows) :])
        for row, values in split["rows"].items():
            for title, (key, digits) in columns.items():
                expected = "–" if values[key] is None else f"{values[key]:.{digits}f}"
                assert shown[SPLITS[name]][CONTENDERS[row]][title].split()[0] == expected
    assert "Not evaluated" not in card
    assert str(tmp_path) not in card


def test_a_report_that_cannot_be_shown_is_said_as_it_is(tmp_path, run) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / "evaluation").mkdir()
    report = {"format_version": 3, "checkpoint": "step-7", "splits": {}}
    for number, (values, said) in enumerate(
        [
            ({**report, "format_version": 2}, "Not shown: report.json has report format 2, not 3; evaluate again"),
            (report, "Not shown: report.json lacks run, kind, main"),
            ([], "Not shown: report.json has report format None"),
            (None, "Not shown: report.json cannot be read"),
        ]
    ):
        (folder / "evaluation" / "report.json").write_text(json.dumps(values) if values is not None else "{")
        card = (write_hf(read_run(folder), tmp_path / f"card-{number}") / "README.md").read_text()
        assert said in card
        assert str(tmp_path) not in card


def change(folder: Path, target: Path, edit) -> Path:
    """A copy of an export whose adapter_config.json went through ``edit``."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    about = json.loads((target / "adapter_config.json").read_text())
    edit(about)
    (target / "adapter_config.json").write_text(json.dumps(about))
    return target


def test_bad_exports_are_named(tmp_path, exported, backbones, tiny_encoder) -> None:
    with pytest.raises(CheckpointError, match="there is no exported model at /no/such"):
        load_exported("/no/such/folder")
    with pytest.raises(CheckpointError, match="is no exported model"):
        load_exported(backbones["llama", False])

    tampered = change(exported, tmp_path / "tampered", lambda about: None)
    content = bytearray((tampered / "adapter_model.safetensors").read_bytes())
    content[-3] ^= 1
    (tampered / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors was changed after the export"):
        load_exported(tampered)
    (tampered / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing"):
        load_exported(tampered)

    for section, key, wrong in (
        ("adapters", "lora_alpha", 17.0),
        ("profiles", "template", "wvs"),
        ("prompt", "max_length", 77),
    ):
        edited = change(
            exported, tmp_path / f"edited-{section}", lambda about, s=section, k=key, w=wrong: about[s].update({k: w})
        )
        with pytest.raises(CheckpointError, match=r"adapter_config.json no longer says how the adapters were trained"):
            load_exported(edited)

    with pytest.raises(
        ModelError, match="wrong base model: its model_type is qwen3, the adapters were trained on one with llama"
    ):
        load_exported(exported, base_model=str(backbones["qwen3", False]))
    for key, wanted in {"vocab_size": 999, "hidden_size": 64}.items():
        other = change(exported, tmp_path / key, lambda about, k=key, w=wanted: about["base"].update({k: w}))
        with pytest.raises(ModelError, match=f"wrong base model: its {key} is .* one with {wanted}"):
            load_exported(other)
    newer = change(exported, tmp_path / "newer", lambda about: about.update(format_version=99))
    with pytest.raises(CheckpointError, match="format 99"):
        load_exported(newer)
    foreign = change(exported, tmp_path / "foreign", lambda about: about.update(peft_type="LORA"))
    with pytest.raises(CheckpointError, match="type LORA"):
        load_exported(foreign)


def test_bad_profiles_are_named_and_unknown_fields_warned(tmp_path, exported, tiny_encoder) -> None:
    model = load_exported(exported)
    with pytest.raises(ModelError, match="2 profiles were given for 3 sequences"):
        model(**BATCH, profiles=PROFILES[:2])
    with pytest.raises(ModelError, match="both given"):
        model(**BATCH, profiles=PROFILES, profile_embeddings=torch.zeros(3, 16))
    with pytest.raises(ModelError, match=r"profiles=\[...\]"):
        model(**BATCH, profiles="A woman.")
    with pytest.raises(ModelError, match=r"shape \(3, 7\); expected \[sequences, 16\]"):
        model(**BATCH, profile_embeddings=torch.zeros(3, 7))
    with pytest.raises(ModelError, match="profile_embeddings are missing"):
        model(**BATCH)
    with pytest.raises(DataError, match="no field with an answer"):
        model(**BATCH, profiles=[{"country": None}])
    with pytest.warns(UserWarning, match="'contry' is unknown to this model \\(did you mean 'country'\\?\\)"):
        model(**BATCH, profiles=[{"contry": "Norway"}])
    other = tmp_path / "other-encoder"
    other.mkdir()
    for file in tiny_encoder.rglob("*"):
        if file.is_file():
            (other / file.relative_to(tiny_encoder)).parent.mkdir(exist_ok=True)
            (other / file.relative_to(tiny_encoder)).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: tensor + 1e-3 for name, tensor in weights.items()},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match="not the one these adapters were trained with"):
        load_exported(exported, encoder=str(other))(**BATCH, profiles=PROFILES)


def test_output_folders_are_never_overwritten_and_never_half_written(tmp_path, run, exported) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        write_hf(read_run(run[0]), taken)
    assert [file.name for file in taken.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_hf(read_run(run[0]), tmp_path / "file" / "below")
    trained = read_run(run[0])
    name = next(name for name in trained.state if name.endswith("lora_b"))
    trained.state[name] = trained.state[name][:, :-1]
    with pytest.raises(ModelError, match=f"{name} has shape"):
        write_hf(trained, tmp_path / "broken")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (write_hf(read_run(run[0]), empty) / "config.json").is_file()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "file", "taken"]


def test_a_saved_model_is_the_exported_folder_again(tmp_path, backbones, tiny_encoder, run, exported) -> None:
    """With the adapters as they are now, beside a base that was found elsewhere, and with the base inside."""
    model = load_exported(exported)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.mul_(0.5)
        expected = model(**BATCH, profiles=PROFILES).logits
        for _ in range(2):  # into a new folder, and into the same again
            model.save_pretrained(tmp_path / "saved")
            again = load_exported(tmp_path / "saved")
            assert torch.equal(again(**BATCH, profiles=PROFILES).logits, expected)
        again.save_pretrained(tmp_path / "saved")
        assert torch.equal(load_exported(tmp_path / "saved")(**BATCH, profiles=PROFILES).logits, expected)
        assert (load_exported(exported)(**BATCH, profiles=PROFILES).logits - expected).abs().max() > 1e-3
        assert {file.name for file in exported.iterdir()} == {file.name for file in (tmp_path / "saved").iterdir()}

        shutil.copytree(backbones["llama", False], tmp_path / "base")
        folder, _, _ = make_run(tmp_path / "runs" / "merged", tmp_path / "base", tiny_encoder, {})
        merged = load_exported(write_hf(read_run(folder), tmp_path / "merged", merged=True))
        light = write_hf(read_run(folder), tmp_path / "light")
        (tmp_path / "base").rename(tmp_path / "elsewhere")
        expected = merged(**BATCH, profiles=PROFILES).logits
        merged.save_pretrained(tmp_path / "merged-again")
        load_exported(light, base_model=str(tmp_path / "elsewhere")).save_pretrained(tmp_path / "light-again")
        for name in ("merged-again", "light-again"):
            assert torch.equal(load_exported(tmp_path / name)(**BATCH, profiles=PROFILES).logits, expected)
    with pytest.raises(ModelError, match="takes no push_to_hub"):
        model.save_pretrained(tmp_path / "never", push_to_hub=True)
    with pytest.raises(ModelError, match="is uploaded as it is"):
        model.push_to_hub("somebody/something")
    assert not (tmp_path / "never").exists()


def test_without_permission_to_run_its_code_transformers_refuses(exported) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)


def peft_log_probabilities(backbone: Path, adapter: Path, examples) -> list[torch.Tensor]:
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32), adapter
    ).eval()
    with torch.no_grad():
        return [model(input_ids=ids).logits[0].double().log_softmax(dim=-1) for ids in examples]


EXACT = {
    "linear": {},
    "mlp": {"router": "mlp", "router_hidden": 8},
    "shared-a": {"shared_a": True, "share_router": False},
    "soft": {"gate_norm": "softmax", "target_modules": ["all-linear"]},
    "not-renormalised": {"gate_norm": "softmax_topk"},
    "lora": {"method": "lora", "num_experts": 1, "top_k": 1, "balance_weight": 0.0},
}


@pytest.mark.parametrize("variant", EXACT)
def test_stock_peft_reads_an_exact_lora(variant, tmp_path, tiny_llama, tiny_encoder) -> None:
    """Where routing depends on the profile alone, the plain LoRA gives the mixture's logits to 1e-5."""
    folder, trained, table = make_run(
        tmp_path / "runs" / variant, tiny_llama, tiny_encoder, EXACT[variant], constant_routing=True
    )
    known = (
        json.loads((folder / "data" / "profiles.jsonl").read_text().splitlines()[3])["fields"]
        if table is not None
        else None
    )
    report = write_lora(folder, [] if table is None else [known, "somebody new"], tmp_path / "lora")
    assert all(row["exact"] for row in report["profiles"])
    kept = {"linear": 4, "mlp": 4, "shared-a": 2, "soft": 8, "not-renormalised": 4, "lora": 2}
    assert {row["rank"] for row in report["profiles"]} == {kept[variant]}
    with torch.no_grad():
        who = {} if table is None else {"profile_embeddings": table.embeddings[3:4].expand(3, -1)}
        expected = trained(**BATCH, **who).logits
    for row in range(3):
        ids = IDS[row : row + 1, MASK[row] == 1]
        (found,) = peft_log_probabilities(tiny_llama, tmp_path / "lora" / "profile-1", [ids])
        torch.testing.assert_close(found, expected[row][MASK[row] == 1].double().log_softmax(-1), rtol=1e-5, atol=1e-5)
    about = json.loads((tmp_path / "lora" / "profile-1" / "adapter_config.json").read_text())
    assert about["peft_type"] == "LORA"
    assert about["lora_alpha"] == trained.config.scaling * about["r"]
    assert all(type(about[key]) is int for key in ("r", "lora_alpha")), "readers that take integers alone"
    assert not any(word in (tmp_path / "lora" / "report.json").read_text() for word in ("Norway", "somebody"))


@pytest.mark.parametrize("kind", ["choice", "nominal", "chat"])
def test_an_averaged_lora_stays_within_its_reported_divergence(kind, tmp_path, tiny_llama, tiny_encoder) -> None:
    """The report's KL and EMD are those of stock PEFT against the mixture, computed again prompt by prompt."""
    from cuma_ds.data.batch import encode_example
    from cuma_ds.data.prepared import PreparedData
    from cuma_ds.data.rendering import Renderer
    from cuma_ds.parallel.backbone import load_tokenizer
    from cuma_ds.recipe import load_config

    source = Path(__file__).parents[1] / "data" / ("chats.jsonl" if kind == "chat" else "opinions.jsonl")
    if kind == "nominal":
        lines = source.read_text().splitlines()
        source = tmp_path / "nominal.jsonl"
        source.write_text("\n".join(json.dumps(json.loads(line) | {"scale": "nominal"}) for line in lines))
    folder, trained, table = make_run(tmp_path / "runs" / kind, tiny_llama, tiny_encoder, {}, source=source)
    fields = json.loads((folder / "data" / "profiles.jsonl").read_text().splitlines()[1])["fields"]
    report = write_lora(folder, [fields], tmp_path / "lora", prompts=1000)["profiles"][0]
    assert not report["exact"]
    config, data = load_config(folder / "config.yaml"), PreparedData.load(folder / "data")
    renderer = Renderer(load_tokenizer(config.model), config.data.max_length)
    kl, distances = [], []
    for row in data.splits[report["prompts"]["split"]]:
        example = encode_example(row, renderer, data.sentences, config.data)
        ids = torch.tensor([example.input_ids])
        (q,) = peft_log_probabilities(tiny_llama, tmp_path / "lora" / "profile-1", [ids])
        with torch.no_grad():
            p = trained(input_ids=ids, profile_embeddings=table.embeddings[1:2]).logits[0].double().log_softmax(-1)
        for position in sorted(set(example.target_position)):
            kl.append(F.kl_div(q[position], p[position], reduction="sum", log_target=True).item())
        if kind != "chat":
            options = [x[-1, example.target_token].softmax(0) for x in (p, q)]
            gaps = (options[0].cumsum(0) - options[1].cumsum(0)).abs()[:-1]
            unordered = (options[0] - options[1]).abs().sum() / 2
            distances.append(float(unordered if kind == "nominal" else gaps.sum() / len(gaps)))
    assert report["prompts"]["measured on"] == len(data.splits[report["prompts"]["split"]])
    assert report["kl_mean"] == pytest.approx(sum(kl) / len(kl), rel=1e-3, abs=1e-6)
    assert report["kl_max"] == pytest.approx(max(kl), rel=1e-3, abs=1e-6)
    assert report["kl_max"] > 1e-5, "the gate must vary for this comparison to mean something"
    assert report.get("distance") == {"choice": "EMD", "nominal": "TV", "chat": None}[kind]
    if distances:
        assert report["emd_max"] == pytest.approx(max(distances), rel=1e-3, abs=1e-6)


def test_lora_refuses_what_makes_no_sense(tmp_path, run, tiny_llama, tiny_encoder) -> None:
    with pytest.raises(ConfigError, match="at least one --profile"):
        write_lora(run[0], [], tmp_path / "out")
    with pytest.raises(ConfigError, match="--calibration is 0"):
        write_lora(run[0], PROFILES, tmp_path / "out", prompts=0)
    folder, _, _ = make_run(tmp_path / "runs" / "mix", tiny_llama, tiny_encoder, {"method": "mixlora"})
    with pytest.raises(ConfigError, match="takes no profiles"):
        write_lora(folder, PROFILES, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_have_the_names_that_were_given_and_many_have_one_summary(tmp_path, run, launch) -> None:
    """Each adapter of many is the one that is written alone; the summary is that of their rows."""
    countries = ["Norway", "Jordan", "Ghana"]
    lines = [json.dumps({"profile": {"country": name}, "name": f"{name}_1"}) for name in countries]
    (tmp_path / "people.jsonl").write_text("\n".join(lines) + "\n")
    words = ["export", "--run", str(run[0]), "--format", "lora"]
    profile = ["--profile", '{"country": "Chile"}', "--name", "chile"]
    done = launch(*words, *profile, "--profiles", str(tmp_path / "people.jsonl"), "--out", str(tmp_path / "many"))
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "many" / "report.json").read_text())
    names = ["chile", *(f"{name}_1" for name in countries)]
    assert [row["name"] for row in report["profiles"]] == names
    assert {place.name for place in (tmp_path / "many").iterdir()} == {*names, "report.json"}
    for name, country in zip(names[1:], countries, strict=True):
        alone = tmp_path / f"alone-{country}"
        write_lora(run[0], [{"country": country}], alone)
        one, other = (
            load_file(place / "adapter_model.safetensors") for place in (alone / "profile-1", tmp_path / "many" / name)
        )
        assert one.keys() == other.keys()
        for tensor in one:  # the encoder rounds otherwise in a batch of several
            torch.testing.assert_close(one[tensor], other[tensor], rtol=1e-5, atol=1e-6)
    rows, summary = report["profiles"], report["summary"]
    assert (summary["adapters"], summary["exact"], summary["max_lora_rank"]) == (4, 0, 8)
    assert max(row["rank"] for row in rows) == 8
    for name, number in (
        ("kl_mean", sum(row["kl_mean"] for row in rows) / 4),
        ("emd_max", max(row["emd_max"] for row in rows)),
    ):
        assert summary[name] == pytest.approx(number, rel=1e-12)
    assert f"--enable-lora --max-lora-rank 8 --lora-modules chile={tmp_path}/many/chile Norway_1=" in done.out
    assert f"all 4 adapters: 0 exact; of the others KL {summary['kl_mean']:.4f}" in done.out


@pytest.mark.parametrize(("rank", "option"), [(1, 1), (2, 8), (64, 64), (65, 128), (257, 320), (513, None)])
def test_the_summary_names_the_smallest_option_of_vllm_that_takes_every_adapter(rank, option) -> None:
    rows = [{"name": "a", "exact": True, "rank": 1}, {"name": "b", "exact": True, "rank": rank}]
    assert summary(rows).get("max_lora_rank") == option


def test_of_many_adapters_those_that_lose_most_are_shown(tmp_path, run, launch) -> None:
    lines = [json.dumps({"profile": f"Somebody with number {number}."}) for number in range(21)]
    (tmp_path / "people.jsonl").write_text("\n".join(lines))
    words = ["--run", str(run[0]), "--format", "lora", "--calibration", "2", "--out", str(tmp_path / "out")]
    done = launch("export", *words, "--profiles", str(tmp_path / "people.jsonl"))
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["profiles"]
    best = min(rows, key=lambda row: row["kl_mean"])["name"]
    shown = set(re.findall(r"profile-\d+(?= )", done.out.split("for vLLM")[0]))
    assert shown == {row["name"] for row in rows} - {best}
    assert "(and 17 more)" in done.out


@pytest.mark.parametrize("variant", AUTHORS)
def test_the_authors_checkpoints_give_the_same_logits(variant, tmp_path, backbones, packages) -> None:
    backbone = backbones["llama", False]
    theirs = write_authors_checkpoint(tmp_path / "theirs", backbone, **AUTHORS[variant])
    ours = load_exported(write_hf(read_reference(tmp_path / "theirs", str(backbone)), tmp_path / "ours"))
    width = AUTHORS[variant].get("profile_dim", 6)
    embeddings = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
    who = {"profile_embeddings": embeddings} if width else {}
    with torch.no_grad():
        found = ours(**BATCH, **who).logits
        bare = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)(**BATCH).logits
    for row in range(3):
        real = MASK[row] == 1
        expected = theirs(IDS[row : row + 1, real], embeddings[row])
        torch.testing.assert_close(found[row][real], expected, rtol=1e-5, atol=1e-5)
        assert (expected - bare[row][real]).abs().max() > 1e-2
    if width:
        with pytest.raises(ModelError, match="profile_embeddings"):
            ours(**BATCH, profiles=PROFILES)


def test_an_imported_checkpoint_with_an_encoder_embeds_profiles_as_the_authors_code_does(
    tmp_path, backbones, tiny_encoder
) -> None:
    """Their sentence, at most 128 tokens, mean of all, not normalised: logits of their equations and vectors."""
    from transformers import AutoModel, AutoTokenizer

    theirs = write_authors_checkpoint(
        tmp_path / "theirs", backbones["llama", False], **AUTHORS["shared-a-mlp"], profile_dim=16
    )
    trained = read_reference(tmp_path / "theirs", str(backbones["llama", False]), str(tiny_encoder))
    folder = write_hf(trained, tmp_path / "ours")
    about = json.loads((folder / "adapter_config.json").read_text())["profiles"]
    assert {key: about[key] for key in ("template", "pooling", "normalise", "max_tokens")} == {
        "template": "authors", "pooling": "mean-all", "normalise": False, "max_tokens": 128,
    }  # fmt: skip
    profiles = {
        "You are a person from Egypt, age group: 16-24 years old, gender: Male, education: Unknown, "
        "marital status: Single, "
        "religion: Muslim, ethnicity: EG: Coptic, employment: Unemployed.": {
            "country": "Egypt", "age_group": "16-24 years", "gender": "Male", "marital_status": "Single",
            "religion": "Muslim",
            "ethnicity": "EG: Coptic", "employment": "Unemployed",
        },
        "You are a person from Unknown, age group: 38, gender: Unknown, education: Unknown, marital status: Unknown, "
        "religion: Unknown, ethnicity: Unknown, employment: Unknown.": {"age": 38},
        "Age: 34, Gender: Woman": "Age: 34, Gender: Woman",
    }  # fmt: skip
    tokenizer, encoder = AutoTokenizer.from_pretrained(tiny_encoder), AutoModel.from_pretrained(tiny_encoder).eval()
    with torch.no_grad():
        vectors = []
        for sentence in profiles:
            tokens = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=128)
            vectors.append(encoder(**tokens).last_hidden_state.mean(dim=1)[0])
        model = load_exported(folder)
        torch.testing.assert_close(
            model.embed_profiles(list(profiles.values())), torch.stack(vectors), rtol=1e-5, atol=1e-6
        )
        found = model(**BATCH, profiles=list(profiles.values())).logits
    for row in range(3):
        real = MASK[row] == 1
        torch.testing.assert_close(
            found[row][real], theirs(IDS[row : row + 1, real], vectors[row]), rtol=1e-5, atol=1e-5
        )
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config | {"num_encoder_proj_mlp_layers": 2}))
    with pytest.raises(ModelError, match=r"projection after the encoder.*leave --encoder out"):
        read_reference(tmp_path / "theirs", str(backbones["llama", False]), str(tiny_encoder))


def test_bad_checkpoints_of_the_authors_are_named(tmp_path, backbones, tiny_llama, tiny_encoder) -> None:
    backbone = backbones["llama", False]
    write_authors_checkpoint(tmp_path / "good", backbone, **AUTHORS["shared-a-mlp"])
    about = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")

    def broken(name: str, change_config=None, change_tensors=None) -> Path:
        config, state = copy.deepcopy(about), dict(tensors)
        if change_config:
            change_config(config)
        if change_tensors:
            change_tensors(state)
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        save_file(state, tmp_path / name / "adapter_model.safetensors")
        return tmp_path / name

    first = "model.layers.0.self_attn.q_proj"
    cases: list[tuple[Path, type[CumaError], str]] = [
        (tmp_path / "missing", CheckpointError, "adapter_config.json is missing"),
        (broken("lora", lambda c: c.update(peft_type="LORA")), CheckpointError, "type 'LORA'"),
        (broken("no-rank", lambda c: c.pop("lora_r")), CheckpointError, "lacks lora_r"),
        (broken("dtype", lambda c: c.update(torch_dtype="int8")), CheckpointError, "torch_dtype is 'int8'"),
        (broken("top-k", lambda c: c.update(top_k=9)), CheckpointError, "top_k is 9"),
        (broken("no-expert", None, lambda t: t.pop(f"{first}.lora_b.2")), ModelError, f"lacks {first}.lora_b.2"),
        (broken("flags", lambda c: c.update(share_router_for_qkv=False)), ModelError, "holds 4 routers, but .* make 6"),
        (
            broken("width", lambda c: c.update(demographic_embed_dim=9)),
            ModelError,
            "reads 38 features; .* it would be 41",
        ),
        (broken("rank", lambda c: c.update(lora_r=2)), ModelError, "has shape"),
        (
            broken("extra", None, lambda t: t.update({"model.layers.7.self_attn.q_proj.lora_a": torch.ones(1)})),
            ModelError,
            "layers.7",
        ),
    ]
    for folder, kind, message in cases:
        with pytest.raises(kind, match=message):
            read_reference(folder, str(backbone))
    (tmp_path / "rank" / "adapter_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read_reference(tmp_path / "rank", str(backbone))
    with pytest.raises(ModelError, match="width 16; the checkpoint's adapters take 6"):
        read_reference(tmp_path / "good", str(backbone), str(tiny_encoder))


def test_the_command_writes_every_format(tmp_path, run, backbones, launch) -> None:
    mine = str(run[0])
    assert launch("export", "--run", mine, "--format", "hf-merged-repo", "--out", str(tmp_path / "merged")).code == 0
    assert (tmp_path / "merged" / "base" / "model.safetensors").is_file()
    done = launch(
        "export",
        "--run",
        mine,
        "--format",
        "lora",
        "--profile",
        '{"country": "Norway"}',
        "--out",
        str(tmp_path / "lora"),
    )
    assert done.code == 0
    assert "profile-1: rank" in done.out
    assert "KL" in done.out
    assert "Norway" not in done.out
    backbone = str(backbones["llama", False])
    write_authors_checkpoint(tmp_path / "theirs", Path(backbone), **AUTHORS["shared-a-mlp"])
    reference = ["--from-reference", str(tmp_path / "theirs"), "--base", backbone]
    assert launch("export", *reference, "--format", "hf", "--out", str(tmp_path / "ours")).code == 0
    assert load_exported(tmp_path / "ours").config.shared_a


MISTAKES = {
    "json": (["--run", "{run}", "--format", "lora", "--profile", "{broken"], "--profile is broken JSON"),
    "no-run": (["--run", "{tmp}", "--format", "hf"], "is no run folder"),
    "no-step": (["--run", "{run}", "--step", "99", "--format", "hf"], "no checkpoint of step 99; it has 7"),
    "nothing": (["--format", "hf"], "one of --run"),
    "no-base": (["--from-reference", "{run}", "--format", "hf"], "--from-reference needs --base"),
    "base-of-a-run": (
        ["--run", "{run}", "--base", "{run}", "--format", "hf"],
        "--base and --encoder belong to --from-reference",
    ),
    "reference-lora": (
        ["--from-reference", "{run}", "--base", "{run}", "--format", "lora"],
        "--format lora needs --run",
    ),
    "a-name-too-few": (
        ["--run", "{run}", "--format", "lora", "--profile", "A", "--profile", "B", "--name", "a"],
        "1 --name for 2 --profile",
    ),
    "a-name-twice": (
        ["--run", "{run}", "--format", "lora", "--profile", "A", "--profile", "B", "--name", "a", "--name", "A"],
        "the name 'A' stands twice",
    ),
    "a-name-with-a-path": (
        ["--run", "{run}", "--format", "lora", "--profile", "A", "--name", "../a"],
        "the name '../a' cannot be the name of a folder",
    ),
    "no-profiles": (["--run", "{run}", "--format", "lora", "--profiles", "{tmp}/none"], "none cannot be read: No such"),
    "hf-profile": (
        ["--run", "{run}", "--format", "hf", "--profile", "A woman."],
        "--profile and --profiles belong to --format lora",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_on_the_command_line_are_one_line_and_leave_nothing(mistake, tmp_path, run, launch) -> None:
    arguments, part = MISTAKES[mistake]
    filled = [argument.replace("{run}", str(run[0])).replace("{tmp}", str(tmp_path)) for argument in arguments]
    done = launch("export", *filled, "--out", str(tmp_path / "out"))
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert done.err.startswith("error: ")
    assert part in done.err
    assert list(tmp_path.iterdir()) == []


PROFILE_LINES = {
    "empty": ("\n", "is empty"),
    "broken": ('{"profile": {"country": "Atlantis"}\n', "line 1 is broken JSON"),
    "fields-alone": ('{"profile": "A"}\n{"country": "Atlantis"}', "line 2: there is no key 'country'"),
    "no-fields": ('{"profile": 3}', "line 1: profile must be an object of fields or a sentence"),
    "number-as-name": ('{"profile": "A", "name": 3}', "line 1: name is 3, expected a text"),
    "some-names": ('{"profile": "A", "name": "a"}\n{"profile": "B"}', "1 of 2 profiles have a name"),
}


@pytest.mark.parametrize("mistake", PROFILE_LINES)
def test_mistakes_in_a_file_of_profiles_are_one_line_and_leave_nothing(mistake, tmp_path, run, launch) -> None:
    text, part = PROFILE_LINES[mistake]
    (tmp_path / "people.jsonl").write_text(text)
    words = ["--run", str(run[0]), "--format", "lora", "--profiles", str(tmp_path / "people.jsonl")]
    done = launch("export", *words, "--out", str(tmp_path / "out"))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert part in done.err
    assert "Atlantis" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.multirank
@pytest.mark.sixteen_bit
def test_what_two_sharded_ranks_trained_answers_as_their_engine_did(
    tmp_path, tiny_llama, tiny_encoder, packages
) -> None:
    """2 ranks, sharded backbone, ep 2 -> hf -> a fresh environment: equal words and logits to 1e-5 in float32.

    In bfloat16 the engine adds what two ranks made in another order than one process. Two answers may be as far apart
    as the engine's own rounding put it from the same model in float32.
    """
    from ranks import run as run_ranks
    from small_runs import recipe

    from cuma_ds.recipe import load_config

    parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
    recipes = {
        dtype: recipe(
            tmp_path,
            tiny_llama,
            tiny_encoder,
            dtype,
            parallel=parallel,
            model={"path": str(tiny_llama), "dtype": dtype},
        )
        for dtype in ("float32", "bfloat16")
    }
    save_file(
        {**BATCH, "embeddings": torch.randn(3, 16, generator=torch.Generator().manual_seed(1)) / 4}, tmp_path / "inputs"
    )
    script = [
        str(ROOT / "tests" / "helpers" / "train_and_ask.py"),
        json.dumps([str(path) for path in recipes.values()]),
        str(tmp_path / "inputs"),
    ]
    for code, output in run_ranks(2, script):
        assert code == 0, output[-3000:]
    run_dirs = {dtype: load_config(path).run_dir for dtype, path in recipes.items()}
    outs = {dtype: write_hf(read_run(run_dir), tmp_path / f"out-{dtype}") for dtype, run_dir in run_dirs.items()}
    (tmp_path / "script.py").write_text(FRESH)
    done = run_fresh(packages, tmp_path / "script.py", str(tmp_path / "inputs"), *map(str, outs.values()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results, real = load_file(tmp_path / "inputs.out"), MASK.bool()
    asked = {dtype: load_file(run_dirs[dtype] / "asked.safetensors") for dtype in outs}
    ours = results[f"{outs['float32']}/logits"][real]
    torch.testing.assert_close(ours, asked["float32"]["logits"][real], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[f"{outs['float32']}/words"], asked["float32"]["words"])
    ours, engine = results[f"{outs['bfloat16']}/logits"][real], asked["bfloat16"]["logits"][real]
    rounding = (engine - results[f"{outs['bfloat16']}/exact"][real]).abs()
    assert rounding.max() < 16 * torch.finfo(torch.bfloat16).eps * engine.abs().max()
    assert (ours - engine).abs().max() <= 1.5 * rounding.max()
    assert (ours - engine).square().mean() <= 1.5 * rounding.square().mean()
