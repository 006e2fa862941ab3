"""How surprised a model is by held-out conversations: token-level loss of the assistant's words.

Shapes: M conversations, R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cuma_ds.data.batch import EncodedExample
from cuma_ds.inference.forward import ForwardOptions, RoutingTally, forward_batches


@dataclass(frozen=True)
class ChatLosses:
    """Summed negative log-likelihood and number of assistant tokens of M conversations, and where each was routed.

    Attributes:
        nll: nats, float64 [M].
        tokens: float64 [M].
        gates_MRE: mean gate weight over the tokens, float32 [M, R, E]; None if not recorded.
        routing: of all conversations together.
    """

    nll: NDArray[np.float64]
    tokens: NDArray[np.float64]
    gates_MRE: NDArray[np.float32] | None = None
    routing: RoutingTally = field(default_factory=RoutingTally)

    @property
    def loss(self) -> float:
        """Mean nats per assistant token; its exponential is the perplexity."""
        return float(self.nll.sum() / self.tokens.sum()) if self.tokens.sum() else float("nan")


def chat_losses(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    embeddings_NP: Tensor | None,
    batch_size: int,
    pad_id: int,
    **options: Unpack[ForwardOptions],
) -> ChatLosses:
    """Loss of each conversation's target tokens (arguments as in :func:`cuma_ds.inference.forward.forward_batches`)."""
    nll, tokens = np.zeros(len(examples)), np.zeros(len(examples))
    routing = RoutingTally()
    for indices, batch, logits, gates_BRE in forward_batches(
        model, examples, embeddings_NP, batch_size, pad_id, **options
    ):
        predicted = logits[batch.targets.row_L, batch.targets.position_L]
        losses = (
            torch.nn.functional.cross_entropy(predicted, batch.targets.token_L, reduction="none").double().cpu().numpy()
        )
        rows = batch.targets.row_L.cpu().numpy()
        weights = batch.targets.weight_L.double().cpu().numpy()
        chosen = np.array(indices)[rows]
        np.add.at(nll, chosen, losses * weights)
        np.add.at(tokens, chosen, weights)
        routing.add(model, indices, gates_BRE)
    return ChatLosses(nll, tokens, routing.gates_of(range(len(examples))), routing)
