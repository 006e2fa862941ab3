"""What one layout of a model costs: bytes that a rank holds, bytes that it sends, seconds of one optimizer step.

Backbone shards, trained state and sent bytes are counted as the engine places and sends them. Only time is an
estimate, from the FLOP/s and bandwidths that the caller assumes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from math import gcd
from typing import NamedTuple

import torch
from torch import nn

from cuma_ds.config import RunConfig
from cuma_ds.parallel.ds_config import DeepSpeedSettings
from cuma_ds.parallel.quantised import BLOCK, BLOCK_BYTES, SCALE_BYTES
from cuma_ds.parallel.shard_group import ShardGroupSize, divide_ranks
from cuma_ds.parallel.wire import (
    ExpertShapes,
    Payload,
    all_gather_bytes,
    all_reduce_bytes,
    all_to_all_bytes,
    balanced_pairs,
    cheaper_dispatch,
    gather_experts_bytes,
)


@dataclass(frozen=True)
class Hardware:
    """What is assumed of the cluster; every figure is per GPU.

    memory: bytes.  reserved: bytes of it for the CUDA context, NCCL and fragmentation.  flops: peak FLOP/s in the
    backbone's dtype.  efficiency: share of the peak that is reached.  intra_bandwidth, inter_bandwidth: bytes/s to
    GPUs of the same and of other machines.  memory_bandwidth: bytes/s of its own memory, of which the same share is
    reached.
    """

    gpus_per_node: int = 8
    memory: float = 80e9
    reserved: float = 2e9
    flops: float = 989e12
    efficiency: float = 0.4
    intra_bandwidth: float = 300e9
    inter_bandwidth: float = 40e9
    memory_bandwidth: float = 3.35e12

    def machines(self, gpus: int) -> tuple[int, ...]:
        """Ranks of each machine, all of them full but the last."""
        full, rest = divmod(gpus, self.gpus_per_node)
        return (self.gpus_per_node,) * full + ((rest,) if rest else ())

    def bandwidth(self, ranks: int) -> float:
        """Bytes/s inside a group of so many ranks."""
        return self.intra_bandwidth if ranks <= self.gpus_per_node else self.inter_bandwidth


@dataclass(frozen=True)
class Work:
    """One micro step of one rank.  sequences of ``length`` tokens (padding included), logits at the last ``kept``."""

    sequences: int
    length: int
    kept: int
    accumulation: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one forward of one rank."""
        return self.sequences * self.length


class Weight(NamedTuple):
    """A frozen parameter.

    numbers: in it.  itemsize: bytes of one while it is used.  packable: whether ``model.quantisation`` packs them.
    """

    numbers: int
    itemsize: int
    packable: bool = False

    @classmethod
    def of(cls, parameter: nn.Parameter, dtype: torch.dtype, packable: set[nn.Parameter]) -> Weight:
        """A parameter of a backbone that is used in ``dtype``."""
        return cls(parameter.numel(), dtype.itemsize, parameter in packable)


