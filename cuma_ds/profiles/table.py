"""The table of profiles: each distinct sentence is embedded once, ever, and looked up by row afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from cuma_ds.errors import DataError
from cuma_ds.files import first_line, write_atomically
from cuma_ds.profiles.embedding import EmbeddingStore, Encoder, embed

_FORMAT = "cuma-profile-table-2"
# Of release 0.1.0: the same without a hash of the content.
_UNHASHED = "cuma-profile-table-1"


@dataclass(frozen=True)
class ProfileTable:
    """Sentences and their raw embeddings, row by row.

    Attributes:
        sentences: N profile sentences.
        embeddings: [N, P] float32, straight from the encoder.
        fingerprint: of the encoder that made them.
    """

    sentences: list[str]
    embeddings: Tensor
    fingerprint: str = ""

    @classmethod
    def build(
        cls,
        sentences: Sequence[str],
        encoder: Encoder,
        cache_dir: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ProfileTable:
        """Embed ``sentences``, asking the encoder only for those that the cache does not hold.

        Args:
            sentences: rows of the table; equal sentences are embedded once.
            encoder: a :class:`~cuma_ds.profiles.encoder.ProfileEncoder`.
            cache_dir: folder of the :class:`~cuma_ds.profiles.embedding.EmbeddingStore`; what a killed process had
                embedded is in it.
            progress: told (sentences done, in all) now and then.
        """
        rows = list(sentences)
        if not rows:
            raise DataError("there are no profiles to embed; at least one is needed")
        store = EmbeddingStore(cache_dir, encoder.fingerprint)
        known = embed(rows, encoder, store, progress=progress)
        return cls(rows, torch.stack([known[sentence] for sentence in rows]), encoder.fingerprint)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of sentences, embeddings and the encoder's fingerprint."""
        digest = hashlib.sha256(json.dumps([self.sentences, list(self.embeddings.shape), self.fingerprint]).encode())
        digest.update(self.embeddings.contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, all of it or nothing."""
        text = torch.frombuffer(bytearray(json.dumps(self.sentences, ensure_ascii=False).encode()), dtype=torch.uint8)
        tensors = {"embeddings": self.embeddings.contiguous(), "sentences": text}
        metadata = {"format": _FORMAT, "fingerprint": self.fingerprint, "sha256": self.sha256}
        write_atomically(Path(path), to_bytes(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> ProfileTable:
        """Read what :meth:`save` wrote; tables of release 0.1.0 hold no hash, and their content is taken as it is.

        Raises:
            DataError: the file is missing, damaged or something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") not in (_FORMAT, _UNHASHED):
                    raise DataError(f"{path} is not a table of profiles in format {_FORMAT}")
                sentences = json.loads(bytes(file.get_tensor("sentences").numpy()).decode())
                table = cls(sentences, file.get_tensor("embeddings"), metadata.get("fingerprint", ""))
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise DataError(f"cannot read the table of profiles {path}: {first_line(error)}") from None
        if metadata["format"] == _FORMAT and metadata.get("sha256") != table.sha256:
            raise DataError(
                f"the table of profiles {path} is damaged: its content has changed since it was written; "
                "restore or remove it"
            )
        return table
