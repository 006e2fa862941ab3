"""What a run will need on a cluster: memory per GPU, bytes on the wire, tokens per second; from shapes alone, no weights.

Backbone shards, trained state and wire bytes are counted exactly as the engine places and sends them; activations are traced
(cuma_ds.parallel.activations); only time is an estimate, from the FLOP/s and bandwidths the caller assumes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from cuma_ds.adapters import CumaModel
from cuma_ds.config import RunConfig
from cuma_ds.errors import ModelError, TopologyError
from cuma_ds.files import first_line
from cuma_ds.parallel.activations import ActivationPeak, activation_peak, adapted_skeleton
from cuma_ds.parallel.dispatch import expert_shapes
from cuma_ds.parallel.ds_config import DeepSpeedSettings, read_deepspeed_config
from cuma_ds.parallel.wire import (
    ExpertShapes,
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

    memory: bytes.  reserved: bytes of it for the CUDA context, NCCL and fragmentation.  flops: peak FLOP/s in the backbone's dtype.
    efficiency: share of the peak that is reached.  intra_bandwidth, inter_bandwidth: bytes/s to GPUs of the same and of other machines.
    """

    gpus_per_node: int = 8
    memory: float = 80e9
    reserved: float = 2e9
    flops: float = 989e12
    efficiency: float = 0.4
    intra_bandwidth: float = 300e9
    inter_bandwidth: float = 40e9


@dataclass(frozen=True)
class Work:
    """One micro step of one rank.  sequences of ``length`` tokens (padding included), logits at the last ``kept``."""

    sequences: int
    length: int
    kept: int
    accumulation: int = 1


@dataclass(frozen=True)
class Plan:
    """The prediction for one cluster size.

    memory: bytes per GPU by purpose.  host_memory: bytes per rank that offloading puts into CPU memory.  wire: bytes one rank sends
    per optimizer step, by purpose and collective.  dispatch: what ``parallel.dispatch`` comes to.  seconds: of one step, by part.
    max_micro_batch: most sequences of this length per forward that fit; 0 when not even one does.
    """

    gpus: int
    memory: dict[str, int]
    host_memory: dict[str, int]
    wire: dict[str, int]
    dispatch: str
    seconds: dict[str, float]
    tokens_per_second: float
    max_micro_batch: int
    fits: bool
    trained_parameters: int
    backbone_parameters: int
    work: dict[str, int] = field(default_factory=dict)

    @property
    def total_memory(self) -> int:
        """Bytes per GPU at the peak."""
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "total_memory": self.total_memory, "total_wire": sum(self.wire.values())}


