"""A frozen linear layer whose weight is kept quantised (``model.quantisation``), as in QLoRA (arXiv 2305.14314).

The row-major numbers of the weight are cut into blocks of 64. A block is packed numbers, of 4 or 8 bits each, and one
float32 scale, its largest absolute value. bitsandbytes packs and unpacks, on CPUs and GPUs. Blocks do not depend on
each other, so each rank packs the part that it holds.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuma_ds.errors import ConfigError, ModelError
from cuma_ds.files import quiet_bitsandbytes

Kind = Literal["int8", "nf4"]

BLOCK = 64
# Bytes of the packed numbers of a block, and of its scale.
BLOCK_BYTES: dict[Kind, int] = {"nf4": 32, "int8": 64}
SCALE_BYTES = 4


class Packing(NamedTuple):
    """How a weight is packed.

    shape, dtype: of the unpacked weight.
    """

    kind: Kind
    shape: torch.Size
    dtype: torch.dtype

    @property
    def blocks(self) -> int:
        """Blocks of the weight, of which the last one may be cut short."""
        return -(-self.shape.numel() // BLOCK)

    @property
    def block_bytes(self) -> int:
        """Bytes of the packed numbers of one block."""
        return BLOCK_BYTES[self.kind]


def pack(numbers: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Pack a flat tensor [N] of float numbers.

    Returns:
        The packed numbers, uint8 [N] (int8) or [ceil(N / 2)] (nf4), and the scales, float32 [ceil(N / 64)].
    """
    bnb = bitsandbytes(kind).functional
    if kind == "nf4":
        packed, state = bnb.quantize_4bit(numbers, blocksize=BLOCK, quant_type="nf4")
    else:
        packed, state = bnb.quantize_blockwise(numbers, code=_steps(numbers.device), blocksize=BLOCK)
    return packed.view(-1), state.absmax


def unpack(packed: Tensor, scales: Tensor, packing: Packing) -> Tensor:
    """The weight, in its shape and dtype.

    Args:
        packed, scales: as :func:`pack` returns them, possibly with more blocks at the end, which are not read.
        packing: of the weight.
    """
    bnb = bitsandbytes(packing.kind).functional
    count, scales = packing.shape.numel(), scales[: packing.blocks]
    if packing.kind == "nf4":
        state = bnb.QuantState(
            absmax=scales, shape=packing.shape, dtype=packing.dtype, blocksize=BLOCK, quant_type="nf4"
        )
        return bnb.dequantize_4bit(packed[: (count + 1) // 2].view(-1, 1), state)
    state = bnb.QuantState(absmax=scales, code=_steps(packed.device), blocksize=BLOCK, dtype=packing.dtype)
    return bnb.dequantize_blockwise(packed[:count].view(packing.shape), state)


class QuantisedLinear(nn.Linear):
    """A frozen linear with a quantised weight: x [.., I] -> [.., O].

    Its parameters are on the meta device until they are filled.

    Args:
        linear: the layer that it replaces. Its bias is kept as it is.
        kind: of quantisation.
        parts: ranks that hold the weight between them, whole blocks each.

    Attributes:
        weight: uint8, the packed numbers of all blocks one after another.
        scales: float32, one for each block.
        packing: how both become a weight.
    """

    weight: nn.Parameter
    scales: nn.Parameter

    def __init__(self, linear: nn.Linear, kind: Kind, parts: int = 1) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packing = Packing(kind, torch.Size((linear.out_features, linear.in_features)), linear.weight.dtype)
        blocks = -(-self.packing.blocks // parts) * parts
        packed = torch.empty(blocks * self.packing.block_bytes, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(torch.empty(blocks, device="meta"), requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen product. Neither it nor autograd keeps the unpacked weight."""
        return _Product.apply(x, self.weight, self.scales, self.bias, self.packing)

    def extra_repr(self) -> str:
        """As of the linear, with the kind."""
        return f"{super().extra_repr()}, {self.packing.kind}"


def quantised_weights(backbone: nn.Module, kind: Kind) -> dict[str, str]:
    """The weights to quantise: those of all linears, but the output head and weights that are tied to others.

    Returns:
        Names of linears, by the names of their weights.

    Raises:
        ModelError: the model has other weights than those of linears and embeddings. Names the largest.
    """
    head = backbone.get_output_embeddings()  # type: ignore[operator]
    uses = Counter(id(parameter) for _, parameter in backbone.named_parameters(remove_duplicate=False))
    linears = {
        f"{name}.weight": name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and module is not head and uses[id(module.weight)] == 1
    }
    looked_up = (nn.Linear, nn.Embedding)
    known = {id(p) for module in backbone.modules() if isinstance(module, looked_up) for p in module.parameters()}
    others = {name: p for name, p in backbone.named_parameters() if p.dim() > 1 and id(p) not in known}
    if others:
        name, parameter = max(others.items(), key=lambda one: one[1].numel())
        raise ModelError(
            f"model.quantisation: {kind} takes the weights of linear layers, but this model also has {name} of shape "
            f"{tuple(parameter.shape)} ({len(others)} such weights); use model.quantisation: none"
        )
    return linears


@cache
def bitsandbytes(kind: Kind) -> ModuleType:
    """The library that packs and unpacks.

    Raises:
        ConfigError: it is not installed.
    """
    quiet_bitsandbytes()
    try:
        import bitsandbytes.functional
    except ImportError:
        raise ConfigError(
            f"model.quantisation: {kind} needs the package bitsandbytes, which is not installed; "
            "pip install 'cuma-ds[quantisation]'"
        ) from None
    return bitsandbytes


class _Context(Protocol):
    """What torch gives to the forward and the backward of an autograd function."""

    packing: Packing
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Product(torch.autograd.Function):
    """x W^T + b of a frozen quantised W, which is unpacked in the forward pass and again in the backward pass.

    What is saved are the parameters themselves. ZeRO releases them after the forward of their layer and makes them
    whole again before its backward.
    """

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, packing: Packing
    ) -> Tensor:
        ctx.packing = packing
        ctx.save_for_backward(packed, scales)
        return F.linear(x, unpack(packed, scales, packing), bias)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales = ctx.saved_tensors
        return grads[0] @ unpack(packed, scales, ctx.packing), None, None, None, None


@cache
def _steps(device: torch.device) -> Tensor:
    """The 8-bit numbers between -1 and 1: 127 even steps on each side of zero."""
    code: Tensor = bitsandbytes("int8").functional.create_linear_map(signed=True)
    return code.to(device)
