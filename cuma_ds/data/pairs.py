"""Preferences drawn from answers to choice questions: the option that a person chose against another one.

Shapes: N rows that were read, Q questions, A answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from cuma_ds.config import DataSection
from cuma_ds.data.raw import Rows
from cuma_ds.data.rendering import LETTERS, ask, worded
from cuma_ds.data.rows import QUESTION_SCHEMA, SCHEMAS, people_lists
from cuma_ds.data.splits import draws

# Keys of the section ``data`` that decide how the prompts of these pairs are written.
ASKED_BY = ("prompt_style", "option_order")
_BATCH_ROWS = 4096


def answer_pairs(rows: Rows, chosen_N: np.ndarray, config: DataSection) -> Iterator[pa.RecordBatch]:
    """One row of kind preference per answer: the question as it is asked for a choice, the letter of the person's
    answer, and the letter of another option.

    That other option is drawn with equal chances by a hash of ``split_seed``, the person and the question, so that it
    does not depend on what else is in the data.

    Args:
        rows: of kind choice.
        chosen_N: [N] bool, the rows to take.
        config: ``split_seed``, ``prompt_style`` and ``option_order``.
    """
    question_ids, texts, options, _ = (rows.questions.table[name].to_pylist() for name in QUESTION_SCHEMA.names)
    table = rows.questions.table
    labels = table["label"].to_pylist() if "label" in table.column_names else [None] * len(texts)
    asked = [worded(text, label, config.prompt_style) for text, label in zip(texts, labels, strict=True)]
    prompts = [
        [{"role": "user", "content": ask(text, shown, config.prompt_style, config.option_order)}]
        for text, shown in zip(asked, options, strict=True)
    ]
    options_Q = np.array([len(shown) for shown in options], np.int64)
    for row_A, question_A, answer_A in _answers(rows, np.flatnonzero(chosen_N)):
        person_A, count_A = rows.person_N[row_A], options_Q[question_A]
        # The number of a person is exact in this notation, and their own whatever the data holds besides them.
        names = [
            f"{rows.draw_P[person].hex()}\0{question_ids[question]}"
            for person, question in zip(person_A, question_A, strict=True)
        ]
        other_A = (draws(config.split_seed, "other option", names) * (count_A - 1)).astype(np.int64)
        other_A += other_A >= answer_A
        yield pa.RecordBatch.from_arrays(
            [
                pa.array(rows.profile_N[row_A].astype(np.int32)),
                people_lists(person_A, np.ones(len(row_A), np.int64)),
                pa.array([prompts[question] for question in question_A], SCHEMAS["preference"].field("prompt").type),
                pa.array(_letters(answer_A, count_A, config), pa.string()),
                pa.array(_letters(other_A, count_A, config), pa.string()),
                pa.nulls(len(row_A), pa.float32()),
            ],
            schema=SCHEMAS["preference"],
        )


def _answers(rows: Rows, places: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Row, question and option of each answer, [A] int each, in the order of the rows, some thousand at a time.

    Args:
        rows: of kind choice.
        places: the rows to take, ascending.
    """
    for start in range(0, len(places), _BATCH_ROWS):
        row_A = places[start : start + _BATCH_ROWS]
        if rows.option_NQ is None:
            yield row_A, rows.question_N[row_A].astype(np.int64), rows.answer_N[row_A].astype(np.int64)
        else:
            option_NQ = rows.option_NQ[row_A].astype(np.int64)
            person, question_A = np.nonzero(option_NQ >= 0)
            yield row_A[person], question_A, option_NQ[person, question_A]


def _letters(option_A: np.ndarray, count_A: np.ndarray, config: DataSection) -> Sequence[str]:
    """[A] the letter by which each option is shown."""
    shown_A = count_A - 1 - option_A if config.option_order == "reversed" else option_A
    return np.array(list(LETTERS))[shown_A].tolist()
