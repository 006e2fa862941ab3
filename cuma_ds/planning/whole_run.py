"""How long a whole run takes: its steps as its recipe cuts them on so many GPUs, and the rollouts of GRPO.

Seconds are estimates from the FLOP/s and bandwidths that the caller assumes. A judge's time is not among them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from cuma_ds.config import RunConfig
from cuma_ds.data.stream import Draw
from cuma_ds.parallel.wire import all_gather_bytes
from cuma_ds.planning.cost import Hardware, Layout, Work
from cuma_ds.planning.plan import Planner
from cuma_ds.planning.rollouts import USABLE, generation_bytes, keys_and_values

_DAY = 86_400


@dataclass(frozen=True)
class WholeRun:
    """The prediction for all steps of a recipe on one number of GPUs.

    Attributes:
        gpus: ranks.
        steps: optimizer steps.
        update_seconds: of one step's forwards and backwards, with what is sent.
        rollout_seconds: of writing and scoring the completions that one step learns from; 0 without rollouts.
        reference_seconds: of what is computed once, before the first step.
        memory: bytes per GPU at the peak, of the update or the rollout.
        fits: whether a GPU has that much.
        work: of one rank and step.
    """

    gpus: int
    steps: int
    update_seconds: float
    rollout_seconds: float
    reference_seconds: float
    memory: int
    fits: bool
    work: Work

    @property
    def days(self) -> float:
        """Of 24 hours."""
        return (self.steps * (self.update_seconds + self.rollout_seconds) + self.reference_seconds) / _DAY

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        return {**asdict(self), "days": self.days}


def whole_run(planner: Planner, gpus: int, length: int, hardware: Hardware) -> WholeRun:
    """What all steps of the planner's recipe take.

    Args:
        planner: ``training.steps`` of its recipe are those of the run.
        gpus: ranks.
        length: tokens of every sequence; a real run's are shorter.
        hardware: what is assumed of it.

    Raises:
        CumaError: as :meth:`Planner.plan`.
    """
    config = planner.config
    work = step_work(config, gpus, length)
    layout = planner.layout(gpus, work, hardware)
    plan = planner.plan_layout(layout, hardware)
    memory, rollout = plan.total_memory, 0.0
    if config.grpo is not None:
        generation = Generation(layout, planner, hardware)
        memory = max(memory, generation.memory(plan.total_memory - plan.memory["activations"]))
        rollout = generation.seconds()
    reference = config.training.steps * forward_seconds(layout, hardware) if config.dpo is not None else 0.0
    return WholeRun(
        gpus=gpus,
        steps=config.training.steps,
        update_seconds=plan.step_seconds,
        rollout_seconds=rollout,
        reference_seconds=reference,
        memory=memory,
        fits=memory + hardware.reserved <= hardware.memory,
        work=work,
    )


def step_work(config: RunConfig, gpus: int, length: int) -> Work:
    """The micro steps of a rank in one step, cut as training cuts them."""
    training = config.training
    draw = Draw(1, training.global_batch_size, training.micro_batch_size, 0, 0, gpus)
    if config.grpo is None or config.rollout is None:
        pair = 2 if config.dpo is not None else 1
        return Work(draw.micro * pair, length, length, draw.accumulation)
    completions = -(-training.global_batch_size // gpus) * config.grpo.group_size
    accumulation = -(-completions // training.micro_batch_size)
    kept = min(length, config.rollout.max_new_tokens)
    return Work(-(-completions // accumulation), length, kept, accumulation)


def forward_seconds(layout: Layout, hardware: Hardware) -> float:
    """Of forwards without gradients over one rank's sequences of a step; each uses the whole backbone once."""
    sizes, work = layout.sizes, layout.work
    flops = 2 * sizes.multiplied + sizes.attention * work.length + 2 * (sizes.shared + sizes.expert)
    compute = work.tokens * work.accumulation * flops / (hardware.flops * hardware.efficiency)
    unpacking = _unpacked(layout) / (hardware.memory_bandwidth * hardware.efficiency)
    return compute + work.accumulation * (_gather_seconds(layout, hardware) + unpacking)


