"""Training on a quantised backbone that ranks hold between them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run
from safetensors.torch import load_file
from small_runs import recipe
from transformers import LlamaConfig, LlamaForCausalLM

from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.parallel.ds_config import DS_CONFIGS
from cuma_ds.parallel.stored import find_checkpoint, read_adapters
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

pytest.importorskip("bitsandbytes")
KINDS = ("nf4", "int8")
SHARDED = {"deepspeed_config": "zero2_sharded_backbone"}
# ranks: how a quantised backbone is held on them.
PLACEMENTS = {
    1: {"whole": {"deepspeed_config": "zero2"}},
    2: {"sharded": SHARDED, "offload": {"deepspeed_config": "zero2_sharded_offload_backbone", "ep_size": 2}},
    4: {"sharded": {**SHARDED, "ep_size": 2}, "grouped": {"deepspeed_config": "grouped", "ep_size": 4}},
}


class Runs:
    """Small runs on 1, 2 and 4 ranks, by (ranks, placement, kind)."""

    def __init__(self, folder: Path, tiny_llama: Path, tiny_encoder: Path) -> None:
        self.paths: dict[tuple[int, str, str], Path] = {}
        settings = json.loads((DS_CONFIGS / "zero2_sharded_overlap.json").read_text())
        settings["frozen_backbone"] |= {"shard_group": 2}
        (folder / "grouped.json").write_text(json.dumps(settings))
        for world, placements in PLACEMENTS.items():
            for name, parallel in placements.items():
                for kind in (*KINDS, "none") if name in ("whole", "sharded") else KINDS:
                    section = {"path": str(tiny_llama), "dtype": "float32", "quantisation": kind}
                    sections = {"model": section, "training": {"steps": 3, "warmup_steps": 0}}
                    if parallel["deepspeed_config"] == "grouped":
                        parallel = {**parallel, "deepspeed_config": str(folder / "grouped.json")}
                    run_name = f"{world}-{name}-{kind}"
                    path = recipe(folder, tiny_llama, tiny_encoder, run_name, parallel=parallel, **sections)
                    self.paths[world, name, kind] = path
            paths = [path for key, path in self.paths.items() if key[0] == world]
            if world == 1:
                changed = folder / "changed.yaml"  # the run that was trained with nf4, now with int8
                changed.write_text(self.paths[1, "whole", "nf4"].read_text().replace("nf4", "int8").replace(
                    "1-whole-int8", "1-whole-nf4"))  # fmt: skip
                self.changed = changed
                paths.append(changed)
            arguments = [json.dumps([str(path) for path in paths]), str(world)]
            for code, output in run(world, ["tests/helpers/train_on_machines.py", *arguments], timeout=900):
                assert code == 0, output[-3000:]

    def said(self, key: tuple[int, str, str]) -> list[dict]:
        return [json.loads(Path(f"{self.paths[key]}.rank{rank}.json").read_text()) for rank in range(key[0])]

    def trained(self, key: tuple[int, str, str]) -> dict[str, torch.Tensor]:
        return read_adapters(find_checkpoint(Run(load_config(self.paths[key]).run_dir).checkpoints))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, tiny_encoder) -> Runs:
    return Runs(tmp_path_factory.mktemp("quantised"), tiny_llama, tiny_encoder)


@pytest.mark.multirank
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_is_the_same_on_1_2_and_4_ranks(kind, runs) -> None:
    expected = runs.trained((1, "whole", kind))
    for world, placements in PLACEMENTS.items():
        for name in placements:
            for key, tensor in runs.trained((world, name, kind)).items():
                torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5, msg=f"{world} {name} {key}")
    plain = runs.trained((1, "whole", "none"))
    assert any(not torch.allclose(tensor, plain[key], atol=1e-4) for key, tensor in expected.items())


@pytest.mark.multirank
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_holds_and_sends_packed_numbers(kind, runs, tiny_llama) -> None:
    linears = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    for world in (2, 4):
        plain, packed = (runs.said((world, "sharded", one))[0]["steps"][-1] for one in ("none", kind))
        rest = plain["full"] - 4 * linears  # embeddings, norms and head, in float32
        block = {"nf4": 32, "int8": 64}[kind] + 4
        assert packed["numbers"] == plain["numbers"]
        assert packed["full"] == rest + linears // 64 * block
        assert packed["held"] * world == packed["full"]
        saved = plain["told"]["backbone"] - packed["told"]["backbone"]
        # Each linear is gathered in the forward and, but for the first q, k and v, in the backward pass.
        assert 0 < saved * world / (world - 1) <= 2 * (4 * linears - linears // 64 * block)
        assert packed["told"]["backbone"] == sum(moved for _, moved in packed["all_gather"]) or world == 4


@pytest.mark.multirank
def test_a_quantised_run_is_opened_on_one_process_and_on_ranks_alike(runs) -> None:
    for key in runs.paths:
        assert all(said["apart"] < 1e-4 for said in runs.said(key)), key


@pytest.mark.multirank
def test_a_quantised_backbone_is_gathered_to_generate_between_steps(runs) -> None:
    for key in runs.paths:
        assert all(step["gathered_apart"] < 1e-5 for said in runs.said(key) for step in said["steps"]), key


@pytest.mark.multirank
def test_an_export_holds_the_base_as_it_is_and_says_how_it_was_quantised(runs, tiny_llama, tmp_path) -> None:
    folder = write_hf(read_run(load_config(runs.paths[1, "whole", "nf4"]).run_dir), tmp_path / "out", merged=True)
    base, source = (load_file(place / "model.safetensors") for place in (folder / "base", tiny_llama))
    assert base.keys() == source.keys()
    assert all(torch.equal(tensor, source[name]) for name, tensor in base.items())
    assert "The base was quantised (nf4) in training" in (folder / "README.md").read_text()


@pytest.mark.multirank
def test_a_run_does_not_change_its_quantisation(runs) -> None:
    said = json.loads(Path(f"{runs.changed}.rank0.json").read_text())
    assert "model.quantisation" in said["error"]
    assert "nf4" in said["error"]
    assert "int8" in said["error"]


@pytest.mark.multirank
def test_the_peak_of_a_training_step_falls_by_what_is_packed(tmp_path, tiny_encoder, monkeypatch) -> None:
    """Measured, with 27 million numbers in linears: neither weights nor activations are there in 16 bits."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "65536")
    sizes = {"vocab_size": 128, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")  # in float32: what is loaded is no mapped file
    peaks = {}
    for kind in ("none", "nf4"):
        model = {"path": str(tmp_path / "model"), "dtype": "bfloat16", "quantisation": kind}
        path = recipe(tmp_path, tmp_path, tiny_encoder, kind, model=model, parallel={"deepspeed_config": "zero2"})
        work = json.dumps({"sequences": 1, "length": 16, "kept": 1})
        ((code, output),) = run(1, ["tests/helpers/measure_memory.py", str(path), work], fresh=True)
        assert code == 0, output[-3000:]
        line = next(line for line in output.splitlines() if line.startswith("counted 0 "))
        peaks[kind] = json.loads(line.removeprefix("counted 0 "))["peak"]
    numbers = 8 * (4 * 512 * 512 + 3 * 512 * 1536)
    packed_away = 2 * numbers - numbers * 36 // 64
    assert peaks["none"] - peaks["nf4"] == pytest.approx(packed_away, rel=0.15), peaks
