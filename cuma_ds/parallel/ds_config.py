"""Read a DeepSpeed JSON and complete it with what the recipe says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cuma_ds.config import RunConfig
from cuma_ds.errors import ConfigError, nearest

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

# What the recipe decides; a DeepSpeed JSON that also sets it could silently contradict the recipe.
_FROM_RECIPE = {
    "optimizer": "training.learning_rate, weight_decay, adam_betas, adam_eps",
    "scheduler": "training.schedule, warmup_steps",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and micro_batch_size",
    "gradient_clipping": "training.max_grad_norm",
}


class FrozenBackbone(BaseModel):
    """Our own part of a DeepSpeed JSON: how the frozen backbone is held at stages 1 and 2."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sharded: bool = Field(False, description="partition the backbone over all ranks")
    offload: Literal["none", "cpu"] = Field("none", description="where the shards live")
    max_reuse_distance: int = Field(0, ge=0, description="keep a gathered layer that is used again within so many elements")
    prefetch_bucket_size: int = Field(0, ge=0, description="elements gathered ahead of their use")


@dataclass(frozen=True)
class DeepSpeedSettings:
    """A DeepSpeed configuration taken apart.

    engine: what ``deepspeed.initialize`` gets.  stage: its ZeRO stage.  backbone: how the frozen backbone is held beside it.
    """

    engine: dict[str, Any]
    stage: int
    backbone: FrozenBackbone


def read_deepspeed_config(config: RunConfig, micro: int, accumulation: int, world: int) -> DeepSpeedSettings:
    """Find, read, check and complete the recipe's DeepSpeed JSON.

    Args:
        config: the run; ``parallel.deepspeed_config`` is a file, or a name in ds_configs/.
        micro: examples per rank in one forward.
        accumulation: micro steps per optimizer step.
        world: number of ranks.

    Raises:
        ConfigError: the file is missing, is no JSON object, or sets what the recipe decides.
    """
    path = find_deepspeed_config(config.parallel.deepspeed_config)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"cannot read the DeepSpeed configuration {path}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: a DeepSpeed configuration is a JSON object, not {type(values).__name__}")
    for key, ours in _FROM_RECIPE.items():
        if key in values:
            raise ConfigError(f"{path}: {key!r} is decided by the recipe ({ours}); remove it here")
    try:
        backbone = FrozenBackbone.model_validate(values.pop("frozen_backbone", {}))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(["frozen_backbone", *map(str, problem["loc"])])
        raise ConfigError(f"{path}: {key}: {problem['msg']}; allowed keys: {', '.join(FrozenBackbone.model_fields)}") from None
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage}; allowed: 1, 2, 3")
    if stage == 3 and backbone.sharded:
        raise ConfigError(f"{path}: frozen_backbone.sharded is for ZeRO stages 1 and 2; stage 3 already shards everything")
    if stage == 3 and config.parallel.ep_size > 1:
        raise ConfigError(
            f"{path}: ZeRO stage 3 cannot hold expert parallelism (parallel.ep_size {config.parallel.ep_size}); "
            "use zero2_sharded_backbone, which shards the backbone and keeps experts parallel, or ep_size 1"
        )
    engine = {
        **values,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world,
        "gradient_clipping": config.training.max_grad_norm,
        "steps_per_print": 10**9,
    }
    if stage == 3 and config.model.dtype != "float32":
        engine.setdefault({"bfloat16": "bf16", "float16": "fp16"}[config.model.dtype], {"enabled": True})
    return DeepSpeedSettings(engine=engine, stage=stage, backbone=backbone)


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
