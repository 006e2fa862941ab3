"""One DeepSpeed engine for the adapters, beside a frozen backbone that is whole or sharded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.config import RunConfig
from cuma_ds.parallel.backbone import ShardedBackbone, load_backbone, stage3_config
from cuma_ds.parallel.dispatch import ExpertParallelDispatcher
from cuma_ds.parallel.ds_config import DeepSpeedSettings
from cuma_ds.parallel.topology import Topology

ParamGroups = list[dict[str, Any]]


class AdapterEngine:
    """The model, its DeepSpeed engine, and where everything lives.

    The engine at ZeRO stage 1 or 2 is given the adapters alone: it never casts, broadcasts, reduces or saves the backbone. At
    stage 3 (the baseline) it is given everything.

    Attributes:
        model: the adapted model, to call for losses and evaluation.
        engine: DeepSpeed's engine.
        topology: this rank's place, with expert-parallel groups.
        dispatcher: byte counters of expert parallelism, or None with ``ep_size`` 1.
    """

    def __init__(
        self,
        config: RunConfig,
        adapters: CumaConfig,
        settings: DeepSpeedSettings,
        topology: Topology,
        make_optimizer: Callable[[ParamGroups], torch.optim.Optimizer],
    ) -> None:
        deepspeed_logger.setLevel(logging.ERROR)
        self.topology = topology
        self.stage = settings.stage
        self.sharded: ShardedBackbone | None = None
        if settings.backbone.sharded:
            self.sharded = ShardedBackbone(config.model, settings.backbone)
            base: nn.Module = self.sharded.model
        elif settings.stage == 3:
            base = _partitioned_at_load(config)
        else:
            base = load_backbone(config.model, topology.device)
        self.model = inject_adapters(base, adapters, config.run.seed).to(topology.device)
        if topology.world > 1:
            self.model.sum_over_ranks = topology.sum_over_ranks
        if config.model.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.dispatcher = self._place_experts(config)
        module = self.model if settings.stage == 3 else _TrainedPart(self.model, topology.ep_size)
        self.engine: DeepSpeedEngine
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=make_optimizer(self._param_groups()), config=settings.engine, dist_init_required=False
        )
        self.engine.train()

    def _place_experts(self, config: RunConfig) -> ExpertParallelDispatcher | None:
        topology = self.topology
        expert_parallel = self.stage != 3
        dispatcher = None
        if topology.ep_size > 1 and topology.ep_group is not None:
            dispatcher = ExpertParallelDispatcher(config.parallel.dispatch, topology.ep_group, self.model.config.top_k)
        for _, layer in self.model.adapted_layers():
            if dispatcher is not None:
                layer.experts.keep(*topology.experts(layer.experts.num_experts))
                layer.dispatcher = dispatcher
            if expert_parallel:
                for parameter in layer.experts.sharded_parameters().values():
                    # DeepSpeed's marks of a parameter that is reduced over its expert-data-parallel group.
                    parameter.allreduce = False  # type: ignore[attr-defined]
                    parameter.group_name = topology.ep_group_name  # type: ignore[attr-defined]
        return dispatcher

    def _param_groups(self) -> ParamGroups:
        shared: list[nn.Parameter] = []
        expert: list[nn.Parameter] = []
        for _, parameter in self.model.adapter_parameters():
            (shared if getattr(parameter, "allreduce", True) else expert).append(parameter)
        groups: ParamGroups = []
        if shared:
            groups.append({"params": shared, "name": "shared"})
        if expert:
            groups.append({"params": expert, "name": self.topology.ep_group_name, "moe": True})
        return groups

    def forward(self, **inputs: Any) -> Any:
        """One forward of the adapted model under the engine."""
        if self.dispatcher is not None:
            self.dispatcher.agree_on_tokens(inputs["input_ids"].numel(), self.topology.device)
        return self.engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss`` (DeepSpeed averages over micro steps and ranks)."""
        self.engine.backward(loss)
        if self.sharded is not None:
            self.sharded.after_backward()

    def step(self, learning_rate: float) -> None:
        """Optimizer step at the accumulation boundary, nothing elsewhere."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    @property
    def trained_parameters(self) -> int:
        """Parameters that train, over all ranks, each expert counted once."""
        sharded = {id(p) for _, layer in self.model.adapted_layers() for p in layer.experts.sharded_parameters().values()}
        return sum(
            getattr(parameter, "ds_numel", parameter.numel()) * (self.topology.ep_size if id(parameter) in sharded else 1)
            for _, parameter in self.model.adapter_parameters()
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of expert parameters this rank holds."""
        held = [getattr(p, "ds_tensor", p) for _, layer in self.model.adapted_layers() for p in layer.experts.sharded_parameters().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm() or 0.0)


class _TrainedPart(nn.Module):
    """What the engine at stage 1 or 2 is shown: the adapters, and a forward that runs the whole model."""

    def __init__(self, model: CumaModel, ep_size: int) -> None:
        super().__init__()
        self._model = (model,)  # a tuple keeps the backbone out of this module's parameters
        for index, (_, layer) in enumerate(model.adapted_layers()):
            setattr(self, f"experts_{index}", layer.experts)
            if layer.owns_router:
                setattr(self, f"router_{index}", layer.router)
        self.mark = _ExpertParallelMark(model.config.num_experts, ep_size)

    def forward(self, **inputs: Any) -> Any:
        return self._model[0](**inputs)

    def train(self, mode: bool = True) -> _TrainedPart:
        self._model[0].train(mode)
        return super().train(mode)


class _ExpertParallelMark(MoE):
    """DeepSpeed reduces expert gradients over their own group once it finds a ``MoE`` module; this one is nothing else."""

    def __init__(self, num_experts: int, ep_size: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.ep_size = ep_size

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already."""


def _partitioned_at_load(config: RunConfig) -> nn.Module:
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(stage3_config(config.model))
    try:
        return load_backbone(config.model)
    finally:
        del keep_alive