class Planner:
    """Predicts runs of one recipe on one backbone shape; shapes are traced once, any number of cluster sizes follow.

    Args:
        config: the recipe; its ``model.path`` is not read.
        model_config: the backbone's configuration.
        profile_dim: P, width of the profile embeddings.

    Raises:
        ModelError: no causal language model has this configuration, or the recipe's targets match nothing.
    """

    def __init__(self, config: RunConfig, model_config: PretrainedConfig, profile_dim: int) -> None:
        self.config = config
        self.model_config = model_config
        width = profile_dim if config.adapters.uses_profiles else 0
        self.adapters = config.adapters.model_copy(update={"profile_dim": width})
        self.dtype = getattr(torch, config.model.dtype)
        self.model = adapted_skeleton(model_config, self.adapters, self.dtype)
        self._peaks: dict[tuple[int, int], ActivationPeak] = {}
        self._gathered = _gathers(
            adapted_skeleton(model_config, self.adapters, self.dtype), config.model.gradient_checkpointing
        )

    def plan(self, gpus: int, work: Work, hardware: Hardware) -> Plan:
        """Memory, bytes and speed on ``gpus`` ranks.

        Raises:
            TopologyError: ``ep_size`` does not divide the number of GPUs.
            ConfigError: the DeepSpeed configuration cannot be read or cannot hold the combination.
        """
        ep_size = self.config.parallel.ep_size
        if gpus < 1 or gpus % ep_size:
            raise TopologyError(
                f"parallel.ep_size is {ep_size}, which does not divide {gpus} GPUs; allowed: multiples of {ep_size}"
            )
        settings = read_deepspeed_config(self.config, work.sequences, work.accumulation, gpus)
        held = self._held(settings, gpus)
        offload = (
            settings.engine.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
        )
        to_host = {
            name for name, moves in (("optimizer", offload), ("backbone", settings.backbone.offload == "cpu")) if moves
        }
        host = {name: held.pop(name) for name in to_host}
        dispatch = self._dispatch(work)
        peak = self._peak(work)
        static = sum(held.values())
        extra = self._dispatch_memory(dispatch, work)
        memory = {**held, "activations": peak.bytes(work.sequences) + extra * work.sequences}
        room = hardware.memory - hardware.reserved - static - peak.fixed
        per_sequence = peak.per_sequence + extra
        most = max(0, int(room // per_sequence)) if per_sequence > 0 else 0
        wire = self.wire(settings, gpus, work, dispatch)
        seconds = self._seconds(wire, gpus, work, hardware)
        tokens = work.sequences * work.length * work.accumulation * gpus
        return Plan(
            gpus=gpus,
            memory=memory,
            host_memory=host,
            wire=wire,
            dispatch=dispatch,
            seconds=seconds,
            tokens_per_second=tokens / sum(seconds.values()),
            max_micro_batch=most,
            fits=sum(memory.values()) + hardware.reserved <= hardware.memory,
            trained_parameters=sum(p.numel() for _, p in self.model.adapter_parameters()),
            backbone_parameters=sum(p.numel() for p in self._backbone()),
            work=asdict(work),
        )

    def _backbone(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if not p.requires_grad]

    def _experts(self) -> list[ExpertShapes]:
        return [expert_shapes(layer.experts) for _, layer in self.model.adapted_layers()]

    def _trained(self) -> tuple[int, int]:
        """Numbers that train on every rank, and those with an expert dimension (all experts)."""
        expert = sum(
            p.numel() for _, layer in self.model.adapted_layers() for p in layer.experts.sharded_parameters().values()
        )
        return sum(p.numel() for _, p in self.model.adapter_parameters()) - expert, expert

    def _held(self, settings: DeepSpeedSettings, gpus: int) -> dict[str, int]:
        """Bytes one rank holds while training, besides activations."""
        sharded = settings.backbone.sharded or settings.stage == 3
        parts = gpus if sharded else 1
        backbone = sum(-(-p.numel() // parts) * p.element_size() for p in self._backbone())
        live = max(_whole_bytes([p], parts) for p in self._backbone()) if sharded and gpus > 1 else 0
        if live and settings.stage != 3:
            early = settings.backbone.prefetch_bucket_size + settings.backbone.max_reuse_distance
            live = min(live + early * self.dtype.itemsize, _whole_bytes(self._backbone(), parts))
        shared, expert = self._trained()
        if settings.stage == 3:
            held = -(-(shared + expert) // gpus)
            local, masters = held, held
        else:
            ep_size = self.config.parallel.ep_size
            local = shared + expert // ep_size
            masters = -(-shared // gpus) + -(-(expert // ep_size) // (gpus // ep_size))
        return {
            "backbone": backbone,
            "live layer": live,
            "adapters": 4 * local,
            "gradients": 4 * (local + self._bucket(settings, local) + masters),
            "optimizer": 12 * masters,
        }

    @staticmethod
    def _bucket(settings: DeepSpeedSettings, local: int) -> int:
        """Numbers in the buffers that gradients are reduced through; never more than what trains."""
        zero = settings.engine["zero_optimization"]
        buffers = 2 if zero.get("overlap_comm") else 1
        return buffers * min(int(zero.get("reduce_bucket_size", local)), local)

    def _peak(self, work: Work) -> ActivationPeak:
        key = (work.length, work.kept)
        if key not in self._peaks:
            checkpointing = self.config.model.gradient_checkpointing
            self._peaks[key] = activation_peak(
                self.model_config, self.adapters, self.dtype, work.length, work.kept, checkpointing
            )
        return self._peaks[key]

    def _active(self) -> int:
        return self.adapters.num_experts if self.adapters.gate_norm == "softmax" else self.adapters.top_k

    def _dispatch(self, work: Work) -> str:
        parallel = self.config.parallel
        if parallel.ep_size == 1 or not self.adapters.has_router:
            return "local"
        if parallel.dispatch != "auto":
            return parallel.dispatch
        forwards = 2 if self.config.model.gradient_checkpointing else 1
        choices = {
            cheaper_dispatch(
                shape,
                parallel.ep_size,
                work.sequences * work.length,
                self._active(),
                self.dtype.itemsize,
                forwards=forwards,
            )
            for shape in self._experts()
        }
        return choices.pop() if len(choices) == 1 else "auto (differs by layer)"

    def _dispatch_memory(self, dispatch: str, work: Work) -> int:
        """Bytes per sequence that moving tokens keeps for the backward pass: what was sent, arrived, answered and returned."""
        if dispatch != "all_to_all":
            return 0
        numbers = sum(2 * shape.sent_per_pair + 3 * shape.out_features for shape in self._experts())
        return numbers * work.length * self._active() * self.dtype.itemsize

    def wire(self, settings: DeepSpeedSettings, gpus: int, work: Work, dispatch: str) -> dict[str, int]:
        """Bytes one rank sends per optimizer step, by purpose and collective; scalars and routing counters are left out."""
        micro_steps, ep_size = work.accumulation, self.config.parallel.ep_size
        shared, expert = self._trained()
        sent: dict[str, int] = {}
        if gpus == 1:
            return sent
        if settings.backbone.sharded or settings.stage == 3:
            sent["backbone all_gather"] = micro_steps * all_gather_bytes(
                _whole_bytes(self._gathered, gpus) // gpus, gpus
            )
        if settings.stage == 3:
            sent["adapters all_gather"] = micro_steps * all_gather_bytes(2 * 4 * (shared + expert) // gpus, gpus)
            sent["gradients reduce_scatter"] = micro_steps * all_gather_bytes(4 * (shared + expert) // gpus, gpus)
            return sent
        copies = gpus // ep_size
        reduces = micro_steps if settings.stage == 2 else 1
        sent["gradients all_reduce"] = reduces * (
            all_reduce_bytes(4 * shared, gpus) + all_reduce_bytes(4 * (expert // ep_size), copies)
        )
        sent["adapters all_gather"] = all_gather_bytes(4 * -(-shared // gpus), gpus) + all_gather_bytes(
            4 * -(-(expert // ep_size) // copies), copies
        )
        for shape in self._experts():
            for collective, count in self._layer_bytes(shape, work, dispatch).items():
                sent[f"experts {collective}"] = sent.get(f"experts {collective}", 0) + micro_steps * count
        return {name: count for name, count in sent.items() if count}

    def _layer_bytes(self, shape: ExpertShapes, work: Work, dispatch: str) -> dict[str, int]:
        ep_size = self.config.parallel.ep_size
        if dispatch == "local":
            return {}
        forwards = 2 if self.config.model.gradient_checkpointing else 1
        tokens = work.sequences * work.length
        if dispatch.startswith("auto"):
            dispatch = cheaper_dispatch(shape, ep_size, tokens, self._active(), self.dtype.itemsize, forwards=forwards)
        if dispatch == "gather_experts":
            return gather_experts_bytes(shape, ep_size, self.dtype.itemsize, forwards=forwards)
        pairs = balanced_pairs(tokens, self._active(), ep_size)
        return all_to_all_bytes(shape, ep_size, self.dtype.itemsize, pairs, pairs, forwards=forwards)

    def _seconds(self, wire: dict[str, int], gpus: int, work: Work, hardware: Hardware) -> dict[str, float]:
        """Compute and wire time of one step; nothing overlaps, which is what the default configuration promises."""
        tokens = work.sequences * work.length * work.accumulation
        matmul = sum(p.numel() for p in self._backbone() if p.dim() >= 2) - self._embedding_numbers()
        passes = 3 if self.config.model.gradient_checkpointing else 2  # forward, gradient of the input, recomputation
        layers, width = (
            self.model_config.get_text_config().num_hidden_layers,
            self.model_config.get_text_config().hidden_size,
        )
        attention = 2 * layers * width * work.length  # causal: half of 4 S D per token
        shared, expert = self._trained()
        adapters = shared + expert  # masked-dense: every expert's product is computed, forward and twice backward
        flops = tokens * (passes * (2 * matmul + attention) + 3 * 2 * adapters)
        within = min(gpus, hardware.gpus_per_node)

        def bandwidth(ranks: int) -> float:
            return hardware.intra_bandwidth if ranks <= within else hardware.inter_bandwidth

        ep_size = self.config.parallel.ep_size
        moved = {
            name: count / bandwidth(ep_size if name.startswith("experts") else gpus) for name, count in wire.items()
        }
        return {"compute": flops / (hardware.flops * hardware.efficiency), **moved}

    def _embedding_numbers(self) -> int:
        """Numbers of an input embedding that is looked up, not multiplied (a tied one is multiplied as the head)."""
        base: Any = self.model.base_model
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        return 0 if head is not None and head.weight is embedding.weight else embedding.weight.numel()


def read_model_config(path: str | Path) -> PretrainedConfig:
    """A ``config.json`` (or the folder it is in) as transformers reads it.

    Raises:
        ModelError: it is missing, broken, or of a kind transformers does not know.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError):
        raise ModelError(f"cannot read the model configuration {path}") from None
    kind = values.pop("model_type", None) if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise ModelError(
            f"{path}: a model configuration is a JSON object with a model_type, as in a Hugging Face model's config.json"
        )
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from None


def _gathers(model: CumaModel, checkpointing: bool) -> list[nn.Parameter]:
    """Frozen parameters in the order in which one micro step gathers them when they are sharded, each as often as it is gathered.

    The rules are those of ZeRO-3 with nothing kept for reuse: gathered before a module's forward and backward, released after. They
    are played on a run without storage, because recomputation stops early and layers below the first trained one have no backward.
    """
    gathered: list[nn.Parameter] = []
    live: set[nn.Parameter] = set()
    in_backward: list[nn.Parameter] = []

    def need(own: list[nn.Parameter]) -> None:
        gathered.extend(parameter for parameter in own if parameter not in live)
        live.update(own)

    def watch(module: nn.Module, own: list[nn.Parameter]) -> None:
        def before_backward(_: Tensor) -> None:
            live.difference_update(in_backward)
            need(own)
            in_backward[:] = own

        def after_forward(_: nn.Module, __: Any, out: Any) -> None:
            live.difference_update(own)
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(before_backward)

        module.register_forward_pre_hook(lambda *_: need(own))
        module.register_forward_hook(after_forward)

    for module in model.modules():
        if own := [p for p in module.parameters(recurse=False) if not p.requires_grad]:
            watch(module, own)
    if checkpointing:
        model.enable_gradient_checkpointing()
    width = model.config.profile_dim
    profiles_NP = torch.zeros(1, width, device="meta") if width else None
    out = model.train()(
        input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), profile_embeddings=profiles_NP, use_cache=False
    )
    out.logits.sum().backward()
    return gathered


def _whole_bytes(parameters: Iterable[nn.Parameter], parts: int) -> int:
    """Bytes of parameters that were gathered from ``parts`` shards of equal (padded) size."""
    return sum(-(-p.numel() // parts) * parts * p.element_size() for p in parameters)
