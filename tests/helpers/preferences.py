"""Small preference data, and its scores worked out one pair at a time in plain Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

COUNTRIES = ["Chile", "Ghana", "Iran", "Japan"]
HIDDEN = "Tuvalu"
ANSWERS = ["Yes.", "No!", "Maybe so?", "I would rather not say."]
# Log-probability of (prompt, answer, row of the profile).
Logp = Callable[[list[dict[str, str]], str, int], float]


def write_preferences(file: Path, people: int = 120, hidden: int = 3) -> Path:
    """One to three pairs of each person; ``hidden`` people are of a country nobody else is of."""
    rng = np.random.default_rng(5)
    lines = []
    for person in range(people + hidden):
        country = HIDDEN if person >= people else COUNTRIES[person % len(COUNTRIES)]
        for _ in range(int(rng.integers(1, 4))):
            chosen, rejected = rng.permutation(ANSWERS)[:2]
            prompt = [{"role": "user", "content": f"What of {rng.integers(3)}?"}]
            if rng.random() < 0.3:
                earlier = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
                prompt = earlier + prompt
            profile = {"country": country, "age": ["young", "old"][person % 3 == 0]}
            lines.append(
                {"profile": profile, "person_id": f"p{person}", "prompt": prompt, "chosen": str(chosen),
                 "rejected": str(rejected)}
            )  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


@torch.no_grad()
def answer_logp(
    model: Any, tokenizer: Any, prompt: Sequence[dict[str, str]], answer: str, profile: Tensor | None
) -> float:
    """log p(answer and its end-of-turn marker | prompt), from the logits of one whole sequence without padding.

    Args:
        profile: raw embedding [P] for the routers; None for a model that takes none.
    """
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    before, said = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer + "<|im_end|>"))
    extra = {} if profile is None else {"profile_embeddings": profile[None]}
    logits_SV = model(input_ids=torch.tensor([before + said]), **extra).logits[0].double().numpy()
    total = 0.0
    for place, token in enumerate(said, start=len(before)):
        row_V = logits_SV[place - 1]
        total += float(row_V[token] - row_V.max() - np.log(np.exp(row_V - row_V.max()).sum()))
    return total


def answer_tokens(tokenizer: Any, answer: str) -> int:
    return len(tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"])


def by_hand(first: float, second: float, tolerance: float = 1e-9) -> float:
    """1, 1/2 or 0: whether the first is larger."""
    return 0.5 if abs(first - second) < tolerance else float(first > second)


def bootstrap_by_hand(people: Sequence[int], values: Sequence[float], replicates: int) -> tuple[float, float, float]:
    """Mean over pairs, and the 95% interval when people are drawn with all of their pairs.

    The draws are those of the seed 0 for as many people as the whole split has; ``values`` are nan for pairs that are
    not in the group.
    """
    persons = sorted(set(people))
    own = {person: [v for p, v in zip(people, values, strict=True) if p == person and v == v] for person in persons}
    every = [value for person in persons for value in own[person]]
    mean = sum(every) / len(every)
    draws = np.random.default_rng(0).multinomial(len(persons), [1 / len(persons)] * len(persons), size=replicates)
    means = []
    for draw in draws:
        drawn = [value for person, times in zip(persons, draw, strict=True) for value in own[person] * int(times)]
        means.append(sum(drawn) / len(drawn))
    low, high = np.percentile(means, [2.5, 97.5])
    shift = mean - sum(means) / len(means)
    return mean, low + shift, high + shift
