"""A trained model in a folder that stock transformers loads: no code of this package is needed, and none is written."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from cuma_ds.errors import ConfigError
from cuma_ds.export.card import plain_card, run_section
from cuma_ds.export.hf import output_folder
from cuma_ds.inference.decoding import settle_generation
from cuma_ds.inference.open import open_trained
from cuma_ds.methods import METHODS
from cuma_ds.methods.cuma import CumaMethod
from cuma_ds.runs import Run


def is_plain(run_dir: str | Path) -> bool:
    """Whether a run trained a method that other libraries know, and not a mixture of this package."""
    return not issubclass(METHODS[Run.open(run_dir).config().adapters.method], CumaMethod)


def write_plain(run_dir: str | Path, out: str | Path, step: int | None = None) -> Path:
    """Write one checkpoint of such a run, its tokenizer, how answers end, and a model card; all of it or nothing.

    ``AutoModelForCausalLM.from_pretrained`` loads the folder of a run of method full. Its weights have ``model.dtype``.

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
        cast("PreTrainedModel", opened.model).save_pretrained(folder)
        opened.renderer.tokenizer.save_pretrained(folder)
        story = run_section(run.report_folder, config, trained.data, trained.checkpoint.name)
        (folder / "README.md").write_text(plain_card(config, story), encoding="utf-8")
    return Path(out)


def refuse_other_formats(run_dir: str | Path, wanted: str) -> None:
    """Raise a ConfigError for formats that such a run does not have."""
    if wanted != "hf":
        method = Run.open(run_dir).config().adapters.method
        raise ConfigError(
            f"--format {wanted} is for adapters of this package; a run of method {method} has --format hf"
        )
