"""LoRA, DoRA and P-Tuning v2 equal PEFT's own models in a plain loop, on any number of ranks and at any ZeRO stage."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from pairs import LearnedPairs
from ranks import run_recipes
from rivals import by_hand, rival, run_and_resume, stored_run
from single_process import Learned, SingleRun
from small_runs import assert_same_training
from transformers import AutoModelForCausalLM, AutoTokenizer

from cuma_ds.config import RunConfig
from cuma_ds.errors import ConfigError
from cuma_ds.evaluation.run import evaluate, evaluate_run
from cuma_ds.evaluation.subject import subject
from cuma_ds.export.lora import write_lora
from cuma_ds.export.plain import check_format, write_plain
from cuma_ds.inference.generate import Completion, generate
from cuma_ds.inference.open import open_peft, open_run
from cuma_ds.inference.running import RunningBatch
from cuma_ds.inference.sampling import Sampling
from cuma_ds.methods import METHODS
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.parallel.stored import find_checkpoint, read_adapters
from cuma_ds.recipe import load_config, make_config
from cuma_ds.runs import Run

TARGETS = ["q_proj", "v_proj", "up_proj"]
METHOD = {
    "lora": {"method": "lora", "lora_r": 4, "lora_alpha": 8, "target_modules": TARGETS},
    "dora": {"method": "dora", "lora_r": 4, "lora_alpha": 8, "target_modules": TARGETS},
    "p_tuning_v2": {"method": "p_tuning_v2", "prefix": {"virtual_tokens": 3, "hidden": 12}},
    "p_tuning_v2, no MLP": {"method": "p_tuning_v2", "prefix": {"virtual_tokens": 3, "projection": False}},
}


def peft_model(name: str, config: RunConfig) -> peft.PeftModel:
    """What a user of PEFT would build, with the values that our run begins with."""
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    if name.startswith("p_tuning"):
        asked = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection="MLP" not in name, encoder_hidden_size=12
        )
    else:
        asked = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=TARGETS, use_dora=name == "dora"
        )
    model = peft.get_peft_model(base, asked)
    ours = METHODS[config.adapters.method](AutoModelForCausalLM.from_pretrained(config.model.path), config).tensors()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours[our_name(key, name)].reshape(parameter.shape))
    return model


def our_name(key: str, name: str) -> str:
    """The name of PEFT's parameter in a checkpoint."""
    if name != "lora":
        return key
    linear, _, which = key.removeprefix("base_model.model.").partition(".lora_")
    return f"{linear}.experts.lora_{which[0].lower()}"


def trained_by_hand(name: str, path: Path, learns: type[Learned]) -> SingleRun:
    config = load_config(path)
    found = by_hand(config, peft_model(name, config), learns)
    if name != "lora":
        return found
    state = {our_name(key, name): tensor[None] for key, tensor in found.state.items()}
    return SingleRun(found.losses, found.grad_norms, state)


@pytest.mark.multirank
@pytest.mark.parametrize("name", METHOD)
def test_sft_is_a_plain_loop_over_the_model_of_peft(name, tmp_path, tiny_llama) -> None:
    stages = {1: ("zero1",), 2: ("zero2_sharded_overlap", "zero3")}
    paths = run_and_resume(tmp_path, tiny_llama, METHOD[name], "sft", stages)
    expected = trained_by_hand(name, paths[0], Learned)
    assert expected.losses[-1] != pytest.approx(expected.losses[0], rel=1e-3)
    for path in paths:
        assert_same_training(path, expected)


@pytest.mark.multirank
@pytest.mark.parametrize("name", ["lora", "dora", "p_tuning_v2"])
def test_dpo_is_a_plain_loop_over_the_model_of_peft(name, tmp_path, tiny_llama) -> None:
    paths = run_and_resume(tmp_path, tiny_llama, METHOD[name], "dpo", {2: ("zero2", "zero2_sharded_backbone")})
    expected = trained_by_hand(name, paths[0], LearnedPairs)
    for path in paths:
        assert_same_training(path, expected)


@pytest.mark.multirank
@pytest.mark.parametrize("name", ["dora", "p_tuning_v2"])
def test_resuming_changes_no_bit(name, tmp_path, tiny_llama) -> None:
    (resumed,) = run_and_resume(tmp_path, tiny_llama, METHOD[name], "sft", {1: ("zero2",)})
    values = {"run": {"name": "at-once", "output_dir": str(tmp_path / "runs")}}
    config = load_config(resumed)
    training = config.training.model_dump(mode="json")
    once = rival(
        tmp_path,
        tiny_llama,
        "at-once",
        METHOD[name],
        training=training,
        parallel={"deepspeed_config": "zero2"},
        **values,
    )
    run_recipes(1, [once])
    one, other = (
        read_adapters(find_checkpoint(Run(load_config(path).run_dir).checkpoints)) for path in (resumed, once)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.multirank
def test_grpo_generates_from_the_trained_prefix(tmp_path, tiny_llama) -> None:
    """Two ranks, whose rollouts go on from a cache behind the prefix, learn what one process learns."""
    sections = {
        "training": {"objective": "grpo", "steps": 3, "global_batch_size": 5, "micro_batch_size": 32},
        "grpo": {"rewards": ["own_rewards:characters"], "group_size": 4, "kl_weight": 0.1, "reference": "base"},
        "rollout": {"max_new_tokens": 6},
    }
    paths = []
    for world in (1, 2):
        own = copy.deepcopy(sections)
        paths.append(rival(tmp_path, tiny_llama, f"grpo-{world}", METHOD["p_tuning_v2"], **own))
        run_recipes(world, paths[-1:])
    one, two = (read_adapters(find_checkpoint(Run(load_config(path).run_dir).checkpoints)) for path in paths)
    begun = METHODS["p_tuning_v2"](AutoModelForCausalLM.from_pretrained(tiny_llama), load_config(paths[0])).tensors()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-5)
    assert any((one[key] - begun[key]).abs().max() > 1e-3 for key in begun)


