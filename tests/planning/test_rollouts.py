"""What generating needs beside the backbone is at least what its cache really holds."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from cuma_ds.inference.cache import layers_of
from cuma_ds.inference.running import ModelForward, RunningBatch
from cuma_ds.planning.rollouts import generation_bytes


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_cache_of_keys_and_values_is_counted(sequences, tiny_llama) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    batch, length = RunningBatch(ModelForward(model), pad_id=0), 40
    batch.join([[5] * (length - 1)] * sequences, None)
    batch.step([5] * sequences)
    assert batch._running is not None
    layers = layers_of(batch._running.cache)
    held = sum(state.numel() * 4 for layer in layers for state in (layer.keys, layer.values))
    text = model.config.get_text_config()
    counted = [generation_bytes(text, 4, sequences, tokens) for tokens in (length, 2 * length)]
    assert held < counted[0] < 40 * held
    assert counted[1] - counted[0] > held
    assert counted[0] == sequences * generation_bytes(text, 4, 1, length)
