"""One DeepSpeed engine for the adapters, beside a frozen backbone that is whole or sharded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler, LossScalerBase
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.config import RunConfig
from cuma_ds.parallel.backbone import ShardedBackbone, load_backbone, load_sharded, stage3_config
from cuma_ds.parallel.dispatch import ExpertGroup, ExpertParallelDispatcher, make_dispatcher
from cuma_ds.parallel.ds_config import DeepSpeedSettings, LossScale
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
        loss_scaler: DeepSpeed's, for a float16 backbone at stages 1 and 2; else None.
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
            base = load_sharded(config.model, stage3_config(config.model))
        else:
            base = load_backbone(config.model, topology.device)
        self.model = inject_adapters(base, adapters, config.run.seed).to(topology.device)
        self.model.shares_per_forward = False  # the loop moves them once per optimizer step
        if topology.world > 1:
            self.model.sum_over_ranks = topology.sum_over_ranks
        if config.model.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.dispatcher = self._place_experts(config)
        module = self.model if settings.stage == 3 else _TrainedPart(self.model, topology.ep_size)
        self.engine: DeepSpeedEngine
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(self._param_groups()),
            config=self._with_fitting_bucket(settings),
            dist_init_required=False,
        )
        self.loss_scaler = self._scale_losses(settings.loss_scale)
        self.engine.train()

    def _scale_losses(self, options: LossScale | None) -> LossScalerBase | None:
        """Let DeepSpeed scale the loss although the adapters are float32: a float16 backbone loses small gradients on their way."""
        if options is None:
            return None
        scaler: LossScalerBase = LossScaler(options.loss_scale)
        if not options.loss_scale:
            scaler = DynamicLossScaler(
                init_scale=2.0**options.initial_scale_power,
                scale_window=options.loss_scale_window,
                min_scale=options.min_loss_scale,
                delayed_shift=options.hysteresis,
                consecutive_hysteresis=False,
                raise_error_at_min_scale=False,
            )
        self.engine.optimizer.loss_scaler = scaler
        return scaler

    def _place_experts(self, config: RunConfig) -> ExpertParallelDispatcher | None:
        topology = self.topology
        expert_parallel = self.stage != 3
        dispatcher = None
        if topology.ep_size > 1 and topology.ep_group is not None:
            adapters = self.model.config
            active = adapters.num_experts if adapters.gate_norm == "softmax" else adapters.top_k
            forwards = 2 if config.model.gradient_checkpointing else 1
            ranks = ExpertGroup(topology.ep_group, config.parallel.overlap_dispatch)
            dispatcher = make_dispatcher(config.parallel.dispatch, ranks, active, forwards)
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

    def _with_fitting_bucket(self, settings: DeepSpeedSettings) -> dict[str, Any]:
        """ZeRO-1/2 allocate the whole gradient bucket; adapters seldom fill one of the usual size."""
        zero = settings.engine["zero_optimization"]
        if settings.stage == 3:
            return settings.engine
        trained = sum(parameter.numel() for _, parameter in self.model.adapter_parameters())
        bucket = min(int(zero.get("reduce_bucket_size", trained)), trained)
        return {**settings.engine, "zero_optimization": {**zero, "reduce_bucket_size": bucket}}

    def forward(self, **inputs: Any) -> Any:
        """One forward of the adapted model under the engine."""
        if self.dispatcher is not None:
            # Examples that share rows come without a mask: padding is nobody's.
            real = inputs["attention_mask"] > 0 if "attention_mask" in inputs else inputs["profile_index"] >= 0
            self.dispatcher.agree_on_tokens(real.sum())
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
        sharded = {
            id(p) for _, layer in self.model.adapted_layers() for p in layer.experts.sharded_parameters().values()
        }
        return sum(
            getattr(parameter, "ds_numel", parameter.numel())
            * (self.topology.ep_size if id(parameter) in sharded else 1)
            for _, parameter in self.model.adapter_parameters()
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of expert parameters this rank holds."""
        held = [
            getattr(p, "ds_tensor", p)
            for _, layer in self.model.adapted_layers()
            for p in layer.experts.sharded_parameters().values()
        ]
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
            if layer.router is not None:
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
