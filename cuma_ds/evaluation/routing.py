"""Expert load, information of routing about profile fields, and a map of profiles by their routing.

Shapes: N profiles, R routers, E experts, L labels of a profile field.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.manifold import MDS
from torch import Tensor

from cuma_ds.adapters.model import CumaModel
from cuma_ds.data.batch import EncodedExample
from cuma_ds.evaluation.metrics import Name, entropy, mean_by_group
from cuma_ds.evaluation.report.model import RouterLoad
from cuma_ds.inference.forward import RoutingTally, forward_batches

Array = NDArray[np.float64]

# Multidimensional scaling takes time with the square of the profiles; beyond this many, principal components are drawn.
_MOST_SCALED = 1000


def expert_load(tally: RoutingTally) -> list[RouterLoad]:
    """How evenly each router uses its experts, over the tokens of all distinct prompts."""
    rows = []
    for name, load_E, spread in zip(tally.router_names, tally.load_RE, tally.entropy_R, strict=True):
        share_E = load_E / max(load_E.sum(), 1.0)
        experts = len(share_E)
        rows.append(
            RouterLoad(
                router=name,
                load=[round(float(share), 6) for share in share_E],
                load_entropy=round(float(entropy(share_E)) / math.log(experts), 6) if experts > 1 else 1.0,
                gate_entropy=round(float(spread / max(tally.tokens, 1.0)), 6),
                unused=int((share_E < 0.1 / experts).sum()),
            )
        )
    return rows


def mean_gates(
    model: CumaModel, examples: Sequence[EncodedExample], embeddings_NP: Tensor | None, batch_size: int, pad_id: int
) -> Tensor:
    """Mean gate [R, E] over all tokens of the examples; arguments as in :func:`.forward_batches`."""
    total_RE, tokens = torch.zeros(()), 0
    device = next(model.parameters()).device
    for indices, _, _, gates_BRE in forward_batches(
        model, examples, embeddings_NP, batch_size, pad_id, device=device, record=True
    ):
        assert gates_BRE is not None
        for gate_RE, index in zip(gates_BRE, indices, strict=True):
            total_RE = total_RE + gate_RE.double() * len(examples[index].input_ids)
            tokens += len(examples[index].input_ids)
    return total_RE / tokens


def comparable_means(
    questions: Sequence[str], names: Sequence[Name], weights: Sequence[float], gates_MRE: NDArray[np.float32]
) -> dict[Name, Array]:
    """Mean routing [R, E] of each name over the questions that all of them were asked.

    Where there is no such question, the one put to most is taken. Differences then come from the profiles and not from
    the questions.

    Args:
        questions, names, weights: of each of M examples.
        gates_MRE: mean gate weight of each example.
    """
    asked: dict[str, set[Hashable]] = {}
    for question, name in zip(questions, names, strict=True):
        asked.setdefault(question, set()).add(name)
    everybody = set(names)
    common = {question for question, who in asked.items() if who == everybody} or {
        max(asked, key=lambda question: len(asked[question]))
    }
    rows = [index for index, question in enumerate(questions) if question in common]
    return mean_by_group(
        gates_MRE[rows], [names[index] for index in rows], np.array([weights[index] for index in rows])
    )


def mutual_information(joint: ArrayLike) -> Array:
    """I(X; Y) in nats of joint distributions [..., X, Y] (counts or any positive measure are normalised)."""
    p = np.asarray(joint, dtype=np.float64)
    p = p / p.sum(axis=(-2, -1), keepdims=True)
    apart = p.sum(axis=-1, keepdims=True) * p.sum(axis=-2, keepdims=True)
    ratio = np.divide(p, apart, out=np.ones_like(p), where=p > 0)
    return (p * np.log(ratio)).sum(axis=(-2, -1))


@dataclass(frozen=True)
class Information:
    """Information between the expert a token goes to and a field of the profile that asks, in nats, for each router.

    Attributes:
        value_R: as measured; biased upwards when profiles are few.
        null_R, high_R: mean and 95th percentile over random permutations of the labels; None where every profile has a
            label of its own.
    """

    value_R: Array
    null_R: Array | None = None
    high_R: Array | None = None

    @property
    def corrected_R(self) -> Array:
        """What is left above the permutations, never below zero."""
        return self.value_R if self.null_R is None else np.maximum(self.value_R - self.null_R, 0.0)


def field_information(
    gates_NRE: NDArray[np.floating], labels: Sequence[str | None], permutations: int = 200, seed: int = 0
) -> Information:
    """I(field; expert) where a profile is drawn at random and its expert with the probability of its gate.

    Args:
        gates_NRE: mean routing of each profile.
        labels: of each profile; profiles without one are left out.
        permutations: of the labels among the profiles, for the null.
    """
    known = [index for index, label in enumerate(labels) if label is not None]
    gates_NRE = np.asarray(gates_NRE, dtype=np.float64)[known]
    _, code_N = np.unique([str(labels[index]) for index in known], return_inverse=True)
    count = int(code_N.max(initial=-1)) + 1
    flat_NK = gates_NRE.reshape(len(known), -1)

    def measure(codes: NDArray[np.int64]) -> Array:
        joint_LRE = (np.eye(count)[codes].T @ flat_NK).reshape(count, *gates_NRE.shape[1:])
        return mutual_information(joint_LRE.transpose(1, 0, 2))

    value_R = measure(code_N)
    if count == len(known):
        return Information(value_R)
    generator = np.random.default_rng(seed)
    null = np.stack([measure(generator.permutation(code_N)) for _ in range(permutations)])
    return Information(value_R, null.mean(axis=0), np.quantile(null, 0.95, axis=0))


@dataclass(frozen=True)
class CulturalMap:
    """Profiles in the plane, near each other where their routing is alike.

    Attributes:
        xy_N2: coordinates; the axes have no meaning of their own.
        method: MDS | PCA.
        fidelity: rank correlation of distances on the map with distances between routings.
    """

    xy_N2: Array
    method: str
    fidelity: float


def cultural_map(gates_NRE: NDArray[np.floating]) -> CulturalMap:
    """The latent cultural topology in two dimensions, by metric multidimensional scaling of routings.

    It starts from the classical solution and fixes the signs, so the same routings always give the same map.

    Args:
        gates_NRE: routing of at least three profiles.
    """
    vectors = np.asarray(gates_NRE, dtype=np.float64).reshape(len(gates_NRE), -1)
    vectors = np.pad(vectors, ((0, 0), (0, max(0, 2 - vectors.shape[1]))))
    if not np.ptp(vectors, axis=0).any():
        return CulturalMap(np.zeros((len(vectors), 2)), "PCA", float("nan"))
    xy = PCA(2, svd_solver="full").fit_transform(vectors)
    method = "PCA"
    if len(vectors) <= _MOST_SCALED:
        scaling = MDS(2, n_init=1, init="classical_mds", max_iter=1000, eps=1e-6, normalized_stress="auto")
        xy, method = scaling.fit_transform(vectors), "MDS"
        xy = PCA(2, svd_solver="full").fit_transform(xy)
    # The largest coordinate of each axis points up or right.
    xy = xy * np.sign(xy[np.abs(xy).argmax(axis=0), [0, 1]] + 1e-300)
    apart, drawn = pdist(vectors), pdist(xy)
    constant = np.ptp(apart) == 0 or np.ptp(drawn) == 0
    return CulturalMap(xy, method, float("nan") if constant else float(spearmanr(apart, drawn).statistic))
