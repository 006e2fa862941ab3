"""The thread that answers: takes waiting requests into the running batch at every step, writes one token for all, lets the finished go."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cuma_ds.errors import CumaError, ModelError
from cuma_ds.export.modeling import CumaForCausalLM, base_fact
from cuma_ds.files import first_line
from cuma_ds.serving.batch import Batch
from cuma_ds.serving.sampling import Sampler, next_tokens
from cuma_ds.serving.text import TextStream

logger = logging.getLogger(__name__)

# Most tokens, padding included, of the prompts that are read between two steps of the running answers.
_PROMPT_TOKENS = 4096
# Logits that differ by less than this share of their spread differ by rounding, in 16-bit dtypes too.
_ROUNDING = 0.05


class QueueFullError(Exception):
    """As many requests as allowed are waiting already."""


class Piece(NamedTuple):
    """What was written since the last piece; ``finish`` ("stop", "length") or ``error`` ends the answer."""

    text: str
    finish: str | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Limits:
    """How much the engine takes.

    Attributes:
        max_batch: answers written at a time.
        max_queue: requests waiting beyond them.
    """

    max_batch: int = 32
    max_queue: int = 256


class Job:
    """One answer to write.

    Args:
        prompt: token ids.
        sentence: who is asking; None for a model that takes no profiles.
        max_tokens: longest answer.
        sampler: how its tokens are chosen.
        text: turns its tokens to text.
        deliver: called from the engine's thread with every :class:`Piece`.
    """

    def __init__(
        self, prompt: Sequence[int], sentence: str | None, max_tokens: int, sampler: Sampler, text: TextStream,
        deliver: Callable[[Piece], None],
    ) -> None:  # fmt: skip
        self.prompt, self.sentence, self.max_tokens = prompt, sentence, max_tokens
        self.sampler, self.text, self._deliver = sampler, text, deliver
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.arrived = time.monotonic()
        self.waited: float | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Nobody wants the answer any more; its place is free at the next step. Harmless when it is complete."""
        self.cancelled = True

    def add(self, token: int, ends: bool) -> None:
        """Take the next token and deliver what became text.

        Args:
            token: its id.
            ends: whether this token ends an answer.
        """
        self.tokens.append(token)
        piece = self.text.add(token)
        if ends or self.text.stopped:
            self.finish = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish = "length"
        if self.finish:
            piece += self.text.finish()
            if self.text.stopped:
                self.finish = "stop"
        if piece or self.finish:
            self._deliver(Piece(piece, self.finish))

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.finish = "error"
        self._deliver(Piece("", error=error))


class Engine:
    """Continuous batching of one model on one thread.

    Args:
        model: in eval mode.
        end_ids: tokens that end an answer.
        pad_id: padding.
        limits: batch and queue sizes.
    """

    def __init__(self, model: CumaForCausalLM, end_ids: Sequence[int], pad_id: int, limits: Limits) -> None:
        self.limits = limits
        self._model, self._end_ids = model, frozenset(end_ids)
        self._batch = Batch(model, pad_id)
        self._running: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def check(self) -> None:
        """Compare how the model continues a made-up prompt: in one whole forward, token by token, and beside a longer one.

        A model that continues it differently beside others writes one answer at a time from now on. A warning says so.

        Raises:
            ModelError: it cannot continue a prompt token by token, or its sentence encoder is missing.
        """
        try:
            whole_V, alone_V, beside_V = self._probe()
        except CumaError:
            raise
        except Exception as error:
            raise ModelError(f"this model cannot be served in batches: {first_line(error)}") from error
        finally:
            self._batch.keep([])
        spread = (whole_V - whole_V.mean()).norm()
        if (alone_V - whole_V).norm() > _ROUNDING * spread:
            how = "token by token it continues a prompt differently than in one whole forward"
            raise ModelError(f"this model cannot be served: {how}")
        if (beside_V - whole_V).norm() > _ROUNDING * spread and self.limits.max_batch > 1:
            self.limits = replace(self.limits, max_batch=1)
            message = "this model answers differently in a batch with others; answers are written one at a time"
            warnings.warn(message, stacklevel=2)

    @torch.inference_mode()
    def _probe(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [V] float32 after a short prompt: whole forward, from the cache, from the cache beside a longer prompt."""
        model, batch = self._model, self._batch
        who = model.embed_profiles(["A person."]) if model.config.profile_dim else None
        vocabulary = int(base_fact(model.base_model.config, "vocab_size"))
        long = [(7 * place + 3) % vocabulary for place in range(24)]
        *short, last = long[3:8]
        more = {} if who is None else {"profile_embeddings": who.to(batch.device)}
        ids = torch.tensor([[*short, last]], device=batch.device)
        whole_V = model(input_ids=ids, use_cache=False, **more).logits[0, -1]
        batch.join([short], who)
        alone_V = batch.step([last])[0]
        batch.keep([])
        batch.join([long], who)
        batch.join([short], who)
        return whole_V.float(), alone_V.float(), batch.step([last, last])[1].float()

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
        return len(self._running), len(self._waiting)

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

    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
            try:
                self._step()
            except Exception as error:  # one broken forward must not end the server
                logger.error("step failed", exc_info=error)
                self._fail(self._running, error)
                self._running = []
                self._batch.keep([])

    def _step(self) -> None:
        """Let the cancelled go, take new ones in, and write one token for everybody."""
        self._leave()
        if jobs := self._admitted():
            self._join(jobs)
        if self._running:
            self._write(self._running, self._batch.step([job.tokens[-1] for job in self._running]))
            self._leave()

    def _join(self, jobs: Sequence[Job]) -> None:
        """Read prompts and write the first token of each; a prompt that cannot be read fails alone."""
        try:
            logits_BV, new = self._batch.read([job.prompt for job in jobs], self._embeddings(jobs))
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._join([job])
                return
            logger.error("prompt failed", exc_info=error)
            self._fail(jobs, error)
            return
        self._running += jobs
        self._batch.add(new)
        self._write(jobs, logits_BV)
        self._leave()

    def _admitted(self) -> list[Job]:
        """The next jobs in line that fit the batch and one forward."""
        jobs: list[Job] = []
        longest = 0
        with self._changed:
            while self._waiting and len(self._running) + len(jobs) < self.limits.max_batch:
                job = self._waiting[0]
                if not job.cancelled:
                    longest = max(longest, len(job.prompt))
                    if jobs and longest * (len(jobs) + 1) > _PROMPT_TOKENS:
                        break
                    job.waited = time.monotonic() - job.arrived
                    jobs.append(job)
                self._waiting.popleft()
        return jobs

    def _embeddings(self, jobs: Sequence[Job]) -> Tensor | None:
        sentences = [job.sentence for job in jobs if job.sentence is not None]
        return self._model.embed_profiles(sentences) if sentences else None

    def _write(self, jobs: Sequence[Job], logits_BV: Tensor) -> None:
        for job, token in zip(jobs, next_tokens(logits_BV, [job.sampler for job in jobs]), strict=True):
            if job.cancelled:
                continue
            try:
                job.add(token, token in self._end_ids)
            except Exception as error:  # what cannot be written as text fails alone
                logger.error("token failed", exc_info=error)
                job.fail(error)

    def _leave(self) -> None:
        rows = [row for row, job in enumerate(self._running) if not (job.cancelled or job.finish)]
        if len(rows) < len(self._running):
            self._running = [self._running[row] for row in rows]
            self._batch.keep(rows)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            if not job.finish:
                job.fail(error)
