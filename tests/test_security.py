"""Files that others wrote: no code of theirs runs, and no name in them leads out of their folder."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from ranks import ROOT
from run_folder import make_run
from safetensors.torch import load_file

from cuma_ds.config import ModelSection
from cuma_ds.data.prepared import PreparedData
from cuma_ds.errors import CumaError
from cuma_ds.evaluation.predictions import PREDICTIONS_FILE, read_predictions
from cuma_ds.files import is_plain_name
from cuma_ds.identity import sealed
from cuma_ds.inference.open import open_export, open_run
from cuma_ds.parallel.backbone import load_backbone, load_tokenizer
from cuma_ds.profiles import ProfileEncoder

# What would run code that stands in a file, or in a text.
DANGEROUS = {
    r"\b(c?pickle|dill|joblib|marshal)\.|\bUnpickler\b": (),
    r"\btorch\.load\(": (),
    r"np\.load\((?!.*allow_pickle=False)": (),
    r"\byaml\.(load|full_load|unsafe_load)\((?!.*_Loader)": (),
    r"(?<![\w.])(eval|exec)\(": (),
    r"shell=True|os\.system|os\.popen": (),
    r"\.extractall\(": (),
    r"trust_remote_code=True": ("cuma_ds/export/card.py", "cuma_ds/export/hf.py"),  # what a user may write
}


def test_nothing_that_runs_code_of_files_is_called() -> None:
    found = []
    for file in sorted([*(ROOT / "cuma_ds").rglob("*.py"), *(ROOT / "launchers").rglob("*.py")]):
        name = str(file.relative_to(ROOT))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            found += [
                f"{name}:{number}: {line.strip()}"
                for pattern, allowed in DANGEROUS.items()
                if name not in allowed and re.search(pattern, line)
            ]
    assert not found


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def run(tmp_path, tiny_llama, tiny_encoder) -> Path:
    base, encoder = tmp_path / "base", tmp_path / "encoder"
    shutil.copytree(tiny_llama, base)
    shutil.copytree(tiny_encoder, encoder)
    return make_run(tmp_path / "opinions", base, encoder, {})[0]


@pytest.mark.parametrize("kind", ["backbone", "encoder", "adapters", "predictions", "table"])
def test_a_pickle_is_never_unpickled(kind, run, tmp_path) -> None:
    mark, places = tmp_path / "it-ran", {"backbone": tmp_path / "base", "encoder": tmp_path / "encoder"}
    if kind in places:
        (places[kind] / "model.safetensors").unlink()
        torch.save({"weight": Bomb(mark)}, places[kind] / "pytorch_model.bin")
        load = {
            "backbone": lambda: load_backbone(ModelSection(path=str(places[kind]), dtype="float32")),
            "encoder": lambda: ProfileEncoder(places[kind])("A person."),
        }[kind]
        with pytest.raises(CumaError):
            load()
    elif kind == "predictions":
        (tmp_path / PREDICTIONS_FILE).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(CumaError):
            read_predictions(tmp_path)
    else:
        file = "checkpoints/step-7/shared.safetensors" if kind == "adapters" else "profiles.safetensors"
        (run / file).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(CumaError):
            open_run(run)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "or this test proves nothing"


def test_code_in_a_model_folder_runs_only_when_it_is_asked_for(run, tmp_path) -> None:
    mark = tmp_path / "it-ran"
    base = tmp_path / "base"
    (base / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    config = json.loads((base / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CumaError):
        load_backbone(ModelSection(path=str(base), dtype="float32"))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["modeling_evil.Slow", "modeling_evil.Fast"]}
    tokenizer["tokenizer_class"] = "Evil"
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with contextlib.suppress(CumaError):
        load_tokenizer(ModelSection(path=str(base), dtype="float32"))
    assert not mark.exists()


def test_an_export_runs_no_code_of_its_folder(run, tmp_path, launch) -> None:
    mark, folder = tmp_path / "it-ran", tmp_path / "hf"
    assert launch("export", "--run", str(run), "--format", "hf", "--out", str(folder)).code == 0
    (folder / "modeling_cuma.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    open_export(folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", 5, None])
def test_names_that_lead_out_of_a_folder(name) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")


def write_an_encoder(folder: Path, name: str) -> Path:
    """The encoder, whose weights an index finds elsewhere."""
    encoder, secret = folder / "encoder", folder / "secret-encoder.safetensors"
    if not secret.exists():
        (encoder / "model.safetensors").rename(secret)
        shutil.copy(secret, encoder / "other.safetensors")
    place = str(secret) if name == "ABSOLUTE" else f"../{secret.name}"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(secret), place)}
    (encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    return encoder


@pytest.mark.parametrize("name", ["../secret.safetensors", "ABSOLUTE"])
def test_an_index_of_weights_names_files_of_its_folder_alone(name, run, tmp_path) -> None:
    base, secret = tmp_path / "base", tmp_path / "secret.safetensors"
    (base / "model.safetensors").rename(secret)
    keys = dict.fromkeys(load_file(secret), str(secret) if name == "ABSOLUTE" else name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": keys}))
    for load in (
        lambda: load_backbone(ModelSection(path=str(base), dtype="float32")),
        lambda: open_run(run),
        lambda: ProfileEncoder(write_an_encoder(tmp_path, name))("A person."),
    ):
        with pytest.raises(CumaError, match="which is no file of its folder"):
            load()


def test_a_checkpoint_names_files_of_its_folder_alone(run) -> None:
    folder = run / "checkpoints" / "step-7"
    (folder / "shared.safetensors").rename(run / "elsewhere.safetensors")
    state = json.loads((folder / "state.json").read_text())
    for part in ("files", "sha256"):
        state[part] = {"../../elsewhere.safetensors": state[part]["shared.safetensors"]}
    state.pop("sealed")
    (folder / "state.json").write_text(json.dumps(sealed(state)))
    with pytest.raises(CumaError, match=r"names '../../elsewhere.safetensors', which is no file of its folder"):
        open_run(run)


def test_prepared_data_names_files_of_its_folder_alone(run) -> None:
    manifest = json.loads((run / "data" / "manifest.json").read_text())
    manifest["splits"]["../../x"] = manifest["splits"]["test"]
    manifest.pop("sealed", None)
    (run / "data" / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(CumaError, match="names a split that is no file of its folder"):
        PreparedData.load(run / "data")


def test_what_a_link_points_to_is_never_removed(tmp_path) -> None:
    from cuma_ds.files import remove_leftovers

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f".data.{'0' * 16}").symlink_to(precious)
    remove_leftovers(folder)
    assert list(folder.iterdir()) == []
    assert (precious / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "/tmp/x", "-rf"])
def test_a_run_cannot_be_named_out_of_its_folder(name) -> None:
    from cuma_ds.config import RunSection

    with pytest.raises(ValueError, match="name"):
        RunSection(name=name)


@pytest.mark.parametrize(
    ("packages", "code", "line"),
    [
        ([], 0, "not audited"),
        ([{"name": "a", "skip_reason": "not found"}], 0, "not audited: no vulnerability service could be asked"),
        ([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "x"}], 0, "in 1 packages; 1 not"),
        ([{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}], 1, "known vulnerabilities: a 1 (CVE-1)"),
    ],
)
def test_an_audit_that_asked_nobody_is_not_called_clean(packages, code, line) -> None:
    from known_vulnerabilities import verdict

    found, said = verdict({"dependencies": packages})
    assert found == code
    assert line in said
