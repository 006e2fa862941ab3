"""The adapted model behaves like the Hugging Face model it wraps, plus profiles: forward, generate, checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import ROOT, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from cuma_ds import CumaConfig, CumaModel, ProfileEncoder, inject_adapters
from cuma_ds.recipe import load_config

PROFILES = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def adapted(folder: Path, **options: object) -> CumaModel:
    targets = ["q_proj", "k_proj", "v_proj"]
    values = {"num_experts": 4, "top_k": 2, "lora_r": 4, "lora_alpha": 32, "profile_dim": 16, "target_modules": targets}
    model = inject_adapters(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), CumaConfig(**(values | options))
    )
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if "lora_b" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.set_profile_standardisation(PROFILES, 3.0)
    return model.eval()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(6, 100, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def test_padding_on_the_left_changes_no_answer(tiny_llama) -> None:
    model = adapted(tiny_llama)
    ids, mask = prompts()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions, profile_embeddings=PROFILES).logits[
        1, 4:
    ]
    alone = model(input_ids=ids[1:2, 4:], profile_embeddings=PROFILES[1:2]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_logits_to_keep_gives_the_last_logits(tiny_llama) -> None:
    model = adapted(tiny_llama)
    ids, _ = prompts()
    whole = model(input_ids=ids, profile_embeddings=PROFILES).logits
    torch.testing.assert_close(
        model(input_ids=ids, profile_embeddings=PROFILES, logits_to_keep=2).logits, whole[:, -2:]
    )


def test_generate_with_cache_equals_choosing_the_best_token_again_and_again(tiny_llama) -> None:
    model = adapted(tiny_llama)
    ids, mask = prompts()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    out = model.generate(input_ids=ids, attention_mask=mask, profile_embeddings=PROFILES, **options)
    for row in range(3):
        tokens = ids[row : row + 1, mask[row].bool()]
        for _ in range(6):
            logits = model(input_ids=tokens, profile_embeddings=PROFILES[row : row + 1]).logits
            tokens = torch.cat([tokens, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
        assert out[row, ids.shape[1] :].tolist() == tokens[0, -6:].tolist(), row


def test_profiles_change_what_is_generated_and_beams_keep_them(tiny_llama) -> None:
    model = adapted(tiny_llama)
    ids, mask = prompts()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    together = model.generate(input_ids=ids, attention_mask=mask, profile_embeddings=PROFILES, **options)
    for row in range(3):
        alone = model.generate(
            input_ids=ids[row : row + 1, mask[row].bool()], profile_embeddings=PROFILES[row : row + 1], **options
        )
        assert together[row, -6:].tolist() == alone[0, -6:].tolist(), row
    same = ids[:1].expand(3, -1)
    answers = model.generate(
        input_ids=same, profile_embeddings=PROFILES, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert len({tuple(row) for row in answers.tolist()}) > 1


@pytest.mark.parametrize("shared", [True, False])
def test_checkpointing_recomputes_with_the_profiles_of_its_own_forward(tiny_llama, shared) -> None:
    """Two forwards before two backwards: each recomputation must see its own profiles, and count nothing twice."""
    grads = {}
    for checkpointing in (False, True):
        model = adapted(tiny_llama, share_router=shared).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        ids, mask = prompts()
        first = model(input_ids=ids, attention_mask=mask, profile_embeddings=PROFILES)
        second = model(input_ids=ids, attention_mask=mask, profile_embeddings=PROFILES.flip(0))
        tokens = float(model.routing_statistics().tokens)
        (first.logits.square().mean() + first.balance_loss).backward()
        (second.logits.square().mean() * 2 + second.balance_loss).backward()
        assert tokens == float(mask.sum()) == float(model.routing_statistics().tokens)
        grads[checkpointing] = {name: parameter.grad for name, parameter in model.adapter_parameters()}
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_gpt2_convolutions_are_adapted_too(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = adapted(tmp_path, target_modules=["c_attn"])
    ids = torch.randint(0, 64, (3, 5))
    with model.adapters_disabled():
        bare = model(input_ids=ids).logits
    plain = GPT2LMHeadModel.from_pretrained(tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(bare, plain)
    assert not torch.allclose(model(input_ids=ids, profile_embeddings=PROFILES).logits, plain)


def test_the_readme_example_runs(tiny_llama, tiny_encoder) -> None:
    source = (ROOT / "README.md").read_text().split("```python")[1].split("```")[0]
    source = source.replace(".cache/models/SmolLM2-135M-Instruct", str(tiny_llama)).replace(
        "profile_dim=384", "profile_dim=16"
    )
    source = source.replace(".cache/models/all-MiniLM-L6-v2", str(tiny_encoder))
    names: dict[str, object] = {}
    exec(source, names)
    assert isinstance(names["model"], CumaModel)
    assert isinstance(names["encoder"], ProfileEncoder)
    assert names["logits"].shape[-1] == 128
    assert isinstance(names["text"], str)
    assert AutoTokenizer.from_pretrained(tiny_llama).vocab_size == 102


@pytest.mark.multirank
def test_the_readme_recipe_for_ones_own_data_trains_and_evaluates(tmp_path, tiny_llama, tiny_encoder) -> None:
    recipe = ROOT / "tests" / "data" / "opinions.yaml"
    assert len(recipe.read_text().splitlines()) <= 10
    settings = [f"model.path={tiny_llama}", f"profiles.encoder={tiny_encoder}"]
    settings += [f"profiles.cache_dir={tmp_path}", f"run.output_dir={tmp_path}"]
    arguments = ["launchers/train.py", "--config", str(recipe), "--set", *settings, "training.steps=3"]
    assert run(1, arguments)[0][0] == 0
    run_dir = load_config(recipe, settings).run_dir
    code, output = run(1, ["launchers/evaluate.py", "--run", str(run_dir)])[0]
    assert code == 0, output
    assert (run_dir / "evaluation" / "report.md").is_file()
