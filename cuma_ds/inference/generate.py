"""Completions of prompts: one decode loop for evaluation, talking, serving and rollouts.

Shapes: B completions, P profile width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from cuma_ds.inference.running import RunningBatch, SingleSequence
from cuma_ds.inference.sampling import Sampler, Sampling, log_probabilities, next_tokens


class Completion:
    """A prompt and the tokens that were written after it so far.

    Args:
        prompt: token ids.
        sampling: how the tokens are chosen. Its seed is this sequence's own.
        profile_P: raw profile embedding; None for a model that takes none.

    Attributes:
        tokens: written so far, with the token that ended it.
        log_probabilities: of each token, at temperature 1, in nats; empty unless the decoder scores.
        finish: ``stop`` (the model ended it) or ``length`` (it is ``max_new_tokens`` long); None while it is written.
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling, profile_P: Tensor | None = None) -> None:
        self.prompt, self.profile_P = prompt, profile_P
        self.max_new_tokens = sampling.max_new_tokens
        self.sampler = Sampler(sampling.temperature, sampling.top_p, sampling.seed)
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.finish: str | None = None

    @property
    def done(self) -> bool:
        """Whether no more tokens are wanted."""
        return self.finish is not None

    def add(self, token: int, ends: bool) -> None:
        """Append the next token.

        Args:
            token: its id.
            ends: whether this token ends an answer.
        """
        self.tokens.append(token)
        if ends:
            self.finish = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish = "length"


class Decoder:
    """The running completions of one model, which are continued together.

    Args:
        batch: an empty batch of the model, e.g. of :func:`cuma_ds.inference.running.measured_batch`.
        most: completions that may run at once.
        end_ids: tokens that end an answer.
        scores: also note the log-probability of every token.

    Attributes:
        running: completions that are not finished.
    """

    def __init__(
        self, batch: RunningBatch | SingleSequence, most: int, end_ids: Collection[int], scores: bool = False
    ) -> None:
        self.running: list[Completion] = []
        self.most, self._batch, self._end_ids, self._scores = most, batch, frozenset(end_ids), scores

    @property
    def room(self) -> int:
        """How many more completions may run."""
        return self.most - len(self.running)

    def admit(self, new: Sequence[Completion]) -> None:
        """Read prompts and write the first token of each. If they cannot be read, the others go on as they were.

        Equal prompts of one profile are read once.
        """
        place: dict[tuple[tuple[int, ...], bytes], int] = {}
        rows = [place.setdefault(_asked(completion), len(place)) for completion in new]
        chosen = [new[rows.index(row)] for row in range(len(place))]
        profiles = [completion.profile_P for completion in chosen if completion.profile_P is not None]
        prompts = [completion.prompt for completion in chosen]
        logits_UV, add = self._batch.read(prompts, torch.stack(profiles) if profiles else None)
        self._write(new, logits_UV, rows)
        unfinished = [number for number, completion in enumerate(new) if not completion.done]
        if unfinished:
            add([rows[number] for number in unfinished])
            self.running += [new[number] for number in unfinished]

    def advance(self) -> None:
        """Write one token of each running completion."""
        self._write(self.running, self._batch.step([completion.tokens[-1] for completion in self.running]))
        self.drop_finished()

    def read(self, prompts: Sequence[Sequence[int]], profiles_BP: Tensor | None) -> Tensor:
        """Logits [B, V] of the token after each prompt, in as few forwards as there is room for; nothing is kept."""
        logits = []
        for start in range(0, len(prompts), self.most):
            part = slice(start, start + self.most)
            logits.append(self._batch.read(prompts[part], None if profiles_BP is None else profiles_BP[part])[0])
        return torch.cat(logits)

    def idle(self) -> None:
        """One forward that writes nothing."""
        self._batch.forward.fill()

    def drop_finished(self) -> None:
        """Remove completions that are done from the batch."""
        rows = [row for row, completion in enumerate(self.running) if not completion.done]
        if len(rows) < len(self.running):
            self.running = [self.running[row] for row in rows]
            self._batch.keep(rows)

    def clear(self) -> None:
        """Remove all completions."""
        self.running = []
        self._batch.keep([])

    def _write(self, completions: Sequence[Completion], logits_UV: Tensor, rows: Sequence[int] | None = None) -> None:
        tokens = next_tokens(logits_UV, [completion.sampler for completion in completions], rows)
        scores = log_probabilities(logits_UV if rows is None else logits_UV[rows], tokens) if self._scores else []
        for row, (completion, token) in enumerate(zip(completions, tokens, strict=True)):
            completion.log_probabilities += scores[row : row + 1]
            completion.add(token, token in self._end_ids)


def _asked(completion: Completion) -> tuple[tuple[int, ...], bytes]:
    """What a completion is a function of, but for how its tokens are chosen."""
    profile_P = completion.profile_P
    return tuple(completion.prompt), b"" if profile_P is None else profile_P.float().cpu().numpy().tobytes()


def generate(
    decoder: Decoder,
    completions: Sequence[Completion],
    all_done: Callable[[bool], bool] = bool,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write completions to their end, the longest prompts first; a finished one makes room for the next.

    Under a sharded backbone or expert parallelism a forward needs every rank. So each rank calls this with its own
    completions (or none) and runs one forward per turn, of fillers once it has nothing left to write, until all are
    done. What is written depends neither on the ranks nor on which completions run together.

    Args:
        decoder: with nothing running.
        completions: each as it was made; they hold the result.
        all_done: told whether this rank is done, returns whether every rank is. With ranks it is an all-reduce.
        progress: called with (completions done, in all) whenever one is done.
    """
    waiting = deque(sorted(completions, key=lambda completion: -len(completion.prompt)))
    done = 0
    try:
        while not all_done(not waiting and not decoder.running):
            if waiting and decoder.room > 0:
                decoder.admit([waiting.popleft() for _ in range(min(decoder.room, len(waiting)))])
            elif decoder.running:
                decoder.advance()
            else:
                decoder.idle()
            before, done = done, len(completions) - len(waiting) - len(decoder.running)
            if progress is not None and done > before:
                progress(done, len(completions))
    finally:
        decoder.clear()
