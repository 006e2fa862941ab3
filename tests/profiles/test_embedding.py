"""Sentences are embedded in parts: shared, killed and damaged work ends with the bits of undisturbed work."""

from __future__ import annotations

import warnings

import pytest
import torch

from cuma_ds.profiles import ProfileEncoder, ProfileTable
from cuma_ds.profiles import embedding as parts
from cuma_ds.profiles import encoder as encoders
from cuma_ds.profiles.embedding import EmbeddingStore, embed

SENTENCES = [f"A {age}-year-old person living in {'x' * (age % 7)}land." for age in range(1, 100)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(parts, "_PART", 8)


class Told:
    """The tiny encoder, which remembers what it was asked, and may stop."""

    def __init__(self, folder, stops_at: int | None = None) -> None:
        self.encoder, self.asked, self.stops_at = ProfileEncoder(folder, "cpu", batch_size=5), [], stops_at

    @property
    def fingerprint(self) -> str:
        return self.encoder.fingerprint

    def __call__(self, sentences: list[str]) -> torch.Tensor:
        self.asked.append(list(sentences))
        if len(self.asked) == self.stops_at:
            raise KeyboardInterrupt
        return self.encoder(sentences)


@pytest.fixture
def undisturbed(tiny_encoder, tmp_path) -> torch.Tensor:
    return ProfileTable.build(SENTENCES, Told(tiny_encoder), tmp_path / "undisturbed").embeddings


def test_parts_hold_sentences_of_like_length_each_once(tiny_encoder, tmp_path) -> None:
    told = Told(tiny_encoder)
    ProfileTable.build([*SENTENCES, *SENTENCES[:20]], told, tmp_path)
    asked = [sentence for part in sorted(told.asked, key=lambda part: (len(part[0]), part[0])) for sentence in part]
    assert asked == sorted(SENTENCES, key=lambda sentence: (len(sentence), sentence))
    assert {len(part) for part in told.asked} == {8, len(SENTENCES) % 8}


@pytest.mark.parametrize("world", [1, 2, 3, 50])
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_depend_neither_on_ranks_nor_on_threads(world, threads, tiny_encoder, tmp_path, undisturbed) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        told = Told(tiny_encoder)
        for rank in range(world):
            share = embed(SENTENCES, told, EmbeddingStore(tmp_path, told.fingerprint), rank, world)
            assert len(share) >= len(SENTENCES) // world // 8 * 8
        asked = len(told.asked)
        table = ProfileTable.build(SENTENCES, told, tmp_path)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(table.embeddings, undisturbed)
    assert asked == len(told.asked) == -(-len(SENTENCES) // 8)


@pytest.mark.parametrize("stops_at", [1, 4, 13])
def test_a_killed_start_goes_on_where_it_was(stops_at, tiny_encoder, tmp_path, undisturbed) -> None:
    told = Told(tiny_encoder, stops_at)
    with pytest.raises(KeyboardInterrupt):
        ProfileTable.build(SENTENCES, told, tmp_path)
    stored = EmbeddingStore(tmp_path, told.fingerprint).read(SENTENCES)
    assert 8 * (stops_at - 1) <= len(stored) < len(SENTENCES)
    again = Told(tiny_encoder)
    assert torch.equal(ProfileTable.build(SENTENCES, again, tmp_path).embeddings, undisturbed)
    assert {sentence for part in again.asked for sentence in part} == set(SENTENCES) - stored.keys()


def test_progress_is_told_in_sentences_of_the_share(tiny_encoder, tmp_path) -> None:
    told, heard = Told(tiny_encoder), []
    embed(SENTENCES, told, EmbeddingStore(tmp_path, told.fingerprint), 0, 2, lambda *said: heard.append(said))
    assert heard == [(8 * done, 51) for done in range(1, 7)] + [(51, 51)]
    embed(SENTENCES[:50], told, EmbeddingStore(tmp_path, told.fingerprint), progress=lambda *said: heard.append(said))
    assert heard[-1] == (50, 50)


@pytest.mark.parametrize("damage", ["a flipped bit", "half a file", "no tensors"])
def test_a_damaged_part_is_noticed_and_embedded_again(damage, tiny_encoder, tmp_path, undisturbed) -> None:
    ProfileTable.build(SENTENCES, Told(tiny_encoder), tmp_path)
    part = sorted(tmp_path.glob("*/*.safetensors"))[-1]
    content = bytearray(part.read_bytes())
    if damage == "a flipped bit":
        content[-200] ^= 1
    part.write_bytes({"half a file": content[: len(content) // 2], "no tensors": b"x" * 40}.get(damage, content))
    again = Told(tiny_encoder)
    with pytest.warns(UserWarning, match=rf"{part.name} is damaged; what it held is embedded again"):
        table = ProfileTable.build(SENTENCES, again, tmp_path)
    assert torch.equal(table.embeddings, undisturbed)
    assert len(again.asked) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ProfileTable.build(SENTENCES, again, tmp_path).embeddings, undisturbed)
    assert len(again.asked) == 1


def test_a_forward_reads_so_many_tokens_at_most(tiny_encoder, monkeypatch) -> None:
    monkeypatch.setattr(encoders, "_BATCH_TOKENS", 100)
    encoder = ProfileEncoder(tiny_encoder, "cpu", batch_size=4)
    texts = ["a" * length for length in (90, 3, 240, 40, 4, 49, 5, 6, 7)]
    alone = torch.cat([encoder(text) for text in texts])
    shapes, model = [], encoder._parts[1]
    model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    torch.testing.assert_close(encoder(texts), alone, rtol=0, atol=1e-6)
    assert shapes == [(4, 6), (2, 40), (1, 49), (1, 90), (1, 240)]
