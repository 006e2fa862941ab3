"""Save what an engine trains, and load it into an engine of any topology. The files: cuma_ds.parallel.stored."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cuma_ds.config import CheckpointSection
from cuma_ds.errors import CheckpointError, CumaError
from cuma_ds.files import first_line, move_folder, remove_folder, write_atomically
from cuma_ds.identity import file_sha256
from cuma_ds.methods.model import Trained
from cuma_ds.parallel import deepspeed_compat as compat
from cuma_ds.parallel.agreement import agreement
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.stored import (
    BESIDE,
    State,
    StoredTensors,
    read_adapters,
    read_state,
    stored_steps,
    write_state,
)
from cuma_ds.parallel.topology import Topology

# What is kept of each parameter, with the name of the Adam moment.
_KINDS = {"param": None, **{moment: moment for moment in compat.MOMENTS}}


def save_checkpoint(
    engine: AdapterEngine,
    checkpoints: Path,
    state: State,
    keep: CheckpointSection,
    beside: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``step-N`` into a run's ``checkpoints`` folder; all ranks call it.

    It is written beside its place and renamed when it is complete and on the disk. ``latest`` then names it, and
    checkpoints that ``keep`` does not ask for are removed.

    Args:
        engine: at any time.
        checkpoints: made if it does not exist.
        state: ``step``, ``fingerprint`` and ``identity`` of the run; the rest is filled in.
        keep: which older checkpoints stay.
        beside: tensors to keep beside those of the engine, for :func:`~cuma_ds.parallel.stored.read_beside`; equal on
            all ranks.

    Returns:
        The folder ``step-N``.

    Raises:
        CumaError: a tensor is not finite, or the file system refuses; the same one line on every rank. Older
            checkpoints are as they were.
    """
    topology = engine.topology
    folder = checkpoints / f"step-{state['step']}"
    partial = folder.with_name(f"{folder.name}.partial")
    optimizer_steps = state["step"] if engine.stage == 3 else compat.optimizer_steps(engine.engine)
    if optimizer_steps:
        compat.link_moments(engine.engine)
    else:
        compat.create_moments(engine.engine, 0)
    shared, experts = _tensors(engine)
    _check_finite({**shared, **experts}, state["step"])
    shared |= {f"{BESIDE}{name}": tensor.cpu().contiguous() for name, tensor in (beside or {}).items()}
    with _writing(topology, partial, state["step"]):
        if topology.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    files = {"shared.safetensors": shared} if topology.is_main else {}
    if experts:
        files[f"experts-{topology.ep_rank}-of-{topology.ep_size}.safetensors"] = experts
    written = {}
    with _writing(topology, partial, state["step"]):
        for name, tensors in files.items():
            save_file(tensors, partial / name)
            written[name] = file_sha256(partial / name)
    by_rank: list[dict[str, str]] = [{}] * topology.world
    dist.all_gather_object(by_rank, written)
    with _writing(topology, partial, state["step"]):
        if topology.is_main:
            complete: State = {
                "step": state["step"],
                "optimizer_steps": optimizer_steps,
                "fingerprint": state["fingerprint"],
                "identity": state["identity"],
                "written_by": {"world": topology.world, "ep_size": topology.ep_size, "zero_stage": engine.stage},
                "num_experts": engine.num_experts,
            }
            write_state(partial, complete, {name: digest for part in by_rank for name, digest in part.items()})
            _publish(partial, folder, keep)
    return folder


