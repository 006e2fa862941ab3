"""Rollouts as a source of batches: the policy answers the step's prompts, and rewards become advantages.

All ranks generate in step, each for prompts of its own. What is written depends neither on the number of ranks nor on
what was done before this process started.

Shapes: M completions of this rank, F rewards, L labels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from cuma_ds.data.batch import Batch, EncodedExample
from cuma_ds.data.rows import Row
from cuma_ds.inference.generate import Completion, generate
from cuma_ds.inference.open import open_engine
from cuma_ds.inference.sampling import Sampling, mixed_seed
from cuma_ds.inference.text import AS_WRITTEN
from cuma_ds.parallel.agreement import agreement, together
from cuma_ds.parallel.held import HeldPolicy
from cuma_ds.planning.rollouts import holds_whole_backbone
from cuma_ds.training.groups import Groups
from cuma_ds.training.objectives.protocol import Begin
from cuma_ds.training.rollout.advantage import Advantages
from cuma_ds.training.rollout.answers import Answers
from cuma_ds.training.rollout.batches import Cutter, Written
from cuma_ds.training.rollout.kept import KeptCompletions
from cuma_ds.training.rollout.rewards import Rewards


class Prompt(NamedTuple):
    """A prompt of a rollout.

    place: in the global batch.  number: of the row in the training split.  row: that row.  example: the prompt's tokens
    and profile.
    """

    place: int
    number: int
    row: Row
    example: EncodedExample


class Rollouts:
    """The batches of steps; ``grpo.iterations`` of them, one after another, learn from the same rollout.

    Args:
        begin: the run.
        layout: completions of each micro batch, and the number of micro batches.

    Attributes:
        advantages: remembers earlier rollouts where ``grpo.advantage`` or ``grpo.robust`` ask for it.

    Raises:
        CumaError: a reward cannot be had, e.g. because the judge is down; the same one line on every rank.
    """

    def __init__(self, begin: Begin, layout: tuple[int, int]) -> None:
        config, self._engine, inputs = begin.config, begin.engine, begin.inputs
        assert config.grpo is not None
        assert config.rollout is not None
        self._seed, self._grpo, self._rollout, self._inputs = config.run.seed, config.grpo, config.rollout, inputs
        with agreement():
            groups = Groups.of(config, inputs.data)
            self._rewards = Rewards(config, inputs.data, inputs.renderer)
        # A judge that does not answer may take long to be given up.
        together(lambda: self._rewards.check(begin.tell) if self._engine.topology.is_main else None)
        names, weights = self._rewards.names, self._rewards.weights
        self.advantages = Advantages(config.grpo, names, weights, groups, self._engine.topology)
        is_bare = config.model.init_from is None and begin.engine.model.switches_off
        keeps_start = config.grpo.kl_weight and config.grpo.reference == "start" and not is_bare
        self._start = HeldPolicy(self._engine) if keeps_start else None
        self._tell = begin.tell
        self._gathers = self._gathers_backbone(config.data.max_length)
        with self._evaluating(), self._whole_backbone():
            opened = open_engine(self._engine, config, inputs.renderer)
            self._decoder, self._all_done = opened.decoder(config.rollout.batch_size), opened.peers.all_done
        # All prompts of this rank at once, whatever a micro batch holds.
        self._draw = dataclasses.replace(inputs.draw, micro_batch_size=inputs.draw.global_batch_size)
        pack_length = config.data.max_length if config.data.packing else None
        self._cut = Cutter(layout, inputs.pad_id, pack_length, config.grpo.mask_truncated)
        self._kept = KeptCompletions(begin.run.completions, config.rollout.keep)
        self._newest: int | None = None
        self._batches: list[Batch] = []
        self._numbers: dict[str, float] = {}
        self._updating_since = 0.0

    def step(self, number: int) -> list[Batch]:
        """See :class:`~cuma_ds.training.inputs.BatchSource`."""
        rollout = number // self._grpo.iterations
        if rollout != self._newest:
            self._batches = self._roll_out(rollout)
            self._newest = rollout
        self._inputs.objective.show("update", 0, 0)
        self._updating_since = time.perf_counter()
        return self._batches

    def report(self) -> dict[str, float]:
        """Numbers of the newest rollout, and the seconds since the update began."""
        return self._numbers | {"update_seconds": time.perf_counter() - self._updating_since}

    def _roll_out(self, rollout: int) -> list[Batch]:
        began, step = time.perf_counter(), rollout * self._grpo.iterations + 1
        with agreement():
            prompts = self._prompts(rollout)
            filler = self._example(self._inputs.data.splits["train"][self._draw.first(rollout)])
        with self._evaluating(), self._whole_backbone():
            written = self._write(rollout, prompts)
        wrote = time.perf_counter()
        answers = self._answers(prompts, written)
        self._inputs.objective.show("rewards", 0, 0)
        rewards_MF = together(lambda: self._rewards(answers))
        found = self.advantages(rewards_MF, np.array([one.prompt.profile for one in written], np.int64))
        if self._engine.topology.is_main:
            rewards = dict(zip(self._rewards.names, rewards_MF.T, strict=True))
            self._kept.add(step, answers, rewards, found.advantage_M)
        batches = self._with_log_probabilities(self._cut(written, found.advantage_M.tolist(), filler))
        tokens, truncated, count = self._totals(written)
        if self._grpo.mask_truncated and truncated == count:
            self._tell(
                f"step {step}: all completions were cut at rollout.max_new_tokens {self._rollout.max_new_tokens}, and "
                "grpo.mask_truncated leaves them out; nothing is learned from them"
            )
        self._numbers = {**found.numbers, "completions/mean_length": tokens / count}
        self._numbers["completions/clipped_ratio"] = truncated / count
        self._numbers["generated_tokens_per_second"] = tokens / (wrote - began)
        self._numbers["rollout_seconds"] = time.perf_counter() - began
        return batches

    def _prompts(self, rollout: int) -> list[Prompt]:
        """Those of this rank."""
        (rows,) = self._draw.rows(rollout)
        first = self._draw.rank * self._draw.micro
        drawn = [(place, number, self._inputs.data.splits["train"][number]) for place, number in enumerate(rows, first)]
        return [Prompt(*one, self._example(one[-1])) for one in drawn]

    def _example(self, row: Row) -> EncodedExample:
        return self._inputs.objective.unit(row, self._inputs.renderer, self._inputs.data.sentences)[0]

    def _write(self, rollout: int, prompts: Sequence[Prompt]) -> list[Written]:
        """The completions of each prompt. The seed of each is mixed from the run's seed, the number of the rollout, the
        prompt's place and the completion's number, see :func:`~cuma_ds.inference.sampling.mixed_seed`.
        """
        settings, table, show = self._rollout, self._inputs.table, self._inputs.objective.show
        numbered = [(prompt, number) for prompt in prompts for number in range(self._grpo.group_size)]
        completions = []
        for (place, _, _, example), number in numbered:
            seed = mixed_seed(self._seed, rollout, place, number)
            sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, seed)
            profile_P = None if table is None else table.embeddings[example.profile]
            completions.append(Completion(example.input_ids, sampling, profile_P))
        show("rollout", 0, len(completions))
        generate(self._decoder, completions, self._all_done, lambda done, total: show("rollout", done, total))
        return [
            Written(prompt.number, number, prompt.example, one.tokens, one.finish == "length")
            for (prompt, number), one in zip(numbered, completions, strict=True)
        ]

    def _answers(self, prompts: Sequence[Prompt], written: Sequence[Written]) -> list[Answers]:
        """What was written after each prompt, as text."""
        tokenizer, size, answers = self._inputs.renderer.tokenizer, self._grpo.group_size, []
        for place, prompt in enumerate(prompts):
            group = written[place * size : (place + 1) * size]
            texts = tuple(tokenizer.decode(one.tokens, **AS_WRITTEN).strip() for one in group)
            lengths, truncated = tuple(len(one.tokens) for one in group), tuple(one.truncated for one in group)
            answers.append(Answers(prompt.number, prompt.row, texts, lengths, truncated))
        return answers

    def _totals(self, written: Sequence[Written]) -> list[float]:
        """Tokens, truncated completions and completions of all ranks."""
        own = [sum(len(one.tokens) for one in written), sum(one.truncated for one in written), len(written)]
        topology = self._engine.topology
        return topology.sum_over_ranks(torch.tensor(own, dtype=torch.float64, device=topology.device)).tolist()

    def _with_log_probabilities(self, batches: list[Batch]) -> list[Batch]:
        """The batches with ``old_L`` and ``reference_L`` where the loss reads them. Dropout is off."""
        with self._evaluating():
            if self._grpo.iterations > 1:
                batches = [self._scored("old_L", batch) for batch in batches]
            if self._grpo.kl_weight:
                with self._engine.model.disabled() if self._start is None else self._start.in_place():
                    batches = [self._scored("reference_L", batch) for batch in batches]
        return batches

    @torch.no_grad()
    def _scored(self, name: str, batch: Batch) -> Batch:
        """The batch with the log-probabilities of its labels under the model as it is."""
        logits_BKV = self._engine.forward(batch, self._inputs.table).logits
        log_p_L, _ = batch.targets.to(logits_BKV.device).scores(logits_BKV, self._rollout.temperature)
        return dataclasses.replace(batch, extras={**batch.extras, name: log_p_L.cpu()})

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, the engine is in evaluation mode."""
        self._engine.train(False)
        try:
            yield
        finally:
            self._engine.train()

    def _gathers_backbone(self, longest: int) -> bool:
        """Whether a rollout gathers a sharded backbone once (``rollout.backbone``)."""
        if self._rollout.backbone != "auto" or not self._engine.shards_backbone:
            return self._rollout.backbone == "gathered"
        gathers = holds_whole_backbone(self._engine, self._rollout.batch_size, longest)
        held = "gathered once for each rollout" if gathers else "gathered for each token, as memory holds no whole one"
        self._tell(f"rollouts: the sharded backbone is {held}")
        return gathers

    def _whole_backbone(self) -> contextlib.AbstractContextManager[None]:
        """Inside, no forward gathers a sharded backbone again, where ``rollout.backbone`` allows that."""
        return self._engine.gathered_backbone() if self._gathers else contextlib.nullcontext()
