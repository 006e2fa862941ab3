"""Safetensors written piece by piece: adapters are not held twice, base weights are not held at all."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cuma_ds.errors import ModelError
from cuma_ds.identity import StoredTensor, stored_tensors, weight_files

_CHUNK = 1 << 20


def copy_weights(source: Path, target: Path, shard_bytes: int = 5 * 10**9) -> int:
    """Copy the weights of a model folder into ``target`` as ``model[-I-of-N].safetensors``; values and dtypes stay.

    Args:
        source: a Hugging Face model folder with safetensors.
        target: an existing folder.
        shard_bytes: most bytes of tensors per file (a single larger tensor gets a file of its own).

    Returns:
        The number of shards.

    Raises:
        ModelError: there are no safetensors, or a file is missing or damaged.
    """
    files = weight_files(source)
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise ModelError(
            f"{source} holds no model.safetensors; hf-merged-repo needs a base model with safetensors weights"
        )
    tensors = {name: stored for file in files for name, stored in stored_tensors(file).items()}
    shards: list[dict[str, StoredTensor]] = [{}]
    for name, stored in tensors.items():
        if shards[-1] and sum(other.size for other in shards[-1].values()) + stored.size > shard_bytes:
            shards.append({})
        shards[-1][name] = stored
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        _write(target / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        about = {"metadata": {"total_size": sum(stored.size for stored in tensors.values())}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return len(shards)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write float32 tensors to a new safetensors file, one after another: nothing is held twice."""
    abouts = {name: {"dtype": "F32", "shape": list(tensor.shape)} for name, tensor in tensors.items()}
    with path.open("xb") as out:
        out.write(_header(abouts, {name: tensor.numel() * 4 for name, tensor in tensors.items()}, metadata))
        for tensor in tensors.values():
            out.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)


def _write(path: Path, tensors: dict[str, StoredTensor]) -> None:
    with path.open("xb") as out:
        sizes = {name: stored.size for name, stored in tensors.items()}
        out.write(_header({name: stored.about for name, stored in tensors.items()}, sizes, {"format": "pt"}))
        for stored in tensors.values():
            with stored.file.open("rb") as stream:
                stream.seek(stored.start)
                _copy(stream, out, stored.size)


def _header(abouts: Mapping[str, Mapping[str, object]], sizes: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file whose tensors follow in this order without gaps."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, about in abouts.items():
        header[name] = {**about, "data_offsets": [offset, offset + sizes[name]]}
        offset += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy(stream: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        chunk = stream.read(min(size, _CHUNK))
        out.write(chunk)
        size -= len(chunk)


def copy_model_files(source: Path, target: Path) -> None:
    """Copy what describes a model beside its weights: configurations, and code where the model brings its own."""
    for pattern in ("config.json", "generation_config.json", "*.py"):
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
