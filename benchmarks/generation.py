"""Tokens per second of the project's sampler: adapters on against off, and against transformers' ``generate``.

16 people of different profiles ask, and the same adapters answer. ``CumaModel.generate`` is transformers' own loop and
takes a profile per row, so its fair form is one batch of all people; beside it stands one call per person, as with an
adapter that serves one profile at a time. Answers have lengths of their own, as in a rollout: transformers' loop ends
when the longest of its batch does, ours gives the place of a finished answer to the next one. The second table has
answers of equal length, where nobody gains by that. Both decode greedily and write the same numbers of tokens. CPU
seconds, so that other work on the machine counts little; variants take turns, and ratios are medians of one turn's.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.inference.generate import Completion, Decoder, generate
from cuma_ds.inference.open import Opened, open_model
from cuma_ds.inference.running import ModelForward, measured_batch
from cuma_ds.inference.sampling import Sampling

QUESTIONS = [
    "How important is religion in your life?",
    "What is a good life?",
    "Can most people be trusted, or need one be careful?",
]
PROFILE = 384
PAD = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """Answers to write: a prompt, a raw profile embedding and a length for each. Those of one person are neighbours."""

    prompts: list[list[int]]
    profiles_BP: Tensor
    lengths: list[int]

    def part(self, start: int, count: int) -> Work:
        """Some of them."""
        end = start + count
        return Work(self.prompts[start:end], self.profiles_BP[start:end], self.lengths[start:end])


class EndsAt(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, prompt: int, lengths: Sequence[int]) -> None:
        self.ends_B = torch.tensor(lengths) + prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """See ``transformers.StoppingCriteria``."""
        return input_ids.shape[1] >= self.ends_B.to(input_ids.device)


def load(arguments: argparse.Namespace) -> Opened:
    """The backbone with 8 experts of rank 8, top 2, on q and v; untrained ones are as fast as trained ones."""
    config = CumaConfig(num_experts=8, top_k=2, lora_r=8, profile_dim=PROFILE, target_modules=("q_proj", "v_proj"))
    opened = open_model(arguments.model, [f"model.dtype={arguments.dtype}"])
    model = inject_adapters(opened.model, config).to(arguments.device).eval()
    model.set_profile_standardisation(torch.randn(64, PROFILE), 3.0)
    return dataclasses.replace(opened, model=model)


def work_of(opened: Opened, arguments: argparse.Namespace, vary: bool) -> Work:
    """So many answers for each person, of 1 to ``tokens`` tokens, or all of the same mean length."""
    draw = random.Random(0)
    asked = [QUESTIONS[person % len(QUESTIONS)] for person in range(arguments.people)]
    prompts = [opened.renderer.encode_prompt([{"role": "user", "content": text}], "") for text in asked]
    answers = arguments.answers if vary else 1
    return Work(
        [prompt for prompt in prompts for _ in range(answers)],
        torch.randn(arguments.people, PROFILE).repeat_interleave(answers, dim=0).to(arguments.device),
        [
            draw.randint(1, arguments.tokens) if vary else (arguments.tokens + 1) // 2
            for _ in range(arguments.people * answers)
        ],
    )


def sampler(decoder: Decoder, work: Work) -> None:
    """Ours."""
    rows = zip(work.prompts, work.lengths, work.profiles_BP, strict=True)
    generate(decoder, [Completion(prompt, Sampling(length), profile_P) for prompt, length, profile_P in rows])


@torch.no_grad()
def peer(model: CumaModel, work: Work, rows: int) -> None:
    """transformers' loop over batches of so many answers, left-padded."""
    for start in range(0, len(work.prompts), rows):
        part = work.part(start, rows)
        longest = max(map(len, part.prompts))
        ids = [[PAD] * (longest - len(prompt)) + prompt for prompt in part.prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part.prompts]
        model.generate(
            torch.tensor(ids, device=work.profiles_BP.device),
            attention_mask=torch.tensor(mask, device=work.profiles_BP.device),
            profile_embeddings=part.profiles_BP,
            max_new_tokens=max(part.lengths),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
            stopping_criteria=StoppingCriteriaList([EndsAt(longest, part.lengths)]),
        )


def without_adapters(model: CumaModel, run: Callable[[], None]) -> None:
    """The same on the bare backbone."""
    with model.adapters_disabled():
        run()


def seconds_of(run: Callable[[], None], device: str) -> float:
    """CPU seconds of this process, or seconds until the GPU is done."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def report(title: str, variants: Mapping[str, Callable[[], None]], tokens: int, arguments: argparse.Namespace) -> None:
    """Print a table; the first variant is ours."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(arguments.rounds + 1):
        for name, run in variants.items():
            elapsed = seconds_of(run, arguments.device)
            if turn:
                seconds[name].append(elapsed)
    where = f"{arguments.device}, {arguments.threads} threads" if arguments.device == "cpu" else arguments.device
    table = Table(title=f"{title}, {arguments.dtype}, {where}, median of {arguments.rounds} rounds")
    for heading in ("variant", "tokens per second", "cuma-ds / this"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    ours = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = statistics.median(value / own for value, own in zip(values, ours, strict=True))
        table.add_row(name, f"{tokens / statistics.median(values):.1f}", f"{ratio:.2f}")
    Console(width=110).print(table)


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct", help="backbone folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the backbone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--people", type=int, default=16, help="people, each with a profile; answers written at once")
    parser.add_argument("--answers", type=int, default=4, help="answers of each person, where lengths vary")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the longest answer")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one for warming up")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    opened = load(arguments)
    model = opened.model
    assert isinstance(model, CumaModel)
    batch, most = measured_batch(ModelForward(model), PAD, arguments.people)
    decoder = Decoder(batch, most, end_ids=())
    for vary in (True, False):
        work = work_of(opened, arguments, vary)

        def ours(work: Work = work) -> None:
            sampler(decoder, work)

        variants = {
            "cuma-ds": ours,
            "cuma-ds, adapters off": lambda ours=ours: without_adapters(model, ours),
            "transformers generate, a profile per row": lambda work=work: peer(model, work, arguments.people),
        }
        if vary:
            variants["transformers generate, a call per person"] = lambda work=work: peer(
                model, work, arguments.answers
            )
        lengths = f"1 to {arguments.tokens}" if vary else str(work.lengths[0])
        title = f"{len(work.lengths)} answers of {lengths} tokens, {arguments.people} people"
        report(title, variants, sum(work.lengths), arguments)


if __name__ == "__main__":
    main()
