"""What to set for a backbone on so many GPUs: the smallest shard group and the weakest quantisation that fit.

Every way to hold the backbone is planned. Layers are gathered ahead of their use, and their memory is counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from pydantic import ValidationError

from cuma_ds.config import RunConfig
from cuma_ds.errors import ConfigError
from cuma_ds.parallel.ds_config import FrozenBackbone, read_values
from cuma_ds.parallel.shard_group import ShardGroupSize, fitting_sizes
from cuma_ds.planning.cost import Hardware, Work, smallest_group
from cuma_ds.planning.plan import Plan, Planner
from cuma_ds.planning.whole_run import step_work

# From the weakest.
QUANTISATIONS = ("none", "int8", "nf4")
# What is gathered ahead and kept, in elements, as in ds_configs/zero2_sharded_overlap.json.
AHEAD = {"prefetch_bucket_size": 50_000_000, "max_reuse_distance": 100_000_000}
# Another choice is shown where it is so many times as fast, and no slower where gathering overlaps.
WORTH_TELLING = 1.05
_MOST_GPUS = 2**12


@dataclass(frozen=True)
class Ask:
    """What a proposal is asked for.

    name: of the backbone.  length: tokens of a sequence.  work: of one rank; None for a step of the recipe, cut into
    the largest micro batches that fit.  quantisations: those to choose from.  shard_group: the only one allowed.
    """

    name: str
    gpus: int
    hardware: Hardware
    length: int
    work: Work | None = None
    quantisations: Sequence[str] = QUANTISATIONS
    shard_group: ShardGroupSize | None = None


class Choice(NamedTuple):
    """One way to hold the backbone.

    name: ``recipe`` as it is, ``smallest`` group with the weakest quantisation that fit, or ``fastest``.  settings:
    keys of a recipe.  deepspeed: the JSON that ``parallel.deepspeed_config`` names then; None for the recipe's own.
    """

    name: str
    plan: Plan
    settings: dict[str, object]
    deepspeed: dict[str, object] | None

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        return {**self._asdict(), "plan": self.plan.as_dict()}


def propose(planner: Planner, ask: Ask) -> list[Choice]:
    """The recipe as it is, the smallest shard group with the weakest quantisation that fit, and what is faster.

    Raises:
        ConfigError: nothing fits, in which case the message says what would; or the recipe holds no frozen backbone
            beside the engine, or its step is too small for the GPUs.
        TopologyError: the asked shard group cannot be made of these GPUs.
    """
    return _Proposer(planner, ask).choices()


class _Proposer:
    def __init__(self, planner: Planner, ask: Ask) -> None:
        self._planner, self._ask, self._config = planner, ask, planner.config
        self._machines = ask.hardware.machines(ask.gpus)
        self._values = read_values(planner.config)
        self._ours = FrozenBackbone.model_validate(self._values.get("frozen_backbone", {}))
        self._check()

    def choices(self) -> list[Choice]:
        """See :func:`propose`."""
        ask = self._ask
        sizes = self._sizes
        if ask.shard_group is not None:
            sizes = [smallest_group(self._machines, ask.shard_group)]
        fitting = list(self._fitting(sizes))
        if not fitting:
            raise ConfigError(self._what_would_fit())
        smallest = fitting[0]
        no_slower = [plan for plan in fitting if plan.overlapped_seconds <= smallest.overlapped_seconds]
        fastest = max(no_slower, key=lambda plan: plan.tokens_per_second)
        found = [*self._recipe(), self._choice("smallest", smallest)]
        if fastest.tokens_per_second >= WORTH_TELLING * smallest.tokens_per_second:
            found.append(self._choice("fastest", fastest))
        return found

    @property
    def _sizes(self) -> list[int]:
        return list(_group_sizes(self._machines))

    def _check(self) -> None:
        config, ask = self._config, self._ask
        if not self._planner.sizes.backbone:
            raise ConfigError(f"adapters.method {config.adapters.method} freezes nothing that groups could hold")
        if self._values.get("zero_optimization", {}).get("stage") == 3:
            raise ConfigError(
                f"parallel.deepspeed_config: {config.parallel.deepspeed_config} is ZeRO stage 3, which shards over all "
                "ranks; name zero2_sharded_backbone to have a shard group proposed"
            )
        batch = config.training.global_batch_size
        if ask.work is None and batch < ask.gpus:
            raise ConfigError(
                f"training.global_batch_size is {batch}, fewer than {ask.gpus} GPUs; raise it, or give --micro-batch"
            )

    def _recipe(self) -> Iterator[Choice]:
        ask, config = self._ask, self._config
        if ask.gpus % config.parallel.ep_size == 0:
            work = ask.work or step_work(config, ask.gpus, ask.length)
            yield Choice("recipe", self._planner.plan(ask.gpus, work, ask.hardware), {}, None)

    def _fitting(self, sizes: list[int]) -> Iterator[Plan]:
        """What fits: the weakest quantisation and the smallest group first, with the fastest ``ep_size`` of each."""
        for quantisation in self._ask.quantisations:
            if not self._can_be(quantisation):
                continue
            for size in sizes:
                plans = [plan for ep_size in self._ep_sizes() if (plan := self._plan(quantisation, size, ep_size))]
                if plans:
                    yield max(plans, key=lambda plan: plan.tokens_per_second)

    def _can_be(self, quantisation: str) -> bool:
        if quantisation == "none":
            return True
        values = self._config.model_dump()
        values["model"]["quantisation"] = quantisation
        try:
            RunConfig.model_validate(values)
        except ValidationError:
            return False
        return any(weight.packable for weight in self._planner.sizes.backbone)

    def _ep_sizes(self) -> list[int]:
        """Numbers of ranks that may share the experts; those of several machines are never faster."""
        adapters, most = self._config.adapters, min(self._ask.gpus, self._ask.hardware.gpus_per_node)
        experts = adapters.num_experts if adapters.has_router else 1
        return [size for size in range(1, most + 1) if experts % size == 0 == self._ask.gpus % size]

    def _plan(self, quantisation: str, size: int, ep_size: int, least: bool = False) -> Plan | None:
        """One combination, None where it does not fit; with ``least`` whether or not one micro batch fits."""
        ask, config = self._ask, self._config
        model = config.model.model_copy(update={"quantisation": quantisation})
        parallel = config.parallel.model_copy(update={"ep_size": ep_size})
        config = config.model_copy(update={"model": model, "parallel": parallel})
        work = ask.work or step_work(_with_micro_batch(config, 1), ask.gpus, ask.length)
        layout = self._planner.layout(ask.gpus, work, ask.hardware, config)
        layout = replace(layout, settings=replace(layout.settings, backbone=self._backbone(size)))
        plan = self._planner.plan_layout(layout, ask.hardware)
        if least or (plan.fits and ask.work is not None):
            return plan
        if not plan.fits:
            return None
        most = plan.max_micro_batch // work.sequences
        work = step_work(_with_micro_batch(config, most), ask.gpus, ask.length)
        return self._planner.plan_layout(replace(layout, work=work), ask.hardware)

    def _backbone(self, size: int) -> FrozenBackbone:
        """How groups of so many ranks hold the backbone."""
        if size == 1:
            return FrozenBackbone(sharded=self._ours.offload == "cpu", shard_group=1, offload=self._ours.offload)
        group: ShardGroupSize = size
        if size == self._ask.gpus:
            group = "world"
        elif set(self._machines) == {size}:
            group = "machine"
        ahead = {name: max(least, getattr(self._ours, name)) for name, least in AHEAD.items()}
        return FrozenBackbone(sharded=True, shard_group=group, offload=self._ours.offload, **ahead)

    def _choice(self, name: str, plan: Plan) -> Choice:
        ours = self._backbone(plan.shards).model_dump(exclude_defaults=True) if plan.shards > 1 else {}
        deepspeed = {name: value for name, value in self._values.items() if name != "frozen_backbone"}
        settings: dict[str, object] = {"model.quantisation": plan.quantisation, "parallel.ep_size": plan.ep_size}
        settings["training.micro_batch_size"] = plan.work["sequences"] // (2 if self._config.dpo is not None else 1)
        return Choice(name, plan, settings, {**({"frozen_backbone": ours} if ours else {}), **deepspeed})

    def _what_would_fit(self) -> str:
        ask, hardware = self._ask, self._ask.hardware
        asked = None if ask.shard_group is None else smallest_group(self._machines, ask.shard_group)
        kinds = [kind for kind in ask.quantisations if self._can_be(kind)]
        tried = itertools.product(kinds, self._sizes if asked is None else [asked], self._ep_sizes())
        plans = [plan for one in tried if (plan := self._plan(*one, least=True))]
        least = min(plans, key=lambda plan: plan.total_memory)
        gb, room = least.total_memory / 1e9, (hardware.memory - hardware.reserved) / 1e9
        told = f"with model.quantisation {least.quantisation} and groups of {least.shards} {ask.name} takes {gb:.1f} GB"
        told = f"{told} per GPU, of {room:.1f} GB, at {least.work['sequences']} x {least.work['length']} tokens"
        if asked is not None:
            others = [f"{plan.shards} with {plan.quantisation}" for plan in self._fitting(self._sizes)]
            return f"shard group {ask.shard_group} on {ask.gpus} GPUs does not fit: {told}; {_what_fits(others)}"
        more = self._enough()
        enough = [f"{more} GPUs"] if more else []
        enough.append(f"{gb + hardware.reserved / 1e9 + 0.05:.1f} GB per GPU")
        return f"nothing fits on {ask.gpus} GPUs: {told}; what would do: {' or '.join(enough)}"

    def _enough(self) -> int | None:
        """The smallest power of two times the asked number of GPUs on which something fits."""
        gpus = 2 * self._ask.gpus
        while gpus <= _MOST_GPUS:
            work = self._ask.work or step_work(_with_micro_batch(self._config, 1), self._ask.gpus, self._ask.length)
            more = _Proposer(self._planner, replace(self._ask, gpus=gpus, work=work))
            if any(more._fitting([1, gpus])):
                return gpus
            gpus *= 2
        return None


def _what_fits(others: list[str]) -> str:
    return f"what fits: {', '.join(others)}" if others else "no other one does"


def _with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": size})})


@cache
def _group_sizes(machines: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(fitting_sizes(machines))
