"""Some completions of each rollout, for people to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cuma_ds.telemetry.writer import drop_rows_after
from cuma_ds.training.rollout.answers import Answers


class KeptCompletions:
    """A file with one JSON line per completion: ``step`` (from 1), ``row`` of the training split, ``completion``,
    ``rewards`` by name and ``advantage``. It holds no profile and no prompt, which may tell of the profile.

    Args:
        file: need not exist. The main rank alone writes it.
        most: completions of each rollout, of different prompts before several of one.
    """

    def __init__(self, file: Path, most: int) -> None:
        self._file, self._most = file, most
        self._begun = False

    def add(
        self,
        step: int,
        answers: Sequence[Answers],
        rewards: Mapping[str, NDArray[np.float64]],
        advantage_M: NDArray[np.float64],
    ) -> None:
        """Append those of a rollout.

        Args:
            step: that learns from it first, from 1. Lines of this and later steps are from before a crash: the first
                call removes them.
            answers: of this rank, M in all.
            rewards: [M] by name.
            advantage_M: of each.
        """
        if not self._begun:
            drop_rows_after(self._file, step - 1)
            self._begun = True
        places = [(number, one, text) for one in answers for number, text in enumerate(one.texts)]
        chosen = sorted(range(len(places)), key=lambda place: places[place][0])[: self._most]
        with self._file.open("a", encoding="utf-8") as lines:
            for place in chosen:
                _, one, text = places[place]
                values = {name: _known(value_M[place]) for name, value_M in rewards.items()}
                line = {"step": step, "row": one.number, "completion": text, "rewards": values}
                lines.write(json.dumps(line | {"advantage": float(advantage_M[place])}, ensure_ascii=False) + "\n")


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
