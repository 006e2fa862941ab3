"""Every name of DeepSpeed that it may change without notice. Read in DeepSpeed 0.19.8, which setup.py asks for.

Each says what it relies on. tests/test_compat.py checks that, so that another release fails there with the reason, and
not with a wrong gradient.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler, LossScalerBase
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    groups,
    lazy_init_hp_params_optimizer_state,
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from cuma_ds.torch_compat import without_hooks

if TYPE_CHECKING:
    from cuma_ds.parallel.ds_config import FrozenBackbone, LossScale

MOMENTS = ("exp_avg", "exp_avg_sq")

_torch_linear = nn.functional.linear  # before ``deepspeed.zero.Init`` puts another in its place


def only_errors() -> None:
    """Let DeepSpeed print errors alone."""
    # Relies on ``deepspeed.utils.logger`` being the logger of the whole library.
    logger.setLevel(logging.ERROR)


def without_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling ``deepspeed_shm_comm`` at every start on a CPU, which may hang."""
    # Relies on ``deepspeed.ops.__compatible_ops__`` being asked first. Only DeepSpeed's inference uses the op.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def expert_group(ep_size: int) -> dist.ProcessGroup:
    """This rank's expert-parallel group of ``ep_size`` consecutive ranks; the first call makes the groups."""
    # Relies on ``_create_expert_and_data_parallel`` making groups of consecutive ranks by the name ``ep_size_N``.
    name = _group_name(ep_size)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    return groups._get_expert_parallel_group(name)


def mark_expert(parameter: nn.Parameter, ep_size: int) -> None:
    """Have a parameter's gradient averaged over the ranks that hold the same experts, not over all ranks."""
    # Relies on the attributes ``allreduce`` and ``group_name``, and on an ExpertMark in the engine's module.
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = _group_name(ep_size)  # type: ignore[attr-defined]


def expert_param_group(parameters: list[nn.Parameter], ep_size: int) -> dict[str, object]:
    """The optimizer's group of marked parameters."""
    # Relies on ZeRO reading the group's keys ``moe`` and ``name``.
    return {"params": parameters, "name": _group_name(ep_size), "moe": True}


class ExpertMark(MoE):
    """An empty module that tells the engine that some of its parameters are experts."""

    # Relies on the engine looking for instances of ``MoE`` and reading ``num_experts`` of each, and nothing else at
    # stages 1 and 2.

    def __init__(self, num_experts: int, ep_size: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.ep_size = ep_size

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing: :func:`expert_group` made the groups."""


class LayerHooks:
    """The hooks that ZeRO-3 gives to a partitioned model: a layer is whole only while it runs.

    Args:
        offload: of the model.
    """

    def __init__(self, offload: DeepSpeedZeRoOffload) -> None:
        self._offload = offload
        _keep_little_for_backward()

    @classmethod
    def of_engine(cls, engine: DeepSpeedEngine) -> LayerHooks:
        """Those of a whole model that an engine at stage 3 trains."""
        # Relies on the stage-3 optimizer's ``parameter_offload``.
        return cls(engine.optimizer.parameter_offload)

    def after_backward(self) -> None:
        """Release layers whose own backward hook did not run, as none does below the first trained layer."""
        # Relies on ``release_backward_leftovers``.
        self._offload.release_backward_leftovers()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every parameter of the model is whole on each rank, and layers run without collectives.

        All ranks enter it together. What is written to a parameter inside is lost.
        """
        # Relies on ``ds_inflight_param_registry`` naming what is gathered early; on ``partition`` and
        # ``GatheredParameters``; and on ``forward_hooks``, ``backward_hooks`` and ``fwd_pre_hook`` being all hooks, of
        # which those of the forward release a layer. They are put back as they were, so that ZeRO-3 keeps the order of
        # modules it has learned.
        offload = self._offload
        whole = [parameter for parameter in offload.module.parameters() if is_partitioned(parameter)]
        early = offload.module.ds_inflight_param_registry
        for handle in early.values():
            handle.wait()
        early.clear()
        whole[0].partition(whole)  # type: ignore[attr-defined]
        hooks = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
        with deepspeed.zero.GatheredParameters(whole), without_hooks(hooks):
            yield


def _keep_little_for_backward() -> None:
    """Let linears with a partitioned frozen weight keep neither that weight whole nor their input until the backward.

    Only the gradient of a weight needs the input. Linears that train are computed as ZeRO-3 would.
    """
    # Relies on ``deepspeed.zero.Init`` having put a function of its own in the place of ``torch.nn.functional.linear``,
    # for good, which keeps the input, too.
    theirs = nn.functional.linear
    if isinstance(theirs, _Linear):
        return
    nn.functional.linear = _Linear(theirs)


class _Linear:
    """``torch.nn.functional.linear``; ``other`` is called for partitioned weights that train."""

    def __init__(self, other: Callable[..., Tensor]) -> None:
        self._other = other

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not is_partitioned(weight):
            return _torch_linear(input, weight, bias)
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        return (self._other if trains else _FrozenProduct.apply)(input, weight, bias)


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b of frozen parameters, which are saved themselves: ZeRO-3 has them whole again in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _torch_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] @ weight.to(grads[0].dtype), None, None  # another dtype under autocast


