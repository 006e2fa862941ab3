"""Load a model from safetensors. Each rank reads its own part of every tensor and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from cuma_ds.config import ModelSection
from cuma_ds.errors import ModelError
from cuma_ds.identity import model_file, weight_files
from cuma_ds.parallel.deepspeed_compat import held
from cuma_ds.parallel.destination import Destination, put, quantise
from cuma_ds.parallel.transformers_compat import WeightNames, keeps_float32

# A tensor is read in pieces of at most so many bytes, so that nothing but the shard grows with the model.
_PIECE_BYTES = 8 * 2**20
_END_BYTES = 2**16


class NotStreamable(Exception):
    """Why a model cannot be read tensor by tensor; transformers' own loading can still do it."""


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint holds a tensor: file and key."""

    file: str
    key: str


@dataclass(frozen=True)
class StreamingPlan:
    """What this rank would load.

    backbone: without parameters (meta device).  tensors: names of each distinct tensor of the model, and where the
    checkpoint holds it, by file.  A tied tensor has several names, and several places where the checkpoint holds
    more than one of them.  digest: of the files.
    """

    backbone: PreTrainedModel
    tensors: list[tuple[list[str], list[_Place]]]
    digest: str


def plan_streaming(model: ModelSection) -> StreamingPlan:
    """Build a causal language model without parameters and find each of them in a folder or hub id; no collectives.

    Raises:
        NotStreamable: no safetensors, weights that transformers converts while loading, or tensors missing.
        ModelError: a weight file that an index names is missing, or the index is damaged, or a tensor has another
            shape, or the weights are quantised already.
        OSError, ValueError, KeyError, SafetensorError: as ``from_pretrained``.
    """
    files = _checkpoint_files(model.path)
    backbone = _empty_model(model)
    return StreamingPlan(backbone, _places(backbone, files, getattr(torch, model.dtype)), _digest(files))


def load_streamed(plan: StreamingPlan, destination: Destination) -> PreTrainedModel:
    """Fill the planned model; all ranks of a partitioned one call it.

    A rank allocates its part and, on a GPU, the one parameter being partitioned; no rank reads another's part and
    nothing is sent. Buffers are whole and computed as in ``from_pretrained``; tied parameters stay tied.

    Args:
        plan: of this rank; all ranks must have found the same files.
        destination: where parameters go.

    Raises:
        ModelError: the model cannot be quantised.
    """
    backbone = plan.backbone
    linears = destination.linears(backbone)
    with contextlib.ExitStack() as open_files:
        checkpoint = _Checkpoint(open_files)
        for names, places in plan.tensors:
            empty = _tensor_at(backbone, names[0])
            if not isinstance(empty, nn.Parameter):
                checkpoint.read(places[0], 0, empty.numel(), empty.view(-1))
                continue
            if names[0] in linears:
                quantise(backbone, linears[names[0]], destination, partial(checkpoint.read, places[0]))
                continue
            parts = [destination.filled(empty, partial(checkpoint.read, place)) for place in places]
            shared = len(parts) > 1 and _are_equal(parts, destination)
            for index, name in enumerate(names):
                part = parts[0] if shared or len(parts) == 1 else parts[index]
                put(backbone, name, part)
                if len(parts) > 1 and not shared:
                    backbone.all_tied_weights_keys.pop(name, None)
    return backbone.eval()


def _digest(files: list[str]) -> str:
    """Of the names, sizes and ends of files: tells one set of weights from another without reading them."""
    digest = hashlib.sha256()
    for file in map(Path, files):
        size = file.stat().st_size
        with file.open("rb") as content:
            content.seek(max(0, size - _END_BYTES))
            digest.update(f"{file.name} {size} ".encode() + content.read())
    return digest.hexdigest()


def _checkpoint_files(path: str) -> list[str]:
    """The safetensors files of a model: one, or those of an index."""
    if model_file(path, "adapter_config.json") is not None:
        raise NotStreamable("the folder holds an adapter")
    files = weight_files(path)
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise NotStreamable("it has no safetensors files")
    return [str(file) for file in files]


def _empty_model(model: ModelSection) -> PreTrainedModel:
    """The model with its buffers computed and its parameters on the meta device."""
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    refuse_quantised(model, config)
    if getattr(config, "transformers_weights", None) is not None:
        raise NotStreamable("its configuration names its own weight file")
    with _parameters_on_meta():
        backbone = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, model.dtype),
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
        )
    with contextlib.suppress(OSError):
        backbone.generation_config = GenerationConfig.from_pretrained(model.path)
    return backbone


def refuse_quantised(model: ModelSection, config: object) -> None:
    """Raise a ModelError for a model whose weights are quantised already."""
    about = getattr(config, "quantization_config", None)
    if about is not None:
        method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
        raise ModelError(
            f"model.path: the weights of {model.path} are quantised already ({method or 'quantization_config'}), and "
            "such weights can be neither sharded nor quantised here; name the 16-bit model that they were made from "
            "(its card says which), and set model.quantisation: nf4 or int8"
        )


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules put parameters on the meta device as they register them; buffers are made as usual."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _places(backbone: PreTrainedModel, files: list[str], dtype: torch.dtype) -> list[tuple[list[str], list[_Place]]]:
    """See :class:`StreamingPlan`; raises what :func:`plan_streaming` says."""
    if keeps_float32(backbone, dtype):
        raise NotStreamable("transformers keeps some of its weights in float32")
    state = backbone.state_dict(keep_vars=True)
    found: dict[str, _Place] = {}
    weight_names = WeightNames(backbone, state)
    for file in files:
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118  a safetensors handle is no dict
                name, converted = weight_names.of(key)
                if name not in state:
                    continue
                if converted:
                    raise NotStreamable(f"transformers converts {key} while loading")
                shape, wanted_shape = content.get_slice(key).get_shape(), list(state[name].shape)
                if shape != wanted_shape:
                    raise ModelError(f"{file}: {key} has shape {shape}, but config.json asks for {wanted_shape}")
                found[name] = _Place(file, key)
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in state.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    wanted = []
    for names in by_tensor.values():
        held = [name for name in names if name in found]
        if not held:
            raise NotStreamable(f"it holds no weights for {names[0]}")
        if 1 < len(held) < len(names):
            raise NotStreamable(f"it holds some of the tied weights {', '.join(names)}")
        wanted.append((names, [found[name] for name in held]))
    return sorted(wanted, key=lambda one: files.index(one[1][0].file))


class _Checkpoint:
    """Reads flat ranges of tensors; keeps only the file in use mapped."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._open: tuple[str, Any] | None = None

    def read(self, place: _Place, start: int, end: int, out: Tensor) -> None:
        """Fill ``out`` [end - start], in its dtype, with the row-major elements start .. end of a tensor."""
        if self._open is None or self._open[0] != place.file:
            self._stack.close()
            self._open = (place.file, self._stack.enter_context(safe_open(place.file, framework="pt")))
        part = self._open[1].get_slice(place.key)
        shape = part.get_shape()
        if not shape:
            out.copy_(self._open[1].get_tensor(place.key).view(1)[start:end])
            return
        width = 1
        for size in shape[1:]:
            width *= size
        rows = max(1, _PIECE_BYTES // (8 * max(1, width)))
        for row in range(start // width, -(-end // width), rows):
            first, last = max(start, row * width), min(end, (row + rows) * width)
            piece = part[row : -(-last // width)].reshape(-1)
            out[first - start : last - start].copy_(piece[first - row * width : last - row * width])


def _are_equal(parameters: list[nn.Parameter], destination: Destination) -> bool:
    """Whether parameters hold the same values, on all ranks that have a part of them."""
    first, *others = map(held, parameters)
    equal = torch.tensor(float(all(torch.equal(first, other) for other in others)), device=parameters[0].device)
    if destination.ranks > 1:
        dist.all_reduce(equal, op=dist.ReduceOp.MIN)
    return bool(equal)


def _tensor_at(module: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(parent), leaf)
