"""What trains is behind one interface: a method that is no mixture trains and resumes like a plain loop of PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run
from safetensors import safe_open
from single_process import examples_of_steps
from small_runs import metrics, recipe
from toy_method import PROMPT, Toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from cuma_ds.config import RunConfig
from cuma_ds.data import load_data
from cuma_ds.data.batch import collate
from cuma_ds.methods import METHODS
from cuma_ds.methods.cuma import CumaMethod
from cuma_ds.parallel.stored import find_checkpoint, read_adapters, read_state
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

HERE = Path(__file__).parents[1]
TOY = {"adapters": {"method": "lora", "num_experts": 1, "top_k": 1, "balance_weight": 0.0}, "profiles": {}}
STEPS = {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.1}


def plain_loop(config: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses by step and the trained tensors of the toy method: no DeepSpeed, one process, one forward per step."""
    data, training = load_data(config.data, config.profiles.template), config.training
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    base = AutoModelForCausalLM.from_pretrained(config.model.path).requires_grad_(False)
    toy = Toy(base, config)  # for its first values alone
    prompt, bias = (tensor.detach().clone().requires_grad_() for tensor in (toy.prompt_PD, toy.bias_V))
    optimizer = torch.optim.AdamW(
        [prompt, bias], training.learning_rate, training.adam_betas, training.adam_eps, training.weight_decay
    )
    losses = []
    for examples in examples_of_steps(config, data, tokenizer):
        loss, weight = torch.zeros(()), sum(sum(example.target_weight) for example in examples)
        for example in examples:
            x = torch.cat([prompt, base.model.embed_tokens(torch.tensor(example.input_ids))])
            log_p = (base(inputs_embeds=x[None]).logits[0, PROMPT:] + bias).log_softmax(dim=-1)
            for place, token, share in zip(
                example.target_position, example.target_token, example.target_weight, strict=True
            ):
                loss = loss - share / weight * log_p[place, token]
        loss.backward()
        torch.nn.utils.clip_grad_norm_([prompt, bias], training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {"prompt": prompt.detach(), "head.bias": bias.detach()}


@pytest.mark.multirank
@pytest.mark.parametrize(("world", "stages"), [(1, ("zero1",)), (2, ("zero1", "zero2", "zero2_sharded_backbone"))])
def test_a_method_without_experts_trains_stops_and_resumes_like_a_plain_loop(
    world, stages, tmp_path, tiny_llama, tiny_encoder
) -> None:
    paths = []
    for stage in stages:
        for name, steps in (("first", 2), ("whole", 4)):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            parallel = {"parallel": {"deepspeed_config": stage}, "training": {**STEPS, "steps": steps}}
            run_of = {"run": {"output_dir": str(tmp_path / "runs"), "name": stage}}
            paths.append(recipe(folder, tiny_llama, tiny_encoder, stage, **TOY, **parallel, **run_of))
    results = run(world, [str(HERE / "helpers" / "toy_method.py"), json.dumps([str(path) for path in paths])])
    assert [code for code, _ in results] == [0] * world, results[0][1][-3000:]
    assert results[0][1].count("after step 2") == len(stages)
    losses, tensors = plain_loop(load_config(paths[-1]))
    assert losses[-1] < losses[0]
    for path in paths[1::2]:
        config = load_config(path)
        assert [row["loss"] for row in metrics(config)] == pytest.approx(losses, rel=1e-5), path
        folder = find_checkpoint(Run(config.run_dir).checkpoints)
        trained = read_adapters(folder)
        assert trained.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-5)
        assert list(read_state(folder)["files"]) == ["shared.safetensors"]
        with safe_open(folder / "shared.safetensors", framework="pt") as stored:
            assert set(stored.keys()) == {
                f"{kind}/{name}" for kind in ("param", "exp_avg", "exp_avg_sq") for name in tensors
            }


def built(method: type, path: Path, tiny_llama: Path) -> tuple[torch.nn.Module, CumaMethod | Toy]:
    torch.manual_seed(1)
    bare, base = (AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2))
    model = method(base, load_config(path))
    with torch.no_grad():
        for one in model.trained_parameters():
            one.parameter.add_(torch.randn(one.parameter.shape))
    return bare.eval(), model.eval()


@pytest.mark.parametrize("method", [CumaMethod, Toy])
def test_disabled_is_the_bare_backbone(method, tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "bare", adapters={"method": "mixlora"})
    config = load_config(path)
    data = load_data(config.data, config.profiles.template)
    examples = next(examples_of_steps(config, data, AutoTokenizer.from_pretrained(tiny_llama)))
    batch = collate(examples, 0)
    bare, model = built(method, path, tiny_llama)
    with torch.no_grad():
        expected = bare(**batch.inputs).logits
        trained = model(batch).logits
        with model.disabled():
            torch.testing.assert_close(model(batch).logits, expected)
        torch.testing.assert_close(model(batch).logits, trained)
    assert (trained - expected).abs().max() > 0.1


def test_every_method_of_a_recipe_is_known() -> None:
    from cuma_ds.adapters.config import CumaConfig

    assert set(METHODS) == set(CumaConfig.model_fields["method"].annotation.__args__)


def test_a_state_that_is_loaded_is_the_state(tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "state", adapters={"profile_dim": 6})
    model = CumaMethod(AutoModelForCausalLM.from_pretrained(tiny_llama), load_config(path))
    model.prepare(torch.randn(9, 6), None)
    model.end_step(torch.rand(len(model.router_names), 4))
    state = {key: tensor.clone() for key, tensor in model.state().items()}
    assert set(state) == {"param/profile_mean", "param/profile_scale", "balance/expert_share"}
    other = CumaMethod(AutoModelForCausalLM.from_pretrained(tiny_llama), load_config(path))
    assert not torch.equal(other.state()["param/profile_mean"], state["param/profile_mean"])
    other.load_state(state)
    assert all(torch.equal(other.state()[key], tensor) for key, tensor in state.items())
