"""What a checkpoint folder holds: find it, check it, read it. Neither DeepSpeed nor other ranks are needed.

A checkpoint folder ``step-N`` holds::

    state.json                     step, fingerprints of the settings, the models and the data, who wrote it, size and
                                    sha256 of every other file, and a sha256 of all this
    shared.safetensors             routers, shared A, profile standardisation, running shares of the balance loss, and
                                    what the objective keeps (``objective/<name>``)
    experts-I-of-J.safetensors     the experts of expert-parallel rank I, one tensor per expert

Tensors are named ``<kind>/<parameter>`` or ``<kind>/<parameter>/<expert>`` with kind ``param`` (float32 master
weight), ``exp_avg`` or ``exp_avg_sq`` (Adam moments). Any world size, ``ep_size`` and ZeRO stage can read it. The
frozen backbone is never in it.

The folder ``start`` of a run that started from a trained model is a checkpoint of step 0 without moments, with all
experts of a linear in one tensor.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cuma_ds.errors import CheckpointError
from cuma_ds.files import atomic_folder, is_plain_name
from cuma_ds.identity import SEAL, Identity, file_sha256, seal_holds, sealed

FORMAT_VERSION = 1
BESIDE = "objective/"
_SHARED = "shared.safetensors"
# What some entries of state.json must be.
_PARTS: dict[str, type] = {"files": dict, "sha256": dict, "identity": dict, "written_by": dict, "fingerprint": str}


class State(TypedDict, total=False):
    """``state.json``.

    optimizer_steps: fewer than ``step`` where float16 gradients overflowed.  identity: what the run was started
    with.  written_by: world, ep_size and zero_stage.  files, sha256: size in bytes and hash of each other file.
    """

    format_version: int
    step: int
    optimizer_steps: int
    fingerprint: str
    identity: Identity
    written_by: dict[str, int]
    num_experts: int
    files: dict[str, int]
    sha256: dict[str, str]
    sealed: str


def write_state(folder: Path, state: State, hashes: Mapping[str, str]) -> None:
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


def write_start(folder: Path, tensors: bytes) -> None:
    """Write the checkpoint of step 0, all of it or nothing, in place of what is there.

    Args:
        folder: named ``start``.
        tensors: a safetensors file of ``param/...`` and ``balance/...``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as beside:
        (beside / _SHARED).write_bytes(tensors)
        write_state(beside, {"step": 0, "optimizer_steps": 0}, {_SHARED: file_sha256(beside / _SHARED)})


def write_untrained(checkpoints: Path, state: State) -> Path:
    """Write the checkpoint of a run that trains nothing: ``step-0``, which holds ``state.json`` alone.

    Args:
        checkpoints: made if it does not exist.
        state: fingerprint and identity of the run.
    """
    folder = checkpoints / "step-0"
    with atomic_folder(folder) as beside:
        write_state(beside, {"step": 0, "optimizer_steps": 0, **state}, {})
    return folder


def start_sha256(state: State) -> str:
    """Hash of the tensors that :func:`write_start` wrote, from its ``state.json``."""
    return state["sha256"][_SHARED]


