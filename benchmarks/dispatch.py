"""Moving tokens, moving experts, or the cheaper: seconds and bytes; and what sharding the backbone costs per step.

    torchrun --nproc_per_node 4 benchmarks/dispatch.py --ep 2 4

All variants of a case take turns within one run, so that a drifting machine hurts them alike. A round's time is that of
the slowest rank. Medians are printed, and ratios to the fastest fixed kind of the case. Bytes are what one rank sends
to others in one step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoConfig

from cuma_ds.adapters import CumaConfig
from cuma_ds.adapters.experts import Experts
from cuma_ds.adapters.mixture import Routes
from cuma_ds.config import RunConfig
from cuma_ds.data.batch import EncodedExample, collate
from cuma_ds.methods.cuma import CumaMethod
from cuma_ds.ops import demographic_gate
from cuma_ds.parallel.deepspeed_compat import is_partitioned
from cuma_ds.parallel.dispatch import DispatchKind, ExpertGroup, ExpertParallelDispatcher, make_dispatcher
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import Topology, leave_processes, start_processes, with_expert_groups
from cuma_ds.profiles import ProfileTable

KINDS: tuple[DispatchKind, ...] = ("all_to_all", "gather_experts", "auto")
# name: tokens per rank, features in and out, experts, active, rank, shared A
LAYERS = {
    "few tokens, many experts": (8, 256, 64, 2, 16, False),
    "as many rows as weights": (256, 256, 64, 2, 8, False),
    "a small batch": (512, 576, 8, 2, 8, False),
    "a small batch, shared A": (512, 576, 8, 2, 8, True),
    "a large batch": (4096, 1024, 8, 2, 8, False),
}
Step = Callable[[], None]


def layer_steps(case: str, topology: Topology) -> dict[str, tuple[Step, ExpertParallelDispatcher]]:
    """Forward and backward of one adapted linear's experts, by kind of dispatch."""
    tokens, width, experts, top_k, lora_r, shared_a = LAYERS[case]
    config = CumaConfig(num_experts=experts, top_k=top_k, lora_r=lora_r, shared_a=shared_a)
    layer = Experts(config, width, width)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    layer.keep(*topology.experts(experts))
    torch.manual_seed(topology.rank)
    x_TD = torch.randn(tokens, width, requires_grad=True)
    gate = demographic_gate(
        torch.randn(tokens, experts), None, torch.zeros(tokens, dtype=torch.long), top_k, "topk_softmax"
    )
    assert topology.ep_group is not None
    steps: dict[str, tuple[Step, ExpertParallelDispatcher]] = {}
    for kind in KINDS:
        dispatcher = make_dispatcher(kind, ExpertGroup(topology.ep_group), top_k)

        def step(dispatcher: ExpertParallelDispatcher = dispatcher) -> None:
            dispatcher.agree_on_tokens(torch.tensor(float(tokens)))
            sent = dispatcher.dispatch(x_TD, Routes(gate.weight_TK, gate.expert_TK), layer)
            dispatcher.combine(layer(*sent.wait()), sent).sum().backward()

        steps[kind] = (step, dispatcher)
    return steps


def model_step(arguments: argparse.Namespace, topology: Topology, deepspeed_config: str) -> tuple[Step, AdapterEngine]:
    """Forward, backward and optimizer step of a real model."""
    config = RunConfig.model_validate(
        {
            "model": {
                "path": arguments.model,
                "dtype": arguments.dtype,
                "quantisation": getattr(arguments, "quantisation", "none"),
            },
            "profiles": {"encoder": "not-read-here"},
            "parallel": {"deepspeed_config": deepspeed_config, "ep_size": topology.ep_size},
        }
    )
    settings = read_deepspeed_config(config, 1, 1, topology.world)
    config = config.model_copy(update={"adapters": config.adapters.model_copy(update={"profile_dim": 8})})
    engine = AdapterEngine(config, settings, topology, torch.optim.AdamW)
    torch.manual_seed(topology.rank)
    engine.model.prepare(torch.randn(9, 8), None)
    vocabulary = AutoConfig.from_pretrained(arguments.model).vocab_size
    ids_BS, last = torch.randint(0, vocabulary, (arguments.batch, arguments.length)).tolist(), [arguments.length - 1]
    examples = [EncodedExample(ids, last, [0], [1.0], row) for row, ids in enumerate(ids_BS)]
    batch = collate(examples, 0).to(topology.device)
    table = ProfileTable([""] * arguments.batch, torch.randn(arguments.batch, 8))

    def step() -> None:
        out = engine.forward(batch, table)
        assert out.balance_loss is not None
        engine.backward(out.logits.float().logsumexp(-1).mean() + 0.01 * out.balance_loss)
        engine.step(1e-4)

    return step, engine


