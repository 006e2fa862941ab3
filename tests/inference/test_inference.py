"""One decode loop for every model and every placement: tokens depend on the prompt, its profile and its seed alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, random_model
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from ranks import run as run_ranks
from run_folder import OPINIONS, lively, make_run

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.inference.generate import Completion, Decoder, generate
from cuma_ds.inference.open import Opened, open_run
from cuma_ds.inference.running import ModelForward, RunningBatch, SingleSequence, measured_batch
from cuma_ds.inference.sampling import Sampling, mixed_seed

WIDTH = 6
PROMPTS = [[9, 10, 11, 12, 13], list(range(20, 50)), [60], list(range(70, 80)), [7, 8]]
PROFILES = torch.randn(len(PROMPTS), WIDTH, generator=torch.Generator().manual_seed(2))


def adapted(family: str) -> CumaModel:
    config = CumaConfig(num_experts=4, top_k=2, lora_r=2, profile_dim=WIDTH, target_modules=(FAMILIES[family].linear,))
    return lively(inject_adapters(random_model(family), config))


@torch.no_grad()
def plain_greedy(model: CumaModel, row: int, new_tokens: int, ends: set[int]) -> tuple[list[int], list[float]]:
    """One whole forward of the bare tokens for each new one, and the log-probability of each."""
    ids, scores = list(PROMPTS[row]), []
    while len(scores) < new_tokens and (not scores or ids[-1] not in ends):
        logits = (
            model(torch.tensor([ids]), profile_embeddings=PROFILES[row : row + 1], use_cache=False)
            .logits[0, -1]
            .double()
        )
        scores.append(float(logits.log_softmax(dim=0).max()))
        ids.append(int(logits.argmax()))
    return ids[len(PROMPTS[row]) :], scores


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_continued_as_by_whole_forwards(family) -> None:
    """In one batch where rows may be padded at their start, else one at a time."""
    model = adapted(family)
    batch, most = measured_batch(ModelForward(model), 0, 3)
    alone = {"bart": (RunningBatch, 1), "roberta": (SingleSequence, 1), "mamba": (SingleSequence, 1)}
    assert (type(batch), most) == alone.get(family, (RunningBatch, 3))
    expected = [plain_greedy(model, row, 4 + row, {5}) for row in range(len(PROMPTS))]
    completions = [Completion(prompt, Sampling(4 + row), PROFILES[row]) for row, prompt in enumerate(PROMPTS)]
    generate(Decoder(batch, most, [5], scores=True), completions)
    for completion, (tokens, scores) in zip(completions, expected, strict=True):
        assert completion.tokens == tokens
        assert completion.log_probabilities == pytest.approx(scores, abs=1e-4)
        assert completion.finish == ("stop" if tokens[-1] == 5 else "length")


class WithoutCache(CumaModel):
    """Keeps nothing between forwards, as models that bring their own code may."""

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        out = super().forward(*args, **{**kwargs, "use_cache": False})
        out.past_key_values = None
        return out


def test_a_model_that_keeps_nothing_reads_everything_again() -> None:
    model = adapted("llama")
    expected = [plain_greedy(model, row, 6, set()) for row in range(len(PROMPTS))]
    model.__class__ = WithoutCache
    batch, most = measured_batch(ModelForward(model), 0, 8)
    assert (type(batch), most) == (SingleSequence, 1)
    completions = [Completion(prompt, Sampling(6), PROFILES[row]) for row, prompt in enumerate(PROMPTS)]
    generate(Decoder(batch, most, []), completions)
    assert [completion.tokens for completion in completions] == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_adapters_that_put_tokens_before_a_prompt_are_continued_as_peft_does(kind) -> None:
    torch.manual_seed(0)
    model = get_peft_model(random_model("llama"), kind(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    batch, most = measured_batch(ModelForward(model), 0, 4)
    completions = [Completion(prompt, Sampling(6)) for prompt in PROMPTS]
    generate(Decoder(batch, most, []), completions)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = model.generate(input_ids=torch.tensor([prompt]), **options)
        assert completion.tokens == found[0, len(prompt) :].tolist()


def test_samples_depend_on_the_seed_and_not_on_the_batch() -> None:
    model = adapted("llama")
    forward = ModelForward(model)

    def written(rows: list[int], most: int, seed: int) -> list[list[int]]:
        samplings = [Sampling(12, temperature=1.3, top_p=0.95, seed=mixed_seed(seed, row)) for row in rows]
        completions = [Completion(PROMPTS[row], one, PROFILES[row]) for row, one in zip(rows, samplings, strict=True)]
        generate(Decoder(RunningBatch(forward, 0), most, []), completions)
        return [completion.tokens for completion in completions]

    together = written([0, 1, 2, 3, 4], 5, seed=1)
    assert together == [written([row], 1, seed=1)[0] for row in range(5)]
    order = [4, 2, 0, 1, 3]
    assert [together[row] for row in order] == written(order, 2, seed=1)
    assert together != written([0, 1, 2, 3, 4], 5, seed=2)


def test_equal_prompts_of_one_profile_are_read_once_and_answered_as_if_each_were_alone() -> None:
    """Several draws of each of two people, some of which end at their first token."""
    model = adapted("llama")
    forward, read = ModelForward(model), []

    class Counting(RunningBatch):
        def read(self, prompts, profiles_BP):
            read.append((len(prompts), len(profiles_BP)))
            return super().read(prompts, profiles_BP)

    def asked() -> list[Completion]:
        limits = [6, 1, 5, 6, 1, 4, 6, 1]
        samplings = [
            Sampling(most, temperature=1.3, seed=mixed_seed(3, number, 1)) for number, most in enumerate(limits)
        ]
        who = [0, 0, 1, 1, 0, 0, 1, 0]
        return [Completion(PROMPTS[0], one, PROFILES[row].clone()) for row, one in zip(who, samplings, strict=True)]

    together, alone = asked(), asked()
    generate(Decoder(Counting(forward, 0), 8, []), together)
    assert read == [(2, 2)]
    for completion in alone:
        generate(Decoder(RunningBatch(forward, 0), 1, []), [completion])
    assert [completion.tokens for completion in together] == [completion.tokens for completion in alone]
    assert len({tuple(completion.tokens[:4]) for completion in together if completion.max_new_tokens > 3}) > 1


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "opinions"
    return make_run(folder, tiny_llama, tiny_encoder, {}, source=OPINIONS)[0]


def asked(opened: Opened, world: int) -> list[dict[str, Any]]:
    """Prompts of unequal length. The last rank of four has none; all of the rank before it end early."""
    assert opened.reader is not None
    profiles = opened.reader(["A person from Norway.", "A person from Ghana.", "Somebody who likes the sea."])
    place = {0: 0, 1: 1 % world, 2: 0, 3: 2 % world, 4: 1 % world, 5: 2 % world}
    prompts = []
    for number, text in enumerate(
        ["Hi", "What is a good life?", "Can most people be trusted? " * 4, "Why", "x" * 90, "No"]
    ):
        early = number in (3, 5)
        sampling = {"max_new_tokens": 2 if early else 14, "temperature": 1.2 * (number % 2), "seed": 10 + number}
        ids = opened.renderer.encode_prompt([{"role": "user", "content": text}], "")
        prompts.append(
            {"prompt": ids, "profile": profiles[number % 3].tolist(), "sampling": sampling, "rank": place[number]}
        )
    return prompts


@pytest.mark.multirank
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_hold_a_model_together_write_what_one_process_writes(world, run, tmp_path) -> None:
    opened = open_run(run)
    prompts = asked(opened, world)
    expected = [Completion(one["prompt"], Sampling(**one["sampling"]), torch.tensor(one["profile"])) for one in prompts]
    generate(opened.decoder(8, scores=True), expected)
    jobs = []
    for config, ep_size, dispatch in (
        ("zero2_sharded_backbone", 1, "auto"),
        ("zero2_sharded_backbone", 2, "auto"),
        ("zero2_sharded_backbone", 2, "all_to_all"),
        ("zero2", world, "gather_experts"),
    ):
        parallel = {"deepspeed_config": config, "ep_size": ep_size, "dispatch": dispatch}
        overrides = [f"parallel.{key}={value}" for key, value in parallel.items()]
        out = str(tmp_path / f"{config}-{ep_size}-{dispatch}")
        jobs.append(
            {"run": str(run), "overrides": overrides, "most": 2, "prompts": prompts, "world": world, "out": out}
        )
    for code, output in run_ranks(world, ["tests/helpers/generate_on_ranks.py", json.dumps(jobs)], timeout=300):
        assert code == 0, output[-3000:]
    for job in jobs:
        found = [json.loads(Path(f"{job['out']}-{rank}.json").read_text()) for rank in range(world)]
        for number, completion in enumerate(expected):
            tokens, scores, finish = found[prompts[number]["rank"]].pop(0)
            assert (tokens, finish) == (completion.tokens, completion.finish), (job["out"], number)
            assert scores == pytest.approx(completion.log_probabilities, abs=1e-4)
        assert found == [[]] * world


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    """A run of conversations that was trained on two or more ranks with a sharded backbone and expert parallelism."""
    parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
    settings = {"min_answers": 1, "bootstrap": 5}
    folder = tmp_path_factory.mktemp("runs") / "chats"
    source = OPINIONS.with_name("chats.jsonl")
    return make_run(folder, tiny_llama, tiny_encoder, {}, source=source, parallel=parallel, evaluation=settings)[0]


@pytest.mark.multirank
def test_the_generate_command_prints_on_ranks_what_it_prints_alone(chats) -> None:
    people = ["--profile", '{"country": "Norway"}', "--profile", '{"country": "Ghana"}']
    command = ["launchers/generate.py", "--run", str(chats), *people, "--prompt", "What is a good life?"]
    command += ["--max-new-tokens", "9", "--compare"]
    outputs = {}
    for world in (1, 2, 4):
        ranks = run_ranks(world, command)
        assert [code for code, _ in ranks] == [0] * world, ranks[0][1][-3000:]
        outputs[world] = ranks[0][1][ranks[0][1].index("┏") :]
        assert not any("answer" in output for _, output in ranks[1:])
    assert outputs[1] == outputs[2] == outputs[4]


@pytest.mark.multirank
def test_the_evaluate_command_generates_on_ranks_what_it_generates_alone(chats, tmp_path) -> None:
    answers, numbers = {}, {}
    for world in (1, 2, 4):
        out = tmp_path / str(world)
        command = ["launchers/evaluate.py", "--run", str(chats), "--out", str(out), "--batch-size", "2"]
        ranks = run_ranks(world, [*command, "--generate", "5", "--max-new-tokens", "9", "--temperature", "0.9"])
        assert [code for code, _ in ranks] == [0] * world, ranks[0][1][-3000:]
        answers[world] = (out / "answers.jsonl").read_text()
        split = next(iter(json.loads((out / "report.json").read_text())["splits"].values()))
        numbers[world] = split["rows"]["trained"]["loss"]
        assert not any("report.json" in output for _, output in ranks[1:])
    assert answers[1] == answers[2] == answers[4]
    assert answers[1].count("\n") == 5
    assert numbers[2] == pytest.approx(numbers[1], abs=1e-5)
    assert numbers[4] == pytest.approx(numbers[1], abs=1e-5)


@pytest.mark.multirank
def test_what_is_for_one_process_is_refused_on_ranks_in_one_line(chats, tmp_path) -> None:
    for command, message in (
        (["launchers/generate.py", "--run", str(chats)], "a chat is for one process"),
        (["launchers/generate.py", "--export", str(tmp_path), "--prompt", "Hi"], "several ranks need --run"),
        (["launchers/evaluate.py", "--run", str(chats), "--gradients"], "--gradients is for one process"),
    ):
        for code, output in run_ranks(2, command):
            assert code == 2
            assert message in output


def test_a_step_copies_no_keys_also_after_a_change_of_the_batch() -> None:
    batch = RunningBatch(ModelForward(adapted("llama").eval()), pad_id=0)
    batch.join(PROMPTS[:3], PROFILES[:3])

    def places() -> list[int]:
        assert batch._running is not None
        return [state.data_ptr() for layer in batch._running.cache.layers for state in (layer.keys, layer.values)]

    batch.step([1, 2, 3])
    before = places()
    for token in range(20):
        batch.step([token] * 3)
    assert places() == before
    batch.keep([0, 2])
    batch.step([1, 2])
    after = places()
    batch.step([1, 2])
    assert places() == after
