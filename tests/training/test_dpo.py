"""The losses of pairs: TRL's own code, and an independent computation in NumPy, say the same."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from pairs import write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from cuma_ds.config import DataSection, DpoSection, RunConfig
from cuma_ds.data import prepare
from cuma_ds.data.batch import Batch, EncodedExample, collate, pack
from cuma_ds.errors import ConfigError, CumaError
from cuma_ds.recipe import load_config
from cuma_ds.training.objectives.dpo import Dpo, PairBatches, pair_loss
from cuma_ds.training.objectives.pairs import pair_values, soft_labels
from cuma_ds.training.objectives.reference import answer_log_probabilities

# By TRL's name of the loss: its settings, and ours.
TRL = {
    "sigmoid": ({}, {}),
    "hinge": ({}, {"loss": "hinge"}),
    "ipo": ({}, {"loss": "ipo", "length_normalised": True}),
    "robust": ({"label_smoothing": 0.2}, {"loss": "robust", "label_smoothing": 0.2}),
    "sigmoid_norm": ({}, {"length_normalised": True}),
    "sigmoid, ld_alpha": ({"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "ipo, ld_alpha": ({"ld_alpha": 0.0}, {"loss": "ipo", "length_normalised": True, "ld_alpha": 0.0}),
}
BETA = 0.7


def pairs(count: int = 5) -> list[dict[str, list[int]]]:
    """Token ids of prompts with two answers, of different lengths."""
    rng = np.random.default_rng(3)
    draw = lambda low, high: rng.integers(6, 100, int(rng.integers(low, high))).tolist()  # noqa: E731
    return [{"prompt_ids": draw(2, 7), "chosen_ids": draw(1, 6), "rejected_ids": draw(1, 6)} for _ in range(count)]


def examples_of(pair: dict[str, list[int]], profile: int = 0) -> list[EncodedExample]:
    examples = []
    for side in ("chosen_ids", "rejected_ids"):
        first, answer = len(pair["prompt_ids"]) - 1, pair[side]
        positions = list(range(first, first + len(answer)))
        examples.append(EncodedExample(pair["prompt_ids"] + answer, positions, answer, [1.0] * len(answer), profile))
    return examples


def dpo(**settings) -> Dpo:
    adapters = {"method": "mixlora"}
    values = {"model": {"path": "m"}, "adapters": adapters, "training": {"objective": "dpo"}}
    return Dpo(RunConfig.model_validate({**values, "dpo": {"beta": BETA, **settings}}))


def batch_of(some: list[dict[str, list[int]]], objective: Dpo, reference, **values: torch.Tensor) -> Batch:
    """All pairs in one batch, with what a model says of them as the reference."""
    plain = collate([example for pair in some for example in examples_of(pair)], pad_id=0)
    numbered = Batch(**{**vars(plain), "rows": tuple(range(len(some)))})
    with torch.no_grad():
        said = objective._log_probabilities(reference(**plain.inputs).logits, numbered)
    ones = torch.ones(len(some))
    known = {"label": ones, "weight": ones, "shift": torch.zeros(len(some)), "reference": said, **values}

    class Stream:
        def step(self, number: int) -> list[Batch]:
            return [numbered]

    return PairBatches(Stream(), known).step(0)[0]


@pytest.fixture(scope="module")
def models(tiny_llama):
    """A policy and a reference: two models that disagree."""
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy, reference


@pytest.fixture(scope="module")
def trainer(models, tiny_llama, tmp_path_factory):
    """TRL's trainer, on copies of the two models."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = (copy.deepcopy(model) for model in models)
    arguments = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), beta=BETA, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, per_device_train_batch_size=8, max_length=None,
    )  # fmt: skip
    logging.getLogger("trl").setLevel(logging.ERROR)
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return DPOTrainer(policy, reference, arguments, train_dataset=text, processing_class=tokenizer)


def of_trl(trainer, some: list[dict[str, list[int]]], loss_types: list[str], settings: dict, weights=(1.0,)):
    """Loss, gradients by parameter, and metrics that TRL's own trainer gives."""
    trainer.loss_types, trainer.loss_weights = loss_types, list(weights)
    trainer.label_smoothing, trainer.ld_alpha = settings.get("label_smoothing", 0.0), settings.get("ld_alpha")
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(some))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: value[-1] for name, value in trainer._metrics["train"].items()}


