"""What other libraries know, in their own format: a model for transformers, an adapter for PEFT. No code of this
package is needed to load it, and none is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cuma_ds.config import NOTHING_TRAINS
from cuma_ds.errors import ConfigError
from cuma_ds.export.card import plain_card, run_section
from cuma_ds.export.hf import output_folder
from cuma_ds.files import full_path
from cuma_ds.inference.decoding import settle_generation
from cuma_ds.inference.open import open_trained
from cuma_ds.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of each method that is no mixture of this package.
_FORMATS = {"full": "hf", "dora": "peft", "p_tuning_v2": "peft"}
_OF_MIXTURES = ("hf", "hf-merged-repo", "lora")


def is_plain(run_dir: str | Path) -> bool:
    """Whether a run trained what other libraries know, and not a mixture of this package."""
    return Run.open(run_dir).config().adapters.method in _FORMATS


def check_format(run_dir: str | Path, wanted: str) -> None:
    """Raise a ConfigError for a format that a run does not have."""
    config = Run.open(run_dir).config()
    method = config.adapters.method
    if method in NOTHING_TRAINS:
        raise ConfigError(
            f"a run of method {method} trains nothing, so there is nothing to export; its model is {config.model.path}"
        )
    formats = (_FORMATS[method],) if method in _FORMATS else _OF_MIXTURES
    if wanted not in formats:
        raise ConfigError(f"a run of method {method} has no --format {wanted}; it has {', '.join(formats)}")


def write_plain(run_dir: str | Path, out: str | Path, step: int | None = None) -> Path:
    """Write one checkpoint of such a run, its tokenizer and a model card; all of it or nothing.

    ``AutoModelForCausalLM.from_pretrained`` loads the folder of a run of method full. Its weights have ``model.dtype``,
    and how answers end is written beside them. ``PeftModel.from_pretrained`` loads that of methods dora and
    p_tuning_v2, whose tensors are float32.

    Args:
        run_dir: a run folder as training leaves it.
        out: a folder that does not exist or is empty.
        step: which checkpoint; the newest complete one by default.

    Raises:
        CumaError: the run cannot be read, or ``out`` cannot be written.
    """
    run = Run.open(run_dir)
    config = run.config()
    with output_folder(out) as folder:
        trained = run.trained(config, step)
        opened = open_trained(config, trained)
        settle_generation(opened.model, opened.renderer)
        cast("PreTrainedModel", opened.model).save_pretrained(folder)  # PEFT's models have it, too
        if (folder / "adapter_config.json").is_file():
            _name_base(folder / "adapter_config.json", full_path(config.model.path))
        opened.renderer.tokenizer.save_pretrained(folder)
        story = run_section(run.report_folder, config, trained.data, trained.checkpoint.name)
        (folder / "README.md").write_text(plain_card(config, story), encoding="utf-8")
    return Path(out)


def _name_base(file: Path, base: str) -> None:
    """Write the base model's place into PEFT's ``adapter_config.json``."""
    about = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**about, "base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8")
