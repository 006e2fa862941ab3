"""Evaluation throughput: answers per second of ours against a loop that encodes and runs one answer at a time.

Both ask the same adapted model about the same answers of people; the loop runs a sample of them. Rounds take turns, so
that a drifting machine hurts both alike; medians and ratios are printed. Two cases: people of one profile share their
prompt (survey answers of countries), and nobody shares anything (every answer has a profile and a question of its
own), where only batching helps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.config import DataSection, ModelSection
from cuma_ds.data.batch import encode_example
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.rows import Row
from cuma_ds.evaluation.choice import predict_choices
from cuma_ds.inference.forward import pad_id_of
from cuma_ds.parallel.backbone import load_backbone, load_tokenizer

OPTIONS = ["Let anyone come", "Let people come while there are jobs", "Set strict limits", "Let nobody come"]


def answers(profiles: int, people: int, alone: bool) -> list[Row]:
    """Merged rows of ``people`` answers; with ``alone`` every one is a row of its own with its own question."""
    if alone:
        return [
            {
                "profile": k % profiles,
                "question": f"What about policy number {k}?",
                "options": OPTIONS,
                "counts": [1, 0, 0, 0],
            }
            for k in range(people)
        ]
    drawn = np.random.default_rng(0).multinomial(people, np.ones(profiles * 4) / (profiles * 4)).reshape(profiles, 4)
    return [
        {"profile": k, "question": "What about policy?", "options": OPTIONS, "counts": drawn[k].tolist()}
        for k in range(profiles)
    ]


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct", help="backbone folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the backbone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--profiles", type=int, default=40, help="distinct profiles")
    parser.add_argument("--people", type=int, default=20_000, help="answers in the first case")
    parser.add_argument("--alone", type=int, default=48, help="answers in the second case")
    parser.add_argument("--batch", type=int, default=16, help="prompts per forward")
    parser.add_argument("--sample", type=int, default=6, help="answers that the loop runs per round")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one for warming up")
    arguments = parser.parse_args()

    section = ModelSection(path=arguments.model, dtype=arguments.dtype)
    model = inject_adapters(load_backbone(section, torch.device(arguments.device)), CumaConfig(profile_dim=384)).eval()
    renderer = Renderer(load_tokenizer(section), max_length=256)
    embeddings_NP = torch.randn(arguments.profiles, 384, generator=torch.Generator().manual_seed(0))
    model.set_profile_standardisation(embeddings_NP, 3.0)
    sentences, data, pad_id = [""] * arguments.profiles, DataSection(), pad_id_of(renderer.tokenizer)

    def ours(rows: list[Row]) -> None:
        encoded = [encode_example(row, renderer, sentences, data) for row in rows]
        predict_choices(model, encoded, embeddings_NP, arguments.batch, pad_id, device=arguments.device)

    @torch.no_grad()
    def loop(rows: list[Row]) -> None:
        for row in rows:
            example = encode_example(row, renderer, sentences, data)
            ids = torch.tensor([example.input_ids], device=arguments.device)
            logits = model(
                input_ids=ids, profile_embeddings=embeddings_NP[[example.profile]].to(arguments.device)
            ).logits
            logits[0, -1, example.target_token].float().softmax(dim=-1).cpu()

    table = Table(
        title=f"evaluation, {arguments.dtype}, {arguments.device}, {torch.get_num_threads()} threads, "
        f"batch {arguments.batch}"
    )
    for heading in ("case", "answers", "ours, answers/s", "loop, answers/s", "ratio", "min", "max"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    cases = {"shared profiles": (arguments.people, False), "nothing shared": (arguments.alone, True)}
    for case, (people, alone) in cases.items():
        rows = answers(arguments.profiles, people, alone)
        rates: list[tuple[float, float]] = []
        for round_number in range(arguments.rounds + 1):
            both = []
            for run, part, count in (
                (ours, rows, people),
                (loop, rows[: arguments.sample], min(arguments.sample, len(rows))),
            ):
                start = time.perf_counter()
                run(part)
                both.append(count / (time.perf_counter() - start))
            if round_number:
                rates.append((both[0], both[1]))
        ratios = [mine / theirs for mine, theirs in rates]
        columns = [statistics.median(column) for column in zip(*rates, strict=True)]
        figures = [*columns, statistics.median(ratios), min(ratios), max(ratios)]
        table.add_row(case, f"{people:,}", *(f"{figure:,.1f}" for figure in figures))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