def of_ours(models, some: list[dict[str, list[int]]], objective: Dpo, **values: torch.Tensor):
    policy, reference = models
    batch = batch_of(some, objective, reference, **values)
    policy.zero_grad()
    found = objective.loss(policy(**batch.inputs).logits, batch)
    loss = found.sum / objective.weight(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    means = {name: float(total / number) for name, (total, number) in found.means.items()}
    return loss.detach(), gradients, means


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    assert max(gradient.abs().max() for gradient in ours[1].values()) > 1e-2
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", TRL)
def test_losses_gradients_and_metrics_are_those_of_trl(name, models, trainer) -> None:
    settings, own = TRL[name]
    theirs = of_trl(trainer, pairs(), [name.partition(",")[0]], settings)
    ours = of_ours(models, pairs(), dpo(**own))
    assert_same(ours, theirs)
    shared = ours[2].keys() & theirs[2].keys()
    assert shared == ours[2].keys() - {"kl"}
    assert len(shared) == 6
    for metric in shared:
        assert ours[2][metric] == pytest.approx(theirs[2][metric], rel=1e-5, abs=1e-5), metric


@pytest.mark.parametrize("pair", range(2))
def test_conservative_dpo_and_the_sft_term_are_those_of_trl(pair, models, trainer) -> None:
    """Of one pair. TRL has label smoothing of the sigmoid in its loss ``aot``, which sorts several pairs, and takes the
    SFT loss per token of all chosen answers together, we of each.
    """
    some = pairs()[pair : pair + 1]
    theirs = of_trl(trainer, some, ["aot"], {"label_smoothing": 0.3})
    assert_same(of_ours(models, some, dpo(label_smoothing=0.3)), theirs)
    theirs = of_trl(trainer, some, ["sigmoid", "sft"], {}, weights=(1.0, 0.4))
    ours = of_ours(models, some, dpo(sft_weight=0.4))
    assert_same(ours, theirs)
    assert float(ours[0]) == pytest.approx(float(of_ours(models, some, dpo())[0]) + 0.4 * ours[2]["sft_loss"], rel=1e-6)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def in_numpy(section: DpoSection, chosen, rejected, label: float, shift: float) -> float:
    """The loss of one pair from per-token log-probabilities of policy and reference, [tokens, 2] each."""
    shortest, scores = min(len(chosen), len(rejected)), []
    for answer in (chosen, rejected):
        ratio = answer[:, 0] - answer[:, 1]
        score = ratio[:shortest].sum() + section.ld_alpha * ratio[shortest:].sum()
        scores.append(score / len(ratio) if section.length_normalised else score)
    delta, beta, noise = scores[0] - scores[1] - shift / section.beta, section.beta, section.label_smoothing

    def sure(delta: float) -> float:
        sure_of_it, other_way = np.log1p(np.exp(-beta * delta)), np.log1p(np.exp(beta * delta))
        return {
            "sigmoid": (1 - noise) * sure_of_it + noise * other_way,
            "robust": ((1 - noise) * sure_of_it - noise * other_way) / (1 - 2 * noise),
            "hinge": max(0.0, 1 - beta * delta),
            "ipo": (delta - 1 / (2 * beta)) ** 2,
        }[section.loss]

    return label * sure(delta) + (1 - label) * sure(-delta) - section.sft_weight * chosen[:, 0].mean()


NUMPY = [
    {"loss": loss, **more}
    for loss in ("sigmoid", "robust", "ipo", "hinge")
    for more in ({}, {"length_normalised": True, "ld_alpha": 0.25}, {"sft_weight": 0.5, "margin": "shift"})
] + [
    {"label_smoothing": 0.1}, {"loss": "robust", "label_smoothing": 0.4, "soft_labels": True},
    {"loss": "ipo", "soft_labels": True, "margin": "weight"}, {"soft_labels": True, "ld_alpha": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("settings", NUMPY, ids=str)
def test_losses_are_those_of_numpy_in_float64(settings, models) -> None:
    policy, reference = (copy.deepcopy(model).double() for model in models)
    objective, some = dpo(**settings), pairs()
    label, weight, shift = torch.tensor([[1, 0.5, 0.25, 1, 0.75], [1, 2, 0.5, 3, 1], [0.3, 0, 1, 2, 0.1]]).double()
    label = label if settings.get("soft_labels") else torch.ones(5)
    weight = weight if settings.get("margin") == "weight" else torch.ones(5)
    shift = shift if settings.get("margin") == "shift" else torch.zeros(5)
    batch = batch_of(some, objective, reference, label=label, weight=weight, shift=shift)
    found = objective.loss(policy(**batch.inputs).logits, batch)
    section, total = objective._dpo, 0.0
    for number, pair in enumerate(some):
        answers = []
        for example in examples_of(pair):
            with torch.no_grad():
                both = [model(torch.tensor([example.input_ids])).logits[0].numpy() for model in (policy, reference)]
            said = [log_softmax(logits)[example.target_position, example.target_token] for logits in both]
            answers.append(np.stack(said, axis=1))
        total += float(weight[number]) * in_numpy(section, *answers, float(label[number]), float(shift[number]))
    assert objective.weight(batch) == pytest.approx(float(weight.sum()))
    assert float(found.sum.detach()) == pytest.approx(total, rel=1e-6, abs=1e-6)


def test_ipo_with_soft_labels_moves_the_policy_to_the_share_that_agrees() -> None:
    """Its minimum is at (2 q - 1) / (2 beta), as the population objective of IPO (arXiv 2310.12036, Prop. 4) says."""
    section, delta = DpoSection(loss="ipo", beta=0.2, soft_labels=True), torch.linspace(-6, 6, 2401)
    for label in (0.1, 0.5, 0.75, 1.0):
        best = delta[pair_loss(delta, torch.tensor(label), section).argmin()]
        assert float(best) == pytest.approx((2 * label - 1) / 0.4, abs=0.006)


def test_rows_that_share_a_batch_or_a_row_of_it_change_nothing(models) -> None:
    """Packed behind one another, with fillers, or alone: the same log-probabilities."""
    policy, some = models[0], pairs()
    examples = [example for pair in some for example in examples_of(pair)]
    together, packed = collate(examples, pad_id=0), pack(examples, pad_id=0, length=24)
    assert packed.input_ids_BS.shape[0] < len(examples)
    with torch.no_grad():
        found = [
            answer_log_probabilities(
                batch.targets.log_probabilities(policy(**batch.inputs).logits), batch.targets, len(some), 0.5
            )
            for batch in (together, packed)
        ]
        torch.testing.assert_close(found[0].log_p_P2, found[1].log_p_P2, rtol=1e-5, atol=1e-5)
        for number in range(len(some)):
            alone = collate(examples[2 * number : 2 * number + 2], pad_id=0)
            log_p_L = alone.targets.log_probabilities(policy(**alone.inputs).logits)
            own = answer_log_probabilities(log_p_L, alone.targets, 1, 0.5)
            torch.testing.assert_close(own.log_p_P2[0], found[0].log_p_P2[number], rtol=1e-5, atol=1e-5)
            assert own.length_P2.tolist() == [[len(some[number]["chosen_ids"]), len(some[number]["rejected_ids"])]]


def test_a_batch_of_fillers_has_no_loss_and_no_weight_but_a_gradient_path(models) -> None:
    objective, (policy, reference) = dpo(sft_weight=0.5), models
    batch = batch_of(pairs(), objective, reference)
    empty = {name: value[:0] for name, value in batch.extras.items()}
    batch = Batch(**{**vars(batch), "rows": (), "extras": empty})
    policy.zero_grad()
    found = objective.loss(policy(**batch.inputs).logits, batch)
    found.sum.backward()
    assert float(found.sum.detach()) == objective.weight(batch) == 0.0
    assert not any(p.grad.any() for p in policy.parameters() if p.grad is not None)
    assert all(value.tolist() == [0.0, 0.0] for value in found.means.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")
    return prepare(DataSection(source="jsonl", path=str(file), heldout_fraction=0.0), "generic")


def test_soft_labels_are_shares_of_a_group_that_chose_alike(data) -> None:
    rows = data.splits["train"].to_list()
    for field in (None, "age"):
        found = soft_labels(data, field)
        fields = [data.profiles[row["profile"]]["fields"] for row in rows]
        who = [of[field or "country"] for of in fields]
        for number, row in enumerate(rows):
            pair = {row["chosen"], row["rejected"]}
            same = [
                other["chosen"]
                for place, other in enumerate(rows)
                if (who[place], other["prompt"]) == (who[number], row["prompt"])
                and {other["chosen"], other["rejected"]} == pair
            ]
            assert float(found[number]) == pytest.approx(same.count(row["chosen"]) / len(same))
        assert 0 < float(found.min()) < 1 == float(found.max())


def test_margins_weigh_or_shift_and_pairs_without_one_are_refused(data, tmp_path) -> None:
    rows = data.splits["train"].to_list()
    margins = [row["margin"] for row in rows]
    for use in ("weight", "shift"):
        values = pair_values(data, dpo_config(margin=use, margin_scale=0.5))
        assert values[use].tolist() == [0.5 * margin for margin in margins]
        assert set(values["label"].tolist()) == {1.0}
    lines = (tmp_path / "pairs.jsonl", write_pairs(tmp_path / "all.jsonl"))
    content = [json.loads(line) for line in lines[1].read_text().splitlines()]
    for wrong, needed in (
        (None, "have no margin; set dpo.margin: ignore"),
        (0, "teach nothing; leave them out with data"),
    ):
        lines[0].write_text("\n".join(json.dumps({**row, "margin": wrong}) for row in content) + "\n")
        damaged = prepare(DataSection(source="jsonl", path=str(lines[0]), heldout_fraction=0.0), "generic")
        with pytest.raises(CumaError, match=needed):
            pair_values(damaged, dpo_config(margin="weight"))


def dpo_config(**settings) -> RunConfig:
    values = {"model": {"path": "m"}, "adapters": {"method": "mixlora"}, "training": {"objective": "dpo"}}
    return RunConfig.model_validate({**values, "dpo": settings})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("loss: hinge, soft_labels: true", "the hinge loss learns the answer of the majority"),
        ("loss: ipo, label_smoothing: 0.1", "label_smoothing is 0.1, but loss ipo does not read it"),
        ("margin: shift, soft_labels: true", "turn one of them off"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_line(settings, reason, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {{path: m}}\ntraining: {{objective: dpo}}\ndpo: {{{settings}}}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"{file}:3: dpo: ")
