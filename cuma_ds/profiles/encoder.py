"""A frozen sentence encoder: sentences in, vectors out; it knows nothing of surveys or adapters."""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cuma_ds.errors import DataError, ModelError
from cuma_ds.files import first_line, is_hub_id, is_plain_name, quiet_transformers
from cuma_ds.identity import stored_tensors

_POOLINGS = ("mean", "cls", "lasttoken")
_SETTINGS = ("auto", "mean", "mean-all", "last", "cls")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Tokens of one forward, padding included: bounds the memory that long sentences take.
_BATCH_TOKENS = 4096


class ProfileEncoder:
    """Embeds profile sentences with any sentence-embedding folder that ``transformers`` reads.

    By default pooling is what the folder's ``1_Pooling/config.json`` says (mean, cls or lasttoken) and the mean over
    real tokens without one, and vectors have length 1. Padding never counts. Vectors are float32. Weights are loaded
    at the first call. Several threads may call it at once.

    Args:
        path: a folder, or a hub id that is brought to the local hub cache.
        device: where to embed; default: the first GPU, else the CPU.
        batch_size: sentences per forward, at most; long ones make smaller batches.
        pooling: auto (what the folder says) | mean | cls | last | mean-all. The last is the mean over every position,
            as the authors' code takes it. There it depended on the padding of a batch; here each sentence is embedded
            alone, without padding.
        normalise: whether vectors are scaled to length 1.
        max_tokens: sentences are cut after so many tokens; default: what the folder says.

    Attributes:
        dim: P, width of the vectors.
        fingerprint: sha256 over the folder's weights, configuration and tokenizer, and these settings.

    Raises:
        ModelError: no such folder, no readable configuration, or modules that would change the vectors.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        pooling: str = "auto",
        normalise: bool = True,
        max_tokens: int | None = None,
    ) -> None:
        from transformers import AutoConfig

        self.folder = _resolve(str(path))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if pooling not in _SETTINGS:
            raise ModelError(f"pooling is {pooling!r}; allowed: {', '.join(_SETTINGS)}")
        self.pooling = _pooling(self.folder) if pooling == "auto" else pooling.replace("last", "lasttoken")
        self.batch_size = batch_size if self.pooling != "mean-all" else 1
        self.normalise = normalise
        try:
            config = AutoConfig.from_pretrained(self.folder)
            self.dim = int(config.hidden_size)
        except Exception as error:  # what reads a model folder is foreign code
            raise ModelError(f"{self.folder} is not a sentence encoder: {first_line(error)}") from None
        self._longest = int(getattr(config, "max_position_embeddings", 0) or 512)
        self._asked_tokens = max_tokens
        self._one_at_a_time = threading.Lock()
        if not any(file for pattern in _WEIGHTS for file in self.folder.glob(pattern)):
            raise ModelError(f"{self.folder} holds no encoder weights; expected one of {', '.join(_WEIGHTS)}")

    def __call__(self, sentences: list[str] | str, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Embed sentences.

        Args:
            progress: told (sentences done, in all) after each batch.

        Returns:
            [N, P] float32 on the CPU, rows in the order given (N = 1 for a single string).
        """
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        embeddings_NP, done = torch.empty(len(texts), self.dim), 0
        inputs = self._tokenise(texts)
        for rows in self._batches([len(read["input_ids"]) for read in inputs]):
            embeddings_NP[rows] = self._embed([inputs[row] for row in rows])
            done += len(rows)
            if progress is not None:
                progress(done, len(texts))
        return embeddings_NP

    def check_files(self) -> None:
        """Raise a ModelError for a tokenizer or weights that cannot be read. Of weights, headers alone are read."""
        from transformers import AutoTokenizer

        for file in self.folder.glob(_WEIGHTS[0]):
            stored_tensors(file)
        try:
            AutoTokenizer.from_pretrained(self.folder)
        except Exception as error:
            raise ModelError(f"the sentence encoder {self.folder} has no tokenizer: {first_line(error)}") from None

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Rows that share a forward. They are of like length, so that little is spent on padding."""
        batch: list[int] = []
        for row in sorted(range(len(lengths)), key=lengths.__getitem__):
            if batch and (len(batch) == self.batch_size or (len(batch) + 1) * lengths[row] > _BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def check_lengths(self, sentences: Iterable[str], apart: bool = True) -> None:
        """Warn of sentences that have more tokens than the encoder reads.

        Args:
            sentences: of profiles.
            apart: also refuse different sentences of which the same tokens are read: they would become one vector.

        Raises:
            DataError: there are such sentences.
        """
        texts = list(dict.fromkeys(sentences))
        # A token has at least one byte, and few are added around a sentence: most need not be tokenised.
        near = [text for text in texts if len(text.encode()) > self._max_tokens - 8]
        if not near:
            return
        tokenizer, _ = self._parts
        limit = min(self._max_tokens, tokenizer.model_max_length)
        whole = tokenizer(near, verbose=False)["input_ids"]
        lengths = [len(ids) for ids in whole if len(ids) > limit]
        if not lengths:
            return
        about = (
            f"{len(lengths)} of {len(texts)} profile sentences have more than the {limit} tokens that {self.folder} "
            "reads"
        )
        about = f"{about} (the longest has {max(lengths)})"
        read = {tuple(ids) for ids in tokenizer(near, truncation=True, max_length=limit)["input_ids"]}
        if apart and len(read) < len({tuple(ids) for ids in whole}):
            raise DataError(
                f"{about}, and some of them differ only in what is not read: different people would get one vector; "
                "put fewer fields "
                "into profiles, or the telling ones first, or use an encoder that reads more"
            )
        warnings.warn(f"{about}; their ends are not read", stacklevel=2)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex digest that changes whenever the vectors could."""
        digest = hashlib.sha256(f"{self.pooling}:{self._max_tokens}{'' if self.normalise else ':raw'}".encode())
        patterns = (
            *_WEIGHTS,
            "config.json",
            "tokenizer*",
            "vocab*",
            "merges.txt",
            "*.model",
            "special_tokens_map.json",
        )
        for file in sorted({file for pattern in patterns for file in self.folder.glob(pattern)}):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    @property
    def _max_tokens(self) -> int:
        asked = self._asked_tokens or _json(self.folder / "sentence_bert_config.json").get("max_seq_length")
        return min(self._longest, int(asked or self._longest))

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        for index in self.folder.glob("*.index.json"):
            for name in _json(index).get("weight_map", {}).values():
                if not is_plain_name(name):
                    raise ModelError(f"{index} is damaged: it names {name!r}, which is no file of its folder")
        with quiet_transformers(bars_only=True):
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder)
                model = AutoModel.from_pretrained(self.folder, dtype=torch.float32)
            except Exception as error:
                raise ModelError(f"the sentence encoder {self.folder} cannot be loaded: {first_line(error)}") from None
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer, model.eval().requires_grad_(False).to(self.device)

    def _tokenise(self, texts: list[str]) -> list[dict[str, list[int]]]:
        """What the encoder reads of each text, without padding. A tokenizer keeps settings, so threads take turns."""
        with self._one_at_a_time:
            tokenizer, _ = self._parts
            longest = min(self._max_tokens, tokenizer.model_max_length)
            read = tokenizer(texts, truncation=True, max_length=longest)
        return [{name: values[row] for name, values in read.items()} for row in range(len(texts))]

    @torch.inference_mode()
    def _embed(self, inputs: list[dict[str, list[int]]]) -> Tensor:
        tokenizer, model = self._parts
        padded = tokenizer.pad(inputs, return_tensors="pt").to(self.device)
        pooled_BP = pool(model(**padded).last_hidden_state, padded["attention_mask"], self.pooling)
        return (torch.nn.functional.normalize(pooled_BP.float(), dim=-1) if self.normalise else pooled_BP.float()).cpu()


