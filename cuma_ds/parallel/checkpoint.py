"""Checkpoints that know no topology: what trains, by parameter name and global expert id, in safetensors.

A checkpoint folder ``step-N`` holds::

    state.json                     step, fingerprints of the settings, the models and the data, who wrote it, size and sha256 of every
                                   other file, and a sha256 of all this
    shared.safetensors             routers, shared A, profile standardisation, running shares of the balance loss
    experts-I-of-J.safetensors     the experts of expert-parallel rank I, one tensor per expert

Tensors are named ``<kind>/<parameter>`` or ``<kind>/<parameter>/<expert>`` with kind ``param`` (float32 master weight), ``exp_avg`` or
``exp_avg_sq`` (Adam moments). Any world size, ``ep_size`` and ZeRO stage can read it; the frozen backbone is never in it.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cuma_ds.errors import CheckpointError
from cuma_ds.files import move_folder, write_atomically
from cuma_ds.identity import SEAL, Identity, file_sha256, seal_holds, sealed
from cuma_ds.parallel.engine import AdapterEngine

FORMAT_VERSION = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    engine: AdapterEngine, checkpoints: Path, step: int, fingerprint: str, identity: Identity, keep_last: int
) -> Path:
    """Write ``checkpoints/step-N``; all ranks call it.

    It is written beside its place and renamed when complete; ``latest`` then names it, and checkpoints older than the last
    ``keep_last`` are removed.

    Args:
        engine: at any time.
        checkpoints: the run's folder of checkpoints.
        step: training steps done.
        fingerprint: of the configuration that decides what is learned; checked on resume.
        identity: of the run; checked on resume.
        keep_last: complete checkpoints to keep.
    """
    topology = engine.topology
    folder = checkpoints / f"step-{step}"
    partial = folder.with_name(f"{folder.name}.partial")
    if topology.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    optimizer_steps = step if engine.stage == 3 else _optimizer_steps(engine)
    if optimizer_steps:
        _link_optimizer_states(engine)
    else:
        _create_optimizer_states(engine, 0)
    shared: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    first, count = topology.experts(engine.model.config.num_experts)
    for name, parameter, is_expert in _parameters(engine):
        tensors = {"param": safe_get_full_fp32_param(parameter)}
        tensors |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in _MOMENTS}
        for kind, tensor in tensors.items():
            if not is_expert:
                shared[f"{kind}/{name}"] = tensor.cpu()
            elif topology.holds_first_copy:
                for expert in range(count):
                    experts[f"{kind}/{name}/{first + expert}"] = tensor[expert].cpu().contiguous()
    for name, buffer in engine.model.standardisation().items():
        shared[f"param/{name}"] = buffer.cpu().contiguous()
    for name, buffer in engine.model.balance_state().items():
        shared[f"balance/{name}"] = buffer.cpu().contiguous()
    written: dict[str, str] = {}  # each rank hashes what it wrote
    if topology.is_main:
        save_file(shared, partial / "shared.safetensors")
        written["shared.safetensors"] = file_sha256(partial / "shared.safetensors")
    if topology.holds_first_copy:
        name = f"experts-{topology.ep_rank}-of-{topology.ep_size}.safetensors"
        save_file(experts, partial / name)
        written[name] = file_sha256(partial / name)
    by_rank: list[dict[str, str]] = [{}] * topology.world
    dist.all_gather_object(by_rank, written)
    if topology.is_main:
        state = {
            "step": step,
            "optimizer_steps": optimizer_steps,  # fewer where float16 gradients overflowed
            "fingerprint": fingerprint,
            "identity": identity,
            "written_by": {"world": topology.world, "ep_size": topology.ep_size, "zero_stage": engine.stage},
            "num_experts": engine.model.config.num_experts,
        }
        write_state(partial, state, {name: digest for part in by_rank for name, digest in part.items()})
        shutil.rmtree(folder, ignore_errors=True)
        move_folder(partial, folder)
        write_atomically(checkpoints / "latest", folder.name + "\n")
        for old in sorted(_steps(checkpoints), reverse=True)[keep_last:]:
            shutil.rmtree(checkpoints / f"step-{old}")
    dist.barrier()
    return folder


def write_state(folder: Path, state: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Write ``state.json`` beside the files of a checkpoint.

    Args:
        folder: holds all other files.
        state: step, fingerprints and the like.
        hashes: sha256 of each other file by its name.
    """
    files = {name: (folder / name).stat().st_size for name in sorted(hashes)}
    content = sealed(
        {"format_version": FORMAT_VERSION, **state, "files": files, "sha256": dict(sorted(hashes.items()))}
    )
    (folder / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(engine: AdapterEngine, folder: Path, fingerprints: Collection[str], identity: Identity) -> int:
    """Load a checkpoint written by any topology into this engine; all ranks call it before the first step.

    The content of the files is not hashed again: :func:`check_checkpoint` comes first.

    Returns:
        The number of optimizer steps it had done.

    Raises:
        CheckpointError: incomplete, damaged, or of another configuration.
    """
    reader, step = check_checkpoint(folder, fingerprints, identity, content=False)
    _create_optimizer_states(engine, int(reader.state.get("optimizer_steps", step)))
    first, count = engine.topology.experts(engine.model.config.num_experts)
    for name, parameter, is_expert in _parameters(engine):

        def read(kind: str, name: str = name, is_expert: bool = is_expert) -> Tensor:
            if is_expert:
                return torch.stack([reader.get(f"{kind}/{name}/{expert}") for expert in range(first, first + count)])
            return reader.get(f"{kind}/{name}")

        master = read("param")
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if master.shape != shape:
            raise CheckpointError(f"{folder}: {name} has shape {tuple(master.shape)}; this run needs {tuple(shape)}")
        _set(engine, parameter, None, master)
        for kind in _MOMENTS:
            _set(engine, parameter, kind, read(kind))
    with torch.no_grad():
        for name, buffer in engine.model.standardisation().items():
            buffer.copy_(reader.get(f"param/{name}"))
        for name, buffer in engine.model.balance_state().items():
            buffer.copy_(reader.get(f"balance/{name}"))
    return step


def check_checkpoint(
    folder: Path, fingerprints: Collection[str], identity: Identity, content: bool = True
) -> tuple[_Reader, int]:
    """Open a checkpoint; returns its reader and its step.

    Args:
        fingerprints: of configurations whose checkpoints may be loaded.
        identity: of the run that loads it.
        content: as in :func:`read_state`.

    Raises:
        CheckpointError: incomplete, damaged, or of another configuration.
    """
    state = read_state(folder, content)
    if state.get("fingerprint") not in fingerprints:
        raise CheckpointError(
            f"{folder} was written by a different configuration; give this run another run.name, or restore the recipe"
        )
    theirs = state.get("identity")
    if theirs and any(
        theirs.get(key) != identity.get(key) for key in ("backbone", "encoder", "source", "data", "profiles")
    ):
        raise CheckpointError(f"{folder} belongs to another run, of another model, encoder or data; move it away")
    return _Reader(folder, state), int(state["step"])


def read_adapters(folder: Path, state: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """All trained tensors of a checkpoint with their full expert dimension, as ``CumaModel.load_adapter_state`` takes them.

    Args:
        state: as :func:`read_state` returned it, if it was called before.

    Raises:
        CheckpointError: incomplete or damaged.
    """
    reader = _Reader(folder, read_state(folder) if state is None else state)
    whole: dict[str, Tensor] = {}
    by_expert: dict[str, dict[int, str]] = {}
    for key in reader.names():
        kind, _, name = key.partition("/")
        if kind != "param":
            continue
        parameter, _, expert = name.partition("/")
        if expert:
            by_expert.setdefault(parameter, {})[int(expert)] = key
        else:
            whole[name] = reader.get(key)
    for parameter, keys in by_expert.items():
        whole[parameter] = torch.stack([reader.get(keys[expert]) for expert in sorted(keys)])
    return whole


def has_checkpoint(checkpoints: Path) -> bool:
    """Whether a run has anything to resume from, complete or not.

    Raises:
        CheckpointError: it has a checkpoint that DeepSpeed itself wrote.
    """
    for folder in checkpoints.glob("*/"):
        _refuse_deepspeed(folder)
    return bool(_steps(checkpoints))


def find_checkpoint(checkpoints: Path, step: int | None = None) -> Path:
    """The newest checkpoint of a run, or that of one step.

    Raises:
        CheckpointError: there is none.
    """
    steps = _steps(checkpoints)
    if not steps:
        raise CheckpointError(f"{checkpoints.parent} holds no checkpoint; train it first")
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{checkpoints.parent} holds no checkpoint of step {step}; it has {', '.join(map(str, sorted(steps)))}"
        )
    return checkpoints / f"step-{max(steps) if step is None else step}"


def read_state(folder: Path, content: bool = True) -> dict[str, Any]:
    """``state.json`` of a checkpoint, after checking that every file it names is there and whole.

    Args:
        content: also hash every file, so that a single changed bit is noticed. Checkpoints of release 0.1.0 hold no hashes; a warning
            says so. One rank of several does it for all.

    Raises:
        CheckpointError: what is missing or damaged.
    """
    _refuse_deepspeed(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version, step, files = state["format_version"], int(state["step"]), dict(state["files"])
        has_hashes = SEAL in state or "sha256" in state
        whole = not has_hashes or (seal_holds(state) and state["sha256"].keys() == files.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: state.json is missing or damaged{_another(folder)}"
        ) from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has checkpoint format {version}; this version reads {FORMAT_VERSION}")
    if not whole:
        raise CheckpointError(f"{folder} is damaged: state.json has changed since it was written{_another(folder)}")
    if has_hashes and folder.name != f"step-{step}":
        raise CheckpointError(f"{folder} is damaged: state.json is of step {step}{_another(folder)}")
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing ({_written_by(state)}){_another(folder)}")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{folder} is damaged: {name} has {path.stat().st_size} bytes instead of {size}{_another(folder)}"
            )
        if content and has_hashes and file_sha256(path) != state["sha256"][name]:
            raise CheckpointError(
                f"{folder} is damaged: the content of {name} has changed since it was written{_another(folder)}"
            )
    if content:
        _check_latest(folder)
        if not has_hashes:
            warnings.warn(
                f"{folder} was written by release 0.1.0, without hashes: its content cannot be checked", stacklevel=2
            )
    return state


def _another(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    others = sorted(step for step in _steps(folder.parent) if folder.name != f"step-{step}")
    return f"; move it away to go on from step {others[-1]}" if others else "; restore it from a copy"


def _check_latest(folder: Path) -> None:
    """The file that names the newest checkpoint is read by people alone, but what it says must be true."""
    latest = folder.with_name("latest")
    if not latest.is_file():
        return
    said = latest.read_bytes()
    if not re.fullmatch(rb"step-\d+\n", said):
        raise CheckpointError(
            f"{latest} is damaged: it does not name a checkpoint; remove it, or write the line {folder.name} there"
        )
    newest = f"step-{max(_steps(folder.parent), default=0)}"
    if said.decode().strip() != newest:
        warnings.warn(
            f"{latest} names {said.decode().strip()}, but the newest checkpoint there is {newest}", stacklevel=3
        )


def _refuse_deepspeed(folder: Path) -> None:
    """DeepSpeed's own files hold fragments of a sharded frozen backbone, which load without complaint and to wrong weights."""
    for file in sorted(folder.glob("*_states.pt")):
        raise CheckpointError(
            f"{folder} was written by DeepSpeed itself ({file.name}) and may hold fragments of a sharded frozen backbone; "
            "it is not resumed from: move it away, or give this run another run.name"
        )


def _written_by(state: dict[str, Any]) -> str:
    by = state.get("written_by", {})
    return f"written by {by.get('world')} ranks, ep_size {by.get('ep_size')}"


def _steps(checkpoints: Path) -> list[int]:
    folders = checkpoints.glob("step-*")
    return [int(match[1]) for folder in folders if (match := re.fullmatch(r"step-(\d+)", folder.name))]


class _Reader:
    """Tensors of a checkpoint by key, read one at a time."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.state = state
        self._folder = folder
        self._places: dict[str, Any] = {}
        for name in state["files"]:
            try:
                file = safe_open(folder / name, framework="pt")
            except (SafetensorError, OSError):
                raise CheckpointError(f"{folder} is damaged: {name} is no readable safetensors file") from None
            self._places |= dict.fromkeys(file.keys(), file)

    def names(self) -> list[str]:
        return list(self._places)

    def get(self, key: str) -> Tensor:
        if key not in self._places:
            raise CheckpointError(f"{self._folder} lacks {key}; it belongs to another model or configuration")
        return self._places[key].get_tensor(key)


def _parameters(engine: AdapterEngine) -> Iterator[tuple[str, torch.nn.Parameter, bool]]:
    """Name, parameter, and whether its first dimension counts experts."""
    expert_ids = {
        id(p) for _, layer in engine.model.adapted_layers() for p in layer.experts.sharded_parameters().values()
    }
    for name, parameter in engine.model.adapter_parameters():
        yield name, parameter, id(parameter) in expert_ids


def _link_optimizer_states(engine: AdapterEngine) -> None:
    """DeepSpeed 0.19 links only the first parameter group to its Adam moments; link them all."""
    if engine.stage == 3:
        return
    zero = engine.engine.optimizer
    for params, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(params, flat, zero.optimizer.state)


def _flat_parameters(engine: AdapterEngine) -> list[Tensor]:
    """What the optimizer steps on: this rank's part of each group, flat."""
    zero = engine.engine.optimizer
    return list(zero.fp32_partitioned_groups_flat if engine.stage == 3 else zero.single_partition_of_fp32_groups)


def _optimizer_steps(engine: AdapterEngine) -> int:
    """How often the optimizer has stepped at stage 1 or 2; a step whose gradients overflowed does not count."""
    states = [engine.engine.optimizer.optimizer.state.get(flat) for flat in _flat_parameters(engine)]
    return max((int(state["step"]) for state in states if state), default=0)


def _create_optimizer_states(engine: AdapterEngine, step: int) -> None:
    """Adam state as after ``step`` steps, its moments to be filled in."""
    zero = engine.engine.optimizer
    for flat in _flat_parameters(engine):
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(step)),  # one tensor each: a shared counter would be advanced several times
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    _link_optimizer_states(engine)


def _set(engine: AdapterEngine, parameter: torch.nn.Parameter, moment: str | None, value: Tensor) -> None:
    """Set a parameter (master weight and the copy the forward reads) or one of its moments from a full tensor."""
    value = value.to(engine.topology.device)
    if engine.stage == 3:
        # The last rank's part is padded; DeepSpeed's setter for full tensors does not expect that.
        held = parameter.ds_tensor.data  # type: ignore[attr-defined]
        padded = torch.nn.functional.pad(value.flatten(), (0, held.numel() * engine.topology.world - value.numel()))
        value = padded.narrow(0, held.numel() * engine.topology.rank, held.numel())
        if moment is None:
            held.copy_(value)
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, moment)
    elif moment is None:
        parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)
