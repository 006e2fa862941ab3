"""Place a model over ranks, and give what trains of it to one DeepSpeed engine beside the frozen backbone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from cuma_ds.config import RunConfig, TrainingSection
from cuma_ds.data.batch import Batch
from cuma_ds.methods import METHODS
from cuma_ds.methods.model import AdaptedModel, Output, Spread, Trained
from cuma_ds.parallel import deepspeed_compat as compat
from cuma_ds.parallel.backbone import PlacedBackbone, known_as_sharded, place_backbone
from cuma_ds.parallel.dispatch import ExpertGroup, ExpertParallelDispatcher, make_dispatcher
from cuma_ds.parallel.ds_config import DeepSpeedSettings
from cuma_ds.parallel.quantised import QuantisedLinear
from cuma_ds.parallel.topology import Topology
from cuma_ds.profiles import ProfileTable
from cuma_ds.telemetry.screen import libraries_are_heard

ParamGroups = list[dict[str, Any]]
# Key of an optimizer's group: what the learning rate of its parameters is multiplied by.
RATE_FACTOR = "rate_factor"


class Placed(NamedTuple):
    """A model on its ranks.

    model: holds this rank's experts.  dispatcher: byte counters of expert parallelism; None with ``ep_size`` 1.
    base: the backbone below it.
    """

    model: AdaptedModel
    dispatcher: ExpertParallelDispatcher | None
    base: PlacedBackbone


def place_model(config: RunConfig, settings: DeepSpeedSettings, topology: Topology) -> Placed:
    """Load a backbone whole or sharded, put the recipe's method into it, keep this rank's experts. All ranks call it.

    Args:
        config: the recipe, with ``adapters.profile_dim`` set.
        settings: says whether the backbone is sharded.
        topology: with expert-parallel groups.
    """
    base = place_backbone(config.model, settings, topology.device)
    sharded = base.shards is not None
    with known_as_sharded(config.model) if sharded else contextlib.nullcontext():
        model = METHODS[config.adapters.method](base.backbone, config).to(topology.device)
    if config.model.gradient_checkpointing:
        model.recompute_activations()
    dispatcher = _dispatcher(config, topology)
    sum_over_ranks = topology.sum_over_ranks if topology.world > 1 else None
    model.place(Spread(topology.experts, dispatcher, sum_over_ranks, compat.gathered if sharded else None))
    return Placed(model, dispatcher, base)


def _dispatcher(config: RunConfig, topology: Topology) -> ExpertParallelDispatcher | None:
    if topology.ep_size == 1 or topology.ep_group is None:
        return None
    forwards = 2 if config.model.gradient_checkpointing else 1
    ranks = ExpertGroup(topology.ep_group, config.parallel.overlap_dispatch)
    return make_dispatcher(config.parallel.dispatch, ranks, config.adapters.active_experts, forwards)


def router_group(training: TrainingSection) -> dict[str, float] | None:
    """The options of the optimizer's group of routers; None where routers train like everything else."""
    rate, decay = training.router_learning_rate, training.router_weight_decay
    if rate is None and decay is None:
        return None
    return {
        RATE_FACTOR: 1.0 if rate is None else rate / training.learning_rate,
        "weight_decay": training.weight_decay if decay is None else decay,
    }


