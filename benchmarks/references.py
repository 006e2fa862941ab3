"""Evaluation at the size of WorldValuesBench: time of one core and peak memory of preparing, references and scores.

The data is made up in the benchmark's shape: 93,278 people (65,294 to train on), 240 questions of 2 to 11 options,
64 countries, and almost as many profiles as people; no file of the benchmark is needed. Each stage is a process of its
own:

prepare     people's answers are split and merged into a prepared folder
references  the folder is opened, and collapse, oracle and nearest are made of 15 million training answers for all 3.2
            million test answers
sample      some test people are drawn, and their answers scored against a made-up model, with intervals
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cuma_ds.config import DataSection, EvaluationSection
from cuma_ds.data.build import build
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.raw import ProfileList, Rows, question_file
from cuma_ds.data.rows import Question
from cuma_ds.data.sampling import Limits, sample
from cuma_ds.data.splits import TEST, TRAIN, VALID, draws
from cuma_ds.evaluation.columns import Ragged
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.references import TrainingAnswers, references
from cuma_ds.evaluation.sections import choice_split
from cuma_ds.evaluation.subgroups import subgroups

COUNTRIES, WIDTH = 64, 384
FIELDS = {"age": 6, "gender": 2, "education": 9, "marital status": 6, "religion": 9, "ethnicity": 30, "employment": 8}
STAGES = ("prepare", "references", "sample")


def people(count: int, questions: int, seed: int = 0) -> Rows:
    """Answers of made-up people, drawn from a distribution of their country, 3.6% of them missing."""
    rng = np.random.default_rng(seed)
    country_N = rng.integers(COUNTRIES, size=count)
    codes = {name: np.minimum(rng.exponential(size / 3, count).astype(int), size - 1) for name, size in FIELDS.items()}
    profiles = ProfileList("wvs")
    profile_N = np.array(
        [
            profiles.add({"country": f"Land {country}", **{name: f"{name} {code[n]}" for name, code in codes.items()}})
            for n, country in enumerate(country_N)
        ],
        np.int32,
    )
    options_Q = rng.choice([2, 3, 4, 5, 10, 11], size=questions, p=[0.12, 0.12, 0.42, 0.1, 0.2, 0.04])
    option_NQ = np.empty((count, questions), np.int8)
    for question, options in enumerate(options_Q):
        likely = rng.dirichlet(np.ones(options), COUNTRIES).cumsum(axis=1)[country_N]
        option_NQ[:, question] = (rng.random(count)[:, None] > likely).sum(axis=1).clip(max=options - 1)
    option_NQ[rng.random(option_NQ.shape) < 0.036] = -1
    asked = [
        Question(f"Q{q}", f"What about subject {q}?", tuple(f"answer {o}" for o in range(options)))
        for q, options in enumerate(options_Q)
    ]
    given = rng.permutation(np.arange(count) / count)
    split_N = np.where(given < 0.7, TRAIN, np.where(given < 0.85, VALID, TEST)).astype(np.int8)
    return Rows(
        "choice", np.arange(count, dtype=np.int32), draws(0, "person", map(str, range(count))), profile_N, profiles, {},
        question_file(asked, None), option_NQ=option_NQ, given_N=split_N,
    )  # fmt: skip


def prepare(folder: Path, arguments: argparse.Namespace) -> str:
    """Split and merge the answers into a prepared folder."""
    rows = people(arguments.people, arguments.questions)
    start = time.process_time()
    with tempfile.TemporaryDirectory(dir=folder) as spool:
        data = build(rows, DataSection(source="wvb", path="made up"), Path(spool)).save(folder / "data")
    sizes = data.manifest["splits"]
    return (
        f"{sizes['train']['answers']:,} + {sizes['test']['answers']:,} answers, {len(data.profiles):,} profiles; "
        f"{time.process_time() - start:.1f} s without making the answers up"
    )


def measure_references(folder: Path, arguments: argparse.Namespace) -> str:
    """Make the references of all test answers, also the one of the nearest profile for people who need it."""
    data = PreparedData.load(folder / "data")
    train = TrainingAnswers.of(data.splits["train"], arguments.min_answers)
    test = ChoiceExamples.of(data.splits["test"])
    names = list(references(train, test, None))
    embeddings = np.random.default_rng(0).standard_normal((len(data.profiles), WIDTH), np.float32)
    train.nearest(test, embeddings)
    return f"{', '.join([*names, 'nearest'])} of {len(test):,} test rows"


def score_sample(folder: Path, arguments: argparse.Namespace) -> str:
    """Score a made-up model on some people, beside the references."""
    data = PreparedData.load(folder / "data")
    train = TrainingAnswers.of(data.splits["train"], arguments.min_answers)
    drawn = sample(data.splits["test"], Limits(people=arguments.sample))
    test, rng = ChoiceExamples.of(drawn.split), np.random.default_rng(0)
    model = Ragged(rng.exponential(size=len(test.counts.values_F)), test.counts.lengths_M)
    settings = EvaluationSection(min_answers=arguments.min_answers, bootstrap=arguments.bootstrap)
    contenders = references(train, test, None) | {"trained": model}
    scored = choice_split(test, contenders, subgroups(data.profiles), settings)
    size = f"{drawn.answers:,} answers of {drawn.people:,} people"
    return f"{size}, {len(scored.cells):,} cells, {settings.bootstrap} bootstrap samples"


def main() -> None:
    """Run every stage in a process of its own and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=93_278, help="default %(default)s")
    parser.add_argument("--questions", type=int, default=240, help="default %(default)s")
    parser.add_argument("--min-answers", type=int, default=30, help="default %(default)s")
    parser.add_argument("--sample", type=int, default=500, help="test people of the last stage (default %(default)s)")
    parser.add_argument("--bootstrap", type=int, default=200, help="bootstrap samples of it (default %(default)s)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        stages = {"prepare": prepare, "references": measure_references, "sample": score_sample}
        said = stages[arguments.stage](arguments.folder, arguments)
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(f"{used.ru_utime + used.ru_stime:.1f}\t{used.ru_maxrss * 1024 / 1e9:.2f}\t{said}")
        return
    table = Table(title="evaluation at benchmark scale, one thread")
    for heading in ("stage", "CPU s", "peak GB", "what"):
        table.add_column(heading, justify="left" if heading in ("stage", "what") else "right")
    alone = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage, "--folder", folder]
            ran = subprocess.run(command, env=alone, stdout=subprocess.PIPE, text=True, check=True)
            table.add_row(stage, *ran.stdout.strip().split("\t"))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
