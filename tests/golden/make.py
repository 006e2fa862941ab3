"""Write what this release leaves behind (a run, its report, its exports), for later releases to open.

    PYTHONPATH=.:tests:tests/helpers python tests/golden/make.py tests/golden/0.1.0

Run it with the code of the release that the folder is named after, and never again: test_golden.py reads the folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
import yaml
from conftest import character_tokenizer
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from cuma_ds.evaluation.run import evaluate_run
from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.inference.modeling import load_exported
from cuma_ds.parallel.stored import find_checkpoint, read_adapters
from cuma_ds.parallel.topology import start_processes, with_expert_groups
from cuma_ds.recipe import load_config
from cuma_ds.training.run import train

PROFILES = [{"country": "Norway", "age": 38}, {"country": "Ghana", "age": 51}]
PROMPTS = [[4, 30, 31, 5, 40, 41], [4, 60, 61, 62, 5, 40]]


def main(out: Path) -> None:
    """Make the models, train five of ten steps, keep that run, and note where the other five steps lead."""
    out.mkdir(parents=True)
    models(out)
    recipe = {
        "run": {"name": "run", "output_dir": str(out), "seed": 3},
        "model": {"path": str(out / "model"), "dtype": "float32"},
        "profiles": {"encoder": str(out / "encoder"), "cache_dir": str(out / "cache")},
        "adapters": {"num_experts": 4, "lora_r": 2, "lora_alpha": 4},
        "data": {"source": "jsonl", "path": "tests/data/opinions.jsonl"},
        "training": {
            "steps": 5,
            "global_batch_size": 6,
            "micro_batch_size": 2,
            "learning_rate": 0.01,
            "schedule": "constant",
        },
        "parallel": {"deepspeed_config": "zero2"},
        "checkpoint": {"every": 5},
        "telemetry": {"progress": False, "tensorboard": False},
        "evaluation": {"min_answers": 2, "bootstrap": 50},
    }
    topology = start_processes(120)
    half, whole = write(out / "recipe.yaml", recipe), dict(recipe, training={**recipe["training"], "steps": 10})
    train(load_config(half), with_expert_groups(topology, 1))
    evaluate_run(out / "run")
    for picture in (out / "run" / "evaluation").glob("*.png"):
        picture.unlink()
    write_hf(read_run(out / "run"), out / "export")
    model = load_exported(out / "export").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(PROMPTS), profiles=PROFILES).logits
    shutil.copytree(out / "run", out / "more")
    train(
        load_config(write(out / "more.yaml", {**whole, "run": {**recipe["run"], "name": "more"}})),
        with_expert_groups(topology, 1),
    )
    state = read_adapters(find_checkpoint(out / "more" / "checkpoints"))
    save_file(
        {"logits": logits, **{f"state/{name}": tensor.contiguous() for name, tensor in state.items()}},
        out / "expected.safetensors",
    )
    for rest in (out / "more", out / "cache"):
        shutil.rmtree(rest)
    (out / "more.yaml").unlink()
    write(out / "recipe.yaml", whole)


def write(file: Path, recipe: dict) -> Path:
    """A recipe as YAML."""
    file.write_text(yaml.safe_dump(json.loads(json.dumps(recipe)), sort_keys=False))
    return file


def models(out: Path) -> None:
    """A random 2-layer Llama and a random sentence encoder, with one token per character."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=104,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=5,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(out / "model")
    character_tokenizer().save_pretrained(out / "model")
    config = BertConfig(
        vocab_size=104, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(out / "encoder")
    character_tokenizer(None).save_pretrained(out / "encoder")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
