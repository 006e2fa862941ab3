"""Small runs of methods that are no mixture, and the same training by hand: one process, one example at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from pairs import pair_recipe
from ranks import run
from reference import reference_learning_rate
from safetensors.torch import save_file
from single_process import Learned, SingleRun, rows_of_steps
from small_runs import recipe
from torch import nn
from transformers import AutoTokenizer

from cuma_ds.config import RunConfig
from cuma_ds.data import load_data, prepare
from cuma_ds.data.batch import collate
from cuma_ds.identity import file_sha256
from cuma_ds.learned_settings import fingerprint
from cuma_ds.parallel.stored import State, write_state
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

TRAIN_MANY = Path(__file__).with_name("train_many.py")
SMALL = {"learning_rate": 1e-3, "max_grad_norm": 0.5, "schedule": "constant", "micro_batch_size": 2}


def rival(folder: Path, tiny_llama: Path, name: str, adapters: dict, make=recipe, **sections: dict) -> Path:
    """A small recipe of a method without profiles, whose section ``adapters`` is exactly this, ``prefix`` in it."""
    path = make(folder, tiny_llama, folder, name, **sections)
    values = yaml.safe_load(path.read_text())
    adapters = dict(adapters)
    if (prefix := adapters.pop("prefix", None)) is not None:
        values["prefix"] = prefix
    path.write_text(yaml.safe_dump({**values, "profiles": {}, "adapters": adapters}))
    return path


def run_and_resume(
    folder: Path,
    tiny_llama: Path,
    adapters: dict,
    objective: str,
    stages: Mapping[int, Sequence[str]],
    **sections: dict,
) -> list[Path]:
    """Recipes of 4 steps by DeepSpeed configuration, trained for 2 steps and resumed, on each number of ranks."""
    make = {"sft": recipe, "dpo": pair_recipe}[objective]
    found = []
    for world, names in stages.items():
        paths = []
        for stage in names:
            for name, steps in (("first", 2), ("whole", 4)):
                place = folder / name
                place.mkdir(exist_ok=True)
                own = {"training": {**SMALL, "steps": steps}, "parallel": {"deepspeed_config": stage}}
                where = {"run": {"output_dir": str(folder / "runs"), "name": f"{stage}-{world}"}}
                paths.append(rival(place, tiny_llama, f"{stage}-{world}", adapters, make, **own, **where, **sections))
        results = run(world, [str(TRAIN_MANY), json.dumps([str(path) for path in paths])])
        assert [code for code, _ in results] == [0] * world, results[0][1][-3000:]
        assert results[0][1].count("after step 2") == len(names)
        found += paths[1::2]
    return found


def by_hand(config: RunConfig, model: nn.Module, learns: type[Learned] = Learned) -> SingleRun:
    """Train a model as a recipe says, with torch's AdamW. ``state`` holds all parameters that train."""
    data, training = load_data(config.data, config.profiles.template), config.training
    learned = learns(config, data, AutoTokenizer.from_pretrained(config.model.path))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), 1.0, training.adam_betas, training.adam_eps, training.weight_decay, foreach=False
    )

    def log_p_of(batch):
        out = model(input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS)
        log_p = out.logits[:, batch.keep].double().log_softmax(dim=-1)
        return log_p[batch.targets.row_L, batch.targets.position_L, batch.targets.token_L]

    with torch.no_grad():
        learned.begin(log_p_of)
    losses, norms = [], []
    for step, rows in enumerate(rows_of_steps(config, data)):
        optimizer.param_groups[0]["lr"] = reference_learning_rate(
            step, training.learning_rate, training.warmup_steps, training.steps, training.schedule
        )
        weight, total = sum(learned.weight(row) for row in rows), 0.0
        optimizer.zero_grad()
        for row in rows:
            batch = collate(learned.examples(row), 0)
            loss = learned.loss(log_p_of(batch), batch, [row]) / weight
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), training.max_grad_norm)))
        optimizer.step()
    return SingleRun(losses, norms, {name: parameter.detach() for name, parameter in parameters.items()})


def stored_run(recipe_file: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The folder of a run that has trained these tensors."""
    config = load_config(recipe_file)
    run = Run.create(config)
    data = prepare(config.data, config.profiles.template).save(run.data_folder)
    run.record_identity(config, data, None)
    folder = run.checkpoints / "step-7"
    folder.mkdir(parents=True)
    save_file({f"param/{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "shared.safetensors")
    state: State = {"step": 7, "fingerprint": fingerprint(config), "identity": run.identity()}
    write_state(folder, state, {"shared.safetensors": file_sha256(folder / "shared.safetensors")})
    return run.folder
