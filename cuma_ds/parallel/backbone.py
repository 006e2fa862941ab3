"""The frozen backbone: whole on every rank, or partitioned over ranks by ZeRO-3 without its optimizer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import HfDeepSpeedConfig

from cuma_ds.config import ModelSection
from cuma_ds.data.embedded import MODEL_NAME
from cuma_ds.errors import CumaError, ModelError
from cuma_ds.files import first_line, is_hub_id, quiet_transformers
from cuma_ds.identity import model_file, model_fingerprint, weight_files
from cuma_ds.parallel import deepspeed_compat as compat
from cuma_ds.parallel.agreement import agreement
from cuma_ds.parallel.destination import Destination, move
from cuma_ds.parallel.ds_config import DeepSpeedSettings
from cuma_ds.parallel.quantised import Kind, bitsandbytes, quantised_weights
from cuma_ds.parallel.shard_group import ShardGroup, make_shard_group
from cuma_ds.parallel.streaming import NotStreamable, load_streamed, plan_streaming, refuse_quantised


def load_backbone(model: ModelSection, device: torch.device | None = None) -> PreTrainedModel:
    """Load a causal language model whole, frozen and in eval mode.

    Raises:
        ModelError: the folder or hub id cannot be loaded, or not be quantised.
        ConfigError: quantising needs a package that is not installed.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = quantisation_of(model)
    if kind is None:
        backbone = _from_pretrained(model)
    else:
        _check_place(model)
        destination = Destination.whole(device, kind)
        with _as_model_error(model), quiet_transformers():
            try:
                backbone = load_streamed(plan_streaming(model), destination)
            except NotStreamable:
                backbone = _from_pretrained(model)
                move(backbone, destination)
    return backbone.to(device).requires_grad_(False).eval()  # type: ignore[arg-type]


def quantisation_of(model: ModelSection) -> Kind | None:
    """How the weights of linears are quantised; None where they are not.

    Raises:
        ConfigError: the package that quantises is not installed.
    """
    if model.quantisation == "none":
        return None
    bitsandbytes(model.quantisation)
    return model.quantisation


def check_quantisation(model: ModelSection) -> None:
    """Raise a CumaError for a backbone that cannot be quantised as the recipe says. No weights are read.

    Raises:
        ModelError: its weights are of other kinds, which are named, or are quantised already.
        ConfigError: a package is not installed.
    """
    kind = quantisation_of(model)
    if kind is not None:
        bare = skeleton(model)
        refuse_quantised(model, bare.config)
        quantised_weights(bare, kind)


def check_weights(model: ModelSection) -> None:
    """Raise a ModelError for a backbone whose files of weights are missing or damaged. Their headers alone are read."""
    _check_place(model)
    with _as_model_error(model), contextlib.suppress(NotStreamable):
        plan_streaming(model)
        return
    if not weight_files(model.path) and model_file(model.path, "adapter_config.json") is None:
        raise ModelError(
            f"model.path: {model.path!r} holds no weights: neither model.safetensors nor an index of parts"
        )


def skeleton(model: ModelSection) -> nn.Module:
    """The backbone's modules without any weights (meta device), to check names and shapes before loading.

    Raises:
        ModelError: the folder or hub id holds no causal language model.
    """
    _check_place(model)
    with _as_model_error(model), torch.device("meta"):
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


def backbone_fingerprint(model: ModelSection) -> dict[str, str]:
    """What the folder or hub id holds now, see :func:`~cuma_ds.identity.model_fingerprint`.

    Raises:
        ModelError: there is no such model, or it is damaged.
    """
    _check_place(model)
    with _as_model_error(model):
        return model_fingerprint(model.path)


class PlacedBackbone(NamedTuple):
    """A frozen backbone on its ranks.

    hooks: make layers whole while they run. None for a whole backbone, and at stage 3, where the engine makes them.
    shards: the ranks that hold it between them; None for a whole one.  meter: counts what gathering layers sends; None
    where there are no hooks.
    """

    backbone: PreTrainedModel
    hooks: compat.LayerHooks | None = None
    shards: ShardGroup | None = None
    meter: compat.GatherMeter | None = None


def place_backbone(model: ModelSection, settings: DeepSpeedSettings, device: torch.device) -> PlacedBackbone:
    """Load the frozen backbone as a DeepSpeed configuration holds it, whole or sharded; all ranks call it.

    Of a sharded one, each rank keeps one part in as many as its shard group has ranks, and whole layers exist only
    while they run. At stages 1 and 2 ZeRO-3 partitions and gathers it without an optimizer, so that the engine beside
    it may hold expert-parallel adapters. With ``max_reuse_distance`` and ``prefetch_bucket_size`` 0, a rank holds its
    shards and one layer at most. Adapters are injected into the backbone afterwards.

    Raises:
        ModelError: the folder or hub id cannot be loaded.
        TopologyError: the ranks cannot be divided into shard groups of this size.
    """
    with agreement():
        quantisation_of(model)  # each machine has an environment of its own
    if settings.stage == 3:
        shards = make_shard_group("world")
        return PlacedBackbone(load_sharded(model, stage3_config(model), shards), shards=shards)
    if not settings.backbone.sharded:
        return PlacedBackbone(load_backbone(model, device))
    shards = make_shard_group(settings.backbone.shard_group)
    config = stage3_config(model, settings.backbone.offload == "cpu")
    backbone = load_sharded(model, config, shards)
    hooks = compat.partition_frozen(backbone, config, settings.backbone)
    return PlacedBackbone(backbone, hooks, shards, compat.GatherMeter(backbone.parameters()))


