"""Read a DeepSpeed JSON and complete it with what the recipe says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from deepspeed.accelerator import get_accelerator
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cuma_ds.config import RunConfig
from cuma_ds.errors import ConfigError, nearest
from cuma_ds.parallel.shard_group import ShardGroupSize
from cuma_ds.resources import resource_folder
from cuma_ds.strict_json import read_json

DS_CONFIGS = resource_folder("ds_configs")

_Part = TypeVar("_Part", bound=BaseModel)

# What the recipe decides; a DeepSpeed JSON that also sets it could silently contradict the recipe.
_FROM_RECIPE = {
    "optimizer": "training.learning_rate, weight_decay, adam_betas, adam_eps",
    "scheduler": "training.schedule, warmup_steps",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and micro_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "bf16": "model.dtype",
}


class FrozenBackbone(BaseModel):
    """Our own part of a DeepSpeed JSON: how the frozen backbone is held at stages 1 and 2."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sharded: bool = Field(False, description="partition the backbone over the ranks of a shard group")
    shard_group: ShardGroupSize = Field(
        "world", description="ranks that hold one copy of the backbone between them: world, machine, or so many ranks"
    )
    offload: Literal["none", "cpu"] = Field("none", description="where the shards are kept")
    max_reuse_distance: int = Field(
        0, ge=0, description="keep a gathered layer that is used again within so many elements"
    )
    prefetch_bucket_size: int = Field(0, ge=0, description="elements gathered ahead of their use")

    @field_validator("shard_group", mode="before")
    @classmethod
    def _check_shard_group(cls, value: object) -> object:
        if value in ("world", "machine") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"is {value!r}; allowed: world, machine, or a number of ranks from 1")


class LossScale(BaseModel):
    """DeepSpeed's ``fp16`` options that have a meaning here; used when the backbone is float16."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss_scale: float = Field(0.0, ge=0, description="fixed factor; 0 lets it follow the gradients")
    initial_scale_power: int = Field(12, ge=0, description="first factor, as a power of two")
    loss_scale_window: int = Field(1000, ge=1, description="steps without overflow before the factor doubles")
    hysteresis: int = Field(2, ge=1, description="overflows before the factor halves")
    min_loss_scale: float = Field(1.0, gt=0, description="smallest factor")


@dataclass(frozen=True)
class DeepSpeedSettings:
    """A DeepSpeed configuration taken apart.

    engine: what ``deepspeed.initialize`` gets.  stage: its ZeRO stage.  backbone: how the frozen backbone is held
    beside it.  loss_scale: for a frozen float16 backbone at stages 1 and 2, else None (an engine that holds the
    backbone scales by itself).
    """

    engine: dict[str, Any]
    stage: int
    backbone: FrozenBackbone
    loss_scale: LossScale | None = None


def read_deepspeed_config(config: RunConfig, micro: int, accumulation: int, world: int) -> DeepSpeedSettings:
    """Find, read, check and complete the recipe's DeepSpeed JSON.

    Args:
        config: the run; ``parallel.deepspeed_config`` is a file, or a name in ds_configs/.
        micro: examples per rank in one forward.
        accumulation: micro steps per optimizer step.
        world: number of ranks.

    Raises:
        ConfigError: the file is missing, is no JSON object, sets what the recipe decides, or cannot do what it asks.
    """
    path = find_deepspeed_config(config.parallel.deepspeed_config)
    values = _read_object(path)
    for key, ours in _FROM_RECIPE.items():
        if key in values:
            raise ConfigError(f"{path}: {key!r} is decided by the recipe ({ours}); remove it here")
    backbone = _part(FrozenBackbone, path, "frozen_backbone", values)
    loss_scale = _part(LossScale, path, "fp16", values)
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage}; allowed: 1, 2, 3")
    if stage == 3 and backbone.sharded:
        raise ConfigError(
            f"{path}: frozen_backbone.sharded is for ZeRO stages 1 and 2; stage 3 already shards everything"
        )
    if backbone.shard_group != "world" and not backbone.sharded:
        raise ConfigError(
            f"{path}: frozen_backbone.shard_group is {backbone.shard_group}, but frozen_backbone.sharded is false; "
            "set it to true, or remove shard_group"
        )
    if backbone.sharded and config.adapters.method == "full":
        raise ConfigError(
            f"{path}: frozen_backbone.sharded is for a backbone that does not train, but adapters.method is full; use "
            "zero3, which shards everything, or zero1 or zero2"
        )
    if (stage == 3 or backbone.sharded) and config.adapters.method == "dora" and config.adapters.dropout:
        raise ConfigError(
            f"{path} shards the backbone, but adapters.dropout is {config.adapters.dropout}, for which DoRA reads "
            "whole weights in its backward pass; set it to 0, or use zero1 or zero2"
        )
    if stage == 3 and config.parallel.ep_size > 1:
        raise ConfigError(
            f"{path}: ZeRO stage 3 cannot hold expert parallelism (parallel.ep_size {config.parallel.ep_size}); "
            "use zero2_sharded_backbone, which shards the backbone and keeps experts parallel, or ep_size 1"
        )
    if stage == 3 and config.model.quantisation != "none":
        raise ConfigError(
            f"{path}: ZeRO stage 3 would cast a quantised backbone (model.quantisation {config.model.quantisation}); "
            "use zero2_sharded_backbone, which shards it, or model.quantisation: none"
        )
    engine = {
        **values,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world,
        "gradient_clipping": config.training.max_grad_norm,
        "steps_per_print": 10**9,
    }
    # The engine is given adapters alone, which are float32; or the backbone too, in its own dtype.
    has_backbone = stage == 3 or config.adapters.method == "full"
    if not has_backbone:
        return DeepSpeedSettings(engine, stage, backbone, loss_scale if config.model.dtype == "float16" else None)
    if config.model.dtype == "float16":
        if not get_accelerator().is_fp16_supported():
            what = "ZeRO stage 3" if stage == 3 else "adapters.method full"
            needs = f"{what} and model.dtype float16 need a device that computes in it"
            raise ConfigError(f"{path}: {needs}; use bfloat16 or float32")
        engine["fp16"] = {"enabled": True, **loss_scale.model_dump()}
    elif config.model.dtype == "bfloat16":
        engine["bf16"] = {"enabled": True}
    return DeepSpeedSettings(engine, stage, backbone)


def read_values(config: RunConfig) -> dict[str, Any]:
    """The recipe's DeepSpeed JSON as it stands in its file.

    Raises:
        ConfigError: the file is missing or no JSON object.
    """
    return _read_object(find_deepspeed_config(config.parallel.deepspeed_config))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"cannot read the DeepSpeed configuration {path}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: a DeepSpeed configuration is a JSON object, not {type(values).__name__}")
    return values


def _part(kind: type[_Part], path: Path, key: str, values: dict[str, Any]) -> _Part:
    """Take our part out of a DeepSpeed JSON."""
    try:
        return kind.model_validate(values.pop(key, {}))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join([key, *map(str, problem["loc"])])
        what = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {where}: {what}; allowed keys: {', '.join(kind.model_fields)}") from None


def find_deepspeed_config(name: str) -> Path:
    """The JSON a recipe means: a path, or the name of one in ds_configs/ (with or without ``.json``)."""
    folders = (Path("ds_configs"), DS_CONFIGS)
    candidates = [Path(name), *(folder / f"{Path(name).name.removesuffix('.json')}.json" for folder in folders)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
    raise ConfigError(
        f"parallel.deepspeed_config: {name!r} is no file and no name in ds_configs/{nearest(Path(name).stem, known)}; "
        f"it has {', '.join(known)}"
    )
