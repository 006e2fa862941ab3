"""Content hashes: of files, of JSON documents that carry their own, and of model folders too large to be read whole."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from transformers.utils import cached_file

from cuma_ds.errors import ModelError
from cuma_ds.files import is_plain_name

# The key of a document under which its own hash stands.
SEAL = "sealed"
# A fingerprint reads at most so many bytes of weights, and at most so many of one tensor, in blocks spread over it.
_SAMPLED_BYTES = 64 * 2**20
_TENSOR_BYTES = 64 * 2**10
_BLOCK_BYTES = 4096
# Keys of config.json and tokenizer_config.json that change no answer, beside token ids and private keys.
_NOT_IDENTITY = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "auto_map",
    "name_or_path",
    "processor_class",
}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip


class Identity(TypedDict, total=False):
    """What a run was started with.

    Attributes:
        backbone: as :func:`model_fingerprint` returns it.
        encoder: fingerprint of the sentence encoder; None for methods without profiles.
        source: SHA-256 of each file the data was made of, by its name.
        data: hash over the prepared data.
        profiles: hash of the embedded profiles; None for methods without profiles.
        start: hash of the trained tensors that the run started from; left out for runs without ``model.init_from``.
        fingerprint_0_1_0: the fingerprint that release 0.1.0 gave the recipe, in runs that it started.
        sealed: see :func:`sealed`.
    """

    backbone: dict[str, str]
    encoder: str | None
    source: dict[str, str]
    data: str
    profiles: str | None
    start: str
    fingerprint_0_1_0: str
    sealed: str


def file_sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_sha256(document: object) -> str:
    """Hex digest of what a JSON document says, whatever its layout and the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def sealed(document: Mapping[str, object]) -> dict[str, object]:
    """The document with a hash of everything else it says."""
    rest = {key: value for key, value in document.items() if key != SEAL}
    return {**rest, SEAL: content_sha256(rest)}


def seal_holds(document: Mapping[str, object]) -> bool:
    """Whether a document still says what it said when it was sealed; false without a seal."""
    return document.get(SEAL) == sealed(document)[SEAL]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file: its dtype and shape as the header has them, and where its bytes are."""

    about: dict[str, object]
    file: Path
    start: int
    size: int


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, from its header alone.

    Raises:
        ModelError: the file is damaged, or is something else.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, end = entry.pop("data_offsets")
            if 8 + length + end > file.stat().st_size:
                raise ValueError
            found[name] = StoredTensor(entry, file, 8 + length + start, end - start)
        return found
    except (ValueError, KeyError, AttributeError, struct.error):
        raise ModelError(f"{file} is no readable safetensors file") from None


def weight_files(path: str | Path) -> list[Path]:
    """The files a model's weights are read from, by the rule of transformers where a folder holds several layouts.

    That is ``model.safetensors``, else the safetensors index, else ``pytorch_model.bin``, else its index.

    Args:
        path: a folder, or a hub id that is brought to the local hub cache.

    Returns:
        The files in order of their names; none where a folder holds no weights of these kinds.

    Raises:
        ModelError: an index is damaged or names a file that is missing.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (file := model_file(path, single)) is not None:
            return [file]
        if (index := model_file(path, f"{single}.index.json")) is not None:
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ModelError(f"{index} is damaged: it names no weight files") from None
            if outside := [name for name in names if not is_plain_name(name)]:
                raise ModelError(f"{index} is damaged: it names {outside[0]!r}, which is no file of its folder")
            files = {name: model_file(path, name) for name in names}
            if missing := [name for name, file in files.items() if file is None]:
                raise ModelError(f"{path} is incomplete: {missing[0]} is missing, which {index.name} names")
            return [file for file in files.values() if file is not None]
    return []


