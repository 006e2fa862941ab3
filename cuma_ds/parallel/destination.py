"""Where the parameters of a backbone go as it is loaded: partitioned over a shard group or whole, quantised or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cuma_ds.parallel.deepspeed_compat import Partitioner, held, whole_parameter, whole_shape
from cuma_ds.parallel.quantised import BLOCK, Kind, QuantisedLinear, pack, quantised_weights
from cuma_ds.parallel.shard_group import ShardGroup

# Fills a flat tensor with the row-major numbers from a start to an end of a weight.
Read = Callable[[int, int, Tensor], object]

# So many numbers are packed at a time. bitsandbytes needs some 16 bytes for each on a CPU.
_PACKED_AT_ONCE = 2**20


@dataclass(frozen=True)
class Destination:
    """The part of each parameter that this process holds.

    make: allocates a parameter of the shape and dtype of one that may be on the meta device; :func:`held` is the part
    to fill.  rank, ranks: which part of how many.  device: where numbers are packed.  quantisation: of the weights of
    linears; None keeps them.
    """

    make: Callable[[nn.Parameter], nn.Parameter]
    rank: int
    ranks: int
    device: torch.device
    quantisation: Kind | None = None

    @classmethod
    def whole(cls, device: torch.device, quantisation: Kind | None) -> Destination:
        """All of each parameter on one device."""

        def make(like: nn.Parameter) -> nn.Parameter:
            return nn.Parameter(torch.empty(like.shape, dtype=like.dtype, device=device), requires_grad=False)

        return cls(make, 0, 1, device, quantisation)

    @classmethod
    def partitioned(cls, stage3: dict[str, object], shards: ShardGroup, quantisation: Kind | None) -> Destination:
        """This rank's part of a shard group.

        Args:
            stage3: DeepSpeed configuration that partitions (``cuma_ds.parallel.backbone.stage3_config``).
            shards: the ranks that hold a parameter between them.
            quantisation: as above.
        """
        partitioner = Partitioner(stage3, shards.group)
        return cls(partitioner.partitioned, shards.rank, len(shards.ranks), partitioner.device, quantisation)

    def filled(self, like: nn.Parameter, read: Read) -> nn.Parameter:
        """A parameter whose part is read from somewhere."""
        parameter = self.make(like)
        part = held(parameter).detach().view(-1)
        start = part.numel() * self.rank
        end = max(start, min(start + part.numel(), whole_shape(parameter).numel()))
        part[end - start :].zero_()
        if end > start:
            read(start, end, part[: end - start])
        return parameter

    def quantised(self, linear: nn.Linear, read: Read) -> QuantisedLinear:
        """A linear whose weight is packed as it is read. Only this rank's blocks are read."""
        assert self.quantisation is not None
        layer = QuantisedLinear(linear, self.quantisation, self.ranks)
        layer.weight, layer.scales = self.make(layer.weight), self.make(layer.scales)
        packed, scales = held(layer.weight).detach(), held(layer.scales).detach()
        packed.zero_()
        scales.zero_()
        first = len(scales) * self.rank * BLOCK
        end = min(first + len(scales) * BLOCK, layer.packing.shape.numel())
        for start in range(first, end, _PACKED_AT_ONCE):
            numbers = torch.empty(min(_PACKED_AT_ONCE, end - start), dtype=layer.packing.dtype, device=self.device)
            read(start, start + len(numbers), numbers)
            some, their_scales = pack(numbers, self.quantisation)
            block = (start - first) // BLOCK
            packed[block * layer.packing.block_bytes :][: len(some)].copy_(some)
            scales[block:][: len(their_scales)].copy_(their_scales)
        return layer

    def linears(self, backbone: nn.Module) -> dict[str, str]:
        """Names of the linears to quantise by the names of their weights, see :func:`quantised_weights`."""
        return {} if self.quantisation is None else quantised_weights(backbone, self.quantisation)


def move(backbone: nn.Module, destination: Destination) -> None:
    """Move the parameters of a model that is loaded already, whole or partitioned over all ranks; those ranks call it.

    One parameter at a time is whole. Tied parameters stay tied.

    Raises:
        ModelError: the model cannot be quantised.
    """
    linears = destination.linears(backbone)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, all_names in names.items():
        with whole_parameter(parameter):
            read = _reader(parameter.detach().flatten())
            if all_names[0] in linears:
                quantise(backbone, linears[all_names[0]], destination, read)
                continue
            moved = destination.filled(parameter, read)
        for name in all_names:
            put(backbone, name, moved)


def quantise(backbone: nn.Module, name: str, destination: Destination, read: Read) -> None:
    """Replace a linear of the model by a quantised one whose weight is read from somewhere."""
    parent, _, leaf = name.rpartition(".")
    linear = backbone.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    setattr(backbone.get_submodule(parent), leaf, destination.quantised(linear, read))


def put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name."""
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent).register_parameter(leaf, parameter)


def _reader(flat: Tensor) -> Read:
    return lambda start, end, out: out.copy_(flat[start:end])
