"""Plans as tables in the terminal and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from cuma_ds.config import RunConfig
from cuma_ds.planning.cost import Hardware
from cuma_ds.planning.plan import Plan
from cuma_ds.planning.proposal import Choice
from cuma_ds.planning.whole_run import WholeRun

_PARTS = ("backbone", "live layer", "adapters", "gradients", "optimizer", "activations")


def print_plans(plans: Mapping[str, Sequence[Plan]], hardware: Hardware, console: Console | None = None) -> None:
    """One table of memory and speed and one of bytes for each backbone."""
    console = console or Console(width=150, highlight=False)
    for name, rows in plans.items():
        first = rows[0]
        work = first.work
        trained, frozen = first.trained_parameters, first.backbone_parameters
        share = trained / frozen if frozen else 1.0  # full fine-tuning freezes nothing
        sizes = f"{frozen / 1e9:.2f} B frozen, {trained / 1e6:.1f} M trained parameters ({share:.2%})"
        shape = f"{work['sequences']} x {work['length']} tokens per GPU and forward"
        shape = f"{shape}, {work['accumulation']} forward(s) per step"
        console.print(f"\n[bold]{name}[/bold]: {sizes}; {shape}")
        console.print(_memory_table(rows, hardware))
        console.print(_wire_table(rows))
    _print_assumptions(hardware, console)
    console.print("Not overlapped; overlapped s: all of the backbone is gathered while layers compute.")


def _print_assumptions(hardware: Hardware, console: Console) -> None:
    memory = f"{hardware.memory / 1e9:.0f} GB of which {hardware.reserved / 1e9:.1f} GB reserved"
    speed = f"{hardware.flops / 1e12:.0f} TFLOP/s at {hardware.efficiency:.0%}"
    within, between = hardware.intra_bandwidth / 1e9, hardware.inter_bandwidth / 1e9
    links = f"{within:.0f} GB/s within machines of {hardware.gpus_per_node}, {between:.0f} GB/s between them"
    of_its_own = f"{hardware.memory_bandwidth / 1e9:,.0f} GB/s to its own memory"
    console.print(f"Assumed per GPU: {memory}; {speed}; {of_its_own}; {links}.")


def print_proposals(
    proposals: Mapping[str, Sequence[Sequence[Choice]]], hardware: Hardware, console: Console | None = None
) -> None:
    """A table for each backbone; with one number of GPUs also what to write into a recipe.

    Args:
        proposals: by the name of the backbone, the choices for each number of GPUs.
        hardware: what is assumed of it.
        console: None for the terminal.
    """
    console = console or Console(width=150, highlight=False)
    for name, rows in proposals.items():
        console.print(f"\n[bold]{name}[/bold]: {rows[0][0].plan.backbone_parameters / 1e9:.2f} B frozen")
        console.print(_proposal_table(rows))
        for choices in rows if len(rows) == 1 else ():
            for choice in choices:
                if choice.deepspeed is not None:
                    words = [f"{key}={value}" for key, value in choice.settings.items()]
                    console.print(f"[bold]{choice.name}[/bold]: --set {' '.join(words)}", soft_wrap=True)
                    file = json.dumps(choice.deepspeed)
                    console.print(f"  parallel.deepspeed_config=FILE, with {file}", soft_wrap=True, markup=False)
    smallest = "smallest: the smallest shard group with the weakest quantisation that fit"
    fastest = "fastest: what is faster than that, overlapped or not; quantisation changes what is learned"
    overlapped = "GB per GPU at the peak; overlapped: all of the backbone is gathered while layers compute"
    console.print(f"{smallest}.\n{fastest}.\n{overlapped}.")
    _print_assumptions(hardware, console)


def _proposal_table(rows: Sequence[Sequence[Choice]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    names = ("GPUs", "", "quantisation", "group", "ep", "micro batch", "dispatch", "GB")
    for column in (*names, "s/step", "overlapped", "tokens/s", "overlapped"):
        table.add_column(column, justify="left" if column in ("", "quantisation", "dispatch") else "right")
    for choices in rows:
        for choice in choices:
            plan = choice.plan
            work = plan.work
            table.add_row(
                f"{plan.gpus:,}",
                choice.name,
                plan.quantisation,
                f"{plan.shards:,}",
                f"{plan.ep_size}",
                f"{work['accumulation']} x {work['sequences']}",
                plan.dispatch,
                f"{plan.total_memory / 1e9:.1f}{'' if plan.fits else ' no'}",
                f"{plan.step_seconds:.2f}",
                f"{plan.overlapped_seconds:.2f}",
                f"{plan.tokens_per_second:,.0f}",
                f"{plan.overlapped_tokens_per_second:,.0f}",
            )
    return table


def print_whole_runs(runs: Mapping[str, Sequence[WholeRun]], config: RunConfig, console: Console | None = None) -> None:
    """What all steps of the recipe take, a line for each backbone and number of GPUs."""
    console = console or Console(width=150, highlight=False)
    of_step = {"sft": "examples", "dpo": "pairs", "grpo": "prompts"}[config.training.objective]
    for name, rows in runs.items():
        work = rows[0].work
        console.print(
            f"\n[bold]{name}[/bold], whole run: {rows[0].steps:,} steps of {config.training.global_batch_size} "
            f"{of_step}, all of {work.length:,} tokens"
        )
        for run in rows:
            parts = f"{run.update_seconds:.2f} s a step"
            if run.rollout_seconds:
                parts = f"{parts} and {run.rollout_seconds:.2f} s for its rollout, without the judge's time"
            fits = "fits" if run.fits else "does not fit"
            cut = f"{run.work.accumulation} x {run.work.sequences} sequences per GPU and step"
            size = f"{run.memory / 1e9:.1f} GB per GPU, {fits}"
            console.print(f"  {run.gpus:,} GPUs: {run.days:.2f} days ({24 * run.days:.1f} h; {parts}; {cut}; {size})")


def _memory_table(rows: Sequence[Plan], hardware: Hardware) -> Table:
    table = Table(title="GB per GPU at the peak, and speed", box=box.SIMPLE_HEAD, title_justify="left")
    parts = [part for part in _PARTS if any(part in plan.memory for plan in rows)]
    hosts = sorted({part for plan in rows for part in plan.host_memory})
    for column in (
        "GPUs",
        *parts,
        "total",
        "fits",
        "max micro batch",
        "tokens/s",
        *(f"{part} on host" for part in hosts),
    ):
        table.add_column(column, justify="right")
    for plan in rows:
        fits = "yes" if plan.fits else f"no ({(hardware.memory - hardware.reserved) / 1e9:.0f})"
        table.add_row(
            f"{plan.gpus:,}",
            *(f"{plan.memory.get(part, 0) / 1e9:.2f}" for part in parts),
            f"{plan.total_memory / 1e9:.2f}",
            fits,
            f"{plan.max_micro_batch:,}" if plan.max_micro_batch else "none",
            f"{plan.tokens_per_second:,.0f}",
            *(f"{plan.host_memory.get(part, 0) / 1e9:.2f}" for part in hosts),
        )
    return table


def _wire_table(rows: Sequence[Plan]) -> Table:
    table = Table(title="MB that one GPU sends per step, and seconds", box=box.SIMPLE_HEAD, title_justify="left")
    kinds = list(dict.fromkeys(kind for plan in rows for kind in plan.wire))
    computes = [f"{part} s" for part in ("compute", "unpacking") if any(part in plan.seconds for plan in rows)]
    for column in ("GPUs", "dispatch", *kinds, *computes, "wire s", "overlapped s"):
        table.add_column(column, justify="right")
    for plan in rows:
        compute = [plan.seconds.get(part.removesuffix(" s"), 0.0) for part in computes]
        table.add_row(
            f"{plan.gpus:,}",
            plan.dispatch,
            *(f"{plan.wire.get(kind, 0) / 1e6:,.1f}" for kind in kinds),
            *(f"{seconds:.3f}" for seconds in compute),
            f"{plan.step_seconds - sum(compute):.3f}",
            f"{plan.overlapped_seconds:.3f}",
        )
    return table


def plot_plans(plans: Mapping[str, Sequence[Plan]], hardware: Hardware, path: Path) -> None:
    """Stacked memory per GPU (left) and tokens per second (right) against the number of GPUs; PNG at ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(plans), 2, figsize=(11, 0.9 + 3.1 * len(plans)), squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for (name, rows), (left, right) in zip(plans.items(), axes, strict=True):
        labels = [f"{plan.gpus:,}" for plan in rows]
        bottom = [0.0] * len(rows)
        for colour, part in zip(colours, _PARTS, strict=False):
            heights = [plan.memory.get(part, 0) / 1e9 for plan in rows]
            left.bar(labels, heights, bottom=bottom, color=colour, label=part, width=0.6)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        left.axhline(
            (hardware.memory - hardware.reserved) / 1e9, color="black", linestyle="--", linewidth=1, label="available"
        )
        left.set(title=f"{name}: memory per GPU", ylabel="GB", xlabel="GPUs")
        left.set_ylim(0, 1.25 * max(max(bottom), hardware.memory / 1e9))
        speeds = [plan.tokens_per_second for plan in rows]
        right.plot([plan.gpus for plan in rows], speeds, marker="o", color=colours[0], label="predicted")
        ideal = [speeds[0] * plan.gpus / rows[0].gpus for plan in rows]
        right.plot([plan.gpus for plan in rows], ideal, linestyle=":", color="grey", label="linear from the first")
        for plan, speed in zip(rows, speeds, strict=True):
            if not plan.fits:
                right.annotate(
                    "does not fit", (plan.gpus, speed), textcoords="offset points", xytext=(8, 8), fontsize=8
                )
        right.set(title=f"{name}: speed", ylabel="tokens/s", xlabel="GPUs", xscale="log", yscale="log")
        right.set_xticks([plan.gpus for plan in rows], labels)
        right.minorticks_off()
        right.grid(alpha=0.3)
        right.legend(frameon=False, fontsize=8)
        left.legend(frameon=False, fontsize=8, ncols=4, loc="upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_proposals(proposals: Mapping[str, Sequence[Sequence[Choice]]], path: Path) -> None:
    """Tokens per second against the number of GPUs, a panel for each backbone: of the recipe where it fits, and of the
    last choice, without and with overlap.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (4.2 * len(proposals), 3.6)
    figure, (axes,) = plt.subplots(1, len(proposals), figsize=size, squeeze=False, layout="constrained")
    for (name, rows), axis in zip(proposals.items(), axes, strict=True):
        recipe = [row[0].plan for row in rows if row[0].name == "recipe" and row[0].plan.fits]
        last = [row[-1].plan for row in rows]
        for label, plans in (("recipe", recipe), ("proposed", last)):
            speeds = [plan.tokens_per_second for plan in plans]
            axis.plot([plan.gpus for plan in plans], speeds, marker="o", label=label)
        speeds = [plan.overlapped_tokens_per_second for plan in last]
        axis.plot([plan.gpus for plan in last], speeds, linestyle="--", label="proposed, overlapped")
        axis.set(title=name, xlabel="GPUs", ylabel="tokens/s", xscale="log", yscale="log")
        axis.set_xticks([row[0].plan.gpus for row in rows], [f"{row[0].plan.gpus:,}" for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
