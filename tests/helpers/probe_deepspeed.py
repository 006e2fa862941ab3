"""One of two ranks that tries what cuma_ds.parallel.deepspeed_compat relies on; rank 0 prints what failed."""

from __future__ import annotations

import importlib
import json
import logging
import traceback

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cuma_ds.parallel import deepspeed_compat as compat
from cuma_ds.parallel.ds_config import FrozenBackbone, LossScale
from cuma_ds.parallel.topology import start_processes

WORLD = 2
STAGE_3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Model(nn.Module):
    """Two parameters that train, one of them marked as an expert of this rank; their sizes are odd."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.arange(5.0))
        self.expert = nn.Parameter(torch.arange(7.0))
        self.mark = compat.ExpertMark(ep_size, ep_size)

    def forward(self, shared: Tensor, expert: Tensor) -> Tensor:
        return (self.shared * shared).sum() + (self.expert * expert).sum()


def engine_of(model: nn.Module, stage: int, groups: list[dict]) -> deepspeed.DeepSpeedEngine:
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    optimizer = torch.optim.AdamW(groups, lr=0.5, betas=(0.0, 0.0), eps=1e-30, weight_decay=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def adapters(stage: int, ep_size: int = 2) -> tuple[Model, deepspeed.DeepSpeedEngine]:
    model = Model(ep_size)
    compat.expert_group(ep_size)
    compat.mark_expert(model.expert, ep_size)
    groups = [{"params": [model.shared], "name": "shared"}, compat.expert_param_group([model.expert], ep_size)]
    return model, engine_of(model, stage, groups)


def expert_group() -> str | None:
    sizes = [dist.get_world_size(compat.expert_group(size)) for size in (1, 2, 2)]
    same = compat.expert_group(2) is compat.expert_group(2)
    return None if sizes == [1, 2, 2] and same else f"expert groups of 1 and 2 ranks have {sizes} ranks"


def gradients(ep_size: int) -> tuple[Tensor, Tensor]:
    """Reduced gradients, as Adam's first moment with beta 0 has them, for gradients of rank + 1."""
    model, engine = adapters(2, ep_size)
    ones = torch.ones(5) * (dist.get_rank() + 1), torch.ones(7) * (dist.get_rank() + 1)
    engine.backward(engine(*ones))
    engine.step()
    compat.link_moments(engine)
    return compat.whole_value(model.shared, "exp_avg"), compat.whole_value(model.expert, "exp_avg")


def mark_expert() -> str | None:
    rank = dist.get_rank()
    shared, expert = gradients(2)
    if not torch.allclose(shared, torch.full((5,), 1.5)):
        return f"the gradient of a parameter on all ranks is {shared.tolist()}, not the mean over ranks, 1.5"
    if not torch.allclose(expert, torch.full((7,), (rank + 1) / WORLD)):
        return f"the gradient of an expert on rank {rank} alone is {expert.tolist()}, not its own divided by the ranks"
    shared, expert = gradients(1)
    if not torch.allclose(expert, torch.full((7,), 1.5)):
        return f"the gradient of an expert that both ranks hold is {expert.tolist()}, not the mean over them, 1.5"
    return None


def expert_param_group() -> str | None:
    _, engine = adapters(2)
    found = engine.optimizer.is_moe_param_group
    return None if found == [False, True] else f"the optimizer takes the groups shared, experts for experts: {found}"


def expert_mark() -> str | None:
    _, engine = adapters(1)
    return None if engine.has_moe_layers and engine.num_experts == [2] else "the engine no longer looks for MoE modules"


class Adding(nn.Linear):
    """A frozen linear that adds something trained: its output needs a gradient, its input does not."""

    added: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.added


def partition_frozen() -> str | None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(4, 4), Adding(4, 4), nn.Linear(4, 4)).requires_grad_(False))
    whole, model = models
    hooks = compat.partition_frozen(model, STAGE_3, FrozenBackbone(sharded=True))
    x, added = torch.ones(2, 4), torch.zeros(4, requires_grad=True)
    whole[1].added = model[1].added = added
    kept: list[torch.Size] = []

    def note(saved: Tensor) -> Tensor:
        kept.append(saved.shape)
        return saved

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            out = model(x)
        expected = whole(x)
        if x.shape in kept:
            return "a partitioned frozen linear keeps its input for the backward pass"
        if not torch.equal(out, expected):
            return "a partitioned frozen model computes something else than a whole one"
        out.sum().backward()
        hooks.after_backward()
        if any(parameter.numel() for parameter in model.parameters()):
            return "after the backward pass and release_backward_leftovers some layers are still whole"
    if not torch.allclose(added.grad, 2 * 2 * whole[2].weight.sum(dim=0)):
        return "gradients through a partitioned frozen layer are wrong"
    return None