def _gather_seconds(layout: Layout, hardware: Hardware) -> float:
    """Of gathering what is sharded once; 0 where every rank holds everything."""
    return all_gather_bytes(_whole(layout) // layout.shards, layout.shards) / hardware.bandwidth(layout.shards)


def _whole(layout: Layout) -> int:
    """Bytes of what is sharded, as one rank gathers it: the backbone, and at stage 3 what trains, too."""
    return layout.whole_backbone() + (_trained(layout) if layout.settings.stage == 3 else 0)


def _trained(layout: Layout) -> int:
    """Bytes of what trains, over all ranks."""
    return layout.sizes.trained_itemsize * (layout.sizes.shared + layout.sizes.expert)


def _unpacked(layout: Layout) -> int:
    """Bytes read and written to unpack a quantised backbone once; 0 for another one."""
    return sum(count * (kept.bytes + kept.unpacked) for kept, count in layout.backbone.items() if kept.unpacked)


class Generation:
    """What writing the completions of a rollout takes on one rank.

    Args:
        layout: of the update; its recipe has sections ``grpo`` and ``rollout``.
        planner: of the recipe.
        hardware: what is assumed of it.
    """

    def __init__(self, layout: Layout, planner: Planner, hardware: Hardware) -> None:
        config = layout.config
        assert config.grpo is not None
        assert config.rollout is not None
        self._layout, self._hardware, self._grpo, self._rollout = layout, hardware, config.grpo, config.rollout
        self._text = planner.setup.text
        self._completions = -(-config.training.global_batch_size // layout.gpus) * config.grpo.group_size
        self._batch = min(config.rollout.batch_size, self._completions)
        self._length = layout.work.length

    @property
    def is_gathered(self) -> bool:
        """Whether a sharded backbone is gathered once per rollout (``rollout.backbone``)."""
        if self._rollout.backbone != "auto":
            return self._rollout.backbone == "gathered"
        held = sum(self._layout.held().values())
        free = self._hardware.memory - self._hardware.reserved - held
        return self._gathered + self._cache <= USABLE * free

    @property
    def _gathered(self) -> int:
        """Bytes of a whole model that is gathered beside its shards; 0 where a rank holds everything."""
        return _whole(self._layout) if self._layout.copies_layers else 0

    @property
    def _cache(self) -> int:
        """Bytes of keys, values and what generating needs beside them."""
        return generation_bytes(self._text, self._layout.sizes.itemsize, self._batch, self._length)

    def memory(self, held: int) -> int:
        """Bytes per GPU while completions are written.

        Args:
            held: by shards, adapters and the optimizer.
        """
        return held + (self._gathered if self.is_gathered else 0) + self._cache

    def seconds(self) -> float:
        """Of one step's share of a rollout: reading the prompts, writing token after token, scoring."""
        hardware, sizes, new = self._hardware, self._layout.sizes, self._rollout.max_new_tokens
        speed = hardware.flops * hardware.efficiency
        of_token = 2 * (sizes.multiplied + sizes.shared + sizes.expert)
        prompt = max(1, self._length - new)
        reading = self._completions * prompt * (of_token + sizes.attention * prompt) / speed
        # A token reads all weights, which may have to be unpacked and read again, and the keys and values of the tokens
        # so far, half of the longest in the mean.
        backbone = sum(count * (kept.bytes + 2 * kept.unpacked) for kept, count in self._layout.backbone.items())
        weights = backbone + _trained(self._layout)
        of_token_before = self._text.num_hidden_layers * keys_and_values(self._text) * sizes.itemsize
        read = weights + self._batch * (prompt + new / 2) * of_token_before
        token = max(read / (hardware.memory_bandwidth * hardware.efficiency), self._batch * of_token / speed)
        gather = _gather_seconds(self._layout, hardware)
        waves = -(-self._completions // self._batch)
        writing = waves * new * (token + (0.0 if self.is_gathered else gather))
        scored = (self._grpo.iterations > 1) + (self._grpo.kl_weight > 0)
        scoring = scored * forward_seconds(self._layout, hardware)
        return (reading + writing + (gather if self.is_gathered else 0.0) + scoring) / self._grpo.iterations
