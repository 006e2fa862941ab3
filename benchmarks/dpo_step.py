"""DPO step on a real model: ours against the naive form with two models and two passes, with the same adapters.

Naive: policy and reference are two loaded models; chosen and rejected answers are read in separate forwards, with
logits at every position. Ours: one model, one forward for both answers, logits at the answers alone, and the words of
the reference are known from before the first step. Ours with the reference in the step is what a pair costs when it is
met for the first time: the same model reads it once more, without gradients and with its adapters off.

Every measurement is a process of its own, which reports its seconds a step and its peak memory (all of it: Python,
libraries, weights). Processes take turns, so that a drifting machine hurts them alike; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch, EncodedExample, collate
from cuma_ds.training.objectives.dpo import Dpo

BETA, BALANCE = 0.1, 0.01
VARIANTS = ("cuma-ds", "cuma-ds, reference in the step", "naive: two models, two passes")


def load(arguments: argparse.Namespace) -> CumaModel:
    """The backbone with 8 experts of rank 8, top 2, on q and v."""
    backbone = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    config = CumaConfig(num_experts=8, top_k=2, lora_r=8, profile_dim=384, target_modules=("q_proj", "v_proj"))
    adapted = inject_adapters(backbone.requires_grad_(False), config).to(arguments.device)
    adapted.set_profile_standardisation(torch.randn(64, 384), 3.0)
    if arguments.gradient_checkpointing:
        adapted.enable_gradient_checkpointing()
    return adapted.train()


def pairs(arguments: argparse.Namespace) -> list[tuple[EncodedExample, EncodedExample]]:
    """Random prompts, each with two answers of half of the longest length or more."""
    vocabulary = AutoConfig.from_pretrained(arguments.model).vocab_size
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    found = []
    for profile in range(arguments.pairs):
        prompt, first = draw(arguments.prompt), arguments.prompt - 1
        lengths = torch.randint((arguments.answer + 1) // 2, arguments.answer + 1, (2,), generator=generator).tolist()
        answers = [draw(length) for length in lengths]
        chosen, rejected = (
            EncodedExample(prompt + ids, list(range(first, first + len(ids))), ids, [1.0] * len(ids), profile)
            for ids in answers
        )
        found.append((chosen, rejected))
    return found


def objective() -> Dpo:
    """The default DPO loss."""
    sections = {"model": {"path": "backbone"}, "adapters": {"method": "mixlora"}, "dpo": {"beta": BETA}}
    return Dpo(RunConfig.model_validate({**sections, "training": {"objective": "dpo"}}))


def ours(arguments: argparse.Namespace, reference_in_step: bool) -> Callable[[], Tensor]:
    """The loss of one step: sum over pairs / pairs + balance."""
    model, dpo, given = load(arguments), objective(), pairs(arguments)
    plain = collate([example for pair in given for example in pair], pad_id=0).to(arguments.device)
    who_NP = torch.randn(arguments.pairs, 384, device=arguments.device)[plain.profile_rows_N]
    ones = torch.ones(arguments.pairs, device=arguments.device)
    known = {"label": ones, "weight": ones, "shift": 0 * ones, "reference": torch.zeros(len(given), 2).to(ones)}
    batch = Batch(**{**vars(plain), "rows": tuple(range(arguments.pairs)), "extras": known})

    def loss() -> Tensor:
        inputs = {**batch.inputs, "profile_embeddings": who_NP, "profile_index": batch.profile_BS}
        if reference_in_step:
            with torch.no_grad(), model.adapters_disabled():
                known["reference"] = dpo._log_probabilities(model(**inputs).logits, batch)
        out = model(**inputs)
        return dpo.loss(out.logits, batch).sum / arguments.pairs + BALANCE * out.balance_loss

    return with_optimizer(model, loss)


def naive(arguments: argparse.Namespace) -> Callable[[], Tensor]:
    """What a research script does."""
    policy, reference, given = load(arguments), load(arguments).requires_grad_(False), pairs(arguments)
    sides = [collate([pair[side] for pair in given], pad_id=0).to(arguments.device) for side in (0, 1)]
    who_PP = torch.randn(arguments.pairs, 384, device=arguments.device)

    def said(model: CumaModel, batch: Batch) -> tuple[Tensor, Tensor]:
        mask = batch.attention_mask_BS
        out = model(input_ids=batch.input_ids_BS, attention_mask=mask, profile_embeddings=who_PP)
        log_p_BS = out.logits[:, :-1].float().log_softmax(-1).gather(2, batch.input_ids_BS[:, 1:, None])[..., 0]
        answer_BS = (torch.arange(mask.shape[1] - 1, device=mask.device) >= arguments.prompt - 1) & (mask[:, 1:] > 0)
        return (log_p_BS * answer_BS).sum(dim=1), out.balance_loss

    def loss() -> Tensor:
        (chosen_P, balance), (rejected_P, more) = (said(policy, batch) for batch in sides)
        with torch.no_grad():
            reference_chosen_P, reference_rejected_P = (said(reference, batch)[0] for batch in sides)
        delta_P = chosen_P - reference_chosen_P - rejected_P + reference_rejected_P
        return -torch.nn.functional.logsigmoid(BETA * delta_P).mean() + BALANCE * (balance + more)

    return with_optimizer(policy, loss)


def with_optimizer(model: CumaModel, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Forward, backward and AdamW step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> Tensor:
        found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    return step


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, peak bytes and the first loss of one variant, in this process."""
    torch.manual_seed(0)
    number = VARIANTS.index(arguments.only)
    step = naive(arguments) if number == 2 else ours(arguments, reference_in_step=number == 1)
    on_gpu, seconds = arguments.device.startswith("cuda"), []
    first = float(step())
    for _ in range(arguments.steps):
        start = time.perf_counter()
        float(step())
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds), "peak": float(peak), "loss": first}


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct", help="backbone folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the backbone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of the longest answer")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations, in all variants")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a process, after one for warming up")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--only", choices=VARIANTS, help="measure one variant in this process and print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        print(json.dumps(measure(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        for name, measured in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(
        title=f"DPO step, {arguments.pairs} pairs of {arguments.prompt} + up to {arguments.answer} tokens, "
        f"{arguments.dtype}, {arguments.device}, {arguments.threads} threads, median of {arguments.rounds} processes"
    )
    for heading in ("variant", "seconds", "of naive", "peak memory, GB", "of naive"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    medians = {
        name: [statistics.median(one[key] for one in measured) for key in ("seconds", "peak")]
        for name, measured in found.items()
    }
    seconds, peak = medians[VARIANTS[-1]]
    for name, (own, memory) in medians.items():
        table.add_row(name, f"{own:.3f}", f"{own / seconds:.2f}", f"{memory / 1e9:.2f}", f"{memory / peak:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