def model_file(path: str | Path, name: str) -> Path | None:
    """One file of a model folder or hub id; None where there is no such file."""
    place = Path(path).expanduser()
    found = cached_file(str(place if place.is_dir() else path), name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def model_fingerprint(path: str | Path) -> dict[str, str]:
    """Hashes that tell one model from another. They do not depend on the folder's place or name, or on how the weights
    are cut into files.

    ``weights`` hashes the name, dtype and shape of every tensor and a sample of its bytes: all of a small tensor, else
    blocks spread evenly from its first byte to its last. At most 64 MiB are read. A change of a few numbers of a large
    tensor can go unnoticed; other training, another release or another precision cannot. ``.bin`` files are sampled as
    a whole, with their end, which holds checksums of all tensors. ``config`` hashes the content of config.json,
    ``tokenizer`` the tokenizer's files.

    Args:
        path: a folder, or a hub id that is brought to the local hub cache.

    Returns:
        Hex digests by the names above; those of files that are not there are left out.

    Raises:
        ModelError: a weight file is missing or damaged, or a configuration is no JSON.
        OSError: there is no such model.
    """
    digests = {
        "weights": _weights_sha256(weight_files(path)),
        "config": _settings_sha256(model_file(path, "config.json")),
    }
    parts = {name: _settings_sha256(file) for name in _TOKENIZER_FILES if (file := model_file(path, name)) is not None}
    return {
        name: digest
        for name, digest in {**digests, "tokenizer": content_sha256(parts) if parts else ""}.items()
        if digest
    }


def base_fact(config: object, name: str) -> Any:
    """A value of a transformers configuration (of its text part, for models with several); None where there is none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config if name == "model_type" else text, name, None)


def changed_part(path: str | Path, known: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What of a model differs from a known fingerprint, in words; None where nothing known does."""
    words = {"weights": "weights", "config": "configuration (config.json)", "tokenizer": "tokenizer or chat template"}
    changed = [word for name, word in words.items() if name in known and known[name] != now.get(name)]
    return (
        f"{path} holds another {' and another '.join(changed)}".replace("another weights", "other weights")
        if changed
        else None
    )


def _weights_sha256(files: Sequence[Path]) -> str:
    """Of every tensor's name, dtype, shape and a sample of its bytes; empty without files."""
    pieces: dict[str, StoredTensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            pieces |= stored_tensors(file)
        else:
            size = file.stat().st_size
            end = min(size, _TENSOR_BYTES)
            pieces |= {
                file.name: StoredTensor({}, file, 0, size),
                f"{file.name} end": StoredTensor({}, file, size - end, end),
            }
    digest = hashlib.sha256()
    with ExitStack() as stack:
        streams = {file: stack.enter_context(file.open("rb")) for file in files}
        for name in sorted(pieces):
            piece = pieces[name]
            digest.update(json.dumps([name, piece.about, piece.size], sort_keys=True).encode())
            most = _SAMPLED_BYTES // len(pieces)
            for offset, length in _blocks(piece.size, most if not piece.about else min(most, _TENSOR_BYTES)):
                streams[piece.file].seek(piece.start + offset)
                digest.update(streams[piece.file].read(length))
    return digest.hexdigest() if files else ""


def _blocks(size: int, most: int) -> list[tuple[int, int]]:
    """Offset and length of the blocks read of ``size`` bytes: one of all, or several of ``most`` together."""
    if size <= most:
        return [(0, size)]
    count = max(2, most // _BLOCK_BYTES)
    length = max(1, most // count)
    return [(place * (size - length) // (count - 1), length) for place in range(count)]


def _settings_sha256(file: Path | None) -> str:
    """Of a file; of JSON settings only what they say, without keys that change no answer. Empty without a file."""
    if file is None:
        return ""
    if file.name not in ("config.json", "tokenizer_config.json"):
        return file_sha256(file)
    try:
        return content_sha256(_that_matters(json.loads(file.read_text(encoding="utf-8"))))
    except ValueError:
        raise ModelError(f"{file} is not JSON in UTF-8") from None


def _that_matters(settings: object) -> object:
    if not isinstance(settings, dict):
        return settings
    kept = {key: value for key, value in settings.items() if key not in _NOT_IDENTITY and not key.startswith("_")}
    return {key: _that_matters(value) for key, value in kept.items() if not key.endswith("_token_id")}