class GatherMeter:
    """Counts the bytes this rank sends to the others of its shard group while parameters are gathered.

    Args:
        parameters: those that are not partitioned are left out.
    """

    # Relies on parameters being gathered through the attributes ``all_gather`` and ``all_gather_coalesced`` of one of
    # them alone, which do nothing for parameters that are there already; and on the attributes ``ds_status`` and
    # ``ds_zero_partition_world_size``.

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._sent = 0
        for parameter in filter(is_partitioned, parameters):
            self._count(parameter, "all_gather")
            self._count(parameter, "all_gather_coalesced")

    def take(self) -> int:
        """Bytes sent since the last call."""
        sent, self._sent = self._sent, 0
        return sent

    def _count(self, parameter: nn.Parameter, method: str) -> None:
        gather = getattr(parameter, method)

        def counting(parameters: Iterable[nn.Parameter] | None = None, *rest: object, **options: object) -> object:
            given = options.pop("param_list", parameters)
            gathered = [parameter] if given is None else list(given)  # type: ignore[call-overload]
            self._sent += sum(map(_sent_to_gather, gathered))
            return gather(gathered, *rest, **options)

        setattr(parameter, method, counting)


def _sent_to_gather(parameter: nn.Parameter) -> int:
    """Bytes this rank sends so that every rank of the group has a parameter, 0 where it has it already."""
    if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:  # type: ignore[attr-defined]
        return 0
    part = held(parameter)
    others = parameter.ds_zero_partition_world_size - 1  # type: ignore[attr-defined]
    return part.numel() * part.element_size() * others


def partition_frozen(model: nn.Module, config: dict[str, object], settings: FrozenBackbone) -> LayerHooks:
    """Give a frozen model the hooks of ZeRO-3 without its optimizer."""
    # Relies on ``DeepSpeedZeRoOffload`` working without an optimizer.
    # It starts a bucket with every module, whatever is on its way already: ``max_live_parameters`` alone bounds it.
    ahead = settings.prefetch_bucket_size + settings.max_reuse_distance
    sizes = (getattr(parameter, "ds_numel", 0) for parameter in model.parameters())
    offload = DeepSpeedZeRoOffload(
        model,
        timers=NoopTimer(),
        ds_config=config,
        overlap_comm=torch.cuda.is_available(),
        param_persistence_threshold=0,
        max_live_parameters=ahead + max(sizes, default=0),
        max_reuse_distance=settings.max_reuse_distance,
        prefetch_bucket_size=settings.prefetch_bucket_size,
    )
    return LayerHooks(offload)


class Partitioner:
    """Makes parameters of which each rank allocates its own part and, for a moment, the whole on its device.

    Args:
        config: DeepSpeed configuration of stage 3.
        group: the ranks that hold a parameter between them; None for all ranks.
    """

    # Relies on ``local_device``, on ``deepspeed.zero.Init`` over a module without parameters converting nothing, on
    # ``_convert_to_deepspeed_param``, and on rank i of n holding elements ``i * size`` to ``(i + 1) * size`` of the
    # flat parameter, zero-padded at the end.

    def __init__(self, config: dict[str, object], group: dist.ProcessGroup | None = None) -> None:
        self._init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, data_parallel_group=group)

    @property
    def device(self) -> torch.device:
        """Where parameters are whole while they are used."""
        return self._init.local_device

    def partitioned(self, like: nn.Parameter) -> nn.Parameter:
        """A partitioned parameter of the shape and dtype of ``like``; :func:`held` is this rank's part to fill."""
        whole = torch.empty(like.shape, dtype=like.dtype, device=self._init.local_device)
        parameter = nn.Parameter(whole, requires_grad=False)
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        return parameter


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned a parameter, which is then empty while its layer does not run."""
    # Relies on the attribute ``ds_tensor``.
    return hasattr(parameter, "ds_tensor")


def whole_parameter(parameter: nn.Parameter) -> contextlib.AbstractContextManager[None]:
    """Inside, a partitioned parameter is whole on each rank that holds a part of it; all of them enter it together."""
    return deepspeed.zero.GatheredParameters([parameter])


def held(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter at rest: its flat part, or all of it where it is not partitioned."""
    # Relies on the attribute ``ds_tensor``.
    return getattr(parameter, "ds_tensor", parameter)


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, partitioned parameters hold a copy of their whole value; all ranks enter it together. Others are left
    alone, and so is what ZeRO-3 knows of all of them: it may be entered while a layer runs.
    """
    # Relies on the layout that :class:`Partitioner` describes, on the attribute ``ds_process_group``, and on a
    # partitioned parameter being empty at rest.
    empty = [(one, one.data) for one in parameters if is_partitioned(one) and one.shape != whole_shape(one)]
    for parameter, data in empty:
        part = held(parameter).data.to(data.device)
        group = parameter.ds_process_group  # type: ignore[attr-defined]
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        shape = whole_shape(parameter)
        parameter.data = torch.cat(parts)[: shape.numel()].view(shape)
    try:
        yield
    finally:
        for parameter, data in empty:
            parameter.data = data


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, partitioned or not."""
    # Relies on the attribute ``ds_shape``.
    return getattr(parameter, "ds_shape", parameter.shape)


