"""The reference of preference training: the start policy's own words, computed once, kept, and checked when read."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from pairs import pair_recipe
from run_folder import lively
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cuma_ds.data import load_data
from cuma_ds.data.batch import Batch
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.stream import Draw, Stream
from cuma_ds.errors import CheckpointError, CumaError
from cuma_ds.identity import sealed
from cuma_ds.methods import METHODS
from cuma_ds.methods.model import AdaptedModel
from cuma_ds.parallel.backbone import load_backbone
from cuma_ds.profiles import ProfileEncoder, ProfileTable
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run
from cuma_ds.training.objectives import reference
from cuma_ds.training.objectives.dpo import Dpo, PairBatches
from cuma_ds.training.objectives.protocol import Begin


class Engine:
    """What the reference asks of an engine, in one process. ``seen`` counts its forwards."""

    dispatcher = None

    def __init__(self, model: AdaptedModel) -> None:
        self.model, self.seen = model, 0
        cpu = torch.device("cpu")
        self.topology = SimpleNamespace(is_main=True, device=cpu, sum_over_ranks=lambda tensor: tensor)

    def take_bytes_sent(self) -> dict[str, float]:
        return {}

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def forward(self, batch: Batch, table: ProfileTable):
        self.seen += 1
        return self.model(batch, table)


class Setup:
    """A run that is about to begin: 4 steps of 6 pairs, on a model whose adapters have learned something."""

    def __init__(self, path, **changes) -> None:
        config = load_config(path)
        self.config = config = config.model_copy(
            update={name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
        )
        self.data = load_data(config.data, config.profiles.template)
        self.rows = self.data.splits["train"]
        encoder = ProfileEncoder(config.profiles.encoder)
        self.table = ProfileTable.build(self.data.sentences, encoder, config.profiles.cache_dir)
        self.objective = Dpo(config)
        self.draw = Draw(len(self.rows), 6, 4, seed=1)
        self.model = self.loaded()
        self.engine = Engine(self.model)
        self.run = Run(config.run_dir)

    def loaded(self) -> AdaptedModel:
        """The start policy, read anew."""
        adapters = self.config.adapters.model_copy(update={"profile_dim": self.table.embeddings.shape[1]})
        model = METHODS["cuma"](load_backbone(self.config.model), self.config.model_copy(update={"adapters": adapters}))
        model.prepare(self.table.embeddings, None)
        lively(model.cuma)
        return model.train()

    def stream(self, **changes) -> Stream:
        renderer = Renderer.of(AutoTokenizer.from_pretrained(self.config.model.path), self.config.data)
        draw = dataclasses.replace(self.draw, **changes)
        return Stream(draw, lambda row: self.objective.unit(self.rows[row], renderer, self.data.sentences), 0)

    def begin(self, steps: int = 4) -> Begin:
        training = self.config.training.model_copy(update={"steps": steps})
        config = self.config.model_copy(update={"training": training})
        inputs = SimpleNamespace(draw=self.draw, batches=self.stream(), table=self.table, data=self.data)
        return Begin(config, self.engine, inputs, self.run, lambda _: None)

    def reference(self, steps: int = 4, bare: bool = False) -> torch.Tensor:
        return reference.reference_log_probabilities(self.begin(steps), bare, self.objective._log_probabilities)


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> None:
    monkeypatch.setattr(reference, "agreement", contextlib.nullcontext)


@pytest.fixture
def setup(tmp_path, tiny_llama, tiny_encoder) -> Setup:
    return Setup(pair_recipe(tmp_path, tiny_llama, tiny_encoder, "run", adapters={"dropout": 0.3}))


@torch.no_grad()
def said_by(model: AdaptedModel, setup: Setup, steps: int) -> torch.Tensor:
    """[M, 2] by another copy of the model: each row in the batch of the first step that meets it."""
    found = torch.full((len(setup.rows), 2), torch.nan)
    for step in range(steps):
        for batch in setup.stream().step(step):
            log_p_L = batch.targets.log_probabilities(model.eval()(batch, setup.table).logits)
            for pair, row in enumerate(batch.rows):
                for side in (0, 1):
                    if found[row, side].isnan():
                        own_L = torch.where(batch.targets.example_L == 2 * pair + side, log_p_L, 0.0)
                        found[row, side] = own_L.sum()
    return found


@pytest.mark.parametrize("bare", [False, True])
def test_the_reference_says_bit_for_bit_what_a_separately_loaded_start_policy_says(setup, bare) -> None:
    separate = setup.loaded()
    with separate.disabled() if bare else contextlib.nullcontext():
        expected = said_by(separate, setup, steps=4)
    found = setup.reference(bare=bare)
    assert torch.equal(found.nan_to_num(1), expected.nan_to_num(1))
    met = {row for step in range(4) for row in setup.draw.global_rows(step)}
    assert {row for row in range(len(setup.rows)) if not found[row].isnan().any()} == met
    assert 20 < len(met) < len(setup.rows)
    assert setup.engine.model.training
    assert torch.equal(load_file(setup.run.reference_file)["log_probabilities"].nan_to_num(1), found.nan_to_num(1))


def test_before_the_first_update_policy_and_reference_say_the_same(tmp_path, tiny_llama, tiny_encoder) -> None:
    setup = Setup(pair_recipe(tmp_path, tiny_llama, tiny_encoder, "run"))
    known = {"reference": setup.reference(), **{name: torch.ones(len(setup.rows)) for name in ("label", "weight")}}
    known["shift"] = torch.zeros(len(setup.rows))
    for batch in PairBatches(setup.stream(), known).step(0):
        found = setup.objective.loss(setup.model(batch, setup.table).logits, batch)
        assert found.means["kl"].tolist() == [0.0, len(batch.rows)]
        assert float(found.sum.detach()) / len(batch.rows) == pytest.approx(0.6931472)


def test_the_profile_reaches_policy_and_reference(setup) -> None:
    """Another profile in either of them changes the loss; the same other profile in both is a third loss."""
    batch = setup.stream().step(0)[0]
    other = dataclasses.replace(batch, profile_rows_N=(batch.profile_rows_N + 1) % len(setup.table.sentences))
    rows = list(batch.rows)
    ones = torch.ones(len(rows))

    def reference_for(asked: Batch) -> torch.Tensor:
        stream = SimpleNamespace(step=lambda number: [asked, *setup.stream().step(number)[1:]])
        begin = setup.begin(1)
        begin.inputs.batches = stream
        setup.run.reference_file.unlink(missing_ok=True)
        said = reference.reference_log_probabilities(begin, False, setup.objective._log_probabilities)
        return said[rows]

    trained = copy.deepcopy(setup.model).eval()
    with torch.no_grad():
        for _, parameter in trained.cuma.adapter_parameters():
            parameter.mul_(1.1)

    def loss(policy: Batch, reference_P2: torch.Tensor) -> float:
        given = {"label": ones, "weight": ones, "shift": 0 * ones, "reference": reference_P2}
        asked = dataclasses.replace(policy, extras=given)
        with torch.no_grad():
            return float(setup.objective.loss(trained(asked, setup.table).logits, asked).sum)

    own, swapped = reference_for(batch), reference_for(other)
    losses = [loss(batch, own), loss(other, own), loss(batch, swapped), loss(other, swapped)]
    assert loss(batch, reference_for(batch)) == losses[0]
    assert all(abs(a - b) > 1e-3 for n, a in enumerate(losses) for b in losses[:n]), losses


def test_more_steps_extend_the_file_and_nothing_is_computed_twice(setup) -> None:
    first = setup.reference(steps=2)
    seen = setup.engine.seen
    assert seen == 2 * setup.draw.accumulation
    assert torch.equal(setup.reference(steps=2).nan_to_num(1), first.nan_to_num(1))
    assert setup.engine.seen == seen
    more = setup.reference(steps=400)
    assert not more.isnan().any()
    assert setup.engine.seen == -(-len(setup.rows) // 6) * setup.draw.accumulation
    setup.run.reference_file.unlink()
    assert torch.equal(setup.reference(steps=400), more)


def test_a_stop_in_the_middle_loses_what_was_not_saved_and_changes_nothing(setup, monkeypatch) -> None:
    expected = setup.reference()
    setup.run.reference_file.unlink()
    monkeypatch.setattr(reference, "_SECONDS_BETWEEN_SAVES", 0.0)
    for forwards in (3, 3):
        engine = setup.engine = Engine(setup.model)
        forward = engine.forward

        def stops(batch, table, engine=engine, forward=forward, forwards=forwards):
            if engine.seen == forwards:
                raise KeyboardInterrupt
            return forward(batch, table)

        engine.forward = stops
        with pytest.raises(KeyboardInterrupt):
            setup.reference()
    kept = load_file(setup.run.reference_file)["log_probabilities"]
    assert kept.isnan().sum() > expected.isnan().sum()
    setup.engine = Engine(setup.model)
    assert torch.equal(setup.reference().nan_to_num(1), expected.nan_to_num(1))
    assert 0 < setup.engine.seen < 4 * setup.draw.accumulation


def test_a_damaged_or_foreign_file_is_refused_in_one_line(setup, tmp_path) -> None:
    found, file = setup.reference(), setup.run.reference_file
    whole = file.read_bytes()

    def complaint() -> str:
        with pytest.raises(CheckpointError) as raised:
            setup.reference()
        assert "\n" not in str(raised.value)
        assert str(file) in str(raised.value)
        assert "remove it, and it will be computed again" in str(raised.value)
        return str(raised.value)

    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(header, len(whole), 97):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "is damaged: its content has changed" in complaint()
    file.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in complaint()
    file.write_bytes(b"")
    assert "is damaged" in complaint()
    save_file({"log_probabilities": found}, file)
    assert "was computed for another start policy" in complaint()
    file.write_bytes(whole)
    setup.run._identity_file.parent.mkdir(parents=True, exist_ok=True)
    setup.run._identity_file.write_text(json.dumps(sealed({"data": "other"})))
    assert "was computed for another start policy, data or recipe" in complaint()
    setup.run._identity_file.unlink()
    assert torch.equal(setup.reference().nan_to_num(1), found.nan_to_num(1))


def test_settings_that_decide_the_values_are_part_of_what_the_file_belongs_to(setup) -> None:
    def belongs(section: str, **values: object) -> str:
        config = setup.config.model_copy(update={section: getattr(setup.config, section).model_copy(update=values)})
        return reference.ReferenceFile.of(setup.begin()._replace(config=config)).belongs_to

    own = belongs("training", steps=4)
    assert belongs("training", steps=400) == own
    assert belongs("parallel", ep_size=2) == own
    others = [
        belongs("dpo", reference="base"), belongs("dpo", ld_alpha=0.5), belongs("data", system_prompt="x"),
        belongs("data", max_length=100), belongs("data", profile_in_prompt=True), belongs("run", seed=9),
    ]  # fmt: skip
    assert len({own, *others}) == 7


def test_a_reference_that_is_no_number_is_one_line(setup) -> None:
    class Broken(Engine):
        def forward(self, batch, table):
            out = super().forward(batch, table)
            return out._replace(logits=out.logits / 0.0)

    setup.engine = Broken(setup.model)
    with pytest.raises(CumaError, match=r"row [0-9]+ of split train .* must be finite") as raised:
        setup.reference()
    assert "\n" not in str(raised.value)
    assert not setup.run.reference_file.exists()
