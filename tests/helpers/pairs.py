"""Small preference data and runs that learn from it, and the same learning by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from single_process import Learned
from small_runs import recipe
from torch import Tensor

from cuma_ds.data.batch import Batch, EncodedExample, collate, encode_pair

ANSWERS = ["Yes.", "No!", "Maybe so?", "I would rather not say."]


def write_pairs(file: Path, people: int = 40) -> Path:
    """One or two pairs of each person, whose answers have different lengths; margins are whole numbers from 1 to 4."""
    rng, lines = np.random.default_rng(7), []
    for person in range(people):
        profile = {"country": ["Chile", "Ghana", "Japan"][person % 3], "age": ["young", "old"][person % 2]}
        for _ in range(int(rng.integers(1, 3))):
            chosen, rejected = rng.permutation(ANSWERS)[:2].tolist()
            prompt = [{"role": "user", "content": f"What of {rng.integers(2)}?"}]
            lines.append(
                {"profile": profile, "person_id": f"p{person}", "prompt": prompt, "chosen": chosen,
                 "rejected": rejected, "margin": int(rng.integers(1, 5))}
            )  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


def pair_recipe(folder: Path, tiny_llama: Path, tiny_encoder: Path, name: str, **sections: dict) -> Path:
    """A small recipe of objective dpo; ``sections`` update its sections."""
    file = folder / "pairs.jsonl"
    data = {"path": str(file if file.exists() else write_pairs(file))} | sections.pop("data", {})
    training = {"objective": "dpo", "global_batch_size": 6, "micro_batch_size": 6, "steps": 5}
    training |= sections.pop("training", {})
    dpo = {"beta": 0.5} | sections.pop("dpo", {})
    return recipe(folder, tiny_llama, tiny_encoder, name, data=data, training=training, dpo=dpo, **sections)


class LearnedPairs(Learned):
    """DPO by hand: float64, one pair at a time, against what the start policy itself says of each answer alone."""

    def begin(self, log_p_of: Callable[[Batch], Tensor]) -> None:
        self.reference = [
            [log_p_of(collate([example], 0)).tolist() for example in self.examples(row)]
            for row in range(len(self.rows))
        ]

    def examples(self, row: int) -> list[EncodedExample]:
        return list(encode_pair(self.rows[row], self.renderer, self.data.sentences))

    def weight(self, row: int) -> float:
        return self.rows[row]["margin"] * self.config.dpo.margin_scale if self.config.dpo.margin == "weight" else 1.0

    def loss(self, log_p_L: Tensor, batch: Batch, rows: list[int]) -> Tensor:
        total = log_p_L.new_zeros(())
        for place, row in enumerate(rows):
            own = [log_p_L[batch.targets.example_L == 2 * place + side] for side in (0, 1)]
            total = total + self.weight(row) * self.of_pair(own, row)
        return total

    def of_pair(self, policy: list[Tensor], row: int) -> Tensor:
        dpo, shortest = self.config.dpo, min(map(len, policy))
        scores = []
        for own, other in zip(policy, self.reference[row], strict=True):
            score = sum(
                (1.0 if place < shortest else dpo.ld_alpha) * (own[place] - other[place]) for place in range(len(own))
            )
            scores.append(score / len(own) if dpo.length_normalised else score)
        shift = self.rows[row]["margin"] * dpo.margin_scale if dpo.margin == "shift" else 0.0
        z = dpo.beta * (scores[0] - scores[1]) - shift
        sure = {
            "sigmoid": lambda z: (1 - dpo.label_smoothing) * (1 + (-z).exp()).log()
            + dpo.label_smoothing * (1 + z.exp()).log(),
            "robust": lambda z: (
                (1 - dpo.label_smoothing) * (1 + (-z).exp()).log() - dpo.label_smoothing * (1 + z.exp()).log()
            ) / (1 - 2 * dpo.label_smoothing),
            "hinge": lambda z: (1 - z).clamp(min=0),
            "ipo": lambda z: (z / dpo.beta - 0.5 / dpo.beta) ** 2,
        }[dpo.loss]  # fmt: skip
        label = self.label(row) if dpo.soft_labels else 1.0
        return label * sure(z) + (1 - label) * sure(-z) - dpo.sft_weight * policy[0].mean()

    def label(self, row: int) -> float:
        """The share of those who were asked the same, in the same country, and chose as this row did."""
        own = self.rows[row]
        pair = {own["chosen"], own["rejected"]}
        same = [
            other["chosen"]
            for other in self.rows
            if other["group"] == own["group"]
            and other["prompt"] == own["prompt"]
            and {other["chosen"], other["rejected"]} == pair
        ]
        return same.count(own["chosen"]) / len(same)