def scale_losses(engine: DeepSpeedEngine, options: LossScale) -> LossScalerBase:
    """Scale losses, although the trained parameters are float32: small gradients vanish in a float16 backbone."""
    # Relies on the ZeRO-1/2 optimizer's attribute ``loss_scaler`` being read by ``backward``, ``step`` and the
    # overflow check.
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
    engine.optimizer.loss_scaler = scaler
    return scaler


def optimizer_steps(engine: DeepSpeedEngine) -> int:
    """How often Adam has stepped at ZeRO stage 1 or 2. A step whose gradients overflowed does not count."""
    # Relies on what :func:`create_moments` relies on.
    states = [engine.optimizer.optimizer.state.get(flat) for flat in _flat_parameters(engine)]
    return max((int(state["step"]) for state in states if state), default=0)


def left_update_out(engine: DeepSpeedEngine) -> bool:
    """Whether the last step at any ZeRO stage was left out, because its gradient norm was not finite."""
    # Relies on the ZeRO optimizers' attribute ``overflow``, which all ranks agree on. They leave such a step out also
    # without a loss scale, as the norm is always computed.
    return bool(engine.optimizer.overflow)


def state_is_finite(engine: DeepSpeedEngine) -> Tensor:
    """[] bool: whether this rank's part of the float32 master weights and of Adam's moments is finite."""
    # Relies on what :func:`create_moments` relies on.
    state = engine.optimizer.optimizer.state
    tensors = [
        tensor
        for flat in _flat_parameters(engine)
        for tensor in (flat, *(state.get(flat, {}).get(moment) for moment in MOMENTS))
        if tensor is not None and tensor.numel()
    ]
    # The largest magnitude of a tensor with NaN is NaN.
    largest = [torch.linalg.vector_norm(tensor.detach(), torch.inf) for tensor in tensors]
    return torch.stack(largest).isfinite().all() if largest else torch.tensor(True)


def create_moments(engine: DeepSpeedEngine, step: int) -> None:
    """Give Adam the state that it has after ``step`` steps, with moments of zero."""
    # Relies on the wrapped optimizer stepping on the flat float32 tensors of ``single_partition_of_fp32_groups``
    # (stages 1 and 2) or ``fp32_partitioned_groups_flat`` (stage 3), with its state keyed by them.
    for flat in _flat_parameters(engine):
        engine.optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(step)),  # one tensor each: a shared counter would be advanced several times
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
    link_moments(engine)


def link_moments(engine: DeepSpeedEngine) -> None:
    """Let :func:`whole_value` and :func:`set_whole_value` find the moments of all parameter groups."""
    # Relies on ``bit16_groups`` being the parameters behind ``single_partition_of_fp32_groups``. DeepSpeed itself
    # links the first group alone at stages 1 and 2.
    if engine.zero_optimization_stage() == 3:
        return
    zero = engine.optimizer
    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)


def whole_value(parameter: nn.Parameter, moment: str | None) -> Tensor:
    """The float32 master weight of a parameter (None) or one of its moments, in its whole shape; all ranks call it."""
    # Relies on ``safe_get_full_fp32_param`` and ``safe_get_full_optimizer_state``.
    if moment is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, moment)


def set_whole_value(parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
    """Set one of a parameter's moments, or (None) its master weight and what the forward reads; all ranks call it."""
    # Relies on ``safe_set_full_*`` at stages 1 and 2. At stage 3 those do not expect the padding of the last rank's
    # part, so this relies on ``safe_set_local_*`` and the layout that :class:`Partitioner` describes.
    if is_partitioned(parameter):
        part = held(parameter).data
        padded = nn.functional.pad(value.flatten(), (0, part.numel() * dist.get_world_size() - value.numel()))
        value = padded.narrow(0, part.numel() * dist.get_rank(), part.numel())
        if moment is None:
            part.copy_(value)
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, moment)
    elif moment is None:
        parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _flat_parameters(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's flat part of each parameter group, which the optimizer steps on."""
    zero = engine.optimizer
    stage_3 = engine.zero_optimization_stage() == 3
    return list(zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups)


def _group_name(ep_size: int) -> str:
    return f"ep_size_{ep_size}"
