"""The same training without DeepSpeed: one process, a micro step in one forward, torch's own AdamW and clipping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cuma_ds.adapters import inject_adapters
from cuma_ds.config import RunConfig
from cuma_ds.data import PreparedData, load_data
from cuma_ds.data.batch import EncodedExample, collate, encode_example
from cuma_ds.data.rendering import Renderer
from cuma_ds.profiles import ProfileEncoder, ProfileTable


@dataclass
class SingleRun:
    """losses and grad_norms by step, and the trained tensors at the end."""

    losses: list[float]
    grad_norms: list[float]
    state: dict[str, Tensor]


def examples_of_steps(config: RunConfig, data: PreparedData, tokenizer: Any) -> Iterator[list[EncodedExample]]:
    """The global batch of each step, in the documented order: seeded permutations, one after another."""
    import numpy as np

    renderer = Renderer(tokenizer, config.data.max_length, config.data.profile_in_prompt)
    rows, size = data.splits["train"], config.training.global_batch_size
    order = [np.random.default_rng([config.run.seed, epoch]).permutation(len(rows)) for epoch in range(200)]
    stream = [int(row) for permutation in order for row in permutation]
    for step in range(config.training.steps):
        wanted = stream[step * size : (step + 1) * size]
        yield [encode_example(rows[row], renderer, data.sentences, config.data) for row in wanted]


def train_single(config: RunConfig, micro_steps: int = 1) -> SingleRun:
    """Train as the recipe says, with each global batch in ``micro_steps`` forwards of equal size."""
    from reference import reference_learning_rate

    data = load_data(config.data, config.profiles.template)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=getattr(torch, config.model.dtype))
    adapters, table = config.adapters, None
    if adapters.uses_profiles:
        table = ProfileTable.build(data.sentences, ProfileEncoder(config.profiles.encoder), config.profiles.cache_dir)
        adapters = adapters.model_copy(update={"profile_dim": table.embeddings.shape[1]})
    model = inject_adapters(model, adapters, config.run.seed).train()
    model.shares_per_forward = False
    rows = data.splits["train"]
    if table is not None:
        model.set_profile_standardisation(table.embeddings[sorted(set(rows["profile"]))], config.profiles.standardise)
    training = config.training
    parameters = [p for _, p in model.adapter_parameters()]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=1.0,
        betas=training.adam_betas,
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
        foreach=False,
    )
    losses, norms = [], []
    for step, examples in enumerate(examples_of_steps(config, data, tokenizer)):
        for group in optimizer.param_groups:
            group["lr"] = reference_learning_rate(
                step, training.learning_rate, training.warmup_steps, training.steps, training.schedule
            )
        weight = sum(sum(example.target_weight) for example in examples)
        size = -(-len(examples) // micro_steps)
        tokens = sum(len(example.input_ids) for example in examples)
        load_RE: Tensor | float = 0.0
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, len(examples), size):
            batch = collate(examples[start : start + size], tokenizer.pad_token_id)
            profiles = None if table is None else table.embeddings[batch.profile_rows_N]
            mask = None
            if adapters.gradient_groups is not None:
                ((field, groups),) = adapters.gradient_groups.items()
                who = [data.profiles[row]["fields"].get(field, "") for row in batch.profile_rows_N.tolist()]
                everyone = range(adapters.num_experts)
                mask = torch.tensor(
                    [[float(e in groups.get(value, groups.get("*", everyone))) for e in everyone] for value in who]
                )
            out = model(
                input_ids=batch.input_ids_BS,
                attention_mask=batch.attention_mask_BS,
                profile_embeddings=profiles,
                gradient_mask=mask,
            )
            log_p = out.logits[:, batch.keep].double().log_softmax(dim=-1)
            nll = (
                -(
                    log_p[batch.targets.row_L, batch.targets.position_L, batch.targets.token_L] * batch.targets.weight_L
                ).sum()
                / weight
            )
            loss = nll
            if config.adapters.balance_weight and adapters.has_router:
                by_run = config.adapters.balance_scope == "run"
                part = float(batch.attention_mask_BS.sum()) / tokens if by_run else 1 / micro_steps
                loss = loss + config.adapters.balance_weight * out.balance_loss * part
                load_RE = load_RE + model.routing_statistics().load_RE
            loss.backward()
            total += float(nll.detach())
        clip = training.max_grad_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, clip)))
        optimizer.step()
        if isinstance(load_RE, Tensor):
            model.update_shares(load_RE)
        losses.append(total)
    return SingleRun(losses, norms, {name: tensor.clone() for name, tensor in model.adapter_state().items()})
