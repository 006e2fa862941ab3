"""One optimizer step of any objective: the mean over the global batch, however it is cut, metrics and seeds."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch, EncodedExample, Unit
from cuma_ds.data.stream import Draw, Stream
from cuma_ds.methods.model import Output
from cuma_ds.training.inputs import TrainingInputs
from cuma_ds.training.objectives import Loss, Objective
from cuma_ds.training.step import dropout_seed, run_step


def pair(row: int) -> Unit:
    """Two answers to one prompt, of different lengths."""
    words = random.Random(row)
    prompt = [words.randrange(6, 100) for _ in range(4 + row % 3)]
    examples = []
    for length in (2, 3):
        answer = [words.randrange(6, 100) for _ in range(length)]
        positions = [len(prompt) - 1 + place for place in range(length)]
        examples.append(EncodedExample(prompt + answer, positions, answer, [1.0] * length, row))
    return examples[0], examples[1]


class Preference(Objective):
    """-log sigmoid of how much the difference in log-probability of two answers has grown since the reference."""

    reads = ("preference",)

    def __init__(self, reference_M2: Tensor) -> None:
        self.reference_M2 = reference_M2

    def unit(self, row, renderer, sentences) -> Unit:
        raise NotImplementedError

    def weight(self, batch: Batch) -> float:
        return float(len(batch.rows))

    def loss(self, logits_BKV: Tensor, batch: Batch) -> Loss:
        log_p_L, example_L = batch.targets.log_probabilities(logits_BKV), batch.targets.example_L
        log_p_N = log_p_L.new_zeros(len(batch.profile_rows_N)).index_add(0, example_L, log_p_L)
        chosen_P, rejected_P = (log_p_N.view(-1, 2)[: len(batch.rows)] - self.reference_M2[list(batch.rows)]).T
        margin_P = chosen_P - rejected_P
        return Loss(-torch.nn.functional.logsigmoid(margin_P).sum(), {"rewards/margins": margin_P.detach().sum()})


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


class Engine:
    """DeepSpeed's part, for one process: the mean over ``parts`` micro batches."""

    dispatcher, left_update_out, finite = None, False, True

    def __init__(self, model, parts: int) -> None:
        self.network, self.parts = model, parts
        self.model = SimpleNamespace(end_step=lambda load_RE: None)
        cpu = torch.device("cpu")
        self.topology = SimpleNamespace(world=1, rank=0, device=cpu, sum_over_ranks=lambda tensor: tensor)

    def forward(self, batch: Batch, table: None) -> Output:
        return Output(self.network(**batch.inputs).logits)

    def backward(self, loss: Tensor) -> None:
        (loss / self.parts).backward()

    def step(self, learning_rate: float) -> None:
        pass

    def take_bytes_sent(self) -> dict[str, int]:
        return {}

    def trained_state_is_finite(self) -> Tensor:
        return torch.tensor(self.finite)


def config(**training) -> RunConfig:
    adapters = {"method": "mixlora", "profile_dim": 0}
    return RunConfig.model_validate({"model": {"path": "m"}, "adapters": adapters, "training": training})


@pytest.mark.parametrize(("micro", "length"), [(5, None), (2, None), (1, None), (3, 64)])
def test_pairs_in_one_forward_learn_what_pairs_learn_alone(model, micro, length) -> None:
    reference_M2 = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)) - 12
    draw = Draw(7, 5, micro, 0)
    inputs = TrainingInputs(
        Preference(reference_M2),
        Stream(draw, pair, 0, length),
        draw,
        None,
        np.zeros(0),
        np.full(7, 2),
        None,
        pair(0)[0],
        0,
        data=None,
        renderer=None,
    )
    model.zero_grad()
    result = run_step(config(), Engine(model, draw.accumulation), inputs, step=1)
    found = model.lm_head.weight.grad.clone()

    rows = np.random.default_rng([0, 0]).permutation(7)[5:].tolist()
    rows += np.random.default_rng([0, 1]).permutation(7)[:3].tolist()
    model.zero_grad()
    margins = []
    for row in rows:
        log_p = []
        for side, example in enumerate(pair(row)):
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, example.target_position]
            log_p.append(
                logits.log_softmax(-1)[range(len(logits)), example.target_token].sum() - reference_M2[row, side]
            )
        margins.append(log_p[0] - log_p[1])
    expected = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()
    expected.backward()

    assert (result.weight, result.people) == (5.0, 10.0)
    assert result.tokens == sum(len(example.input_ids) for row in rows for example in pair(row))
    assert float(result.sums["loss"]) / result.weight == pytest.approx(float(expected.detach()), rel=1e-5)
    mean_margin = float(result.sums["rewards/margins"]) / result.weight
    assert mean_margin == pytest.approx(float(torch.stack(margins).detach().mean()), rel=1e-4)
    assert model.lm_head.weight.grad.norm() > 1e-3
    torch.testing.assert_close(found, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_every_micro_batch_of_every_rank_has_its_own_dropout_and_the_same_in_a_resumed_run() -> None:
    seeds = [dropout_seed(*numbers) for numbers in itertools.product(range(3), range(20), range(3), range(4))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # These two numbers are those of every machine and release; a run may be resumed elsewhere.
    assert dropout_seed(0, 0, 0, 0) == 7896617691693857887
    assert dropout_seed(3, 100, 1, 7) == 2282622815651162768


@pytest.mark.parametrize(
    ("loss", "left_out", "dtype", "finite", "fault"),
    [
        (1.0, False, "bfloat16", True, None), (float("nan"), True, "bfloat16", True, "loss"),
        (float("inf"), True, "float16", True, "loss"), (1.0, True, "bfloat16", True, "gradient"),
        (1.0, True, "float16", True, None), (1.0, False, "bfloat16", False, "update"),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_found_in_its_step(model, loss, left_out, dtype, finite, fault) -> None:
    """In float16 a gradient that is not finite is how the loss scale is found."""

    class Constant(Preference):
        def loss(self, logits_BKV: Tensor, batch: Batch) -> Loss:
            return Loss(logits_BKV.sum() * 0 + loss)

    draw = Draw(7, 5, 5, 0)
    inputs = TrainingInputs(
        Constant(torch.zeros(7, 2)), Stream(draw, pair, 0, None), draw, None, np.zeros(0), np.full(7, 2), None,
        pair(0)[0], 0, data=None, renderer=None,
    )  # fmt: skip
    engine = Engine(model, draw.accumulation)
    engine.left_update_out, engine.finite = left_out, finite
    settings = RunConfig.model_validate({**config().model_dump(), "model": {"path": "m", "dtype": dtype}})
    result = run_step(settings, engine, inputs, step=1)
    assert (result.fault, result.stopping) == (fault, False)
