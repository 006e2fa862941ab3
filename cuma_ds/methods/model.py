"""The interface of everything that trains. Engine, checkpoint and planner know a model by it alone.

Shapes: B rows of a micro batch, K kept positions, V vocabulary, R routers, E experts, N profiles, P profile width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cuma_ds.adapters.balance import RoutingStatistics
from cuma_ds.adapters.experts import Dispatcher
from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch
from cuma_ds.errors import ModelError
from cuma_ds.profiles import ProfileTable

# replicated: the same on every rank. per_expert: dimension 0 counts experts, which expert parallelism spreads over
# ranks.
Placement = Literal["replicated", "per_expert"]


class Trained(NamedTuple):
    """One parameter that trains; ``router`` where it may have a learning rate and a weight decay of its own."""

    name: str
    parameter: nn.Parameter
    placement: Placement
    router: bool = False


class Output(NamedTuple):
    """What a forward gives.

    logits: [B, K, V] at the positions that the batch keeps.  balance_loss: a scalar, while training a method that
    has one.  routing: what the routers did; None for methods without routers.
    """

    logits: Tensor
    balance_loss: Tensor | None = None
    routing: RoutingStatistics | None = None


@dataclass(frozen=True)
class ExpertShapes:
    """The experts of one adapted linear, over all ranks."""

    num_experts: int
    lora_r: int
    in_features: int
    out_features: int
    shared_a: bool

    @property
    def elements(self) -> int:
        """Numbers in all experts that are on one rank only (a shared A is on every rank)."""
        return self.num_experts * self.lora_r * (self.out_features + (0 if self.shared_a else self.in_features))

    @property
    def sent_per_pair(self) -> int:
        """Numbers sent to an expert for one (token, expert) pair: x, or A x where A is shared."""
        return self.lora_r if self.shared_a else self.in_features


@dataclass(frozen=True)
class Spread:
    """How a model is spread over ranks.

    experts: first and number of the experts that stay on this rank, of so many.  dispatcher: brings tokens and
    experts of several ranks together; None where each rank has all experts.  sum_over_ranks: sums a detached tensor
    over all ranks; None on one rank.  whole: context in which the given parameters are whole on every rank; None where
    they always are.
    """

    experts: Callable[[int], tuple[int, int]]
    dispatcher: Dispatcher | None = None
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    whole: Callable[[list[nn.Parameter]], contextlib.AbstractContextManager[None]] | None = None


class AdaptedModel(nn.Module):
    """A causal language model and what trains in or beside it.

    Attributes:
        router_names: a name for each router, in the order of ``Output.routing``.
        switches_off: whether :meth:`disabled` is there.
    """

    router_names: Sequence[str] = ()
    switches_off = True

    @classmethod
    def check(cls, skeleton: nn.Module, config: RunConfig) -> None:
        """Raise a CumaError for a backbone that the recipe's method cannot train, before its weights are loaded.

        Args:
            skeleton: the backbone without weights.
            config: the recipe.
        """

    @property
    def backbone(self) -> nn.Module:
        """The model of transformers inside."""
        raise NotImplementedError

    @property
    def inference_model(self) -> nn.Module:
        """What generates and answers: called as a model of transformers, with all that was trained."""
        return self.backbone

    def forward(self, batch: Batch, table: ProfileTable | None = None) -> Output:
        """Run one micro batch.

        Args:
            batch: on any device.
            table: the run's embedded profiles; None for methods that take none.
        """
        raise NotImplementedError

    def trained_parameters(self) -> Iterator[Trained]:
        """Everything that an optimizer steps on. Names are those of a checkpoint."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Buffers that a checkpoint keeps beside trained parameters, by their key there (``param/profile_mean``)."""
        return {}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors with the keys of :meth:`state` in."""
        for key, buffer in self.state().items():
            buffer.copy_(tensors[key])

    def tensors(self) -> dict[str, Tensor]:
        """Trained parameters, and buffers that belong to them, by name; detached and not copied."""
        return {one.name: one.parameter.detach() for one in self.trained_parameters()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors with the names of :meth:`tensors` in.

        Raises:
            ModelError: names the first missing, unexpected or misshapen tensor.
        """
        copy_tensors(self.tensors(), tensors)

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model is the bare backbone."""
        raise NotImplementedError

    def expert_shapes(self) -> list[ExpertShapes]:
        """The experts of each adapted linear over all ranks; expert parallelism sends them tokens, or their weights."""
        return []

    def place(self, spread: Spread) -> None:
        """Keep what this rank holds; called once, before training."""

    def prepare(self, profiles_NP: Tensor | None, mask_NE: Tensor | None) -> None:
        """Take what the model must know of the training profiles; called before a checkpoint is loaded.

        Args:
            profiles_NP: [N, P] embeddings of the distinct profiles of training examples; None for methods that take
                none.
            mask_NE: share of its gradient that each profile of the run's table sends to each expert
                (``adapters.gradient_groups``).
        """

    def recompute_activations(self) -> None:
        """Recompute activations in the backward pass."""
        self.backbone.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    def end_step(self, load_RE: Tensor | None) -> None:
        """The last call of an optimizer step.

        Args:
            load_RE: [R, E] top-k assignments of the whole step over all ranks; None for methods without routers.
        """


@torch.no_grad()
def copy_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of a model that have the same names and shapes.

    Raises:
        ModelError: names the first missing, unexpected or misshapen tensor.
    """
    for name in sorted(own.keys() ^ tensors.keys()):
        what = "lack" if name in own else "hold"
        raise ModelError(f"the trained tensors {what} {name}; they belong to another model or configuration")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            shape = tuple(tensors[name].shape)
            raise ModelError(f"trained tensor {name} has shape {shape}; this model needs {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])
