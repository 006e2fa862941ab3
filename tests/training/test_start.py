"""A run that starts from a trained model: what it takes from it, what it refuses, and that it needs it once."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from commands import TRAIN, one_line
from ranks import run, run_recipes
from run_folder import make_run
from safetensors.torch import load_file, save_file
from small_runs import DATA, metrics, recipe
from test_identity import other_weights

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import encode_example
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.stream import Draw, Stream
from cuma_ds.errors import CheckpointError, ConfigError
from cuma_ds.evaluation.run import evaluate_run
from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.inference.open import load_trained, open_run
from cuma_ds.learned_settings import fingerprint
from cuma_ds.methods.cuma import model_inputs
from cuma_ds.parallel.backbone import load_tokenizer
from cuma_ds.parallel.stored import find_checkpoint, read_adapters, read_state
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run
from cuma_ds.training.inputs import prepare_run
from cuma_ds.training.start import with_start

STEPS = 3
GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0"


@pytest.fixture
def places(tmp_path, tiny_llama, tiny_encoder) -> dict[str, Path]:
    """Copies of backbone and encoder that may be changed."""
    shutil.copytree(tiny_llama, tmp_path / "llama")
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    return {"model": tmp_path / "llama", "encoder": tmp_path / "encoder"}


@pytest.fixture
def start(tmp_path, places) -> Path:
    """A run of one checkpoint with settings of its own."""
    folder, _, _ = make_run(
        tmp_path / "starts" / "sft", places["model"], places["encoder"],
        {"num_experts": 3, "lora_r": 3, "dropout": 0.1, "balance_weight": 0.05},
        profiles={"template": "wvs", "standardise": 2.0},
        data={"test_fraction": 0.4, "split_seed": 5, "prompt_style": "metadata", "system_prompt": "Be brief."},
    )  # fmt: skip
    return folder


def going_on(folder: Path, start: Path, places: dict[str, Path], **sections: dict) -> RunConfig:
    """A recipe that leaves to its start whatever it may."""
    values = {
        "run": {"name": "on", "output_dir": str(folder / "runs")},
        "model": {"path": str(places["model"]), "dtype": "float32", "init_from": str(start)},
        "profiles": {"cache_dir": str(folder / "cache")},
        "data": {"path": str(DATA)},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    (folder / "on.yaml").write_text(yaml.safe_dump(values))
    return load_config(folder / "on.yaml")


def exported(start: Path, folder: Path) -> Path:
    return write_hf(read_run(start), folder)


# What a run takes


def test_a_recipe_leaves_to_its_start_what_belongs_to_the_model_and_its_people(start, tmp_path, places) -> None:
    config = going_on(tmp_path, start, places, adapters={"dropout": 0.0}, data={"max_length": 300})
    resolved = with_start(config)
    before = Run(start).config()
    assert resolved.adapters == before.adapters.model_copy(update={"dropout": 0.0})
    assert resolved.profiles.model_dump(exclude={"cache_dir"}) == before.profiles.model_dump(exclude={"cache_dir"})
    kept = {"profile_in_prompt", "system_prompt", "prompt_style", "option_order", "test_fraction", "split_seed"}
    assert resolved.data.model_dump(include=kept) == before.data.model_dump(include=kept)
    assert resolved.data.heldout == before.data.heldout
    assert resolved.data.max_length == 300
    assert resolved.training == config.training
    assert with_start(resolved) == resolved


def test_an_export_says_what_it_knows(start, tmp_path, places) -> None:
    config = going_on(tmp_path, exported(start, tmp_path / "export"), places, data={"split_seed": 7})
    resolved, before = with_start(config), Run(start).config()
    assert resolved.adapters == before.adapters
    assert (resolved.profiles.encoder, resolved.profiles.template) == (str(places["encoder"].resolve()), "wvs")
    assert (resolved.data.prompt_style, resolved.data.system_prompt) == ("metadata", "Be brief.")
    assert resolved.data.split_seed == 7


SET_OTHERWISE = {
    "adapters.top_k": ({"adapters": {"top_k": 1}}, "adapters.top_k: 2, but this recipe says 1"),
    "method": ({"adapters": {"method": "lora"}}, "adapters.method: cuma, but this recipe says lora"),
    "target_modules": (
        {"adapters": {"target_modules": ["up_proj"]}},
        r"adapters.target_modules: \['q_proj', 'v_proj'\], .* says \['up_proj'\]",
    ),
    "template": ({"profiles": {"template": "generic"}}, "profiles.template: wvs, but this recipe says generic"),
    "standardise": ({"profiles": {"standardise": None}}, "profiles.standardise: 2.0, but this recipe says None"),
    "prompt": ({"data": {"prompt_style": "letters"}}, "data.prompt_style: metadata, but this recipe says letters"),
    "test_fraction": ({"data": {"test_fraction": 0.1}}, "data.test_fraction: 0.4, but this recipe says 0.1"),
    "heldout": ({"data": {"heldout_fraction": 0.0}}, "data.heldout_fraction: 0.15, but this recipe says 0.0"),
    "split_seed": ({"data": {"split_seed": 0}}, "data.split_seed: 5, but this recipe says 0"),
}


@pytest.mark.parametrize("what", SET_OTHERWISE)
def test_a_key_of_the_model_that_is_set_otherwise_is_refused_and_both_values_named(
    what, start, tmp_path, places
) -> None:
    changes, problem = SET_OTHERWISE[what]
    with pytest.raises(ConfigError, match=rf"model\.init_from: .*sft has {problem}; leave the key out"):
        with_start(going_on(tmp_path, start, places, **changes))


def test_the_same_value_and_what_only_training_knows_may_be_set(start, tmp_path, places) -> None:
    changes = {"num_experts": 3, "balance_weight": 0.0, "balance_scope": "micro_batch", "gradient_mask": "dominant"}
    groups = {"gradient_mask": "groups", "gradient_groups": {"country": {"*": [0]}}}
    for adapters in (changes, groups):
        data = {"test_fraction": 0.4, "heldout_fraction": 0.15}
        resolved = with_start(going_on(tmp_path, start, places, adapters=adapters, data=data))
        assert {key: getattr(resolved.adapters, key) for key in changes} == {
            **resolved.adapters.model_dump(include=set(changes)), **adapters_of(adapters)
        }  # fmt: skip
        prepare_run(resolved)
        shutil.rmtree(resolved.run_dir)


def adapters_of(changes: dict) -> dict:
    return {key: value for key, value in changes.items() if key != "gradient_groups"}


def test_settings_that_do_not_go_together_with_the_start_are_one_line(start, tmp_path, places) -> None:
    with pytest.raises(
        ConfigError, match=r"sft \(model\.init_from\) decides.*ep_size is 2, which does not divide .* 3"
    ):
        with_start(going_on(tmp_path, start, places, parallel={"ep_size": 2}))


# What is no start


def peft_adapter(folder: Path, _: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))


def authors(folder: Path, _: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "CuMA"}))


def without_checkpoint(folder: Path, start: Path) -> None:
    shutil.copytree(start, folder)
    shutil.rmtree(folder / "checkpoints")


NO_START: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "nothing": (
        lambda folder, start: None,
        "does not exist; it takes a run folder, or a folder made by launchers/expo",
    ),
    "an empty folder": (lambda folder, start: folder.mkdir(), "is neither; it takes a run folder"),
    "no checkpoint": (without_checkpoint, "holds no checkpoint; train it first"),
    "a PEFT adapter": (peft_adapter, r"holds adapters of type LORA, not an export of cuma-ds \(it takes a run folder"),
    "the authors' format": (authors, r"holds adapters of type CuMA, .*import it first \(--from-reference\)"),
}


@pytest.mark.parametrize("what", NO_START)
def test_what_is_no_run_and_no_export_is_one_line_that_says_what_to_use(what, start, tmp_path, places) -> None:
    make, problem = NO_START[what]
    make(tmp_path / "thing", start)
    with pytest.raises(CheckpointError, match=rf"^model\.init_from: .*thing.* ?{problem}") as refused:
        with_start(going_on(tmp_path, tmp_path / "thing", places))
    assert "\n" not in str(refused.value)


def test_models_hub_ids_and_the_run_itself_are_told_apart(start, tmp_path, places) -> None:
    with pytest.raises(CheckpointError, match=r"llama is a model as it is; name it as model\.path"):
        with_start(going_on(tmp_path, places["model"], places))
    with pytest.raises(CheckpointError, match=r"somebody/cuma-export is no folder here; train it or download it first"):
        with_start(going_on(tmp_path, Path("somebody/cuma-export"), places))
    with pytest.raises(ConfigError, match=r"on is this run itself; choose another run\.name"):
        with_start(going_on(tmp_path, tmp_path / "runs" / "on", places))


# What does not belong to the start


def prepared(config: RunConfig) -> Run:
    prepare_run(with_start(config))
    return Run(config.run_dir)


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.filterwarnings("ignore:.*does not say on whom it was trained")
def test_another_backbone_or_encoder_is_refused_by_content(kind, start, tmp_path, places) -> None:
    origin = start if kind == "run" else exported(start, tmp_path / "export")
    shutil.copytree(places["encoder"], tmp_path / "same")
    config = going_on(tmp_path, origin, places, profiles={"encoder": str(tmp_path / "same")})
    prepared(config)
    shutil.rmtree(config.run_dir)
    other_weights_of_encoder(tmp_path / "same")
    with pytest.raises(
        CheckpointError, match=r"profiles\.encoder: .*same is another sentence encoder than .*init_from"
    ):
        prepared(config)
    other_weights(places["model"])
    config = going_on(tmp_path, origin, places)
    with pytest.raises(CheckpointError, match=r"model\.path: .*llama holds other weights than .* was trained on; name"):
        prepared(config)
    assert not config.run_dir.exists()


def other_weights_of_encoder(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def test_another_split_of_the_same_people_is_refused(start, tmp_path, places) -> None:
    """The manifest of the start is made what release 0.1.0, or a source with a split of its own, would have written."""
    manifest = start / "data" / "manifest.json"
    whole = json.loads(manifest.read_text())
    del whole["sealed"]
    config = going_on(tmp_path, start, places)
    for split, words in (
        (None, "trained on data as release 0.1.0 drew people"),
        ({"by": "hash", "people": "given by the source"}, "whose people are given by the source"),
    ):
        changed = {key: value for key, value in {**whole, "split": split}.items() if value is not None}
        manifest.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=rf"{words} .*but this data is .*people are drawn .* be tested on"):
            prepared(config)
    manifest.write_text(json.dumps({**whole, "source": "prism", "split": {"by": "hash", "people": "other people"}}))
    prepared(config)


@pytest.mark.filterwarnings("ignore:.*release 0.1.0")
def test_a_run_of_release_0_1_0_is_a_start_for_the_people_that_it_drew_alone(tmp_path) -> None:
    old, encoder = shutil.copytree(GOLDEN / "run", tmp_path / "old"), {"encoder": str(GOLDEN / "encoder")}
    model = {"model": GOLDEN / "model"}
    with pytest.raises(CheckpointError, match=r"trained on data as release 0\.1\.0 drew people .* people are drawn"):
        prepared(going_on(tmp_path, old, model, profiles=encoder))
    data = {"path": str(old / "data")}
    with pytest.warns(
        UserWarning, match=r"old does not say what model it was trained on; that .*model is it cannot be"
    ):
        run = prepared(going_on(tmp_path, old, model, profiles=encoder, data=data))
    found, expected = run.start_adapters(), read_adapters(find_checkpoint(old / "checkpoints"))
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert run.config().adapters.balance_scope == "micro_batch"  # as that release did


def test_that_an_export_says_nothing_of_its_people_is_said(start, tmp_path, places) -> None:
    with pytest.warns(UserWarning, match=r"export is an export, which does not say on whom it was trained"):
        prepared(going_on(tmp_path, exported(start, tmp_path / "export"), places))


# What is kept of it


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.filterwarnings("ignore:.*does not say on whom it was trained")
def test_the_run_keeps_the_trained_tensors_and_needs_the_folder_no_more(kind, start, tmp_path, places) -> None:
    origin = start if kind == "run" else exported(start, tmp_path / "export")
    config = going_on(tmp_path, origin, places)
    run = prepared(config)
    expected = read_adapters(find_checkpoint(Run(start).checkpoints))
    found = run.start_adapters()
    assert found is not None
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_state(run.start)["step"] == 0
    assert run.config().adapters == Run(start).config().adapters
    before = (run.start / "state.json").read_bytes()
    shutil.rmtree(origin)
    again = with_start(config)
    assert again == with_start(again)
    assert fingerprint(again) == fingerprint(run.config())
    prepare_run(again)
    assert (run.start / "state.json").read_bytes() == before


def test_a_renamed_start_goes_on_and_another_one_or_none_does_not(start, tmp_path, places) -> None:
    config = going_on(tmp_path, start, places)
    prepared(config)
    renamed = start.rename(start.with_name("renamed"))
    run = prepared(going_on(tmp_path, renamed, places))
    assert run.config().model.init_from == str(renamed)
    other, _, _ = make_run(
        tmp_path / "starts" / "other", places["model"], places["encoder"], {"num_experts": 3, "lora_r": 3},
        profiles={"template": "wvs", "standardise": 2.0},
        data={"test_fraction": 0.4, "split_seed": 5, "prompt_style": "metadata", "system_prompt": "Be brief."},
    )  # fmt: skip
    change_checkpoint(other)
    with pytest.raises(CheckpointError, match=r"model\.init_from: .*other is not what .*runs/on started from"):
        prepared(going_on(tmp_path, other, places))
    # The run's own key still names the renamed folder: training it on makes no difference.
    change_checkpoint(renamed)
    config = going_on(tmp_path, renamed, places)
    prepared(config)
    with pytest.raises(ConfigError, match=r"model\.init_from: a trained model, but this recipe says None"):
        Run.create(run.config(["model.init_from=null"]))
    with pytest.raises(ConfigError, match=r"top_k: 2, but this recipe says 1; choose another run\.name"):
        prepared(going_on(tmp_path, renamed, places, adapters={"top_k": 1}))


def change_checkpoint(folder: Path) -> None:
    """Make another checkpoint of what a run has, one step later."""
    from cuma_ds.identity import file_sha256
    from cuma_ds.parallel.stored import write_state

    old = find_checkpoint(folder / "checkpoints")
    state, step = dict(read_state(old)), int(old.name.removeprefix("step-")) + 1
    new = shutil.copytree(old, old.with_name(f"step-{step}"))
    tensors = load_file(new / "shared.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, new / "shared.safetensors")
    write_state(new, {**state, "step": step}, {"shared.safetensors": file_sha256(new / "shared.safetensors")})
    (new.parent / "latest").write_text(f"step-{step}\n")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(bytes(content))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda start: flip(start / "shared.safetensors"), "the content of shared.safetensors has changed"),
    "the state": (lambda start: flip(start / "state.json"), "damaged"),
    "gone": (shutil.rmtree, "state.json is missing or damaged; restore it from a copy"),
    "a file gone": (lambda start: (start / "shared.safetensors").unlink(), "shared.safetensors is missing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_start_is_refused(what, start, tmp_path, places) -> None:
    damage, words = DAMAGE[what]
    config = going_on(tmp_path, start, places)
    run = prepared(config)
    damage(run.start)
    for read in (lambda: prepared(config), run.start_adapters):
        with pytest.raises(CheckpointError, match=words):
            read()


def test_the_start_of_another_run_is_refused(start, tmp_path, places) -> None:
    config = going_on(tmp_path, start, places)
    run = prepared(config)
    change_checkpoint(start)
    other = prepared(going_on(tmp_path, start, places, run={"name": "other"}))
    shutil.rmtree(run.start)
    shutil.copytree(other.start, run.start)
    with pytest.raises(CheckpointError, match=r"runs/on/start is not what this run started from; restore it"):
        prepared(config)


def test_a_first_try_that_broke_off_leaves_nothing_behind_that_counts(start, tmp_path, places, monkeypatch) -> None:
    """A crash between the start and the identity: the next start writes it anew, from what is there then."""
    config = with_start(going_on(tmp_path, start, places))
    run = Run(config.run_dir)
    with monkeypatch.context() as broken:
        broken.setattr(Run, "record_identity", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_run(config)
    assert run.start.is_dir()
    change_checkpoint(start)
    prepare_run(with_start(config))
    expected = read_adapters(find_checkpoint(Run(start).checkpoints))
    found = run.start_adapters()
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# Training on


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    """The recipe of a run that has learned something."""
    path = recipe(
        tmp_path_factory.mktemp("trained"), tiny_llama, tiny_encoder, "sft",
        training={"warmup_steps": 0, "schedule": "constant", "learning_rate": 0.05, "max_grad_norm": 1.0},
        data={"packing": False},
    )  # fmt: skip
    run_recipes(1, [path])
    return path


def second(folder: Path, trained: Path, name: str, world: int, **sections: dict) -> Path:
    """A recipe that goes on from that run."""
    config = load_config(trained)
    values = {
        "run": {"name": name, "output_dir": str(folder / "runs"), "seed": 8},
        "model": {"path": config.model.path, "dtype": "float32", "init_from": str(config.run_dir)},
        "data": {"path": config.data.path},
        "training": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8 // world, "schedule": "constant"},
        "checkpoint": {"every": 1},
        "telemetry": {"tensorboard": False},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def first_loss(path: Path) -> float:
    """The loss of the first batch of a run, by its start policy as evaluation opens it: no engine, no optimizer."""
    run = Run(load_config(path).run_dir)
    config, data, table = run.config(), run.data(), run.profiles(run.config())
    adapters = run.start_adapters()
    assert adapters is not None
    model = load_trained(config, adapters, table)
    tokenizer, rows = load_tokenizer(config.model), data.splits["train"]
    renderer = Renderer.of(tokenizer, config.data)
    draw = Draw(len(rows), config.training.global_batch_size, config.training.global_batch_size, config.run.seed)
    stream = Stream(
        draw, lambda row: (encode_example(rows[row], renderer, data.sentences, config.data),), tokenizer.pad_token_id
    )
    (batch,) = stream.step(0)
    with torch.no_grad():
        logits = model(**model_inputs(batch, table, torch.device("cpu"))).logits
    log_p_L = logits.log_softmax(-1)[batch.targets.row_L, batch.targets.position_L, batch.targets.token_L]
    return -float((batch.targets.weight_L * log_p_L).sum()) / batch.weight_sum


PLACEMENTS = {
    1: {"plain": {"deepspeed_config": "zero1"}},
    2: {
        "sharded": {"deepspeed_config": "zero2_sharded_backbone"},
        "ep 2": {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2},
        "zero 1, ep 2": {"deepspeed_config": "zero1", "ep_size": 2},
        "zero 3": {"deepspeed_config": "zero3"},
    },
    4: {"ep 4": {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 4}},
}


@pytest.mark.multirank
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_first_loss_is_that_of_the_start_wherever_it_is_loaded(world, trained, tmp_path) -> None:
    paths = {
        name: second(tmp_path, trained, f"w{world}-{number}", world, parallel=parallel)
        for number, (name, parallel) in enumerate(PLACEMENTS[world].items())
    }
    run_recipes(world, list(paths.values()), timeout=900)
    expected = first_loss(next(iter(paths.values())))
    untrained = metrics(load_config(trained))[0]["loss"]
    assert abs(expected - untrained) > 0.1
    for name, path in paths.items():
        rows = metrics(load_config(path))
        assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5), name
        assert rows[-1]["loss"] != rows[0]["loss"]


@pytest.mark.multirank
def test_two_ranks_go_on_as_one_and_a_killed_run_as_a_whole_one(trained, tmp_path) -> None:
    """The start folder is away when the runs are resumed."""
    origin = load_config(trained).run_dir
    copy = shutil.copytree(origin, tmp_path / "copy")
    whole = second(tmp_path, trained, "whole", 1, parallel={"deepspeed_config": "zero1"})
    cut = second(
        tmp_path, trained, "cut", 2, model={"init_from": str(copy)}, training={"steps": 1},
        parallel={"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2},
    )  # fmt: skip
    run_recipes(1, [whole])
    run_recipes(2, [cut])
    shutil.rmtree(copy)
    cut = second(
        tmp_path, trained, "cut", 2, model={"init_from": str(copy)},
        parallel={"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2},
    )  # fmt: skip
    run_recipes(2, [cut])
    expected, found = (
        read_adapters(find_checkpoint(Run(load_config(path).run_dir).checkpoints)) for path in (whole, cut)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    folder = load_config(cut).run_dir
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_run(folder)
        report = evaluate_run(folder)
        assert exported(folder, tmp_path / "export").is_dir()
    assert opened.checkpoint == f"step-{STEPS}"
    assert report.splits


@pytest.mark.multirank
def test_dpo_begins_at_the_sft_policy_and_measures_from_it(trained, tmp_path) -> None:
    """The people's answers that the run learned from become pairs. At the start policy the rewards are 0 against
    itself, and against the bare backbone they are not.
    """
    data, training = {"kind": "preference"}, {"objective": "dpo", "learning_rate": 0.01}
    paths = [
        second(tmp_path, trained, f"dpo-{reference}", 1, data=data, training=training, dpo={"reference": reference})
        for reference in ("start", "base")
    ]
    run_recipes(1, paths)
    from_start, from_base = (metrics(load_config(path)) for path in paths)
    assert from_start[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert from_start[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert abs(from_start[-1]["rewards/margins"]) > 1e-4
    assert abs(from_base[0]["rewards/margins"]) > 1e-3
    run = Run(load_config(paths[0]).run_dir)
    before = Run(load_config(trained).run_dir)
    sides = [{name: sizes["people"] for name, sizes in one.data().manifest["splits"].items()} for one in (run, before)]
    assert sides[0] == sides[1]


@pytest.mark.multirank
def test_a_start_that_is_refused_is_one_line_on_two_ranks(trained, tmp_path) -> None:
    path = second(tmp_path, trained, "refused", 2, adapters={"top_k": 3})
    one_line(run(2, [TRAIN, "--config", str(path)]), "model.init_from", "adapters.top_k: 2, but this recipe says 3")
    assert not load_config(path).run_dir.exists()