def load_sharded(model: ModelSection, stage3: dict[str, object], shards: ShardGroup) -> PreTrainedModel:
    """Load a causal language model partitioned over shard groups, frozen and in eval mode; all ranks call it.

    Each rank reads its own part from safetensors. What cannot be read so goes through transformers' own loading,
    where rank 0 reads everything and sends each layer to the others; that is said once.

    Raises:
        ModelError: the folder or hub id cannot be loaded, or is another one on another rank's machine.
    """
    plan, reason = None, None

    def destination() -> Destination:
        return Destination.partitioned(stage3, shards, quantisation_of(model))

    with agreement():
        _check_place(model)
        with _as_model_error(model), quiet_transformers():
            try:
                plan = plan_streaming(model)
            except NotStreamable as error:
                reason = str(error)
    found: list[tuple[str | None, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(found, (reason, plan.digest if plan else None))
    reasons = [reason for reason, _ in found if reason is not None]
    if plan is not None and not reasons:
        others = [rank for rank, (_, digest) in enumerate(found) if digest != found[0][1]]
        with agreement():
            if others:
                other = f"holds other weights for rank {others[0]} than for rank 0"
                raise ModelError(f"model.path: {model.path!r} {other}; copy one folder")
        with _as_model_error(model):
            return load_streamed(plan, destination()).requires_grad_(False).eval()
    del plan
    if dist.get_rank() == 0:
        warnings.warn(
            f"model.path: {model.path} is loaded through rank 0, which reads all of it: {reasons[0]}", stacklevel=2
        )
    keep_alive = HfDeepSpeedConfig(stage3)  # from_pretrained partitions as it loads while this lives
    try:
        backbone = _from_pretrained(model)
    finally:
        del keep_alive
    if shards.group is not None or quantisation_of(model) is not None:
        move(backbone, destination())
    return backbone.requires_grad_(False).eval()


@contextlib.contextmanager
def known_as_sharded(model: ModelSection) -> Iterator[None]:
    """Inside, libraries that ask transformers whether parameters are partitioned are told so. PEFT then makes weights
    whole that it begins with.
    """
    keep_alive = HfDeepSpeedConfig(stage3_config(model))
    try:
        yield
    finally:
        del keep_alive


def stage3_config(model: ModelSection, offload: bool = False) -> dict[str, object]:
    """The DeepSpeed configuration that partitions a frozen model in its own dtype."""
    zero: dict[str, object] = {"stage": 3, "stage3_param_persistence_threshold": 0}
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
    return sum(compat.held(p).numel() * p.element_size() for p in _frozen(model))


def live_bytes(model: nn.Module) -> int:
    """Bytes of whole frozen parameters that exist at this moment because a layer is running; 0 at rest when sharded."""
    return sum(p.numel() * p.element_size() for p in _frozen(model) if compat.is_partitioned(p))


def full_bytes(model: nn.Module) -> int:
    """Bytes of all frozen parameters, as if held whole."""
    return sum(compat.whole_shape(p).numel() * p.element_size() for p in _frozen(model))


def file_of_weight(model: ModelSection, name: str) -> str | None:
    """The file of ``model.path`` that holds a weight; None where that is not known.

    Args:
        model: of the recipe.
        name: ends in the weight's name in the file; what adapters and wrappers put around it does not matter.
    """
    folder = Path(model.path).expanduser()
    words = [word for word in name.split(".") if word not in ("base", "base_layer", "base_model", "cuma")]
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, framework="pt") as stored:
            if any(words[-len(key.split(".")) :] == key.split(".") for key in stored.keys()):  # noqa: SIM118
                return str(file)
    return None


def _frozen(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if not parameter.requires_grad]


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer.

    Raises:
        ModelError: the folder or hub id has none.
    """
    _check_place(model)
    try:
        return AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except CumaError:
        raise
    except Exception as error:  # the tokenizers library raises this class itself
        raise ModelError(f"model.path: no tokenizer could be loaded from {model.path!r}: {first_line(error)}") from None


def _from_pretrained(model: ModelSection) -> PreTrainedModel:
    _check_place(model)
    with _as_model_error(model), quiet_transformers():
        weight_files(model.path)  # transformers would follow an index out of its folder
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=getattr(torch, model.dtype),
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
        )
    backbone, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"model.path: {model.path!r} holds no weights for {missing[0]} ({len(missing)} missing)")
    return backbone


@contextlib.contextmanager
def _as_model_error(model: ModelSection) -> Iterator[None]:
    try:
        yield
    except (CumaError, NotStreamable, RuntimeError):  # the last may be one of a collective
        raise
    except Exception as error:  # what reads a model folder is foreign code
        raise ModelError(
            f"model.path: {model.path!r} cannot be loaded as a causal language model: {first_line(error)}"
        ) from None


def _check_place(model: ModelSection) -> None:
    path = Path(model.path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.path: {model.path!r} holds no config.json; expected a Hugging Face model folder")
        return
    if not is_hub_id(model.path, needs_owner=False):
        unpack = f"; `cuma-ds prepare embedded --out {path.parent}` unpacks it" if path.name == MODEL_NAME else ""
        raise ModelError(f"model.path: the folder {model.path!r} does not exist{unpack}")
