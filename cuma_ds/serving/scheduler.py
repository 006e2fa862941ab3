"""Continuous batching on one thread.

At each step it admits waiting requests, decodes one token for every running request and removes finished ones.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cuma_ds.errors import CumaError, ModelError
from cuma_ds.files import first_line
from cuma_ds.inference.forward import pad_id_of
from cuma_ds.inference.generate import Completion, Decoder
from cuma_ds.inference.running import ModelForward, RunningBatch, measure
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker
from cuma_ds.inference.text import TextStream

logger = logging.getLogger(__name__)

# Most tokens, padding included, of the prompts that are read between two steps of the running answers.
_PROMPT_TOKENS = 4096


class QueueFullError(Exception):
    """As many requests as allowed are waiting already."""


class Piece(NamedTuple):
    """The text since the last piece; ``finish`` ("stop", "length") or ``error`` ends the answer."""

    text: str
    finish: str | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Limits:
    """How much the scheduler takes.

    Attributes:
        max_batch: answers written at a time.
        max_queue: requests waiting beyond them.
    """

    max_batch: int = 32
    max_queue: int = 256


class Job(Completion):
    """One answer to write.

    Args:
        prompt: token ids.
        sentence: the profile; None for a model that takes no profiles.
        sampling: how its tokens are chosen.
        text: turns its tokens to text.
        deliver: called from the scheduler's thread with every :class:`Piece`.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sentence: str | None,
        sampling: Sampling,
        text: TextStream,
        deliver: Callable[[Piece], None],
    ) -> None:
        super().__init__(prompt, sampling)
        self.sentence, self.text, self._deliver = sentence, text, deliver
        self.arrived = time.monotonic()
        self.waited: float | None = None
        self.cancelled = False

    @property
    def done(self) -> bool:
        """Whether no more tokens are wanted."""
        return self.cancelled or super().done

    def cancel(self) -> None:
        """Give the answer up; its place is free at the next step. A complete answer stays as it is."""
        self.cancelled = True

    def add(self, token: int, ends: bool) -> None:
        """Append the next token and deliver what became text. A token that cannot become text ends the job."""
        if self.cancelled:
            return
        try:
            super().add(token, ends)
            piece = self.text.add(token)
            if self.finish or self.text.stopped:
                piece += self.text.finish()
                self.finish = "stop" if self.text.stopped else self.finish
            if piece or self.finish:
                self._deliver(Piece(piece, self.finish))
        except Exception as error:
            logger.error("token failed", exc_info=error)
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.finish = "error"
        self._deliver(Piece("", error=error))


class Scheduler:
    """Continuous batching of one model on one thread.

    Args:
        forward: of the model.
        end_ids: tokens that end an answer.
        pad_id: padding.
        limits: batch and queue sizes.
        embed: makes raw profile embeddings [B, P] of sentences; None for a model that takes none.
    """

    def __init__(
        self,
        forward: ModelForward,
        end_ids: Collection[int],
        pad_id: int,
        limits: Limits,
        embed: Callable[[Sequence[str]], Tensor] | None = None,
    ) -> None:
        self.limits, self._embed = limits, embed
        self._batch = RunningBatch(forward, pad_id)
        self._decoder = Decoder(self._batch, limits.max_batch, end_ids)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def check(self) -> None:
        """Measure whether the model continues a made-up prompt token by token, and in a batch, as in one whole forward.

        A model that continues it differently in a batch writes one answer at a time from now on, with a warning.

        Raises:
            ModelError: it cannot continue a prompt token by token, or its sentence encoder is missing.
        """
        try:
            fit = measure(self._batch, None if self._embed is None else self._embed(["A person."]))
        except CumaError:
            raise
        except Exception as error:
            raise ModelError(f"this model cannot be served in batches: {first_line(error)}") from error
        if not fit.alone:
            how = "token by token it continues a prompt differently than in one whole forward"
            raise ModelError(f"this model cannot be served: {how}")
        if not fit.beside and self.limits.max_batch > 1:
            self.limits = replace(self.limits, max_batch=1)
            self._decoder.most = 1
            message = "this model answers differently in a batch with others; answers are written one at a time"
            warnings.warn(message, stacklevel=2)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the step that is running, drop everything else."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread answers."""
        return self._thread.is_alive()

    def load(self) -> tuple[int, int]:
        """How many answers are being written, and how many requests wait."""
        return len(self._decoder.running), len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFullError: too many wait.
        """
        with self._changed:
            if len(self._waiting) >= self.limits.max_queue:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    @torch.inference_mode()
    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._decoder.running or self._stopping)
            try:
                self._step()
            except Exception as error:  # one broken forward must not end the server
                logger.error("step failed", exc_info=error)
                _fail(self._decoder.running, error)
                self._decoder.clear()

    def _step(self) -> None:
        """Remove cancelled requests, admit waiting ones, and decode one token for every running request."""
        self._decoder.drop_finished()
        if jobs := self._next():
            self._admit(jobs)
        if self._decoder.running:
            self._decoder.advance()

    def _admit(self, jobs: Sequence[Job]) -> None:
        """Read prompts and write the first token of each; a prompt that cannot be read fails alone."""
        try:
            if self._embed is not None:
                profiles_BP = self._embed([job.sentence for job in jobs if job.sentence is not None])
                for job, profile_P in zip(jobs, profiles_BP, strict=True):
                    job.profile_P = profile_P
            self._decoder.admit(jobs)
        except Exception as error:
            if jobs[0] in self._decoder.running:  # it was read, and the whole step failed
                raise
            if len(jobs) > 1:
                for job in jobs:
                    self._admit([job])
                return
            logger.error("prompt failed", exc_info=error)
            _fail(jobs, error)

    def _next(self) -> list[Job]:
        """The next jobs in line that fit the batch and one forward."""
        jobs: list[Job] = []
        longest = 0
        with self._changed:
            while self._waiting and len(jobs) < self._decoder.room:
                job = self._waiting[0]
                if not job.cancelled:
                    longest = max(longest, len(job.prompt))
                    if jobs and longest * (len(jobs) + 1) > _PROMPT_TOKENS:
                        break
                    job.waited = time.monotonic() - job.arrived
                    jobs.append(job)
                self._waiting.popleft()
        return jobs


def scheduler_of(talker: Talker, limits: Limits, end_ids: Collection[int] | None = None) -> Scheduler:
    """A scheduler of the model that a talker asks; its answers end at the talker's tokens unless others are given."""
    forward, pad_id = ModelForward(talker.opened.model), pad_id_of(talker.tokenizer)
    return Scheduler(forward, talker.end_ids if end_ids is None else end_ids, pad_id, limits, talker.opened.reader)


def _fail(completions: Sequence[Completion], error: Exception) -> None:
    for job in completions:
        if isinstance(job, Job) and not job.finish:
            job.fail(error)
