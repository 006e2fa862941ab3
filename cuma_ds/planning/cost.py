"""What one layout of a model costs: bytes that a rank holds, bytes that it sends, seconds of one optimizer step.

Backbone shards, trained state and sent bytes are counted as the engine places and sends them. Only time is an
estimate, from the FLOP/s and bandwidths that the caller assumes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from cuma_ds.config import RunConfig
from cuma_ds.parallel.ds_config import DeepSpeedSettings
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


@dataclass(frozen=True)
class Sizes:
    """Numbers in the model of one recipe, over all ranks.

    backbone: of each frozen parameter.  gathered: of the frozen parameters that one micro step gathers, in order.
    itemsize: bytes of one of them.  shared, expert: trained on every rank, and trained with an expert dimension.
    layers: experts of each adapted linear.  active: experts that answer for one token.  multiplied: frozen numbers
    that each token is multiplied with.  attention: FLOPs of one token's attention per token of its sequence.
    trained_itemsize, trained_multiplied: as itemsize and multiplied, of what trains.  largest: numbers of the largest
    parameter.
    """

    backbone: tuple[int, ...]
    gathered: tuple[int, ...]
    itemsize: int
    shared: int
    expert: int
    layers: tuple[ExpertShapes, ...]
    active: int
    multiplied: int
    attention: int
    trained_itemsize: int
    trained_multiplied: int
    largest: int


@dataclass(frozen=True)
class Layout:
    """One recipe on so many ranks, with the work of one of them."""

    sizes: Sizes
    config: RunConfig
    settings: DeepSpeedSettings
    gpus: int
    work: Work

    @property
    def ep_size(self) -> int:
        """Ranks that hold one set of experts between them."""
        return self.config.parallel.ep_size

    @property
    def is_sharded(self) -> bool:
        """Whether the backbone is partitioned over all ranks."""
        return self.settings.backbone.sharded or self.settings.stage == 3

    def held(self) -> dict[str, int]:
        """Bytes one rank holds while training, besides activations, by purpose."""
        sizes, parts = self.sizes, self.gpus if self.is_sharded else 1
        backbone = sum(-(-count // parts) for count in sizes.backbone) * sizes.itemsize
        if self.settings.stage == 3:
            local = masters = -(-(sizes.shared + sizes.expert) // self.gpus)
        else:
            local = sizes.shared + sizes.expert // self.ep_size
            copies = self.gpus // self.ep_size
            masters = -(-sizes.shared // self.gpus) + -(-(sizes.expert // self.ep_size) // copies)
        return {
            "backbone": backbone,
            "live layer": self._live(),
            "adapters": sizes.trained_itemsize * local,
            "gradients": sizes.trained_itemsize * (local + self._bucket(local)) + 4 * masters,
            "optimizer": 12 * masters,
        }

    def _live(self) -> int:
        """Bytes of the largest frozen parameter that is whole while it is used, and of what is gathered early."""
        if not self.is_sharded or self.gpus == 1:
            return 0
        sizes, ours = self.sizes, self.settings.backbone
        live = self._whole([sizes.largest])
        if self.settings.stage == 3:
            return live
        early = (ours.prefetch_bucket_size + ours.max_reuse_distance) * sizes.itemsize
        return min(live + early, self._whole(sizes.backbone))

    def _whole(self, counts: Iterable[int]) -> int:
        """Bytes of parameters gathered from shards of equal (padded) size."""
        return sum(-(-count // self.gpus) * self.gpus for count in counts) * self.sizes.itemsize

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
        if self.is_sharded:
            sent["backbone all_gather"] = micro_steps * all_gather_bytes(self._whole(self.sizes.gathered) // gpus, gpus)
        if self.settings.stage == 3:
            sent["adapters all_gather"] = micro_steps * all_gather_bytes(2 * size * trained // gpus, gpus)
            sent["gradients reduce_scatter"] = micro_steps * all_gather_bytes(size * trained // gpus, gpus)
            return dict(sent)
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
        """Compute and wire time of one step. Nothing overlaps, which is what the default configuration promises."""
        passes = 3 if self.config.model.gradient_checkpointing else 2  # forward, gradient of the input, recomputation
        frozen = passes * (2 * self.sizes.multiplied + self.sizes.attention * self.work.length)
        # Every expert's product is computed, forward and twice backward.
        adapters = 3 * 2 * self.sizes.trained_multiplied
        flops = self.work.tokens * self.work.accumulation * (frozen + adapters)
        seconds = {"compute": flops / (hardware.flops * hardware.efficiency)}
        within = min(self.gpus, hardware.gpus_per_node)
        for name, count in self.wire().items():
            ranks = self.ep_size if name.startswith("experts") else self.gpus
            seconds[name] = count / (hardware.intra_bandwidth if ranks <= within else hardware.inter_bandwidth)
        return seconds