def stored_steps(checkpoints: Path) -> list[int]:
    """The steps of all checkpoints in a folder, complete or not, in rising order."""
    found = (re.fullmatch(r"step-(\d+)", folder.name) for folder in checkpoints.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def has_checkpoint(checkpoints: Path) -> bool:
    """Whether there is anything to resume from, complete or not.

    Raises:
        CheckpointError: there is a checkpoint that DeepSpeed itself wrote.
    """
    for folder in checkpoints.glob("*/"):
        _refuse_deepspeed(folder)
    return bool(stored_steps(checkpoints))


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was written. Another one may be whole.

    Attributes:
        what: is wrong, without what to do about it.
    """

    what = ""

    @classmethod
    def at(cls, folder: Path, what: str) -> DamagedCheckpoint:
        """The error about a folder ``step-N``."""
        error = cls(f"{folder} {what}{_another(folder)}")
        error.what = f"{folder} {what}"
        return error


def newest_whole(checkpoints: Path, content: bool = True) -> tuple[Path, State]:
    """The newest checkpoint that is whole, and its ``state.json``. A warning names newer ones that are not.

    Args:
        checkpoints: of a run.
        content: as in :func:`read_state`.

    Raises:
        CheckpointError: there is none.
    """
    damaged: list[DamagedCheckpoint] = []
    for step in reversed(stored_steps(checkpoints)):
        folder = checkpoints / f"step-{step}"
        try:
            state = read_state(folder, content)
        except DamagedCheckpoint as error:
            damaged.append(error)
            continue
        for one in damaged:
            warnings.warn(f"{one.what}; {folder.name} is used instead", stacklevel=2)
        return folder, state
    if damaged:
        raise damaged[0]
    return find_checkpoint(checkpoints), {}


def set_damaged_aside(checkpoints: Path, newest: Path) -> None:
    """Rename checkpoints newer than the newest whole one, so that they no longer count as checkpoints."""
    for step in stored_steps(checkpoints):
        if step > int(newest.name.removeprefix("step-")):
            folder = checkpoints / f"step-{step}"
            names = (
                folder.with_name(f"{folder.name}.damaged{more}") for more in chain([""], (f"-{n}" for n in count(2)))
            )
            folder.rename(next(name for name in names if not name.exists()))


def find_checkpoint(checkpoints: Path, step: int | None = None) -> Path:
    """The newest checkpoint of a run's ``checkpoints`` folder, or that of one step.

    Raises:
        CheckpointError: there is none.
    """
    steps = stored_steps(checkpoints)
    if not steps:
        raise CheckpointError(f"{checkpoints.parent} holds no checkpoint; train it first")
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{checkpoints.parent} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        )
    return checkpoints / f"step-{steps[-1] if step is None else step}"


def check_checkpoint(folder: Path, fingerprints: Collection[str], identity: Identity, content: bool = True) -> State:
    """``state.json`` of a checkpoint, after checking that the checkpoint is whole and belongs to a run.

    Args:
        folder: ``step-N``.
        fingerprints: of configurations whose checkpoints may be loaded.
        identity: what the run was started with.
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
    known = ("backbone", "encoder", "source", "data", "profiles", "start")
    if theirs and any(theirs.get(key) != identity.get(key) for key in known):
        raise CheckpointError(f"{folder} belongs to another run, of another model, encoder or data; move it away")
    return state


def read_state(folder: Path, content: bool = True) -> State:
    """``state.json`` of a checkpoint, after checking that every file it names is there and whole.

    Args:
        folder: ``step-N``.
        content: also hash every file, so that a single changed bit is noticed. Checkpoints of release 0.1.0 hold no
            hashes; a warning says so. One rank of several does it for all.

    Raises:
        CheckpointError: what is missing or damaged.
    """
    _refuse_deepspeed(folder)
    try:
        state: State = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version, step, files = state["format_version"], int(state["step"]), dict(state["files"])
        has_hashes = SEAL in state or "sha256" in state
        if not all(isinstance(part, _PARTS.get(key, object)) for key, part in state.items()):
            raise TypeError
        whole = not has_hashes or (seal_holds(state) and state["sha256"].keys() == files.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        what = "is not a complete checkpoint: state.json is missing or damaged"
        raise DamagedCheckpoint.at(folder, what) from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has checkpoint format {version}; this version reads {FORMAT_VERSION}")
    if not whole:
        raise DamagedCheckpoint.at(folder, "is damaged: state.json has changed since it was written")
    if has_hashes and folder.name != f"step-{step}" and (step or folder.name != "start"):
        raise DamagedCheckpoint.at(folder, f"is damaged: state.json is of step {step}")
    _check_files(folder, state, state.get("sha256", {}) if content else {})
    if content:
        _check_latest(folder)
    if content and not has_hashes:
        warnings.warn(
            f"{folder} was written by release 0.1.0, without hashes: its content cannot be checked", stacklevel=2
        )
    return state


def read_adapters(folder: Path, state: State | None = None) -> dict[str, Tensor]:
    """All trained tensors of a checkpoint with all experts, as ``CumaModel.load_adapter_state`` takes them.

    Args:
        folder: ``step-N``.
        state: as :func:`read_state` returned it, if it was called before.

    Raises:
        CheckpointError: incomplete or damaged.
    """
    stored = StoredTensors(folder, read_state(folder) if state is None else state)
    whole: dict[str, Tensor] = {}
    experts: dict[str, set[int]] = {}
    for key in stored.names():
        kind, _, name = key.partition("/")
        parameter, _, expert = name.partition("/")
        if kind == "param" and expert:
            experts.setdefault(parameter, set()).add(int(expert))
        elif kind == "param":
            whole[name] = stored.get(key)
    return whole | {name: stored.stacked(f"param/{name}", sorted(numbers)) for name, numbers in experts.items()}


def read_beside(folder: Path) -> dict[str, Tensor]:
    """What was kept beside the tensors of the engine, by name; nothing in checkpoints that have none.

    Args:
        folder: ``step-N``, checked before.
    """
    stored = StoredTensors(folder, read_state(folder, content=False))
    return {name.removeprefix(BESIDE): stored.get(name) for name in stored.names() if name.startswith(BESIDE)}


class StoredTensors:
    """The tensors of a checkpoint by their key, read one at a time.

    Raises:
        CheckpointError: a file is damaged, or a key that was asked for is missing.
    """

    def __init__(self, folder: Path, state: State) -> None:
        self._folder = folder
        self._places: dict[str, Any] = {}
        for name in state["files"]:
            try:
                file = safe_open(folder / name, framework="pt")
            except (SafetensorError, OSError):
                raise CheckpointError(f"{folder} is damaged: {name} is no readable safetensors file") from None
            self._places |= dict.fromkeys(file.keys(), file)

    def names(self) -> list[str]:
        """All keys."""
        return list(self._places)

    def get(self, key: str) -> Tensor:
        """One tensor."""
        if key not in self._places:
            raise CheckpointError(f"{self._folder} lacks {key}; it belongs to another model or configuration")
        return self._places[key].get_tensor(key)

    def stacked(self, key: str, experts: Collection[int]) -> Tensor:
        """The tensors of some experts, stacked along a new first dimension."""
        return torch.stack([self.get(f"{key}/{expert}") for expert in experts])


def _check_files(folder: Path, state: State, hashes: Mapping[str, str]) -> None:
    by = state.get("written_by", {})
    written_by = f"written by {by.get('world')} ranks, ep_size {by.get('ep_size')}"
    for name, size in state["files"].items():
        if not is_plain_name(name):
            raise DamagedCheckpoint.at(folder, f"is damaged: state.json names {name!r}, which is no file of its folder")
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint.at(folder, f"is incomplete: {name} is missing ({written_by})")
        if path.stat().st_size != size:
            what = f"is damaged: {name} has {path.stat().st_size} bytes instead of {size}"
            raise DamagedCheckpoint.at(folder, what)
        if hashes and file_sha256(path) != hashes[name]:
            raise DamagedCheckpoint.at(folder, f"is damaged: the content of {name} has changed since it was written")


def _another(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    others = [str(step) for step in stored_steps(folder.parent) if folder.name != f"step-{step}"]
    return f"; there are others, of step {', '.join(others)}" if others else "; restore it from a copy"


def _check_latest(folder: Path) -> None:
    """Check the file ``latest``. Only people read it, but what it says must be true."""
    latest = folder.with_name("latest")
    if not latest.is_file():
        return
    said = latest.read_bytes()
    if not re.fullmatch(rb"step-\d+\n", said):
        warnings.warn(f"{latest} is damaged: it does not name a checkpoint; the newest is {folder.name}", stacklevel=3)
        return
    newest = f"step-{max(stored_steps(folder.parent), default=0)}"
    if said.decode().strip() != newest:
        warnings.warn(
            f"{latest} names {said.decode().strip()}, but the newest checkpoint there is {newest}", stacklevel=3
        )


def _refuse_deepspeed(folder: Path) -> None:
    """Raise for DeepSpeed's own files: fragments of a sharded backbone in them load to wrong weights, silently."""
    for file in sorted(folder.glob("*_states.pt")):
        raise CheckpointError(
            f"{folder} was written by DeepSpeed itself ({file.name}) and may hold fragments of a sharded frozen "
            "backbone; it is not resumed from: move it away, or give this run another run.name"
        )