@contextlib.contextmanager
def _writing(topology: Topology, partial: Path, step: int) -> Iterator[None]:
    """Turn what a file system refuses one rank into one line of all ranks. What was saved before stays.

    The room is given back once no rank writes any more.
    """
    try:
        with agreement():
            try:
                yield
            except (OSError, SafetensorError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
                raise CheckpointError(
                    f"the checkpoint of step {step} cannot be written: {reason}; once that is mended, the same command "
                    "goes on from the checkpoint before"
                ) from None
    except CumaError:
        if topology.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def load_checkpoint(engine: AdapterEngine, folder: Path) -> int:
    """Load a checkpoint written by any topology into this engine; all ranks call it before the first step.

    Whether it belongs to this run, and whether a bit has changed, is not asked again: ``check_checkpoint`` comes first.

    Returns:
        The number of training steps it had done.

    Raises:
        CheckpointError: incomplete, damaged, or of a model of other shapes.
    """
    state = read_state(folder, content=False)
    stored = StoredTensors(folder, state)
    compat.create_moments(engine.engine, int(state.get("optimizer_steps", state["step"])))
    for trained in engine.trained:
        name = trained.name
        for kind, moment in _KINDS.items():
            if trained.placement == "per_expert":
                value = stored.stacked(f"{kind}/{name}", _experts(engine, trained))
            else:
                value = stored.get(f"{kind}/{name}")
            _set(engine, trained, moment, value, folder)
    engine.model.load_state({key: stored.get(key) for key in engine.model.state()})
    return int(state["step"])


def load_start(engine: AdapterEngine, folder: Path) -> None:
    """Load trained tensors alone, as :func:`~cuma_ds.parallel.stored.write_start` wrote them; all ranks call it before
    the first step. The optimizer stays as it is: no steps, moments of zero.

    Where there are no balance shares, the engine keeps its own.

    Args:
        engine: of any topology, prepared.
        folder: checked before.

    Raises:
        CheckpointError: incomplete, damaged, or of a model of other shapes.
    """
    state = read_state(folder, content=False)
    stored, whole = StoredTensors(folder, state), read_adapters(folder, state)
    for trained in engine.trained:
        if trained.name not in whole:
            raise CheckpointError(f"{folder} lacks {trained.name}; it belongs to another model or configuration")
        value = whole.pop(trained.name)
        if trained.placement == "per_expert":
            own = _experts(engine, trained)
            value = value[own.start : own.stop]
        _set(engine, trained, None, value, folder)
    there = {key: stored.get(key) for key in engine.model.state() if key in stored.names()}
    engine.model.load_state({**engine.model.state(), **there})
    if foreign := sorted(whole.keys() - {key.removeprefix("param/") for key in there}):
        raise CheckpointError(f"{folder} holds {foreign[0]}; it belongs to another model or configuration")


def _set(engine: AdapterEngine, trained: Trained, moment: str | None, value: Tensor, folder: Path) -> None:
    """Set a parameter (None) or one of its moments; all ranks call it."""
    shape = compat.whole_shape(trained.parameter)
    if value.shape != shape:
        raise CheckpointError(f"{folder}: {trained.name} has shape {tuple(value.shape)}; this run needs {tuple(shape)}")
    compat.set_whole_value(trained.parameter, moment, value.to(engine.topology.device))


def _tensors(engine: AdapterEngine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What every rank has alike (on the main rank), and this rank's experts one by one if it holds their first copy, by
    key.
    """
    shared: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    for trained in engine.trained:
        for kind, moment in _KINDS.items():
            value = compat.whole_value(trained.parameter, moment)
            if trained.placement == "replicated":
                if engine.topology.is_main:  # which writes them
                    shared[f"{kind}/{trained.name}"] = value.cpu()
            elif engine.topology.holds_first_copy:
                numbered = zip(_experts(engine, trained), value.cpu(), strict=True)
                experts |= {f"{kind}/{trained.name}/{number}": expert.contiguous() for number, expert in numbered}
    shared |= {key: buffer.cpu().contiguous() for key, buffer in engine.model.state().items()}
    return shared, experts


def _experts(engine: AdapterEngine, trained: Trained) -> range:
    """The numbers of the experts that this rank holds of a parameter."""
    count = compat.whole_shape(trained.parameter)[0]
    first = engine.topology.ep_rank * count
    return range(first, first + count)


def _check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Refuse to save what cannot be gone on from; all ranks call it with what they would write."""
    broken = next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None)
    with agreement():
        if broken is not None:
            kind, _, name = broken.partition("/")
            what = {"param": "parameter", "balance": "balance share"}.get(kind, f"Adam moment {kind} of")
            raise CumaError(
                f"after step {step}, {what} {name} is not finite, and no checkpoint is written; lower "
                "training.learning_rate or weight_decay, raise adam_eps, and start again: the run goes on from its "
                "last checkpoint"
            )


def _publish(partial: Path, folder: Path, keep: CheckpointSection) -> None:
    """Give a complete checkpoint its name, let ``latest`` name it, and remove old ones."""
    remove_folder(folder)
    move_folder(partial, folder)
    write_atomically(folder.with_name("latest"), folder.name + "\n")
    for old in stored_steps(folder.parent)[: -keep.keep_last]:
        if not keep.keep_every or old % keep.keep_every:
            remove_folder(folder.with_name(f"step-{old}"))
