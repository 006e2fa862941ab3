"""Log-probabilities of answers, and those that the reference gives to the training pairs.

The reference is a state of the model that trains: the start policy, or the bare backbone. What it says of the training
pairs never changes, so it is computed once, before the first step, and kept in the run folder. No second model is held.

Shapes: M rows of split train, G rows of a step, B sequences, K kept positions, V vocabulary, P pairs, N = 2 P answers,
L labels.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cuma_ds.data.batch import Batch, Targets
from cuma_ds.data.stream import Draw
from cuma_ds.errors import CheckpointError, CumaError
from cuma_ds.files import write_atomically
from cuma_ds.identity import content_sha256
from cuma_ds.learned_settings import fingerprint
from cuma_ds.parallel.agreement import agreement
from cuma_ds.telemetry.progress import shown
from cuma_ds.training.objectives.protocol import Begin

_SECONDS_BETWEEN_SAVES = 30.0
_TENSOR = "log_probabilities"


class Answers(NamedTuple):
    """log_p_P2: [P, 2] log-probability of the chosen and the rejected answer.  length_P2: [P, 2] int64 tokens."""

    log_p_P2: Tensor
    length_P2: Tensor


def answer_log_probabilities(log_p_L: Tensor, targets: Targets, pairs: int, tail_weight: float = 1.0) -> Answers:
    """log p(answer | prompt) of the two answers of each pair, which are the first ``2 * pairs`` examples of a batch.

    Args:
        log_p_L: [L] log-probability of each label.
        targets: of the batch, on the same device.
        pairs: P.
        tail_weight: weight of the tokens by which one answer is longer than the other (LD-DPO, arXiv 2409.06411); 1 is
            the plain sum over tokens.
    """
    own_NL = targets.example_L == torch.arange(2 * pairs, device=log_p_L.device)[:, None]
    length_N = own_NL.sum(dim=1)
    log_p_NL = torch.where(own_NL, log_p_L, 0.0)
    if tail_weight < 1:
        shared_N = length_N.view(pairs, 2).amin(dim=1).repeat_interleave(2)
        tail_NL = own_NL.cumsum(dim=1) > shared_N[:, None]
        log_p_NL = torch.where(tail_NL, tail_weight * log_p_NL, log_p_NL)
    return Answers(log_p_NL.sum(dim=1).view(pairs, 2), length_N.view(pairs, 2))


def reference_log_probabilities(begin: Begin, bare: bool, log_p_of: Callable[[Tensor, Batch], Tensor]) -> Tensor:
    """What the reference gives to the training rows that the run will meet; all ranks call it together.

    What the run folder holds already is not computed again. The rest is computed in the batches of the first step that
    meets each row, without dropout, and saved from time to time, so that a run that is stopped here goes on here.

    Args:
        begin: with the start policy in the engine.
        bare: the reference is the bare backbone, not the start policy.
        log_p_of: of logits [B, K, V] and their batch on the same device: [P, 2].

    Returns:
        [M, 2] float32, NaN for rows that no step meets.

    Raises:
        CheckpointError: the file in the run folder is damaged, or of something else.
        CumaError: a log-probability is no number.
    """
    engine, draw = begin.engine, begin.inputs.draw
    file = ReferenceFile.of(begin)
    with agreement():
        log_p_M2 = file.read(draw.n_rows)
    steps = _steps_to_compute(log_p_M2, draw, begin.config.training.steps)
    if not steps:
        return log_p_M2
    begin.tell(f"reference log-probabilities of the pairs of {len(steps)} steps, kept in {file.path}")
    is_main, saved = engine.topology.is_main, time.monotonic()
    engine.train(False)
    reference = engine.model.disabled() if bare else contextlib.nullcontext()
    with torch.no_grad(), reference:
        for step in shown(steps, "reference", is_main and begin.config.telemetry.progress):
            _keep(log_p_M2, draw.global_rows(step), _of_step(begin, step, log_p_of))
            if is_main and time.monotonic() > saved + _SECONDS_BETWEEN_SAVES:
                file.write(log_p_M2)
                saved = time.monotonic()
    engine.train()
    engine.take_bytes_sent()  # not of a step
    with agreement():
        if is_main:
            file.write(log_p_M2)
    return log_p_M2


def _steps_to_compute(log_p_M2: Tensor, draw: Draw, steps: int) -> list[int]:
    """The steps of the first epoch that meet rows without a value. Later epochs meet no others."""
    first_epoch = range(min(steps, -(-draw.n_rows // draw.global_batch_size)))
    return [step for step in first_epoch if log_p_M2[draw.global_rows(step)].isnan().any()]


def _of_step(begin: Begin, step: int, log_p_of: Callable[[Tensor, Batch], Tensor]) -> Tensor:
    """[G, 2] for the rows of one step, on the CPU of every rank."""
    engine, inputs = begin.engine, begin.inputs
    device = engine.topology.device
    log_p_G2 = torch.zeros(inputs.draw.global_batch_size, 2, device=device)
    for batch, places in zip(inputs.batches.step(step), inputs.draw.places(), strict=True):
        logits_BKV = engine.forward(batch, inputs.table).logits
        log_p_G2[places.start : places.stop] = log_p_of(logits_BKV, batch.to(device)).float()
    return engine.topology.sum_over_ranks(log_p_G2).cpu()


def _keep(log_p_M2: Tensor, rows: list[int], log_p_G2: Tensor) -> None:
    """Fill in the rows that have no value yet. All ranks hold the same."""
    for row, log_p_2 in zip(rows, log_p_G2, strict=True):
        if not log_p_2.isfinite().all():
            raise CumaError(
                f"the reference gives the answers of row {row} of split train the log-probabilities "
                f"{log_p_2.tolist()}; they must be finite: try model.dtype float32"
            )
        if log_p_M2[row].isnan().any():
            log_p_M2[row] = log_p_2


class ReferenceFile(NamedTuple):
    """The log-probabilities in a run folder.

    path: the file.  belongs_to: hash of all that they depend on.
    """

    path: Path
    belongs_to: str

    @classmethod
    def of(cls, begin: Begin) -> ReferenceFile:
        """The file of a run. It depends on the start policy, the models, the data and the recipe."""
        depends = {"started_with": begin.run.identity(), "settings": fingerprint(begin.config)}
        return cls(begin.run.reference_file, content_sha256(depends))

    def read(self, rows: int) -> Tensor:
        """[rows, 2] float32; NaN for what has not been computed, and everywhere where there is no file.

        Raises:
            CheckpointError: damaged, or of something else.
        """
        if not self.path.exists():
            return torch.full((rows, 2), torch.nan)
        again = "remove it, and it will be computed again"
        try:
            with safe_open(self.path, framework="pt") as stored:
                about, log_p_M2 = stored.metadata() or {}, stored.get_tensor(_TENSOR)
        except (SafetensorError, OSError):
            raise CheckpointError(f"{self.path} is damaged; {again}") from None
        if about.get("belongs_to") != self.belongs_to:
            raise CheckpointError(f"{self.path} was computed for another start policy, data or recipe; {again}")
        if about.get("sha256") != _sha256(log_p_M2) or log_p_M2.shape != (rows, 2):
            raise CheckpointError(f"{self.path} is damaged: its content has changed since it was written; {again}")
        return log_p_M2

    def write(self, log_p_M2: Tensor) -> None:
        """Replace the file by what is known now."""
        about = {"belongs_to": self.belongs_to, "sha256": _sha256(log_p_M2)}
        write_atomically(self.path, save({_TENSOR: log_p_M2}, about))


def _sha256(log_p_M2: Tensor) -> str:
    return hashlib.sha256(log_p_M2.numpy().tobytes()).hexdigest()