def dispatch_turns(step: Step, engine: AdapterEngine) -> tuple[dict[str, Step], Counter[str]]:
    """The step by kind of dispatch, and a count of the bytes each sends."""
    dispatcher, model, sent = engine.dispatcher, engine.model, Counter[str]()
    assert dispatcher is not None
    assert isinstance(model, CumaMethod)
    dispatchers = {kind: make_dispatcher(kind, dispatcher.ranks, model.cuma.config.top_k) for kind in KINDS}

    def run(kind: DispatchKind) -> None:
        engine.dispatcher = dispatchers[kind]
        for _, layer in model.cuma.adapted_layers():
            layer.dispatcher = dispatchers[kind]
        step()
        sent[kind] += sum(dispatcher.take_bytes_sent().values())

    return {kind: partial(run, kind) for kind in KINDS}, sent


def with_linear(step: Step, engine: AdapterEngine, plain: Callable[..., torch.Tensor]) -> Step:
    """The step with the ``F.linear`` of a run of its own. DeepSpeed replaces it for good once anything is sharded."""
    linear = F.linear if any(map(is_partitioned, engine.model.backbone.parameters())) else plain

    def run() -> None:
        F.linear, before = linear, F.linear
        step()
        F.linear = before

    return run


def take_turns(steps: dict[str, Step], rounds: int, topology: Topology) -> dict[str, list[float]]:
    """Seconds of each round on the slowest rank, after two rounds for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            if topology.device.type == "cuda":
                torch.cuda.synchronize()
            slowest = torch.tensor([time.perf_counter() - start], device=topology.device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if number >= 2:
                seconds[name].append(float(slowest))
    return seconds


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ep", type=int, nargs="+", default=[2, 4], help="expert-parallel sizes that divide the number of ranks"
    )
    parser.add_argument(
        "--parts", nargs="+", default=["layers", "model", "sharding"], choices=["layers", "model", "sharding"]
    )
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct", help="backbone folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=2, help="sequences per rank")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, after two for warming up")
    arguments = parser.parse_args()
    alone = start_processes(600)
    threads = torch.get_num_threads()
    table = Table(
        title=f"{alone.world} ranks, {alone.device.type}, {threads} threads each, median of {arguments.rounds} rounds"
    )
    for heading in ("case", "ep", "variant", "ms", "ratio", "MB sent"):
        table.add_column(heading, justify="left" if heading in ("case", "variant") else "right")

    def add(case: str, ep: int, seconds: dict[str, list[float]], fixed: Sequence[str], sent: dict[str, int]) -> None:
        base = min(statistics.median(seconds[name]) for name in fixed)
        for name, times in seconds.items():
            median = statistics.median(times)
            moved = f"{sent[name] / 1e6:.3f}" if name in sent else ""
            table.add_row(case, str(ep), name, f"{1e3 * median:.1f}", f"{median / base:.2f}", moved)

    for ep in arguments.ep if "layers" in arguments.parts else ():
        topology = with_expert_groups(alone, ep)
        for case in LAYERS:
            layers = layer_steps(case, topology)
            seconds = take_turns({kind: step for kind, (step, _) in layers.items()}, arguments.rounds, topology)
            sent = {
                kind: sum(d.take_bytes_sent().values()) // (arguments.rounds + 2) for kind, (_, d) in layers.items()
            }
            add(case, ep, seconds, KINDS[:2], sent)
    for ep in arguments.ep if "model" in arguments.parts else ():
        step, engine = model_step(arguments, with_expert_groups(alone, ep), "zero2")
        steps, sent = dispatch_turns(step, engine)
        seconds = take_turns(steps, arguments.rounds, alone)
        moved = {kind: count // (arguments.rounds + 2) for kind, count in sent.items()}
        add(f"model, {arguments.batch * arguments.length} tokens a rank", ep, seconds, KINDS[:2], moved)
        del step, engine, steps
    if "sharding" in arguments.parts:
        topology = with_expert_groups(alone, 1)
        names = {
            "backbone whole": "zero2",
            "backbone sharded": "zero2_sharded_backbone",
            "sharded, prefetched": "zero2_sharded_overlap",
        }
        plain_linear = F.linear
        steps = {
            name: with_linear(*model_step(arguments, topology, file), plain_linear) for name, file in names.items()
        }
        seconds = take_turns(steps, arguments.rounds, topology)
        add(f"model, {arguments.batch * arguments.length} tokens a rank", 1, seconds, ("backbone whole",), {})
    leave_processes()
    if alone.is_main:
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