class Kept(NamedTuple):
    """How a frozen parameter is kept: in units of bytes that ranks divide between them, numbers or packed blocks.

    elements: that ZeRO counts in a unit.  unpacked: bytes of the whole weight where it has to be unpacked, else 0.
    """

    units: int
    unit_bytes: int
    elements: int
    unpacked: int

    @classmethod
    def of(cls, weight: Weight, quantisation: str) -> Kept:
        """A weight under ``model.quantisation``. A packed block is one element of ZeRO for each byte and its scale."""
        if quantisation == "none" or not weight.packable:
            return cls(weight.numbers, weight.itemsize, 1, 0)
        packed = BLOCK_BYTES["nf4" if quantisation == "nf4" else "int8"]
        return cls(-(-weight.numbers // BLOCK), packed + SCALE_BYTES, packed + 1, weight.numbers * weight.itemsize)

    def part(self, ranks: int) -> int:
        """Bytes that one of so many ranks holds, with the padding of the last one."""
        return -(-self.units // ranks) * self.unit_bytes

    @property
    def bytes(self) -> int:
        """As a whole, packed where it is."""
        return self.units * self.unit_bytes


@dataclass(frozen=True)
class Sizes:
    """Numbers in the model of one recipe, over all ranks.

    backbone: how many frozen parameters there are of each kind.  gathered: how many of each kind one micro step uses,
    and gathers where they are sharded.  itemsize: bytes of a number in the backbone's dtype.  shared, expert: trained
    on every rank, and trained with an expert dimension.  layers: experts of each adapted linear.  active: experts that
    answer for one token.  multiplied: frozen numbers that each token is multiplied with.  attention: FLOPs of one
    token's attention per token of its sequence.  trained_itemsize, trained_multiplied: as itemsize and multiplied, of
    what trains.  largest_trained: numbers of the largest parameter that trains.
    """

    backbone: Counter[Weight]
    gathered: Counter[Weight]
    itemsize: int
    shared: int
    expert: int
    layers: tuple[ExpertShapes, ...]
    active: int
    multiplied: int
    attention: int
    trained_itemsize: int
    trained_multiplied: int
    largest_trained: int

    @property
    def backbone_parameters(self) -> int:
        """Frozen numbers."""
        return sum(count * weight.numbers for weight, count in self.backbone.items())


@dataclass(frozen=True)
class Layout:
    """One recipe on so many ranks, with the work of one of them.

    machines: ranks of each machine.
    """

    sizes: Sizes
    config: RunConfig
    settings: DeepSpeedSettings
    machines: tuple[int, ...]
    work: Work

    @property
    def gpus(self) -> int:
        """All ranks."""
        return sum(self.machines)

    @property
    def ep_size(self) -> int:
        """Ranks that hold one set of experts between them."""
        return self.config.parallel.ep_size

    @cached_property
    def shards(self) -> int:
        """Ranks that hold one copy of the backbone between them; of the smallest group, where machines differ.

        Raises:
            TopologyError: ``frozen_backbone.shard_group`` does not divide the machines.
        """
        if self.settings.stage == 3:
            return self.gpus
        ours = self.settings.backbone
        return smallest_group(self.machines, ours.shard_group) if ours.sharded else 1

    @property
    def copies_layers(self) -> bool:
        """Whether a layer that runs is another copy than what is held: shards, or all of it in CPU memory."""
        return self.shards > 1 or self.settings.backbone.offload == "cpu"

    @cached_property
    def backbone(self) -> Counter[Kept]:
        """How many frozen parameters are kept in each way."""
        return self._kept(self.sizes.backbone)

    @cached_property
    def used(self) -> Counter[Kept]:
        """The same, of the parameters that one micro step uses, as often as it does."""
        return self._kept(self.sizes.gathered)

    def _kept(self, weights: Counter[Weight]) -> Counter[Kept]:
        kept = Counter[Kept]()
        for weight, count in weights.items():
            kept[Kept.of(weight, self.config.model.quantisation)] += count
        return kept

    def held(self) -> dict[str, int]:
        """Bytes one rank holds while training, besides activations, by purpose."""
        sizes = self.sizes
        if self.settings.stage == 3:
            local = masters = -(-(sizes.shared + sizes.expert) // self.gpus)
        else:
            local = sizes.shared + sizes.expert // self.ep_size
            copies = self.gpus // self.ep_size
            masters = -(-sizes.shared // self.gpus) + -(-(sizes.expert // self.ep_size) // copies)
        return {
            "backbone": sum(count * kept.part(self.shards) for kept, count in self.backbone.items()),
            "live layer": self._live_layer(),
            "adapters": sizes.trained_itemsize * local,
            "gradients": sizes.trained_itemsize * (local + self._bucket(local)) + 4 * masters,
            "optimizer": 12 * masters,
        }

    def _live_layer(self) -> int:
        """Bytes of the largest weight that is live, or at stage 3 gathered to be trained."""
        trained = self.sizes.largest_trained * self.sizes.itemsize if self.settings.stage == 3 else 0
        return max(self.largest_live(), trained)

    def largest_live(self) -> int:
        """Bytes that are made for the weight that takes most while its layer runs, and for what is gathered early."""
        return max((self.live([weight]) for weight in self.sizes.backbone), default=0)

    def live(self, weights: Iterable[Weight]) -> int:
        """Bytes that are made while the layers of these weights run: gathered copies, early ones too, and unpacked."""
        kept = [Kept.of(weight, self.config.model.quantisation) for weight in weights]
        unpacked = sum(one.unpacked for one in kept)
        if not self.copies_layers:
            return unpacked
        gathered = self._early + sum(one.part(self.shards) * self.shards for one in kept)
        return unpacked + min(gathered, self.whole_backbone())

    @cached_property
    def _early(self) -> int:
        """Bytes of what is gathered before its layer runs, or kept for its next use."""
        if self.settings.stage == 3:
            return 0
        ours = self.settings.backbone
        elements = sum(count * kept.units * kept.elements for kept, count in self.backbone.items())
        return (ours.prefetch_bucket_size + ours.max_reuse_distance) * self.whole_backbone() // elements

    def whole_backbone(self) -> int:
        """Bytes of the backbone as one rank gathers it."""
        return sum(count * kept.part(self.shards) for kept, count in self.backbone.items()) * self.shards

    def _bucket(self, local: int) -> int:
        """Numbers in the buffers that gradients are reduced through, never more than what trains."""
        zero = self.settings.engine["zero_optimization"]
        buffers = 2 if zero.get("overlap_comm") else 1
        return buffers * min(int(zero.get("reduce_bucket_size", local)), local)

    def on_host(self) -> set[str]:
        """The purposes whose bytes are in CPU memory."""
        offload = self.settings.engine.get("zero_optimization", {}).get("offload_optimizer", {})
        moved = {"optimizer"} if offload.get("device", "none") != "none" else set()
        return moved | {"backbone"} if self.settings.backbone.offload == "cpu" else moved

    @cached_property
    def dispatch(self) -> str:
        """What ``parallel.dispatch`` comes to."""
        if self.ep_size == 1 or not self.config.adapters.has_router:
            return "local"
        if self.config.parallel.dispatch != "auto":
            return self.config.parallel.dispatch
        choices = {self._cheaper(shape) for shape in self.sizes.layers}
        return choices.pop() if len(choices) == 1 else "auto (differs by layer)"

    @property
    def _payload(self) -> Payload:
        forwards = 2 if self.config.model.gradient_checkpointing else 1
        return Payload(self.ep_size, self.sizes.itemsize, forwards=forwards)

    def _cheaper(self, shape: ExpertShapes) -> str:
        return cheaper_dispatch(shape, self._payload, self.work.tokens, self.sizes.active)

    def dispatch_memory(self) -> int:
        """Bytes per sequence that moving tokens keeps for the backward pass: rows sent and received, both ways."""
        if self.dispatch != "all_to_all":
            return 0
        numbers = sum(2 * shape.sent_per_pair + 3 * shape.out_features for shape in self.sizes.layers)
        return numbers * self.work.length * self.sizes.active * self.sizes.itemsize

    def wire(self) -> dict[str, int]:
        """Bytes one rank sends per optimizer step, by purpose and collective, without scalars and routing counts."""
        if self.gpus == 1:
            return {}
        micro_steps, gpus, trained = self.work.accumulation, self.gpus, self.sizes.shared + self.sizes.expert
        size, sent = self.sizes.trained_itemsize, Counter[str]()
        part = sum(count * kept.part(self.shards) for kept, count in self.used.items())
        sent["backbone all_gather"] = micro_steps * all_gather_bytes(part, self.shards)
        if self.settings.stage == 3:
            sent["adapters all_gather"] = micro_steps * all_gather_bytes(2 * size * trained // gpus, gpus)
            sent["gradients reduce_scatter"] = micro_steps * all_gather_bytes(size * trained // gpus, gpus)
            return {name: count for name, count in sent.items() if count}
        shared, expert, copies = self.sizes.shared, self.sizes.expert // self.ep_size, gpus // self.ep_size
        reduces = micro_steps if self.settings.stage == 2 else 1
        sent["gradients all_reduce"] = reduces * (
            all_reduce_bytes(size * shared, gpus) + all_reduce_bytes(size * expert, copies)
        )
        sent["adapters all_gather"] = all_gather_bytes(size * -(-shared // gpus), gpus) + all_gather_bytes(
            size * -(-expert // copies), copies
        )
        for shape in self.sizes.layers:
            for collective, count in self._layer_wire(shape).items():
                sent[f"experts {collective}"] += micro_steps * count
        return {name: count for name, count in sent.items() if count}

    def links(self) -> dict[str, int]:
        """The bytes of :meth:`wire` for backbone and experts, by link, as a run counts them; ``wire`` has the rest.

        Of the ranks that share experts, as many as possible are counted in other shard groups.
        """
        sent = self.wire()
        backbone = sent.get("backbone all_gather", 0)
        experts = sum(count for name, count in sent.items() if name.startswith("experts"))
        outside = self.ep_size - gcd(self.ep_size, self.shards)
        between = experts * outside // (self.ep_size - 1) if outside else 0
        return {"inside_shard_group": backbone + experts - between, "between_shard_groups": between}

    def _layer_wire(self, shape: ExpertShapes) -> dict[str, int]:
        dispatch = self.dispatch
        if dispatch == "local":
            return {}
        if dispatch.startswith("auto"):
            dispatch = self._cheaper(shape)
        if dispatch == "gather_experts":
            return gather_experts_bytes(shape, self._payload)
        pairs = balanced_pairs(self.work.tokens, self.sizes.active, self.ep_size)
        return all_to_all_bytes(shape, self._payload, pairs, pairs)

    def seconds(self, hardware: Hardware) -> dict[str, float]:
        """Of one step: compute, unpacking quantised weights, and each kind of bytes on the wire; nothing overlaps."""
        passes = 3 if self.config.model.gradient_checkpointing else 2  # forward, gradient of the input, recomputation
        frozen = passes * (2 * self.sizes.multiplied + self.sizes.attention * self.work.length)
        # Every expert's product is computed, forward and twice backward.
        adapters = 3 * 2 * self.sizes.trained_multiplied
        flops = self.work.tokens * self.work.accumulation * (frozen + adapters)
        seconds = {"compute": flops / (hardware.flops * hardware.efficiency)}
        # Packed numbers are read and unpacked ones are written; reading these again is part of the product.
        unpacked = sum(count * (kept.bytes + kept.unpacked) for kept, count in self.used.items() if kept.unpacked)
        if unpacked:
            speed = hardware.memory_bandwidth * hardware.efficiency
            seconds["unpacking"] = self.work.accumulation * unpacked / speed
        ranks = {"backbone": self.shards, "experts": self.ep_size}
        for name, count in self.wire().items():
            seconds[name] = count / hardware.bandwidth(ranks.get(name.split()[0], self.gpus))
        return seconds


def overlapped(seconds: dict[str, float]) -> float:
    """Seconds of a step of which all gathering of the backbone takes place while layers compute."""
    compute = seconds["compute"] + seconds.get("unpacking", 0.0)
    backbone = seconds.get("backbone all_gather", 0.0)
    return sum(seconds.values()) - min(compute, backbone)


@cache
def smallest_group(machines: tuple[int, ...], size: ShardGroupSize) -> int:
    """Ranks in the smallest of the shard groups of this size."""
    return min(map(len, divide_ranks(machines, size)))