def pool(hidden_BSP: Tensor, mask_BS: Tensor, how: str) -> Tensor:
    """One vector per sequence from its real tokens (``mean-all``: from every position).

    Args:
        hidden_BSP: [B, S, P] hidden states.
        mask_BS: [B, S], 1 for real tokens.
        how: mean | cls (first real token) | lasttoken (last real token) | mean-all.

    Returns:
        [B, P], dtype of ``hidden_BSP``.
    """
    if how == "mean-all":
        return hidden_BSP.mean(1)
    if how == "mean":
        weights_BS1 = mask_BS.unsqueeze(-1).to(hidden_BSP.dtype)
        return (hidden_BSP * weights_BS1).sum(1) / weights_BS1.sum(1).clamp(min=1)
    positions_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    chosen_B = (mask_BS if how == "cls" else positions_S * mask_BS).argmax(dim=1)
    return hidden_BSP[torch.arange(len(hidden_BSP), device=hidden_BSP.device), chosen_B]


def _resolve(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(path):
        raise ModelError(
            f"there is no sentence encoder at {path}; profiles.encoder is a folder or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, ignore_patterns=["onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack"]))
    except Exception as error:
        raise ModelError(
            f"{path} is neither a folder nor a sentence encoder the hub gives us: {first_line(error)}"
        ) from None


def _pooling(folder: Path) -> str:
    modules = _json(folder / "modules.json", default=[])
    known = ("Transformer", "Pooling", "Normalize")
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind not in known:
            raise ModelError(f"{folder / 'modules.json'} asks for a {kind} module; supported: {', '.join(known)}")
    place = next(
        (str(module.get("path")) for module in modules if str(module.get("type", "")).endswith("Pooling")), "1_Pooling"
    )
    config = _json(folder / place / "config.json")
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    else:
        modes = [
            key.removeprefix("pooling_mode_")
            for key, on in config.items()
            if key.startswith("pooling_mode_") and on is True
        ]
    modes = [mode.removesuffix("_tokens").removesuffix("_token") for mode in modes] or ["mean"]
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise ModelError(
            f"{folder / place / 'config.json'} asks for pooling {' + '.join(modes)}; supported: "
            f"one of {', '.join(_POOLINGS)}"
        )
    return modes[0]


def _json(file: Path, default: Any = None) -> Any:
    if not file.is_file():
        return {} if default is None else default
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {first_line(error)}") from None