def gathered() -> str | None:
    frozen = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).requires_grad_(False)
    trained = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    hooks_of = {
        frozen: compat.partition_frozen(frozen, STAGE_3, FrozenBackbone(sharded=True, prefetch_bucket_size=100)),
        trained: compat.LayerHooks.of_engine(engine_of(trained, 3, [{"params": list(trained.parameters())}])),
    }
    x = torch.ones(2, 4)
    for model, hooks in hooks_of.items():
        model[0].adapter = nn.Linear(1, 1)  # not partitioned
        expected, order = [model(x).detach() for _ in range(3)][-1], []
        module_hooks = [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in model.modules()]
        model[0].register_forward_hook(lambda *_, order=order: order.append("first"))
        with hooks.gathered():
            for _ in range(2):
                if not torch.equal(model(x), expected):
                    return "a gathered model computes something else than a partitioned one"
            if any(p.shape != compat.whole_shape(p) for p in model.parameters()):
                return "a layer that ran in a gathered model was released"
            if order != ["first"] * 2:
                return "a hook that is not DeepSpeed's did not run in a gathered model"
        if any(parameter.numel() for parameter in model.parameters() if compat.is_partitioned(parameter)):
            return "after gathering some layers are still whole"
        if not torch.equal(model(x), expected):
            return "a model that was gathered computes something else than before"
        found = [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in model.modules()]
        if [len(hooks) for hooks in found] != [len(hooks) + (n == 1) for n, hooks in enumerate(module_hooks)]:
            return "gathering did not put DeepSpeed's hooks back"
    return None


