"""Trained adapters as a folder that ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` loads.

The folder holds::

    config.json, modeling_cuma.py    what transformers needs; the code is the package's own, in one file
    adapter_config.json              the adapters, the base model, how profiles are embedded, how prompts were written
    adapter_model.safetensors        routers, experts (float32, full expert dimension), profile standardisation
    generation_config.json           which tokens end an answer; greedy decoding
    tokenizer files, README.md       the base model's tokenizer; a model card written from the run
    base/                            only in ``hf-merged-repo``: the base model itself
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

import cuma_ds
from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.config import ModelSection
from cuma_ds.data.rendering import PROMPT_KEYS, Renderer
from cuma_ds.errors import CheckpointError, ModelError
from cuma_ds.export.card import model_card, run_section
from cuma_ds.export.source import modeling_source
from cuma_ds.export.weights import copy_model_files, copy_weights, save_tensors
from cuma_ds.files import atomic_folder, first_line, full_path
from cuma_ds.identity import base_fact, file_sha256
from cuma_ds.inference.decoding import folder_generation, settled_generation
from cuma_ds.inference.modeling import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FACTS,
    BASE_FOLDER,
    EXPORT_FORMAT,
    Export,
    ProfileFacts,
    settings_sha256,
)
from cuma_ds.inference.open import profile_facts
from cuma_ds.parallel.backbone import backbone_fingerprint, load_tokenizer, skeleton
from cuma_ds.runs import Run

_CONFIG = {
    "model_type": "cuma",
    "architectures": ["CumaForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_cuma.CumaExportConfig",
        "AutoModelForCausalLM": "modeling_cuma.CumaForCausalLM",
    },
}


@dataclass(frozen=True)
class Trained:
    """Adapters ready to be exported, from a run or from the authors' format.

    Attributes:
        adapters: with ``profile_dim`` set.
        state: as :meth:`CumaModel.load_adapter_state` takes it.
        base: the frozen model they belong to.
        profiles: encoder (or None), its fingerprint, template, and the field names of the training profiles.
        prompt: how training wrote prompts, :data:`PROMPT_KEYS` of the recipe's section ``data``.
        story: where they come from, as Markdown for the model card.
        backbone: fingerprint of the base model in training; the base model's own as it is now where that is not known.
    """

    adapters: CumaConfig
    state: dict[str, Tensor]
    base: ModelSection
    profiles: ProfileFacts
    prompt: dict[str, str | int | bool | None] = field(default_factory=dict)
    story: str = ""
    backbone: dict[str, str] = field(default_factory=dict)


def read_run(run_dir: str | Path, step: int | None = None) -> Trained:
    """The adapters of one checkpoint of a run, without a process group and without the weights of the backbone.

    Args:
        run_dir: a run folder as training leaves it.
        step: which checkpoint; the newest complete one by default.

    Raises:
        CumaError: the folder or the checkpoint cannot be used; says why.
    """
    run = Run.open(run_dir)
    config = run.config()
    trained = run.trained(config, step)
    width = 0 if trained.table is None else trained.table.embeddings.shape[1]
    return Trained(
        adapters=config.adapters.model_copy(update={"profile_dim": width}),
        state=trained.adapters,
        base=config.model,
        profiles=profile_facts(config, trained.data, trained.table),
        prompt={key: getattr(config.data, key) for key in PROMPT_KEYS},
        story=run_section(run.report_folder, config, trained.data, trained.checkpoint.name),
        backbone=trained.identity.get("backbone", {}),
    )


def write_hf(trained: Trained, out: str | Path, merged: bool = False) -> Path:
    """Write the folder, all of it or nothing.

    Args:
        trained: what to export.
        out: a folder that does not exist or is empty.
        merged: also put the base model inside, its safetensors in shards of at most 5 GB.

    Raises:
        CheckpointError: ``out`` cannot be written or is not empty.
        ModelError: the adapters do not fit the base model; names the tensor.
    """
    with output_folder(out) as folder:
        bare = skeleton(trained.base)
        # The skeleton has no memory; this checks every name and shape.
        inject_adapters(bare, trained.adapters).load_adapter_state(trained.state)
        made_by = {"format": "pt", "made_by": f"cuma-ds {cuma_ds.__version__}"}
        save_tensors(folder / ADAPTER_WEIGHTS, trained.state, made_by)
        place = Path(trained.base.path).expanduser()
        export = describe(trained, bare.config)
        export["sha256"] = file_sha256(folder / ADAPTER_WEIGHTS)
        export["settings_sha256"] = settings_sha256(export)
        _dump(folder / ADAPTER_CONFIG, export)
        _dump(folder / "config.json", _CONFIG)
        (folder / "modeling_cuma.py").write_text(modeling_source(), encoding="utf-8")
        renderer = None
        with contextlib.suppress(ModelError):  # without one, the export takes token ids only
            tokenizer = load_tokenizer(trained.base)
            tokenizer.save_pretrained(folder)
            renderer = Renderer(tokenizer, int(trained.prompt.get("max_length") or 2048))
        settled_generation(folder_generation(trained.base.path, bare), bare.config, renderer).save_pretrained(folder)
        if merged:
            if not place.is_dir():
                place = _from_hub(trained.base.path)
            (folder / BASE_FOLDER).mkdir()
            copy_model_files(place, folder / BASE_FOLDER)
            copy_weights(place, folder / BASE_FOLDER)
        (folder / "README.md").write_text(model_card(export, trained.story, place, merged), encoding="utf-8")
    return Path(out)


def describe(trained: Trained, base_config: object) -> Export:
    """The content of ``adapter_config.json``, without the hash of the weights."""
    facts = {name: base_fact(base_config, name) for name in BASE_FACTS}
    fingerprint = trained.backbone or backbone_fingerprint(trained.base)
    # An export brings its own tokenizer.
    facts["fingerprint"] = {name: digest for name, digest in fingerprint.items() if name != "tokenizer"}
    return {
        "peft_type": "CUMA",
        "format_version": EXPORT_FORMAT,
        "base_model_name_or_path": full_path(trained.base.path),
        "adapters": trained.adapters.model_dump(mode="json"),
        "profiles": trained.profiles,
        "prompt": trained.prompt,
        "base": {**facts, "dtype": trained.base.dtype, "trust_remote_code": trained.base.trust_remote_code},
    }


@contextlib.contextmanager
def output_folder(out: str | Path) -> Iterator[Path]:
    """A new folder that takes its place only when everything in it was written.

    Raises:
        CheckpointError: the place is taken by something that is not empty, or cannot be written.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out {out} exists and is not empty; nothing is overwritten, choose another folder")
    try:
        with atomic_folder(out) as folder:
            yield folder
    except OSError as error:
        raise CheckpointError(f"--out {out} cannot be written: {error.strerror or error}") from None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.py", "README.md"]))
    except Exception as error:
        raise ModelError(f"the base model {name} cannot be brought from the hub: {first_line(error)}") from None


def _dump(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
