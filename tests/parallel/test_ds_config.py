"""DeepSpeed JSON files are completed by the recipe, and refused where they contradict it or cannot do what it asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cuma_ds.config import RunConfig
from cuma_ds.errors import ConfigError
from cuma_ds.parallel import ds_config
from cuma_ds.parallel.ds_config import DS_CONFIGS, DeepSpeedSettings, read_deepspeed_config


def read(path: Path | str, dtype: str = "float32", ep_size: int = 1) -> DeepSpeedSettings:
    values = {
        "model": {"path": "x", "dtype": dtype},
        "profiles": {"encoder": "x"},
        "parallel": {"deepspeed_config": str(path), "ep_size": ep_size},
        "training": {"max_grad_norm": 0.5},
    }
    return read_deepspeed_config(RunConfig.model_validate(values), 3, 2, 4)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_configuration_stands_in_the_readme_and_takes_its_sizes_from_the_recipe(path) -> None:
    assert f"| {path.stem}" in (DS_CONFIGS / "README.md").read_text()
    settings = read(path.stem)
    assert settings.engine["train_batch_size"] == 3 * 2 * 4
    assert settings.engine["gradient_clipping"] == 0.5
    assert "frozen_backbone" not in settings.engine
    assert settings.backbone.sharded == ("sharded" in path.stem)
    assert settings.backbone.offload == ("cpu" if path.stem.endswith("offload_backbone") else "none")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"bf16": {"enabled": True}}, "'bf16' is decided by the recipe (model.dtype)"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: Extra inputs are not permitted; allowed keys: loss_scale"),
        ({"gradient_clipping": 1.0}, "training.max_grad_norm"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0; allowed: 1, 2, 3"),
        ({"frozen_backbone": {"offload": "nvme"}}, "frozen_backbone.offload: Input should be 'none' or 'cpu'"),
        (
            {"zero_optimization": {"stage": 3}, "frozen_backbone": {"sharded": True}},
            "stage 3 already shards everything",
        ),
    ],
)
def test_a_contradiction_is_one_line(changes, part, tmp_path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | changes))
    with pytest.raises(ConfigError, match=r"mine\.json") as error:
        read(path)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("supported", [True, False])
def test_float16_scales_the_loss_and_needs_a_device_for_it_at_stage_3_alone(supported, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ds_config.get_accelerator(), "is_fp16_supported", lambda: supported)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"initial_scale_power": 9}}))
    assert read(path, "float16").loss_scale.initial_scale_power == 9
    assert read(path, "bfloat16").loss_scale is None
    assert "fp16" not in read(path, "float16").engine
    if supported:
        assert read("zero3", "float16").engine["fp16"]["enabled"]
    else:
        with pytest.raises(ConfigError, match="float16 need a device"):
            read("zero3", "float16")
    assert read("zero3", "bfloat16").engine["bf16"] == {"enabled": True}
