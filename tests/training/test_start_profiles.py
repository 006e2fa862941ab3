"""How profiles become vectors belongs to a model: runs that start from it, exports and what asks them do the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from run_folder import make_run
from safetensors.torch import load_file
from small_runs import DATA

from cuma_ds.errors import ConfigError
from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.inference.modeling import load_exported
from cuma_ds.inference.open import open_export, open_run
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker
from cuma_ds.profiles import ProfileEncoder
from cuma_ds.recipe import load_config
from cuma_ds.training.start import with_start

OWN = {
    "format": "From {country}[, {gender}]", "fields": ["country", "gender"], "pooling": "mean-all",
    "normalise": False, "max_tokens": 12, "standardise": None,
}  # fmt: skip
PROFILE, SENTENCE = {"country": "Norway", "age": 38, "gender": "female"}, "From Norway, female"
PROMPT = {"profile_in_prompt": True, "profile_prompt": "Be {profile}.", "prompt_style": "metadata"}


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    folder = tmp_path_factory.mktemp("start") / "sft"
    return make_run(folder, tiny_llama, tiny_encoder, {}, profiles=OWN, data=PROMPT)[0]


@pytest.fixture(scope="module")
def exported(start) -> Path:
    return write_hf(read_run(start), start.parent / "exported")


def by_hand(encoder: Path, sentence: str) -> torch.Tensor:
    """[P]: the mean over the first 12 tokens, special tokens included, of transformers' own model."""
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(encoder)(sentence, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(encoder)(**ids).last_hidden_state[0].mean(0)


def test_a_run_embeds_its_sentences_as_its_recipe_says(start, tiny_encoder) -> None:
    table = load_file(start / "profiles.safetensors")
    sentences = yaml.safe_load(bytes(table["sentences"].tolist()).decode())
    assert SENTENCE in sentences
    torch.testing.assert_close(table["embeddings"][sentences.index(SENTENCE)], by_hand(tiny_encoder, SENTENCE))


def test_an_export_reads_profiles_as_its_run(start, exported, tiny_encoder) -> None:
    model, wanted = load_exported(exported), by_hand(tiny_encoder, SENTENCE)
    torch.testing.assert_close(model.embed_profiles([PROFILE])[0], wanted)
    torch.testing.assert_close(open_run(start).reader([PROFILE])[0], wanted)
    with pytest.warns(UserWarning, match="the profile field 'age' is unknown to this model"):
        model.embed_profiles([PROFILE])


def test_the_file_in_an_export_reads_profiles_without_this_package(exported, tiny_encoder) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    with pytest.warns(UserWarning, match="unknown"):
        torch.testing.assert_close(model.embed_profiles([PROFILE])[0], by_hand(tiny_encoder, SENTENCE))


@pytest.mark.parametrize("which", ["run", "export"])
def test_prompts_and_sentences_of_who_is_asked_are_those_of_training(which, start, exported) -> None:
    opened = open_run(start) if which == "run" else open_export(exported)
    talker = Talker(opened, Sampling(4, 0.0))
    text = talker.tokenizer.decode(talker.encode([{"role": "user", "content": "Hi"}], talker.sentence(PROFILE)))
    assert text.startswith(f"<|im_start|>system\nBe {SENTENCE}.<|im_end|>")


@pytest.mark.parametrize("which", ["run", "export"])
def test_a_run_that_starts_from_it_does_the_same(which, start, exported, tmp_path, tiny_llama) -> None:
    values = {
        "run": {"name": "on", "output_dir": str(tmp_path)},
        "model": {"path": str(tiny_llama), "dtype": "float32", "init_from": str(start if which == "run" else exported)},
        "data": {"path": str(DATA)},
    }
    (tmp_path / "on.yaml").write_text(yaml.safe_dump(values))
    resolved = with_start(load_config(tmp_path / "on.yaml"))
    asked = {**OWN, "fields": tuple(OWN["fields"])}
    del asked["standardise"]
    assert resolved.profiles.model_dump(include=set(asked)) == asked
    assert resolved.data.model_dump(include=set(PROMPT)) == PROMPT
    with pytest.raises(
        ConfigError, match=r"has profiles.pooling: mean-all, but this recipe says cls; leave the key out"
    ):
        with_start(load_config(tmp_path / "on.yaml", ["profiles.pooling=cls"]))


def test_another_encoder_setting_is_another_encoder(start, tiny_encoder) -> None:
    ours = ProfileEncoder(tiny_encoder, pooling="mean-all", normalise=False, max_tokens=12).fingerprint
    facts = read_run(start).profiles
    assert facts["fingerprint"] == ours != ProfileEncoder(tiny_encoder).fingerprint
    assert facts["fields"] == ["country", "gender"]