def moved(name: str, folder: Path, tiny_llama: Path) -> tuple[Path, peft.PeftModel]:
    """A run folder of some training, and PEFT's model of the same values."""
    path = rival(folder, tiny_llama, name.split(",")[0], METHOD[name])
    model = peft_model(name, load_config(path)).eval()
    generator = torch.Generator().manual_seed(3)
    state = {}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                state[our_name(key, name)] = parameter.detach()[None] if name == "lora" else parameter.detach()
    return stored_run(path, state), model


IDS = torch.tensor([[1, 20, 30, 40, 50], [1, 7, 8, 9, 10]])


@torch.no_grad()
@pytest.mark.parametrize("name", METHOD)
def test_stock_peft_loads_the_export_and_gives_the_same_logits(name, tmp_path, tiny_llama) -> None:
    folder, model = moved(name, tmp_path, tiny_llama)
    if name == "lora":
        write_lora(folder, [], tmp_path / "out")
        out = tmp_path / "out" / "profile-1"
    else:
        check_format(folder, "peft")
        out = write_plain(folder, tmp_path / "out")
        assert f"method {METHOD[name]['method']}" in (out / "README.md").read_text()
        assert AutoTokenizer.from_pretrained(out).encode("Yes.")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), out).eval()
    expected = model(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, expected)
    torch.testing.assert_close(open_run(folder).model(IDS).logits, expected)
    assert peft.PeftConfig.from_pretrained(out).base_model_name_or_path == str(tiny_llama)
    with loaded.disable_adapter():
        assert (loaded(IDS).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["dora", "p_tuning_v2"])
def test_its_report_compares_with_the_bare_model_and_that_of_its_export(name, tmp_path, tiny_llama) -> None:
    folder, _ = moved(name, tmp_path, tiny_llama)
    rows = evaluate_run(folder).splits["test"].rows
    assert rows["trained"].emd_questions != pytest.approx(rows["before"].emd_questions)
    opened = open_peft(write_plain(folder, tmp_path / "out"), overrides=["data.max_length=256", "model.dtype=float32"])
    exported = evaluate(subject(opened, folder / "data"), tmp_path / "report").splits["test"].rows
    for row in ("before", "trained"):
        assert exported[row].emd_questions == pytest.approx(rows[row].emd_questions, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dora", "p_tuning_v2"])
def test_it_generates_in_one_batch_what_whole_forwards_say(name, tmp_path, tiny_llama) -> None:
    folder, model = moved(name, tmp_path, tiny_llama)
    decoder = open_run(folder).decoder(3)
    assert (type(decoder._batch), decoder.most) == (RunningBatch, 3)
    prompts = [[1, 20, 30], [1, 9, 8, 7, 6, 5, 40], [1, 33]]
    completions = [Completion(prompt, Sampling(temperature=0, max_new_tokens=8)) for prompt in prompts]
    generate(decoder, completions)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = list(prompt)
        for token in completion.tokens:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


@pytest.mark.parametrize(
    ("adapters", "sections", "message"),
    [
        ({"method": "dora", "num_experts": 8}, {}, "method 'dora' does not read num_experts"),
        ({"method": "p_tuning_v2", "lora_r": 64}, {}, "method 'p_tuning_v2' does not read lora_r"),
        (
            {"method": "dora"},
            {"parallel": {"ep_size": 2}},
            "ep_size is 2, which does not divide adapters.num_experts 1",
        ),
        (
            {"method": "p_tuning_v2"},
            {"model": {"gradient_checkpointing": True}},
            "gradient_checkpointing is true, but with it transformers passes no keys and values",
        ),
        (
            {"method": "dora"},
            {"model": {"quantisation": "nf4"}},
            "dora measures the backbone's weights, and packed",
        ),
        ({"method": "p_tuning_v2"}, {"data": {"packing": True}}, "one prefix per row"),
        ({"method": "lora"}, {"prefix": {}}, "section 'prefix' belongs to adapters.method: p_tuning_v2"),
        ({"method": "p_tuning_v2"}, {"prefix": {"hidden": 4, "projection": False}}, "there is no MLP"),
        (
            {"method": "dora", "dropout": 0.1},
            {"parallel": {"deepspeed_config": "zero2_sharded_backbone"}},
            "adapters.dropout is 0.1, for which DoRA reads whole weights in its backward pass",
        ),
    ],
)
def test_what_cannot_be_is_one_line(adapters, sections, message) -> None:
    def read() -> None:
        values = {"adapters": adapters, **copy.deepcopy(sections)}
        values["model"] = {"path": "m", **values.get("model", {})}
        read_deepspeed_config(make_config(values), 1, 1, 1)

    with pytest.raises(ConfigError, match=message) as raised:
        read()
    assert "\n" not in str(raised.value)