class AdapterEngine:
    """A placed model and the DeepSpeed engine that trains it.

    The engine at ZeRO stage 1 or 2 is given what trains alone: it never casts, broadcasts, reduces or saves the
    backbone. At stage 3 (the baseline) it is given everything.

    Args:
        config: the recipe, with ``adapters.profile_dim`` set.
        settings: of DeepSpeed.
        topology: with expert-parallel groups.
        make_optimizer: makes the optimizer of parameter groups.

    Attributes:
        model: the placed model, to call for evaluation.
        trained: its parameters that train.
        engine: DeepSpeed's engine.
        topology: this rank's place.
        dispatcher: byte counters of expert parallelism, or None with ``ep_size`` 1.
        loss_scaler: DeepSpeed's, for a float16 backbone at stages 1 and 2; else None.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: DeepSpeedSettings,
        topology: Topology,
        make_optimizer: Callable[[ParamGroups], torch.optim.Optimizer],
    ) -> None:
        if not libraries_are_heard():
            compat.only_errors()
        self.topology = topology
        self.stage = settings.stage
        self.model, self.dispatcher, self._base = place_model(config, settings, topology)
        self._hooks = self._base.hooks
        self.trained = list(self.model.trained_parameters())
        self._router_group = router_group(config.training)
        module = self.model if settings.stage == 3 else _TrainedPart(self.model, self.trained, topology.ep_size)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(self._param_groups()),
            config=self._with_fitting_bucket(settings),
            dist_init_required=False,
        )
        options = settings.loss_scale
        self.loss_scaler = None if options is None else compat.scale_losses(self.engine, options)
        self.train()

    def _param_groups(self) -> ParamGroups:
        """Parameters whose gradients all ranks average; and, but at stage 3, experts, averaged where they are held."""
        experts = [one.parameter for one in self.trained if one.placement == "per_expert" and self.stage != 3]
        for parameter in experts:
            compat.mark_expert(parameter, self.topology.ep_size)
        own = self._router_group
        shared = [one for one in self.trained if one.placement == "replicated" or self.stage == 3]
        routers = [one.parameter for one in shared if one.router and own is not None]
        rest = [one.parameter for one in shared if own is None or not one.router]
        groups: ParamGroups = [{"params": rest, "name": "shared"}] if rest else []
        groups += [{"params": routers, "name": "routers", **own}] if routers and own is not None else []
        return [*groups, compat.expert_param_group(experts, self.topology.ep_size)] if experts else groups

    def _with_fitting_bucket(self, settings: DeepSpeedSettings) -> dict[str, Any]:
        """ZeRO-1/2 allocate the whole gradient bucket; adapters seldom fill one of the usual size."""
        zero = settings.engine["zero_optimization"]
        if settings.stage == 3:
            return settings.engine
        trained = sum(one.parameter.numel() for one in self.trained)
        bucket = min(int(zero.get("reduce_bucket_size", trained)), trained)
        return {**settings.engine, "zero_optimization": {**zero, "reduce_bucket_size": bucket}}

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation (dropout, balance loss)."""
        self.engine.train(mode)
        self.model.train(mode)

    def forward(self, batch: Batch, table: ProfileTable | None = None) -> Output:
        """One forward of the model under the engine; see :class:`AdaptedModel`."""
        if self.dispatcher is not None:
            self.dispatcher.agree_on_tokens((batch.profile_BS >= 0).sum().to(self.topology.device))
        return self.engine(batch, table)

    def forward_alone(self, batch: Batch, table: ProfileTable | None = None) -> Output:
        """The same without DeepSpeed's engine, which need not hear of what is not learned from."""
        if self.dispatcher is not None:
            self.dispatcher.agree_on_tokens((batch.profile_BS >= 0).sum().to(self.topology.device))
        return self.model(batch, table)

    @property
    def shards_backbone(self) -> bool:
        """Whether each rank keeps a part of the backbone alone."""
        return self._hooks is not None or self.stage == 3

    @property
    def shards(self) -> int:
        """Ranks that hold one copy of the backbone between them."""
        return 1 if self._base.shards is None else len(self._base.shards.ranks)

    def gathered_backbone(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the whole backbone is on every rank, gathered once; to generate between two steps.

        A sharded backbone is otherwise gathered for each forward, that is for each token of a rollout. Its shards
        stay, so a rank holds ``full_bytes`` more. They are given back at the end. All ranks enter it together. Of a
        backbone that is not sharded, nothing changes.
        """
        if self.stage == 3:
            return compat.LayerHooks.of_engine(self.engine).gathered()
        return contextlib.nullcontext() if self._hooks is None else self._hooks.gathered()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss`` (DeepSpeed averages over micro steps and ranks)."""
        self.engine.backward(loss)
        self.after_backward()

    def after_backward(self) -> None:
        """Release what a backward pass, also one without the engine, gathered of a sharded backbone."""
        if self._hooks is not None:
            self._hooks.after_backward()

    def take_bytes_sent(self) -> dict[str, int]:
        """Payload bytes this rank sent to others since the last call, without gradients.

        Returns:
            Those of expert parallelism by collective. With a sharded backbone at stages 1 and 2 also those of gathering
            it as ``backbone``, and all of them by link: ``inside_shard_group`` and ``between_shard_groups``.
        """
        sent = {} if self.dispatcher is None else self.dispatcher.take_bytes_sent()
        to_rank = {} if self.dispatcher is None else self.dispatcher.ranks.take_bytes_to()
        meter, shards = self._base.meter, self._base.shards
        if meter is None or shards is None:
            return sent
        backbone = meter.take()
        between = sum(count for rank, count in to_rank.items() if rank not in shards.ranks)
        inside = sum(to_rank.values()) - between + backbone
        return {**sent, "backbone": backbone, "inside_shard_group": inside, "between_shard_groups": between}

    def step(self, learning_rate: float) -> None:
        """Optimizer step at the accumulation boundary, nothing elsewhere."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(RATE_FACTOR, 1.0)
        self.engine.step()

    @property
    def left_update_out(self) -> bool:
        """Whether the last step changed nothing, because its gradients were not finite."""
        return compat.left_update_out(self.engine)

    def trained_state_is_finite(self) -> Tensor:
        """[] bool on the device: whether this rank's part of the trained parameters and of Adam's moments is finite."""
        return compat.state_is_finite(self.engine).to(self.topology.device)

    @property
    def num_experts(self) -> int:
        """Experts over all ranks; 1 for a method without."""
        held = [compat.whole_shape(one.parameter)[0] for one in self.trained if one.placement == "per_expert"]
        return max(held, default=1) * (self.topology.ep_size if held else 1)

    @property
    def trained_parameters(self) -> int:
        """Numbers that train, over all ranks, each expert counted once."""
        copies = {"replicated": 1, "per_expert": self.topology.ep_size}
        return sum(compat.whole_shape(one.parameter).numel() * copies[one.placement] for one in self.trained)

    @property
    def backbone_parameters(self) -> int:
        """Numbers in the backbone without what was added to it, over all ranks; quantised ones as if unpacked."""
        frozen = sum(compat.whole_shape(one).numel() for one in self.model.parameters() if not one.requires_grad)
        for layer in self.model.modules():
            if isinstance(layer, QuantisedLinear):
                packed = (compat.whole_shape(one).numel() for one in (layer.weight, layer.scales))
                frozen += layer.packing.shape.numel() - sum(packed)
        return frozen or self.trained_parameters

    @property
    def expert_bytes(self) -> int:
        """Bytes of expert parameters this rank holds."""
        held = [compat.held(one.parameter) for one in self.trained if one.placement == "per_expert"]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm() or 0.0)


class _TrainedPart(nn.Module):
    """What the engine at stage 1 or 2 is shown: the trained parameters, and a forward that runs the whole model."""

    def __init__(self, model: AdaptedModel, trained: list[Trained], ep_size: int) -> None:
        super().__init__()
        # As a function: the backbone is no part of this module.
        self._run: Callable[[Batch, ProfileTable | None], Output] = model.__call__
        for one in trained:
            self.register_parameter(one.name.replace(".", "/"), one.parameter)
        held = [one.parameter.shape[0] for one in trained if one.placement == "per_expert"]
        if held:
            self.mark = compat.ExpertMark(held[0] * ep_size, ep_size)

    def forward(self, batch: Batch, table: ProfileTable | None) -> Output:
        return self._run(batch, table)
