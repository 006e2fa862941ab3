"""The frozen backbone: whole on every rank, or partitioned over all ranks by ZeRO-3's machinery without an optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.utils.timer import NoopTimer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging as transformers_logging

from cuma_ds.config import ModelSection
from cuma_ds.errors import ModelError
from cuma_ds.parallel.ds_config import FrozenBackbone


def load_backbone(model: ModelSection, device: torch.device | None = None) -> PreTrainedModel:
    """Load a causal language model whole, frozen and in eval mode.

    Raises:
        ModelError: the folder or hub id cannot be loaded.
    """
    backbone = _from_pretrained(model)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return backbone.to(device).requires_grad_(False).eval()  # type: ignore[arg-type]


def skeleton(model: ModelSection) -> nn.Module:
    """The backbone's modules without any weights (meta device), to check names and shapes before loading.

    Raises:
        ModelError: the folder or hub id holds no causal language model.
    """
    _check_place(model)
    with _as_model_error(model), torch.device("meta"):
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


class ShardedBackbone:
    """A frozen model of which every rank keeps one part in ``world``; whole layers exist only while they run.

    ZeRO-3 partitions and gathers the parameters, but there is no ZeRO-3 optimizer: the engine beside it may be at stage 1 or 2 and
    hold expert-parallel adapters, which stage 3 cannot.

    Attributes:
        model: the frozen model, its parameters partitioned. Adapters must be injected after this object was made.

    With ``max_reuse_distance`` and ``prefetch_bucket_size`` 0, a rank never holds more than its shards and one layer.
    """

    def __init__(self, model: ModelSection, settings: FrozenBackbone) -> None:
        config = stage3_config(model, settings.offload == "cpu")
        keep_alive = HfDeepSpeedConfig(config)  # from_pretrained partitions as it loads while this lives
        try:
            self.model = _from_pretrained(model)
        finally:
            del keep_alive
        self.model.requires_grad_(False).eval()
        self._offload = DeepSpeedZeRoOffload(
            self.model,
            timers=NoopTimer(),
            ds_config=config,
            overlap_comm=torch.cuda.is_available(),
            param_persistence_threshold=0,
            max_reuse_distance=settings.max_reuse_distance,
            prefetch_bucket_size=settings.prefetch_bucket_size,
        )

    def after_backward(self) -> None:
        """Release parameters whose backward hook never fired (layers below the first trained one)."""
        self._offload.release_backward_leftovers()


def stage3_config(model: ModelSection, offload: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration that partitions a frozen model in its own dtype."""
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "fp16": {"enabled": model.dtype == "float16"},
    }


def resident_bytes(model: nn.Module) -> int:
    """Bytes of frozen parameters this rank holds now (its shards, or everything when not sharded)."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            held = getattr(parameter, "ds_tensor", parameter)
            total += held.numel() * held.element_size()
    return total


def live_bytes(model: nn.Module) -> int:
    """Bytes of whole frozen parameters that exist at this moment because a layer is running; 0 at rest when sharded."""
    gathered = [p for p in model.parameters() if not p.requires_grad and hasattr(p, "ds_tensor")]
    return sum(p.numel() * p.element_size() for p in gathered)


def full_bytes(model: nn.Module) -> int:
    """Bytes of all frozen parameters, as if held whole."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters() if not p.requires_grad)


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer.

    Raises:
        ModelError: the folder or hub id has none.
    """
    _check_place(model)
    try:
        return AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.path: no tokenizer could be loaded from {model.path!r}: {_first_line(error)}") from None


def _from_pretrained(model: ModelSection) -> PreTrainedModel:
    _check_place(model)
    with _as_model_error(model), _quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=getattr(torch, model.dtype),
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
        )


@contextlib.contextmanager
def _as_model_error(model: ModelSection) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"model.path: {model.path!r} cannot be loaded as a causal language model: {_first_line(error)}") from None


def _check_place(model: ModelSection) -> None:
    path = Path(model.path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.path: {model.path!r} holds no config.json; expected a Hugging Face model folder")
        return
    looks_like_hub_id = model.path.count("/") <= 1 and not model.path.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise ModelError(f"model.path: the folder {model.path!r} does not exist")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