def partitioner() -> str | None:
    like = nn.Parameter(torch.empty(3, 5, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    made = compat.Partitioner(STAGE_3).partitioned(like)
    part, numbers = compat.held(made), torch.arange(16.0)
    if not compat.is_partitioned(made) or made.numel() != 0 or compat.whole_shape(made) != like.shape:
        return "a partitioned parameter has no ds_tensor or ds_shape, or is not empty"
    if part.shape != (8,) or part.dtype != torch.bfloat16:
        return f"half of 15 numbers in bfloat16 is {part.dtype} of shape {tuple(part.shape)}"
    part.copy_(numbers[8 * dist.get_rank() :][:8])
    with deepspeed.zero.GatheredParameters([made]):
        gathered = made.detach().clone()
    expected = numbers[:15].view(3, 5).bfloat16()
    if not torch.equal(gathered, expected):
        return "the parts of a parameter no longer follow each other by rank"
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    own = compat.Partitioner(STAGE_3, alone).partitioned(like)
    if compat.held(own).numel() != like.numel():
        return "a parameter is partitioned over other ranks than those of the group"
    compat.held(own).copy_(numbers[:15] + dist.get_rank())
    with compat.whole_parameter(own):
        right = torch.equal(own.flatten(), (numbers[:15] + dist.get_rank()).bfloat16())
    return None if right else "a parameter of a group is gathered from ranks outside"


def gather_meter() -> str | None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).requires_grad_(False)
    settings = FrozenBackbone(sharded=True, prefetch_bucket_size=100)
    compat.partition_frozen(model, STAGE_3, settings)
    meter = compat.GatherMeter(model.parameters())
    once = sum(compat.held(p).numel() * 4 for p in model.parameters()) * (dist.get_world_size() - 1)
    for _ in range(3):
        model(torch.ones(2, 4))
        if (found := meter.take()) != once:
            return f"a forward is counted to send {found} bytes of {once}"
    with compat.whole_parameter(model[0].weight):
        pass
    expected = compat.held(model[0].weight).numel() * 4 * (dist.get_world_size() - 1)
    return None if meter.take() == expected else "GatheredParameters does not gather as it is counted"


def held() -> str | None:
    plain = nn.Parameter(torch.ones(2, 3))
    right = compat.held(plain) is plain and compat.whole_shape(plain) == (2, 3) and not compat.is_partitioned(plain)
    return None if right else "a parameter that ZeRO-3 does not know looks partitioned"


def scale_losses() -> str | None:
    model, engine = adapters(2)
    scaler = compat.scale_losses(engine, LossScale(loss_scale=8.0))
    seen: list[Tensor] = []
    model.shared.register_hook(lambda gradient: seen.append(gradient.clone()))
    engine.backward(engine(torch.ones(5), torch.ones(7)))
    engine.step()
    compat.link_moments(engine)
    if not torch.equal(seen[0], torch.full((5,), 8.0)):
        return "backward does not multiply the loss by the optimizer's loss_scaler"
    if not torch.allclose(compat.whole_value(model.shared, "exp_avg"), torch.ones(5)):
        return "step does not divide gradients by the optimizer's loss_scaler"
    model, engine = adapters(2)
    scaler = compat.scale_losses(engine, LossScale(initial_scale_power=4, hysteresis=1))
    before = model.shared.detach().clone()
    engine.backward(engine(torch.full((5,), float("inf")), torch.ones(7)))
    engine.step()
    if scaler.loss_scale != 8.0 or compat.optimizer_steps(engine) or not torch.equal(before, model.shared):
        return "an overflow is no longer noticed, or does not halve the factor of the optimizer's loss_scaler"
    for stage in (1, 2):
        model, engine = adapters(stage)
        before = model.shared.detach().clone()
        for size, left_out in ((float("inf"), True), (1.0, False)):
            engine.backward(engine(torch.full((5,), size), torch.ones(7)))
            engine.step()
            if compat.left_update_out(engine) != left_out or torch.equal(before, model.shared) != left_out:
                return f"at ZeRO stage {stage}, a gradient that is not finite no longer leaves the update out"
    return None


def moments() -> str | None:
    for stage in (1, 2, 3):
        if stage == 3:
            model = nn.Linear(3, 5)
            engine = engine_of(model, 3, [{"params": list(model.parameters())}])
        else:
            model, engine = adapters(stage)
        compat.create_moments(engine, 4)
        names = dict(model.named_parameters())
        for number, (name, parameter) in enumerate(names.items()):
            for kind, moment in enumerate((None, *compat.MOMENTS)):
                shape = compat.whole_shape(parameter)
                value = torch.arange(float(shape.numel())).view(shape) + 100 * number + 10 * kind + 1
                compat.set_whole_value(parameter, moment, value)
                if not torch.equal(compat.whole_value(parameter, moment), value):
                    return f"at ZeRO stage {stage}, {moment or 'the weight'} of {name} does not come back as it was set"
            if stage < 3 and not torch.equal(parameter.detach(), compat.whole_value(parameter, None)):
                return f"at ZeRO stage {stage}, the forward does not read the weight that was set"
        if stage < 3 and compat.optimizer_steps(engine) != 4:
            return f"at ZeRO stage {stage}, the wrapped optimizer does not have the state that it was given"
        if stage < 3:
            engine.backward(engine(torch.ones(5), torch.ones(7)))
            engine.step()
            if compat.optimizer_steps(engine) != 5:
                return f"at ZeRO stage {stage}, a step goes on from another state than was created"
        for kind in (None, *compat.MOMENTS):
            if not compat.state_is_finite(engine):
                return f"at ZeRO stage {stage}, finite weights and moments are taken for others"
            parameter = next(iter(names.values()))
            value = torch.zeros(compat.whole_shape(parameter))
            compat.set_whole_value(parameter, kind, value + torch.nan)
            if compat.state_is_finite(engine):
                return f"at ZeRO stage {stage}, {kind or 'the weight'} that is not finite is not found"
            compat.set_whole_value(parameter, kind, value)
    return None


def without_shared_memory_op() -> str | None:
    built = importlib.import_module("deepspeed.comm.torch").build_shm_op()
    return None if built is None else "deepspeed_shm_comm is built although __compatible_ops__ says that it cannot be"


def only_errors() -> str | None:
    compat.only_errors()
    return None if logging.getLogger("DeepSpeed").level == logging.ERROR else "deepspeed.utils.logger is another logger"


CHECKS = (
    only_errors, without_shared_memory_op, expert_group, mark_expert, expert_param_group, expert_mark, partition_frozen,
    gathered, partitioner, gather_meter, held, scale_losses, moments,
)  # fmt: skip

if __name__ == "__main__":
    topology = start_processes(60)
    for check in CHECKS:
        try:
            found = check()
        except Exception:
            found = traceback.format_exc(limit=-2)
        if topology.is_main:
            print("seen " + json.dumps({"name": check.__name__, "changed": found}), flush=True)
    dist.barrier()
