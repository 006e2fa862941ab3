"""WVB-probe: the small set of (person, question) that the paper of WorldValuesBench evaluates models on.

``samples.tsv`` of the benchmark's public repository names 36 questions and five people of each continent, kind of
settlement and level of education for each of them: 8,280 answers of 4,860 people. It holds no answers; those are the
survey's.

Shapes: N people, Q questions, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cuma_ds.data.sources.delimited import csv_batches, csv_columns, require_columns
from cuma_ds.errors import DataError, nearest

QUESTION, PERSON = "Question", "D_INTERVIEW"


def read_probe(
    file: Path, questions: Sequence[str], kept: Sequence[str] | None, ids: np.ndarray, option_NQ: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """Which answers belong to the probe.

    Args:
        file: ``samples.tsv``, or a table with its columns ``Question`` and ``D_INTERVIEW``.
        questions: ids of the Q questions that were read.
        kept: the ids that the recipe keeps; None where it keeps all, so that another question is a mistake.
        ids: [N] int64 interview number of each person.
        option_NQ: [N, Q] what they answered, -1 for nothing.

    Returns:
        [N, Q] bool, and how many samples are left out by reason.

    Raises:
        DataError: no such file, a missing column, an unknown question, a sample that comes twice, nobody of the file
            in the data.
    """
    if not file.is_file():
        raise DataError(
            f"data.probe: there is no file {file}; it is WorldValuesBench/probe/samples.tsv of the benchmark"
        )
    require_columns(file, csv_columns(file), [QUESTION, PERSON])
    batches = [batch for batch, _ in csv_batches(file, [QUESTION, PERSON], {PERSON: pa.int64()})]
    if not any(map(len, batches)):
        raise DataError(f"{file} holds no samples")
    table = pa.Table.from_batches(batches)
    if table[QUESTION].null_count or table[PERSON].null_count:
        row = pc.index(pc.or_(pc.is_null(table[QUESTION]), pc.is_null(table[PERSON])), True).as_py() + 2
        raise DataError(f"{file}: row {row}: {QUESTION} and {PERSON} must both be given")
    asked = table[QUESTION].combine_chunks().dictionary_encode()
    place = {name: number for number, name in enumerate(questions)}
    number_of = np.array([place.get(name.strip(), -1) for name in asked.dictionary.to_pylist()], np.int64)
    if kept is None and (number_of < 0).any():
        name = asked.dictionary[int(np.argmax(number_of < 0))].as_py()
        row = int(np.argmax(asked.indices.to_numpy() == np.argmax(number_of < 0))) + 2
        raise DataError(f"{file}: row {row}: there is no question {name!r}{nearest(name, list(questions))}")
    question_S, id_S = number_of[asked.indices.to_numpy()], table[PERSON].to_numpy()
    _check_once(file, asked.indices.to_numpy() * (int(id_S.max()) + 1) + id_S)
    order = np.argsort(ids)
    found_S = order[np.minimum(np.searchsorted(ids, id_S, sorter=order), len(ids) - 1)]
    there_S = ids[found_S] == id_S
    if not there_S.any():
        raise DataError(f"{file}: none of its {len(id_S):,} samples is of a person in the data; are both of one wave?")
    probe_NQ = np.zeros((len(ids), len(questions)), bool)
    used_S = there_S & (question_S >= 0)
    probe_NQ[found_S[used_S], question_S[used_S]] = True
    silent_NQ = probe_NQ & (option_NQ < 0)
    reasons = {
        "samples of the probe without an answer": int(silent_NQ.sum()),
        "samples of the probe whose person is not in the data": int((~there_S).sum()),
        "samples of the probe whose question is left out": int((there_S & (question_S < 0)).sum()),
    }
    return probe_NQ & ~silent_NQ, {reason: count for reason, count in reasons.items() if count}


def _check_once(file: Path, key_S: np.ndarray) -> None:
    _, first = np.unique(key_S, return_index=True)
    if len(first) < len(key_S):
        row = int(np.setdiff1d(np.arange(len(key_S)), first)[0]) + 2
        raise DataError(f"{file}: row {row}: this person and question have come before; each sample has one row")
