"""Sentences become vectors in parts of a fixed make-up: killed work goes on, and several ranks share it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cuma_ds.files import write_atomically

# Sentences that are embedded and stored at once; what a kill costs each thread at most.
_PART = 256


class Encoder(Protocol):
    """What embedding needs of an encoder."""

    @property
    def fingerprint(self) -> str: ...

    def __call__(self, sentences: list[str]) -> Tensor: ...


class EmbeddingStore:
    """Vectors of one encoder in a folder, by content.

    Names and contents of its files are hashes of (encoder, sentence) and vectors, never profile text. Several processes
    may read and write it at once.

    Args:
        folder: may hold the vectors of several encoders; default: the user's cache folder.
        fingerprint: of the encoder.
    """

    def __init__(self, folder: str | Path | None, fingerprint: str) -> None:
        place = Path(folder).expanduser() if folder else default_cache_dir()
        self._folder, self._fingerprint = place / fingerprint[:32], fingerprint

    def read(self, sentences: Iterable[str]) -> dict[str, Tensor]:
        """The vectors [P] of those sentences that are there. A damaged file is removed, with a warning."""
        wanted = {self._key(sentence): sentence for sentence in sentences}
        known: dict[str, Tensor] = {}
        for shard in sorted(self._folder.glob("*.safetensors")):
            try:
                keys, vectors_MP = _read_shard(shard)
            except OSError:
                continue  # another process has removed it, or it is not ours to read: its sentences are embedded again
            except SafetensorError:
                warnings.warn(f"{shard} is damaged; what it held is embedded again", stacklevel=2)
                with contextlib.suppress(OSError):
                    shard.unlink()
                continue
            known.update((wanted[key], vector) for key, vector in zip(keys, vectors_MP, strict=True) if key in wanted)
        return known

    def add(self, vectors: Mapping[str, Tensor]) -> None:
        """Store vectors [P] by sentence, all of them or none."""
        if not vectors:
            return
        keys = b"".join(map(self._key, vectors))
        tensors = {
            "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(len(vectors), -1),
            "embeddings": torch.stack(list(vectors.values())),
        }
        name = hashlib.sha256(keys).hexdigest()[:32]
        write_atomically(
            self._folder / f"{name}.safetensors", save(tensors, metadata={"sha256": _sha256(*tensors.values())})
        )

    def _key(self, sentence: str) -> bytes:
        return hashlib.sha256(f"{self._fingerprint}\0{sentence}".encode()).digest()


def embed(
    sentences: Sequence[str],
    encoder: Encoder,
    store: EmbeddingStore,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Embed what the store does not hold, one rank's share of it.

    Sentences of like length form a part, whatever the number of ranks and threads. Each CPU thread that torch may use
    works on a part of its own with one thread, and stores it when it is done. So the bits of a vector do not depend on
    ranks, threads or a kill.

    Args:
        sentences: of all ranks, in any order.
        encoder: may be called by several threads at once.
        store: is read first and gets each part.
        rank, world: this rank embeds each ``world``-th part.
        progress: told (sentences done, in all) of this share after each part.

    Returns:
        The vectors [P] float32 by sentence: those of the store and of this share.
    """
    distinct = sorted(set(sentences), key=lambda sentence: (len(sentence), sentence))
    parts = [distinct[start : start + _PART] for start in range(0, len(distinct), _PART)][rank::world]
    known = store.read(distinct)
    missing = [[sentence for sentence in part if sentence not in known] for part in parts]

    def work(part: list[str]) -> dict[str, Tensor]:
        vectors = dict(zip(part, encoder(part).to(torch.float32).cpu(), strict=True))
        store.add(vectors)
        return vectors

    total = sum(map(len, parts))
    done = total - sum(map(len, missing))
    missing = [part for part in missing if part]
    with _one_thread_each(len(missing)) as pool:
        for vectors in pool.map(work, missing):
            known |= vectors
            done += len(vectors)
            if progress is not None:
                progress(done, total)
    return known


def default_cache_dir() -> Path:
    """Where embeddings are kept unless a recipe says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cuma-ds" / "profiles"


_threads_changed = threading.Lock()


@contextlib.contextmanager
def _one_thread_each(tasks: int) -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads for one operator, and at most one per task. Each operator gets one thread,
    also outside of the pool. Work that has not begun is given up on an error.
    """
    with _threads_changed:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(max(1, min(threads, tasks)), initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _read_shard(shard: Path) -> tuple[list[bytes], Tensor]:
    """Keys and vectors. What release 0.1.0 wrote has no hash, and is taken as it is.

    Raises:
        SafetensorError: its content has changed since it was written.
        OSError: it cannot be read.
    """
    with safe_open(str(shard), framework="pt") as file:
        keys, vectors_MP = file.get_tensor("keys"), file.get_tensor("embeddings")
        sha256 = (file.metadata() or {}).get("sha256")
    if sha256 is not None and sha256 != _sha256(keys, vectors_MP):
        raise SafetensorError("another content")
    return list(map(bytes, keys.numpy())), vectors_MP


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
