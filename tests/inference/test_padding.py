"""An example answers and teaches the same alone and in a padded batch, whatever way its model counts positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import FAMILIES, random_model, save_family
from ranks import run
from small_runs import recipe

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.data.batch import EncodedExample, as_filler, collate
from cuma_ds.evaluation.chat import chat_losses
from cuma_ds.evaluation.choice import predict_choices
from cuma_ds.evaluation.gradients import group_gradients
from cuma_ds.methods.cuma import model_inputs
from cuma_ds.profiles import ProfileTable
from cuma_ds.training.objectives.sft import label_losses
from cuma_ds.training.packing import tells_examples_apart

WIDTH = 6
LENGTHS = (9, 23, 14)
# What transformers 5 makes of packed rows: it finds their examples by position_ids for these alone.
PACKABLE = {"gpt2", "gpt_neox", "llama"}


def adapted(kind: str) -> CumaModel:
    config = CumaConfig(num_experts=4, top_k=2, lora_r=4, profile_dim=WIDTH, target_modules=[FAMILIES[kind].linear])
    model = inject_adapters(random_model(kind, attn_implementation="eager"), config)
    generator = torch.Generator().manual_seed(3)
    for _, parameter in model.adapter_parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request) -> CumaModel:
    return adapted(request.param).eval()


@pytest.fixture(scope="module")
def table() -> ProfileTable:
    generator = torch.Generator().manual_seed(4)
    return ProfileTable([f"p{i}" for i in range(len(LENGTHS))], torch.randn(len(LENGTHS), WIDTH, generator=generator))


@pytest.fixture(scope="module")
def examples() -> list[EncodedExample]:
    """One per profile, of different lengths, with two letters at the last position."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(6, 128, (length,), generator=generator).tolist() for length in LENGTHS]
    return [EncodedExample(ids, [len(ids) - 1] * 2, [40, 50], [0.25, 0.75], number) for number, ids in enumerate(rows)]


def alone(model: CumaModel, example: EncodedExample, table: ProfileTable) -> torch.Tensor:
    """Logits [S, V] of the bare tokens: no mask, no positions, no padding."""
    ids, profile = torch.tensor([example.input_ids]), table.embeddings[[example.profile]]
    return model(input_ids=ids, profile_embeddings=profile, use_cache=False).logits[0]


@torch.no_grad()
def test_choices_are_answered_as_alone(model, examples, table) -> None:
    found = predict_choices(model, examples, table.embeddings, 3, pad_id=0)
    for example, probabilities in zip(examples, found.probabilities, strict=True):
        expected = alone(model, example, table)[-1, example.target_token].double().softmax(0)
        np.testing.assert_allclose(probabilities, expected.numpy(), atol=2e-5)
    assert len({round(float(p[0]), 3) for p in found.probabilities}) == 3


@torch.no_grad()
def test_conversations_surprise_as_alone(model, examples, table) -> None:
    talks = [
        EncodedExample(e.input_ids, [2, 5, len(e.input_ids) - 2], [11, 12, 13], [1.0] * 3, e.profile) for e in examples
    ]
    found = chat_losses(model, talks, table.embeddings, 3, pad_id=0)
    for talk, nll in zip(talks, found.nll, strict=True):
        logits = alone(model, talk, table)[talk.target_position].double().log_softmax(dim=-1)
        assert nll == pytest.approx(-float(logits[torch.arange(3), talk.target_token].sum()), rel=1e-4)


def test_a_padded_batch_teaches_what_its_examples_teach_alone(model, examples, table) -> None:
    loss, gradients = 0.0, 0.0
    for example in examples:
        model.zero_grad()
        log_p = alone(model, example, table)[-1].log_softmax(0)[example.target_token]
        one = -(log_p * torch.tensor(example.target_weight)).sum()
        one.backward()
        loss += float(one.detach())
        gradients = gradients + torch.cat([parameter.grad.flatten() for _, parameter in model.adapter_parameters()])
    model.zero_grad()
    batch = collate([*examples, as_filler(examples[0])], pad_id=0)
    out = model(**model_inputs(batch, table, torch.device("cpu")))
    together = label_losses(out.logits, batch.targets).sum()
    together.backward()
    found = torch.cat([parameter.grad.flatten() for _, parameter in model.adapter_parameters()])
    assert float(together.detach()) == pytest.approx(loss, rel=1e-4)
    assert gradients.norm() > 1e-2
    assert float((found - gradients).norm() / gradients.norm()) < 1e-4


def test_gradients_of_groups_do_not_depend_on_who_shares_a_batch(model, examples, table) -> None:
    together = group_gradients(model, [examples], table.embeddings, 3, 0)
    one_by_one = group_gradients(model, [examples], table.embeddings, 1, 0)
    assert float((together - one_by_one).norm() / one_by_one.norm()) < 1e-4


def test_packing_is_refused_for_models_that_do_not_tell_examples_apart(request, model, examples, table) -> None:
    kind = request.node.callspec.params["model"]

    def logits_of(batch):
        return model(**model_inputs(batch, table, torch.device("cpu"))).logits

    assert tells_examples_apart(logits_of, examples[0], pad_id=0) == (kind in PACKABLE)


@pytest.mark.multirank
def test_a_packed_run_of_such_a_model_stops_before_its_first_step(tmp_path: Path, tiny_encoder) -> None:
    folder = save_family(tmp_path / "opt", "opt")
    data, adapters = {"packing": True, "max_length": 400}, {"target_modules": ["v_proj"]}
    path = recipe(tmp_path, folder, tiny_encoder, "packed", data=data, adapters=adapters)
    for code, output in run(2, ["launchers/train.py", "--config", str(path)]):
        assert code == 2, output[-2000:]
    output = run(1, ["launchers/train.py", "--config", str(path)])[0][1]
    assert "does not tell the examples of one row apart" in output
    assert not (tmp_path / "runs" / "packed" / "checkpoints").exists()
    assert not (tmp_path / "runs" / "packed" / "metrics.jsonl").exists()
