"""The same training without DeepSpeed: one process, a micro step in one forward, torch's own AdamW and clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cuma_ds.adapters import inject_adapters
from cuma_ds.config import RunConfig
from cuma_ds.data import PreparedData, load_data
from cuma_ds.data.batch import Batch, EncodedExample, collate, encode_example
from cuma_ds.data.rendering import Renderer
from cuma_ds.profiles import ProfileEncoder, ProfileTable


@dataclass
class SingleRun:
    """losses and grad_norms by step, and the trained tensors at the end."""

    losses: list[float]
    grad_norms: list[float]
    state: dict[str, Tensor]


class Learned:
    """What is learned: here what people answered (objective sft).

    Args:
        config: the recipe.
        data: all splits.
        tokenizer: of the model.
    """

    def __init__(self, config: RunConfig, data: PreparedData, tokenizer: Any) -> None:
        self.config, self.data, self.rows = config, data, data.splits["train"]
        self.renderer = Renderer(tokenizer, config.data.max_length, config.data.profile_in_prompt)

    def begin(self, log_p_of: Callable[[Batch], Tensor]) -> None:
        """Before the first step. ``log_p_of`` runs the model: [L] float64 of the labels of a batch."""

    def examples(self, row: int) -> list[EncodedExample]:
        """Of one row; equally many of each."""
        return [encode_example(self.rows[row], self.renderer, self.data.sentences, self.config.data)]

    def weight(self, row: int) -> float:
        """What the sum of losses is divided by is the sum of these."""
        return sum(self.examples(row)[0].target_weight)

    def loss(self, log_p_L: Tensor, batch: Batch, rows: list[int]) -> Tensor:
        """Summed over the rows of one forward; log_p_L as in ``begin``."""
        return -(log_p_L * batch.targets.weight_L).sum()


def rows_of_steps(config: RunConfig, data: PreparedData) -> Iterator[list[int]]:
    """The rows of each global batch, in the documented order: seeded permutations, one after another."""
    rows, size = data.splits["train"], config.training.global_batch_size
    order = [np.random.default_rng([config.run.seed, epoch]).permutation(len(rows)) for epoch in range(200)]
    stream = [int(row) for permutation in order for row in permutation]
    for step in range(config.training.steps):
        yield stream[step * size : (step + 1) * size]


def examples_of_steps(config: RunConfig, data: PreparedData, tokenizer: Any) -> Iterator[list[EncodedExample]]:
    """The global batch of each step."""
    learned = Learned(config, data, tokenizer)
    for rows in rows_of_steps(config, data):
        yield [example for row in rows for example in learned.examples(row)]


def train_single(config: RunConfig, micro_steps: int = 1, learns: type[Learned] = Learned) -> SingleRun:
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
    of_routers = {name: ".router." in name for name, _ in model.adapter_parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in model.adapter_parameters() if of_routers[name] == chosen]}
        for chosen in (False, True)
    ]
    if training.router_weight_decay is not None:
        groups[1]["weight_decay"] = training.router_weight_decay
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=1.0,
        betas=training.adam_betas,
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
        foreach=False,
    )
    learned = learns(config, data, tokenizer)

    def forward(batch: Batch, seeds: Sequence[list[int]] = ()) -> tuple[Tensor, Any]:
        profiles = None if table is None else table.embeddings[batch.profile_rows_N].clone()
        for row, entropy in enumerate(seeds):
            if profiles is not None and (adapters.profile_dropout or adapters.profile_noise):
                # As documented: a seed of each place in the step, one uniform number, then normal ones.
                seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1
                generator = torch.Generator().manual_seed(seed)
                hidden = torch.rand(1, generator=generator).item() < adapters.profile_dropout
                known = table.embeddings[sorted(set(rows["profile"]))].double()
                spread = (known - known.mean(dim=0)).square().mean().sqrt()  # RMS before it is scaled
                noise = adapters.profile_noise * spread * torch.randn(profiles.shape[1], generator=generator)
                profiles[row] = known.mean(dim=0) if hidden else profiles[row] + noise
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
        return log_p[batch.targets.row_L, batch.targets.position_L, batch.targets.token_L], out

    with torch.no_grad():
        learned.begin(lambda batch: forward(batch)[0])
    losses, norms = [], []
    for step, rows_of_step in enumerate(rows_of_steps(config, data)):
        for number, group in enumerate(optimizer.param_groups):
            peak = (training.router_learning_rate if number else None) or training.learning_rate
            group["lr"] = reference_learning_rate(step, peak, training.warmup_steps, training.steps, training.schedule)
        weight = sum(learned.weight(row) for row in rows_of_step)
        size = -(-len(rows_of_step) // micro_steps)
        tokens = sum(len(example.input_ids) for row in rows_of_step for example in learned.examples(row))
        load_RE: Tensor | float = 0.0
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, len(rows_of_step), size):
            own = rows_of_step[start : start + size]
            batch = collate([example for row in own for example in learned.examples(row)], tokenizer.pad_token_id)
            places = [start + number for number, row in enumerate(own) for _ in learned.examples(row)]
            log_p_L, out = forward(batch, [[config.run.seed, step, place] for place in places])
            nll = learned.loss(log_p_L, batch, own) / weight
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
