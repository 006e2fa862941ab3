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
from cuma_ds.data.batch import Batch
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
    over all ranks; None on one rank.
    """

    experts: Callable[[int], tuple[int, int]]
    dispatcher: Dispatcher | None = None
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None


class AdaptedModel(nn.Module):
    """A causal language model and what trains in or beside it.

    Attributes:
        router_names: a name for each router, in the order of ``Output.routing``.
    """

    router_names: Sequence[str] = ()

    @property
    def backbone(self) -> nn.Module:
        """The model of transformers inside."""
        raise NotImplementedError

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
