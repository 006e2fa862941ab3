"""The loss of objective grpo against TRL's own code, and against the equations in NumPy."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch, EncodedExample, as_filler
from cuma_ds.training.objectives.grpo import Grpo
from cuma_ds.training.rollout.batches import Cutter, Written

LONGEST, TEMPERATURE = 5, 0.7
LENGTHS = (1, 5, 3, 2, 5, 1, 4, 2)


def completions() -> list[Written]:
    """Two prompts with four completions each; those of five tokens are truncated."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(6, 100, (count,), generator=generator).tolist()

    prompts = [EncodedExample(tokens(size), [size - 1], [0], [0.0], 0) for size in (4, 7)]
    return [
        Written(number // 4, number % 4, prompts[number // 4], tokens(length), length == LONGEST)
        for number, length in enumerate(LENGTHS)
    ]


ADVANTAGES = torch.tensor([1.2, -0.7, 0.1, -0.6, 0.9, -1.1, 0.0, 0.2])


def objective(loss: str, kl_weight: float, mask_truncated: bool) -> Grpo:
    config = {
        "model": {"path": "m"},
        "adapters": {"method": "mixlora"},
        "training": {"objective": "grpo"},
        "grpo": {
            "loss": loss, "kl_weight": kl_weight, "mask_truncated": mask_truncated, "epsilon": 0.2, "epsilon_high": 0.3
        },
        "rollout": {"temperature": TEMPERATURE, "max_new_tokens": LONGEST},
    }  # fmt: skip
    return Grpo(RunConfig.model_validate(config))


def batches_of(cutter: Cutter) -> list[Batch]:
    return cutter(completions(), ADVANTAGES.tolist(), completions()[0].prompt)


@pytest.fixture
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def others(model, drift: float) -> dict[int, Tensor]:
    """Log-probabilities [C, 5] of the completions' tokens, moved by up to ``drift`` nats; 0 behind their ends."""
    written, found = completions(), torch.zeros(len(LENGTHS), LONGEST)
    generator = torch.Generator().manual_seed(7)
    for place, one in enumerate(written):
        ids = torch.tensor([[*one.prompt.input_ids, *one.tokens]])
        logits = model(input_ids=ids).logits[0, len(one.prompt.input_ids) - 1 : -1].detach() / TEMPERATURE
        log_p = logits.log_softmax(-1)[range(len(one.tokens)), one.tokens]
        found[place, : len(one.tokens)] = log_p + drift * (2 * torch.rand(len(one.tokens), generator=generator) - 1)
    return found


def with_extras(batch: Batch, first: int, **tables: Tensor) -> Batch:
    """The batch with one number per label out of tables [C, 5], whose rows are all completions."""
    completion_L = batch.extras["completion_L"]
    seen: dict[int, int] = defaultdict(int)
    places = []
    for completion in completion_L.tolist():
        places.append(seen[completion])
        seen[completion] += 1
    for name, table in tables.items():
        batch.extras[name] = table[first + completion_L, torch.tensor(places)]
    return batch


def ours(model, grpo: Grpo, cutter: Cutter, old: Tensor | None, reference: Tensor) -> tuple[float, dict[str, float]]:
    """The mean over the global batch, with its gradients in the model, as a step of a run computes it."""
    batches, first, sums = batches_of(cutter), 0, defaultdict(float)
    weight = sum(grpo.weight(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        tables = {"reference_L": reference} | ({} if old is None else {"old_L": old})
        batch = with_extras(batch, first, **tables)
        first += int(batch.extras["completion_L"].max()) + 1
        found = grpo.loss(model(**batch.inputs).logits, batch)
        loss = found.sum / (weight or 1.0)
        loss.backward()
        total += float(loss.detach())
        for name, value in found.means.items():
            sums[name] = sums[name] + value.double()
    return total, {name: float(value[0] / value[1].clamp(min=1)) for name, value in sums.items()}


def trls(model, loss: str, kl_weight: float, mask_truncated: bool, old: Tensor | None, reference: Tensor):
    """Loss and metrics of ``GRPOTrainer._compute_loss`` for the same completions on one device."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    from trl.trainer.utils import add_fused_lm_head, pad

    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    written = completions()
    prompts = [torch.tensor(one.prompt.input_ids) for one in written]
    answers = [torch.tensor(one.tokens) for one in written]
    completion_mask = pad([torch.ones_like(ids) for ids in answers], 0, "right")
    if mask_truncated:
        completion_mask = completion_mask * (~torch.tensor([one.truncated for one in written]))[:, None].int()
    inputs = {
        "prompt_ids": pad(prompts, 0, "left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
        "completion_ids": pad(answers, 0, "right"),
        "completion_mask": completion_mask,
        "advantages": ADVANTAGES,
        "num_items_in_batch": completion_mask.sum(),
        "ref_per_token_logps": reference,
    }
    if old is not None:
        inputs["old_per_token_logps"] = old
    accelerator = SimpleNamespace(
        num_processes=1,
        autocast=contextlib.nullcontext,
        gather=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )
    trainer = SimpleNamespace(
        accelerator=accelerator, model=model, beta=kl_weight, loss_type=loss, epsilon_low=0.2, epsilon_high=0.3,
        max_completion_length=LONGEST, importance_sampling_level="token", top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, aux_loss_enabled=False, use_vllm=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    )  # fmt: skip
    scores = trl.GRPOTrainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = getattr(scores, "__wrapped__", scores).__get__(trainer)
    found = trl.GRPOTrainer._compute_loss(trainer, model, inputs)
    found.backward()
    return float(found.detach()), {name: values[0] for name, values in trainer._metrics["eval"].items()}


def gradients(model) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize(("mask_truncated", "stale"), [(False, True), (True, True), (False, False)])
def test_losses_gradients_and_metrics_are_those_of_trl(model, loss, kl_weight, mask_truncated, stale) -> None:
    old, reference = (others(model, 0.6) if stale else None), others(model, 0.5)
    grpo = objective(loss, kl_weight, mask_truncated)
    found, means = ours(model, grpo, Cutter((8, 1), 0, None, mask_truncated), old, reference)
    own = gradients(model)
    expected, metrics = trls(model, loss, kl_weight, mask_truncated, old, reference)
    theirs = gradients(model)

    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert max(float(gradient.norm()) for gradient in own.values()) > 1e-2
    for name, gradient in theirs.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-5, atol=1e-5)
    names = ["entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
    for name in [*names, *(["kl"] if kl_weight else [])]:
        assert means[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
    assert (means["clip_ratio/region_mean"] > 0) == stale, "clipping must be active for the comparison to mean much"


CUTS = {
    "three": Cutter((3, 3), 0, None, True),
    "one, and two batches of fillers": Cutter((1, 10), 0, None, True),
    "packed": Cutter((5, 2), 0, 40, True),
}


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("cut", CUTS)
def test_how_completions_are_cut_into_micro_batches_does_not_matter(model, loss, cut) -> None:
    old, reference, grpo = others(model, 0.6), others(model, 0.5), objective(loss, 0.3, True)
    expected, expected_means = ours(model, grpo, Cutter((8, 1), 0, None, True), old, reference)
    whole = gradients(model)
    found, means = ours(model, grpo, CUTS[cut], old, reference)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert means == pytest.approx(expected_means, rel=1e-4)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_losses_are_the_equations_in_numpy(loss, kl_weight, mask_truncated) -> None:
    (batch,) = batches_of(Cutter((8, 1), 0, None, mask_truncated))
    random = np.random.default_rng(5)
    logits_BKV = random.normal(size=(*batch.input_ids_BS.shape[:1], len(batch.keep), 128))
    old, reference = random.normal(-4.5, 0.5, (8, LONGEST)), random.normal(-4.5, 0.5, (8, LONGEST))
    batch = with_extras(batch, 0, old_L=torch.from_numpy(old), reference_L=torch.from_numpy(reference))
    batch.extras["advantage_L"] = batch.extras["advantage_L"].double()
    grpo = objective(loss, kl_weight, mask_truncated)
    found = float(grpo.loss(torch.from_numpy(logits_BKV), batch).sum) / grpo.weight(batch)

    keep, row_of = batch.keep.tolist(), {}
    for row, ids in enumerate(batch.input_ids_BS.tolist()):
        row_of[tuple(ids)] = row
    total, tokens_in_all = 0.0, 0
    for place, one in enumerate(completions()):
        ids = [*one.prompt.input_ids, *one.tokens[:-1]]
        row = row_of[tuple(ids + [0] * (batch.input_ids_BS.shape[1] - len(ids)))]
        if mask_truncated and one.truncated:
            continue
        inside = 0.0
        for number, token in enumerate(one.tokens):
            z = logits_BKV[row, keep.index(len(one.prompt.input_ids) - 1 + number)] / TEMPERATURE
            log_p = z[token] - np.log(np.exp(z - z.max()).sum()) - z.max()
            ratio, advantage = np.exp(log_p - old[place, number]), float(ADVANTAGES[place])
            inside -= min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
            d = reference[place, number] - log_p
            inside += kl_weight * (np.exp(d) - d - 1)
        total += inside / len(one.tokens) if loss == "grpo" else inside
        tokens_in_all += len(one.tokens)
    denominator = {"grpo": 8, "dr_grpo": 8 * LONGEST, "dapo": tokens_in_all}[loss]
    assert found == pytest.approx(total / denominator, rel=1e-6)


def test_a_step_whose_completions_are_all_masked_learns_nothing(model) -> None:
    grpo = objective("dapo", 0.0, True)
    (batch,) = Cutter((8, 1), 0, None, True)(
        [one for one in completions() if one.truncated] * 2, [1.0] * 4, completions()[0].prompt
    )
    found = grpo.loss(model(**batch.inputs).logits, batch)
    assert grpo.weight(batch) == 0
    assert float(found.sum.detach()) == 0


def test_completions_of_one_token_share_the_sequence_of_their_prompt() -> None:
    """A group of letters costs one sequence, as a histogram does."""
    prompt = EncodedExample([7, 8, 9], [2], [0], [0.0], 4)
    other = EncodedExample([7, 8, 9], [2], [0], [0.0], 5)
    written = [Written(1, 0, prompt, [20], True), Written(1, 1, prompt, [21], True), Written(2, 0, other, [20], True)]
    (batch,) = Cutter((4, 1), 0, None, False)(
        [*written, Written(1, 2, prompt, [20], True)], [1.0, 2.0, 3.0, 4.0], prompt
    )
    assert batch.input_ids_BS.tolist() == [[7, 8, 9], [7, 8, 9]]
    assert batch.profile_rows_N.tolist() == [4, 5]
    assert batch.targets.row_L.tolist() == [0, 0, 0, 1]
    assert batch.targets.token_L.tolist() == [20, 21, 20, 20]
    assert batch.extras["completion_L"].tolist() == [0, 1, 3, 2]
    assert batch.extras["advantage_L"].tolist() == [1.0, 2.0, 4.0, 3.0]
    assert batch.rows == (1, 2)
    assert objective("grpo", 0.0, False).weight(batch) == 4


def test_a_batch_without_completions_counts_for_nothing(model) -> None:
    (batch,) = Cutter((2, 1), 0, None, False)([], [], completions()[0].prompt)
    assert batch.real_tokens == 0
    assert as_filler(completions()[0].prompt).input_ids == batch.input_ids_BS[0].tolist()
    for loss in ("grpo", "dr_grpo", "dapo"):
        grpo = objective(loss, 0.0, False)
        assert grpo.weight(batch) == 0
        assert float(grpo.loss(model(**batch.inputs).logits, batch).sum.detach()) == 0
