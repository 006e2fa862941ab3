"""Objective grpo without DeepSpeed, the project's sampler or its losses: one process, one forward per token, plain
formulas.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field

import numpy as np
import torch
from reference import reference_learning_rate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cuma_ds.adapters import inject_adapters
from cuma_ds.config import RunConfig
from cuma_ds.data import load_data
from cuma_ds.data.rendering import Renderer
from cuma_ds.profiles import ProfileEncoder, ProfileTable


@dataclass
class SingleGrpo:
    """Losses by step, texts by rollout, KL by step, and the trained tensors at the end."""

    losses: list[float] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


class Asked:
    """One completion: prompt ids, its profile's embedding, and what was written."""

    def __init__(self, prompt: list[int], profile: int, seed: list[int]) -> None:
        self.prompt, self.profile, self.tokens = prompt, profile, list[int]()
        mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
        self.generator = torch.Generator().manual_seed(mixed)

    def draw(self, logits_V: Tensor, temperature: float) -> int:
        """The place of a uniform number in the cumulated probabilities, the most probable tokens first."""
        p_V, order_V = (logits_V.double() / temperature).softmax(-1).sort(descending=True, stable=True)
        uniform = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        place = int((p_V.cumsum(-1) <= uniform * float(p_V.sum())).sum())
        return int(order_V[min(place, len(order_V) - 1)])


def train_single_grpo(config: RunConfig, start: dict[str, Tensor] | None = None) -> SingleGrpo:
    """Train as the recipe says.

    Args:
        config: objective grpo with one ``module:function`` reward, loss dapo and rewards scaled by batch.
        start: adapters to start from, which are the reference, too; None: the bare backbone.
    """
    grpo, rollout, training = config.grpo, config.rollout, config.training
    data = load_data(config.data, config.profiles.template)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    renderer = Renderer(tokenizer, config.data.max_length)
    table = ProfileTable.build(data.sentences, ProfileEncoder(config.profiles.encoder), config.profiles.cache_dir)
    adapters = config.adapters.model_copy(update={"profile_dim": table.embeddings.shape[1]})
    backbone = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    model = inject_adapters(backbone, adapters, config.run.seed)
    rows = data.splits["train"]
    model.set_profile_standardisation(table.embeddings[sorted(set(rows["profile"]))], config.profiles.standardise)
    if start is not None:
        model.load_adapter_state(start)
    reference: nn.Module = copy.deepcopy(model).eval()
    if grpo.reference == "base":
        reference = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    module, _, name = grpo.rewards[0].partition(":")
    reward = getattr(importlib.import_module(module), name)

    def log_p(network: nn.Module, one: Asked) -> Tensor:
        """[tokens] log-probabilities at the sampling temperature."""
        inputs = {} if network is not model and grpo.reference == "base" else profile_inputs(one)
        logits = network(input_ids=torch.tensor([[*one.prompt, *one.tokens]]), **inputs).logits[0]
        scores = (logits[len(one.prompt) - 1 : -1].double() / rollout.temperature).log_softmax(-1)
        return scores[range(len(one.tokens)), one.tokens]

    def profile_inputs(one: Asked) -> dict[str, Tensor]:
        return {"profile_embeddings": table.embeddings[[one.profile]]}

    def write(one: Asked) -> None:
        while len(one.tokens) < rollout.max_new_tokens and (not one.tokens or one.tokens[-1] != 5):
            ids = torch.tensor([[*one.prompt, *one.tokens]])
            one.tokens.append(one.draw(model(input_ids=ids, **profile_inputs(one)).logits[0, -1], rollout.temperature))

    parameters = [p for _, p in model.adapter_parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=1.0, betas=training.adam_betas, eps=training.adam_eps, weight_decay=training.weight_decay,
        foreach=False,
    )  # fmt: skip
    model.shares_per_forward = False
    order = [np.random.default_rng([config.run.seed, epoch]).permutation(len(rows)) for epoch in range(50)]
    stream = [int(row) for permutation in order for row in permutation]
    found, size = SingleGrpo(), training.global_batch_size
    for step in range(training.steps):
        if step % grpo.iterations == 0:
            number = step // grpo.iterations
            model.eval()
            asked, columns = [], []
            for place, row_number in enumerate(stream[number * size : (number + 1) * size]):
                row = rows[row_number]
                prompt = renderer.encode_choice(row["question"], row["options"], "")
                for turn in range(grpo.group_size):
                    asked.append(Asked(prompt, row["profile"], [config.run.seed, number, place, turn]))
                    columns.append(data.profiles[row["profile"]])
            with torch.no_grad():
                for one in asked:
                    write(one)
                old = [log_p(model, one) for one in asked]
                kept = [log_p(reference, one) for one in asked]
            texts = [
                tokenizer.decode(one.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
                for one in asked
            ]
            found.texts.append(texts)
            rewards = np.array(reward([], texts, columns)).reshape(size, grpo.group_size)
            advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(ddof=1) + 1e-4)
            model.train()
        for group in optimizer.param_groups:
            group["lr"] = reference_learning_rate(
                step, training.learning_rate, training.warmup_steps, training.steps, training.schedule
            )
        optimizer.zero_grad()
        total, tokens, kl_sum = torch.zeros((), dtype=torch.float64), sum(len(one.tokens) for one in asked), 0.0
        for one, advantage, before, stays in zip(asked, advantages.flatten(), old, kept, strict=True):
            new = log_p(model, one)
            ratio = (new - (before if grpo.iterations > 1 else new.detach())).exp()
            clipped = ratio.clamp(1 - grpo.epsilon, 1 + grpo.epsilon)
            kl = (stays - new).exp() - (stays - new) - 1
            total = total + (grpo.kl_weight * kl - torch.min(ratio * advantage, clipped * advantage)).sum()
            kl_sum += float(kl.detach().sum())
        (total / tokens).backward()
        load_RE = None
        if config.adapters.balance_weight:
            sequences = {(one.profile, *one.prompt, *one.tokens[:-1]) for one in asked}
            load_RE = _balance(model, sorted(sequences), table, config.adapters.balance_weight)
        nn.utils.clip_grad_norm_(parameters, training.max_grad_norm or float("inf"))
        optimizer.step()
        if load_RE is not None:
            model.update_shares(load_RE)
        found.losses.append(float(total.detach()) / tokens)
        found.kls.append(kl_sum / tokens)
    found.state = {name: tensor.clone() for name, tensor in model.adapter_state().items()}
    return found


def _balance(model: nn.Module, sequences: list[tuple[int, ...]], table: ProfileTable, weight: float) -> Tensor:
    """Add the gradients of the balance loss over distinct sequences (profile, tokens); top-k assignments [R, E]."""
    width = max(map(len, sequences)) - 1
    ids_BS = torch.zeros(len(sequences), width, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for row, (_, *ids) in enumerate(sequences):
        ids_BS[row, : len(ids)], mask_BS[row, : len(ids)] = torch.tensor(ids), 1
    profiles = table.embeddings[[sequence[0] for sequence in sequences]]
    out = model(input_ids=ids_BS, attention_mask=mask_BS, profile_embeddings=profiles)
    (weight * out.balance_loss).backward()
    return model.routing_statistics().load_RE
