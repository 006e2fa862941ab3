"""CuMA: a frozen language model with a mixture of LoRA experts routed by what is asked and who is asking (arXiv 2601.04885).

Made by cuma-ds 0.1.0 from its own modules, joined in one file that needs torch and transformers only. Licence: Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
import contextlib
import difflib
import hashlib
import itertools
import json
import math
import re
import torch
import warnings
import weakref
import zlib
from pathlib import Path
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig
from typing import Any, Literal, NamedTuple, Protocol


# From cuma_ds/errors.py

class CumaError(Exception):
    """Base of every error a user can fix. The message is one line: what, where, what was allowed.

    Attributes:
        printed_by_main: all ranks have this error and rank 0 prints it for them.
    """

    printed_by_main = False


class ConfigError(CumaError):
    """A recipe, an override or an option that cannot work."""


class DataError(CumaError):
    """Input data that cannot be read or used as asked."""


class ModelError(CumaError):
    """A model, encoder or adapter that is missing or does not fit."""


class CheckpointError(CumaError):
    """A checkpoint or run folder that is missing, incomplete or belongs to something else."""


class TopologyError(CumaError):
    """A world size, expert-parallel size or ZeRO stage that cannot hold what was asked."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


# From cuma_ds/adapters/config.py

GateNorm = str
Method = str


@dataclass(frozen=True)
class CumaConfig:
    """What the mixture looks like; the keys of ``adapters`` in adapter_config.json."""

    method: Method = 'cuma'
    num_experts: int = 8
    top_k: int = 2
    lora_r: int = 8
    lora_alpha: float = 16.0
    target_modules: tuple[str, ...] = ('q_proj', 'v_proj')
    router: Literal['linear', 'mlp'] = 'linear'
    router_hidden: int = 256
    router_layers: int = 2
    router_bias: bool | None = None
    gate_norm: GateNorm = 'topk_softmax'
    shared_a: bool = False
    share_router: bool = True
    balance_weight: float = 0.01
    gradient_mask: Literal['none', 'dominant', 'groups'] = 'none'
    gradient_groups: dict[str, dict[str, tuple[int, ...]]] | None = None
    dropout: float = 0.0
    profile_dim: int = 0

    @property
    def scaling(self) -> float:
        """alpha / r, the factor on the mixture's output."""
        return self.lora_alpha / self.lora_r

    @property
    def has_router(self) -> bool:
        """False for plain LoRA: one expert, gate 1."""
        return self.method != "lora"

    @property
    def uses_profiles(self) -> bool:
        """Whether routing depends on who is asking."""
        return self.method == "cuma"


# From cuma_ds/ops/reference.py

GATE_NORMS = ("topk_softmax", "softmax", "softmax_topk", "softmax_topk_softmax")
GroupedWay = Literal["compiled", "turns", "no"]


class GateOutput(NamedTuple):
    """What :func:`demographic_gate` returns.

    weight_TK: [T, K] mixture weights, zero for padding.  expert_TK: [T, K] int32, largest weight first, -1 for padding.
    load_E: [E] assignments per expert.  weight_sum_E: [E] summed weights, differentiable.  entropy: [] summed entropy of the gate, nats.
    invalid: [] real tokens left unrouted because a logit is NaN or inf.
    """

    weight_TK: Tensor
    expert_TK: Tensor
    load_E: Tensor
    weight_sum_E: Tensor
    entropy: Tensor
    invalid: Tensor


class Pairs(NamedTuple):
    """The pairs of a token and one of its experts, sorted by expert: what :func:`sort_by_expert` returns.

    order_M: [M] int32, the pair (t * K + k) at each sorted place, -1 past the last one.  position_TK: [T, K] int32, the place of each pair,
    -1 if it has none.  end_E: [E] int32, where each expert's places end (the offsets grouped products take).
    """

    order_M: Tensor
    position_TK: Tensor
    end_E: Tensor


def demographic_gate(
    hidden_logits_TE: Tensor, profile_logits_NE: Tensor | None, profile_index_T: Tensor, top_k: int, norm: str
) -> GateOutput:
    """See :func:`cuma_ds.ops.demographic_gate`."""
    logits_TE = hidden_logits_TE.float() if hidden_logits_TE.dtype in (torch.bfloat16, torch.float16) else hidden_logits_TE
    real_T = profile_index_T >= 0
    if profile_logits_NE is not None:
        logits_TE = logits_TE + profile_logits_NE.to(logits_TE.dtype)[profile_index_T.clamp(min=0)]
    finite_T = logits_TE.detach().isfinite().all(dim=-1)
    routed_T = real_T & finite_T
    logits_TE = logits_TE.masked_fill(~routed_T[:, None], 0.0)
    tokens, experts = logits_TE.shape
    if norm == "softmax":
        expert_TK = torch.arange(experts, device=logits_TE.device).expand(tokens, experts)
        weight_TK = logits_TE.softmax(dim=-1)
    else:
        expert_TK = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        values_TE = logits_TE if norm == "topk_softmax" else logits_TE.softmax(dim=-1)
        weight_TK = values_TE.gather(-1, expert_TK)
        if norm != "softmax_topk":
            weight_TK = weight_TK.softmax(dim=-1)
    weight_TK = weight_TK.masked_fill(~routed_T[:, None], 0.0)
    detached_TK = weight_TK.detach()
    flat = expert_TK.reshape(-1)
    zeros_E = detached_TK.new_zeros(experts)
    return GateOutput(
        weight_TK=weight_TK,
        expert_TK=expert_TK.masked_fill(~routed_T[:, None], -1).to(torch.int32),
        load_E=zeros_E.scatter_add(0, flat, routed_T[:, None].expand_as(expert_TK).reshape(-1).to(zeros_E.dtype)),
        weight_sum_E=zeros_E.scatter_add(0, flat, weight_TK.reshape(-1)),
        entropy=-torch.special.xlogy(detached_TK, detached_TK).sum(),
        invalid=(real_T & ~finite_T).sum().to(detached_TK.dtype),
    )


def dense_gate(weight_TK: Tensor, expert_TK: Tensor, num_experts: int) -> Tensor:
    """The gate as a [T, E] matrix: weights of the chosen experts, zero elsewhere."""
    chosen_TK = expert_TK >= 0
    zeros_TE = weight_TK.new_zeros(weight_TK.shape[0], num_experts)
    return zeros_TE.scatter_add(1, expert_TK.clamp(min=0).long(), weight_TK * chosen_TK)


def gate_scale(z_TER: Tensor, weight_TK: Tensor, expert_TK: Tensor, num_experts: int, scale: float = 1.0) -> Tensor:
    """See :func:`cuma_ds.ops.gate_scale`."""
    return _scaled(z_TER, (scale * dense_gate(weight_TK, expert_TK, num_experts))[:, :, None])


def gate_scale_backward(
    d_out_TER: Tensor,
    z_TER: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    scale: float = 1.0,
    mask_NE: Tensor | None = None,
    profile_index_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`cuma_ds.ops.gate_scale_backward`."""
    gate_TE = scale * dense_gate(weight_TK, expert_TK, d_out_TER.shape[1])
    d_gate_TE = scale * (d_out_TER.to(weight_TK.dtype) * z_TER.to(weight_TK.dtype)).sum(dim=-1)
    d_weight_TK = d_gate_TE.gather(1, expert_TK.clamp(min=0).long()) * (expert_TK >= 0)

    def d_z(share_TE: Tensor) -> Tensor:
        d = d_out_TER * share_TE[:, :, None]
        return (d.sum(dim=1, keepdim=True) if z_TER.shape[1] == 1 else d).to(z_TER.dtype)

    if mask_NE is None or profile_index_T is None:
        nothing = z_TER.new_empty(0)
        return d_z(gate_TE), d_weight_TK, nothing, nothing
    allowed_TE = gate_TE * mask_NE.to(gate_TE.dtype)[profile_index_T.clamp(min=0)] * (profile_index_T >= 0)[:, None]
    return d_z(gate_TE), d_weight_TK, d_z(allowed_TE), _scaled(z_TER, allowed_TE[:, :, None])


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> Pairs:
    """See :func:`cuma_ds.ops.sort_by_expert`."""
    expert_M = expert_TK.reshape(-1).long()
    key_M = expert_M.masked_fill(expert_M < 0, num_experts)
    order_M = key_M.argsort(stable=True)
    place_M = torch.arange(len(order_M), device=order_M.device)
    position_M = torch.empty_like(order_M).scatter(0, order_M, place_M)
    end_E = torch.zeros(num_experts + 1, dtype=torch.long, device=key_M.device).scatter_add(0, key_M, torch.ones_like(key_M)).cumsum(0)[:-1]
    order_M = order_M.masked_fill(place_M >= end_E[-1:], -1)
    position_M = position_M.masked_fill(expert_M < 0, -1)
    return Pairs(order_M.to(torch.int32), position_M.to(torch.int32).view(expert_TK.shape), end_E.to(torch.int32))


def permute_gather(x_TW: Tensor, order_M: Tensor, position_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """See :func:`cuma_ds.ops.permute_gather`."""
    from_M = order_M.clamp(min=0).long()
    rows_MW = x_TW[from_M // position_TK.shape[1]]
    if weight_TK is not None:
        rows_MW = _scaled(rows_MW, weight_TK.reshape(-1)[from_M, None])
    return rows_MW.masked_fill(order_M[:, None] < 0, 0.0)


def permute_scatter(y_MW: Tensor, order_M: Tensor, position_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """See :func:`cuma_ds.ops.permute_scatter`."""
    y_TKW = y_MW[position_TK.clamp(min=0).long()].masked_fill(position_TK[:, :, None] < 0, 0.0)
    if weight_TK is None:
        return y_TKW.sum(dim=1)
    return (y_TKW * weight_TK[:, :, None]).sum(dim=1).to(y_MW.dtype)


def grouped_way(dtype: torch.dtype, device: str) -> GroupedWay:
    """See :func:`cuma_ds.ops.grouped_way`."""
    return "turns" if device == "cpu" and not torch.compiler.is_compiling() else "no"


def grouped_shrink(x_TI: Tensor, weight_EJI: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`cuma_ds.ops.grouped_shrink`. Experts take turns, so that their rows stay in the cache."""
    z_MJ = x_TI.new_empty(len(pairs.order_M), weight_EJI.shape[1])
    for expert, place, token_P in _turns(pairs):
        torch.mm(x_TI.index_select(0, token_P), weight_EJI[expert].T, out=z_MJ[place])
    return z_MJ


def grouped_expand(z_MJ: Tensor, weight_EJI: Tensor, pairs: Pairs, onto_TI: Tensor | None = None) -> Tensor:
    """See :func:`cuma_ds.ops.grouped_expand`."""
    wide = torch.promote_types(z_MJ.dtype, torch.float32)
    shape = (pairs.position_TK.shape[0], weight_EJI.shape[2])
    y_TI = z_MJ.new_zeros(shape, dtype=wide) if onto_TI is None else onto_TI.to(wide, copy=True)
    for expert, place, token_P in _turns(pairs):
        y_TI.index_add_(0, token_P, (z_MJ[place] @ weight_EJI[expert]).to(wide))
    return y_TI.to(z_MJ.dtype)


def grouped_outer(z_MJ: Tensor, x_TI: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`cuma_ds.ops.grouped_outer`."""
    sum_EJI = x_TI.new_zeros(len(pairs.end_E), z_MJ.shape[1], x_TI.shape[1])
    for expert, place, token_P in _turns(pairs):
        torch.mm(z_MJ[place].T, x_TI.index_select(0, token_P), out=sum_EJI[expert])
    return sum_EJI


def _turns(pairs: Pairs) -> Iterator[tuple[int, slice, Tensor]]:
    """Every expert that somebody asks, where its pairs stand, and the tokens they are of."""
    token_M = pairs.order_M.long() // pairs.position_TK.shape[1]
    begin = 0
    for expert, end in enumerate(pairs.end_E.tolist()):
        if end > begin:
            yield expert, slice(begin, end), token_M[begin:end]
        begin = end


def _scaled(rows: Tensor, weight: Tensor) -> Tensor:
    """The product in the wider dtype, rounded once, as the compiled operators do."""
    return (rows * weight).to(rows.dtype)


# From cuma_ds/adapters/mixture.py

Strategy = Literal["dense", "grouped"]


class GradientMask(NamedTuple):
    """Which share of its weight gradients each token may send to each expert.

    mask_NE: [N, E] in [0, 1].  profile_T: [T] int64, each token's row, -1 for padding.
    """

    mask_NE: Tensor
    profile_T: Tensor


def mixture(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    mask: GradientMask | None = None,
    strategy: Strategy | None = None,
    z_TC: Tensor | None = None,
    onto_TO: Tensor | None = None,
) -> Tensor:
    """scale * sum_i g_i B_i A_i x, added to the frozen part if that is given.

    Args:
        x_TD: [T, D].
        weight_TK, expert_TK: [T, K] the gate: mixture weights, and int32 experts, -1 for padding.
        lora_a: [E, r, D], or [r, D] shared by all experts.
        lora_b: [E, O, r].
        scale: alpha / r.
        mask: scales the *weight* gradients a token sends to an expert; outputs, input and gate gradients are untouched.
        strategy: by default the cheaper one, see :func:`cheaper_strategy`.
        z_TC: x times all of ``lora_a``, if :func:`project` made it already. Not with ``mask``: what A learns went another way.
        onto_TO: [T, O] the frozen part, itself left as it is.

    Returns:
        [T, O] in the dtype of ``x_TD``, or of both if ``onto_TO`` has another.
    """
    out_dtype, dtype = x_TD.dtype, compute_dtype(x_TD)
    shared_a = lora_a.dim() == 2
    if strategy is None:
        strategy = "dense" if z_TC is not None and not shared_a else _strategy(x_TD, lora_b, weight_TK.shape[1])
    with without_autocast(x_TD):
        a, b = (_rounded(lora, x_TD) for lora in (lora_a, lora_b))
        x_TD = x_TD.to(dtype)
        learning = mask or (None, None)
        # Where dtypes allow, the frozen part is added while the answer is written.
        begin_TO = onto_TO if onto_TO is not None and onto_TO.dtype == x_TD.dtype == out_dtype else None
        if strategy == "grouped" and not shared_a:
            y_TO = _Grouped.apply(x_TD, weight_TK, a, b, expert_TK, scale, *learning, None, None, begin_TO)
        else:
            learner = (None, None) if mask is None else (x_TD.detach(), a)
            if z_TC is None:
                (z_TC,) = project(x_TD, (a if mask is None else a.detach()).flatten(0, -2))
            if strategy == "dense":
                y_TO = _Dense.apply(z_TC, weight_TK, b, expert_TK, scale, *learning, *learner, begin_TO)
            else:
                y_TO = _Grouped.apply(z_TC, weight_TK, None, b, expert_TK, scale, *learning, *learner, begin_TO)
    if begin_TO is not None:
        return y_TO
    y_TO = y_TO.to(out_dtype)
    return y_TO if onto_TO is None else onto_TO + y_TO


def project(x_TD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x W^T for every W, [T, rows of W] each, in one product: x is read once and its gradient written once.

    Args:
        x_TD: [T, D].
        weights: each [*, D].

    Returns:
        One tensor per weight, in the compute dtype of ``x_TD``.
    """
    dtype = compute_dtype(x_TD)
    with without_autocast(x_TD):
        if len(weights) == 1:
            return (F.linear(x_TD.to(dtype), weights[0].to(dtype)),)
        product = F.linear(x_TD.to(dtype), torch.cat([weight.to(dtype) for weight in weights]))
        return product.split([len(weight) for weight in weights], dim=1)


def all_a(x_TD: Tensor, lora_a: Tensor, lora_b: Tensor, top_k: int) -> Tensor | None:
    """What :func:`mixture` multiplies every token with first, [C, D], for :func:`project`; None where experts multiply their own rows."""
    if lora_a.dim() == 3 and _strategy(x_TD, lora_b, top_k) == "grouped":
        return None
    return _rounded(lora_a, x_TD).flatten(0, -2)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Inside, products have the dtypes they are given."""
    where = x.device.type
    return torch.autocast(where, enabled=False) if torch.amp.is_autocast_available(where) else contextlib.nullcontext()


def _rounded(lora: Tensor, x: Tensor) -> Tensor:
    """As x is, whatever multiplies it: experts that travelled here in the dtype of x give the same answers."""
    return lora.to(x.dtype).to(compute_dtype(x))


def _strategy(x_TD: Tensor, lora_b: Tensor, top_k: int) -> Strategy:
    experts, out_features, rank = lora_b.shape
    return cheaper_strategy(experts, top_k, rank, x_TD.shape[1], out_features, compute_dtype(x_TD), x_TD.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of ``x``, but float32 for 16-bit tensors on a CPU without units for such products, where they are slower."""
    units = {
        torch.bfloat16: lambda: torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
        torch.float16: torch.cpu._is_amx_fp16_supported,
    }
    return torch.float32 if x.device.type == "cpu" and x.dtype in units and not units[x.dtype]() else x.dtype


def cheaper_strategy(
    experts: int, top_k: int, rank: int, in_features: int, out_features: int, dtype: torch.dtype, device: str = "cpu"
) -> Strategy:
    """Dense or grouped, by the work per token (benchmarks/layer.py fits the constants; docs/performance.md has where they come from).

    Dense multiplies E r columns, grouped K r of them but moves K rows of x and of the answer per token.
    """
    way = grouped_way(dtype, device)
    if way == "no":  # then torch's grouped products do it
        bits = torch.finfo(dtype).bits
        if bits == 64 or any(size * bits % 128 for size in (rank, in_features, out_features)):
            return "dense"  # they take neither float64 nor rows that are not multiples of 16 bytes
        if bits == 32 and torch.compiler.is_compiling():
            return "dense"  # nor does torch.compile trace them in float32
    columns_dense, columns_grouped = experts * rank, top_k * rank
    moved_columns = MOVED_COLUMNS.get("compiled" if way == "compiled" else device, MOVED_COLUMNS["cpu"])
    return "grouped" if columns_dense > columns_grouped + moved_columns * top_k else "dense"


# What moving one row costs, in columns of a dense product: for compiled grouped products, CPUs without, and GPUs, which multiply far
# faster than they move.
MOVED_COLUMNS = {"compiled": 4.0, "cpu": 64.0, "cuda": 400.0}


class _Dense(torch.autograd.Function):
    """From z = x A^T on. With a mask, A learns here from ``x_TD``, and z comes from an A that does not learn."""

    @staticmethod
    def forward(
        ctx: Any,
        z_TC: Tensor,
        weight_TK: Tensor,
        lora_b: Tensor,
        expert_TK: Tensor,
        scale: float,
        mask_NE: Tensor | None,
        profile_T: Tensor | None,
        x_TD: Tensor | None,
        lora_a: Tensor | None,
        begin_TO: Tensor | None,
    ) -> Tensor:
        z_TER = z_TC.unflatten(1, (-1, lora_b.shape[2])).contiguous()
        h_TER = gate_scale(z_TER, weight_TK, expert_TK, lora_b.shape[0], scale)
        ctx.scale, ctx.shape_of_a = scale, None if lora_a is None else lora_a.shape
        ctx.save_for_backward(z_TER, weight_TK, lora_b, expert_TK, mask_NE, profile_T, x_TD, h_TER)
        h_TC, b_CO = h_TER.flatten(1), _joined(lora_b)
        return h_TC @ b_CO if begin_TO is None else torch.addmm(begin_TO, h_TC, b_CO)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        z_TER, weight_TK, lora_b, expert_TK, mask_NE, profile_T, x_TD, h_TER = ctx.saved_tensors
        dh_TER = (dy_TO @ _joined(lora_b).T).view_as(h_TER)
        dz, dweight_TK, learning_dz, learning_h = gate_scale_backward(dh_TER, z_TER, weight_TK, expert_TK, ctx.scale, mask_NE, profile_T)
        if mask_NE is None:
            learning_dz, learning_h = dz, h_TER
        da = db = None
        if ctx.needs_input_grad[8]:
            da = (learning_dz.flatten(1).T @ x_TD).view(ctx.shape_of_a)
        if ctx.needs_input_grad[2]:
            db = (learning_h.flatten(1).T @ dy_TO).view(lora_b.shape[0], lora_b.shape[2], -1).transpose(1, 2)
        return dz.flatten(1), dweight_TK, db, None, None, None, None, None, da, dy_TO if ctx.needs_input_grad[9] else None


def _joined(lora_b: Tensor) -> Tensor:
    """[E, O, r] -> [E * r, O]."""
    return lora_b.transpose(1, 2).reshape(-1, lora_b.shape[1])


class _Rows:
    """Rows of x [T, I], each token's as often as it has experts; what follows the last pair in [M, J] is not written, nobody reads it."""

    def __init__(self, x_TI: Tensor, pairs: Pairs) -> None:
        self.x_TI, self.pairs = x_TI, pairs
        self.all_MI = None if _in_place(x_TI) else permute_gather(x_TI, pairs.order_M, pairs.position_TK)

    def shrink(self, weight_EJI: Tensor) -> Tensor:
        """Each row times its expert's matrix, [M, J]."""
        if self.all_MI is None:
            return grouped_shrink(self.x_TI, weight_EJI, self.pairs)
        return _grouped_mm(self.all_MI, weight_EJI.transpose(1, 2), self.pairs.end_E)

    def outer(self, z_MJ: Tensor) -> Tensor:
        """z^T x per expert, [E, J, I]."""
        if self.all_MI is None:
            return grouped_outer(z_MJ, self.x_TI, self.pairs)
        return _grouped_mm(z_MJ.T, self.all_MI, self.pairs.end_E)


def _expand(z_MJ: Tensor, weight_EJI: Tensor, pairs: Pairs, onto_TI: Tensor | None = None) -> Tensor:
    """Each row times its expert's matrix, summed over the experts of a token, and added to what is given: [T, I]."""
    if _in_place(z_MJ):
        return grouped_expand(z_MJ, weight_EJI, pairs, onto_TI)
    y_TI = permute_scatter(_grouped_mm(z_MJ, weight_EJI, pairs.end_E), pairs.order_M, pairs.position_TK)
    return y_TI if onto_TI is None else onto_TI + y_TI


def _in_place(x: Tensor) -> bool:
    """Whether experts multiply rows where they are, instead of all rows at once in the order of the experts."""
    return grouped_way(x.dtype, x.device.type) != "no"


def _grouped_mm(a: Tensor, b: Tensor, end_E: Tensor) -> Tensor:
    """Rows of ``a`` [M, I] times their expert's ``b`` [E, I, J], or the experts' own ``a`` [I, M] times ``b`` [M, J] as [E, I, J]."""
    if a.is_meta or not a.numel():  # torch has neither shapes for float32 on meta nor sums over no rows on CUDA
        return a.new_zeros((a.shape[0], b.shape[2]) if b.dim() == 3 else (len(end_E), a.shape[0], b.shape[1]))
    product = F.grouped_mm(a, b, offs=end_E)
    if b.dim() == 2:  # what an expert without rows gets is left unwritten by some GPUs (pytorch issue 172439)
        product.masked_fill_((end_E.diff(prepend=end_E.new_zeros(1)) == 0)[:, None, None], 0.0)
    return product


class _Grouped(torch.autograd.Function):
    """From rows that are x, each expert having its own A; or z = x A^T with one A for all, which learns here with a mask (``x_TD``)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_TC: Tensor,
        weight_TK: Tensor,
        own_a: Tensor | None,
        lora_b: Tensor,
        expert_TK: Tensor,
        scale: float,
        mask_NE: Tensor | None,
        profile_T: Tensor | None,
        x_TD: Tensor | None,
        shared_a: Tensor | None,
        begin_TO: Tensor | None,
    ) -> Tensor:
        pairs = sort_by_expert(expert_TK, lora_b.shape[0])
        z_MR = permute_gather(rows_TC, pairs.order_M, pairs.position_TK) if own_a is None else _Rows(rows_TC, pairs).shrink(own_a)
        weight_M = scale * weight_TK.flatten()[pairs.order_M.clamp(min=0)]
        h_MR = (z_MR * weight_M[:, None]).to(z_MR.dtype)
        ctx.scale = scale
        own_rows = None if own_a is None else rows_TC
        b_ERO = lora_b.transpose(1, 2)
        if _in_place(rows_TC):
            b_ERO = b_ERO.contiguous()
        ctx.save_for_backward(own_rows, weight_M, own_a, b_ERO, expert_TK, mask_NE, profile_T, x_TD, z_MR, h_MR, *pairs)
        return _expand(h_MR, b_ERO, pairs, begin_TO)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        rows_TD, weight_M, own_a, b_ERO, expert_TK, mask_NE, profile_T, x_TD, z_MR, h_MR, *saved = ctx.saved_tensors
        pairs = Pairs(*saved)
        order_M, position_TK, _ = pairs
        dy = _Rows(dy_TO, pairs)
        dh_MR = dy.shrink(b_ERO)
        dweight_M = ctx.scale * (dh_MR.float() * z_MR).sum(dim=1)
        dweight_TK = dweight_M[position_TK.clamp(min=0)].masked_fill(position_TK < 0, 0.0)
        dz_MR = (dh_MR * weight_M[:, None]).to(dh_MR.dtype)
        learning_dz, learning_h = dz_MR, h_MR
        if mask_NE is not None and profile_T is not None:
            share_M = _share(mask_NE, profile_T, expert_TK).flatten()[order_M.clamp(min=0), None]
            learning_dz, learning_h = ((rows * share_M).to(rows.dtype) for rows in (dz_MR, h_MR))
        drows_TC = d_own_a = d_shared_a = None
        if ctx.needs_input_grad[0]:
            drows_TC = permute_scatter(dz_MR, order_M, position_TK) if own_a is None else _expand(dz_MR, own_a, pairs)
        if ctx.needs_input_grad[2]:
            d_own_a = _Rows(rows_TD, pairs).outer(learning_dz)
        db = dy.outer(learning_h).transpose(1, 2) if ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[9]:
            d_shared_a = permute_scatter(learning_dz, order_M, position_TK).T @ x_TD
        d_begin_TO = dy_TO if ctx.needs_input_grad[10] else None
        return drows_TC, dweight_TK, d_own_a, db, None, None, None, None, None, d_shared_a, d_begin_TO


def _share(mask_NE: Tensor, profile_T: Tensor, expert_TK: Tensor) -> Tensor:
    """The mask of each (token, chosen expert), [T, K]."""
    return mask_NE[profile_T.clamp(min=0)].gather(1, expert_TK.clamp(min=0).long())


# From cuma_ds/adapters/context.py

class TokenIndex:
    """Which profile row and which sequence each of the T tokens of a layer's input belongs to.

    profile_T: [T] int64, row of the profile, -1 for padding.  real_T: [T] bool.  sequence_T: [T] int64, row of the batch.
    """

    def __init__(self, profile_BS: Tensor) -> None:
        batch, length = profile_BS.shape
        self.profile_T = profile_BS.reshape(-1)
        self.real_T = self.profile_T >= 0
        self.row_T = self.profile_T.clamp(min=0)
        self.sequence_T = torch.arange(batch, device=profile_BS.device).repeat_interleave(length)
        self.batch = batch


@dataclass
class RouterStatistics:
    """What one router did in one forward, over real tokens only.

    load_E: assignments per expert (int counts as float32).  weight_sum_E: summed gate weights, differentiable.
    entropy_sum: summed gate entropy in nats.  tokens: number of real tokens.  gate_BE: mean gate per sequence, when recorded.
    """

    load_E: Tensor
    weight_sum_E: Tensor
    entropy_sum: Tensor
    tokens: Tensor
    gate_BE: Tensor | None


@dataclass
class RoutingState:
    """The profiles of one forward and what the routers did with them."""

    profiles_NP: Tensor | None = None
    profile_index: Tensor | None = None
    attention_mask_BS: Tensor | None = None
    gradient_mask_NE: Tensor | None = None
    rows: int = 0
    num_profiles: int = 0
    collect: bool = False
    record_sequences: bool = False
    statistics: dict[int, RouterStatistics] = field(default_factory=dict)
    _indices: dict[tuple[int, int], TokenIndex] = field(default_factory=dict)

    def tokens(self, x: Tensor) -> TokenIndex:
        """Locate the tokens of a layer's input ``x`` ([B, S, D], or [T, D] flattened) in the batch.

        A batch that generation expanded (beams, several returned sequences) repeats each profile in place. With a KV cache the
        input holds the last S positions of the attention mask.

        Raises:
            ModelError: the input's tokens cannot be those of the batch.
        """
        if x.dim() >= 3:
            batch, length = x.shape[0], x.shape[1:-1].numel()
        else:
            batch, length = self.rows, x.shape[0] // max(self.rows, 1)
        if self.rows == 0 or batch % self.rows or (x.dim() < 3 and batch * length != x.shape[0]):
            raise ModelError(
                f"an adapted layer received an input of shape {tuple(x.shape)} while the batch has {self.rows} sequences; "
                "only layers that see every token of the batch can be adapted"
            )
        key = (batch, length)
        if key not in self._indices:
            self._indices[key] = TokenIndex(self._profile_BS(batch, length, x.device))
        return self._indices[key]

    def _profile_BS(self, batch: int, length: int, device: torch.device) -> Tensor:
        assert self.profile_index is not None
        index = self.profile_index.to(device)
        index_BS = index[:, None].expand(-1, length) if index.dim() == 1 else index[:, -length:]
        mask_BS = self.attention_mask_BS
        if mask_BS is not None and mask_BS.dim() == 2 and mask_BS.shape[1] >= length:
            index_BS = index_BS.masked_fill(mask_BS[:, -length:].to(device) == 0, -1)
        return index_BS.repeat_interleave(batch // self.rows, dim=0)


class RoutingContext:
    """Shared by all adapted layers of one model; holds the state of the forward that is running or ran last.

    The state stays after the forward so that activation checkpointing can recompute with it.
    """

    def __init__(self) -> None:
        self.state = RoutingState()
        self.enabled = True

    def collect(self, router_index: int, gate: GateOutput, tokens: TokenIndex) -> None:
        """Add one router's gate to the statistics of this forward (once per router, never while recomputing)."""
        if not self.state.collect:
            return
        gate_BE = None
        if self.state.record_sequences:
            gate_TE = dense_gate(gate.weight_TK.detach(), gate.expert_TK, len(gate.load_E))
            sums_BE = gate_TE.new_zeros(tokens.batch, gate_TE.shape[1]).index_add_(0, tokens.sequence_T, gate_TE)
            counts_B = gate_TE.new_zeros(tokens.batch).index_add_(0, tokens.sequence_T, tokens.real_T.to(gate_TE.dtype))
            gate_BE = sums_BE / counts_B.clamp(min=1)[:, None]
        self.state.statistics[router_index] = RouterStatistics(
            gate.load_E, gate.weight_sum_E, gate.entropy, tokens.real_T.sum().to(gate.load_E.dtype), gate_BE
        )

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """``context_fn`` of torch.utils.checkpoint: recompute with the state this forward had, without counting twice."""
        return contextlib.nullcontext(), self._replay(self.state)

    @contextlib.contextmanager
    def _replay(self, state: RoutingState) -> Iterator[None]:
        current = self.state
        self.state = replace(state, collect=False)
        try:
            yield
        finally:
            self.state = current


# From cuma_ds/adapters/balance.py

@dataclass
class RoutingStatistics:
    """All routers' statistics of one forward, over real tokens.

    load_RE: [R, E] top-k assignments.  weight_sum_RE: [R, E] summed gate weights (differentiable).  entropy_R: [R] summed gate
    entropy, nats.  tokens: [] number of real tokens.  gate_RBE: mean gate per sequence, only when recorded.
    """

    load_RE: Tensor
    weight_sum_RE: Tensor
    entropy_R: Tensor
    tokens: Tensor
    gate_RBE: Tensor | None

    @classmethod
    def stack(cls, by_router: dict[int, RouterStatistics]) -> RoutingStatistics | None:
        """Collect the routers in module order; None when nothing was routed."""
        if not by_router:
            return None
        rows = [by_router[index] for index in sorted(by_router)]
        device = rows[0].load_E.device
        gates = [row.gate_BE.to(device) for row in rows if row.gate_BE is not None]
        return cls(
            load_RE=torch.stack([row.load_E.to(device) for row in rows]),
            weight_sum_RE=torch.stack([row.weight_sum_E.to(device) for row in rows]),
            entropy_R=torch.stack([row.entropy_sum.to(device) for row in rows]),
            tokens=rows[0].tokens,
            gate_RBE=torch.stack(gates) if gates else None,
        )


def balance_loss(statistics: RoutingStatistics, sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """L_balance = sum over routers of E * sum_i f_i p_i, over real tokens only.

    f_i is the share of the top-k assignments that went to expert i, p_i the mean gate weight of i; f carries no gradient.

    Args:
        statistics: of one forward.
        sum_over_ranks: sums a detached tensor over the data-parallel ranks. With it, f and the token count are those of all
            ranks together, and the *mean over ranks* of the returned value is the loss of the joined batch, so that the
            number of ranks does not change what is learned.

    Returns:
        A scalar; 1 per router at perfect balance. Zero when there is no real token.
    """
    load_RE, tokens = statistics.load_RE, statistics.tokens
    world: Tensor | float = 1.0
    if sum_over_ranks is not None:
        packed = torch.cat([load_RE.flatten(), tokens[None], torch.ones_like(tokens)[None]])
        packed = sum_over_ranks(packed)
        load_RE, tokens, world = packed[:-2].view_as(load_RE), packed[-2], packed[-1]
    share_RE = load_RE / load_RE.sum(dim=1, keepdim=True).clamp(min=1)
    mean_RE = statistics.weight_sum_RE * world / tokens.clamp(min=1)
    return load_RE.shape[1] * (share_RE * mean_RE).sum()


# From cuma_ds/adapters/experts.py

class Experts(nn.Module):
    """E low-rank experts: A_i [r, D] and B_i [O, r]; A may be one for all (HydraLoRA style).

    Under expert parallelism this module holds the experts ``first .. first + E_local`` of ``num_experts``.

    lora_a: [E_local, r, D], or [r, D] when shared.  lora_b: [E_local, O, r].  Both float32 unless an engine casts them.
    """

    def __init__(self, config: CumaConfig, in_features: int, out_features: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.first = 0
        self.shared_a = config.shared_a
        self.scaling = config.scaling
        a_shape = (config.lora_r, in_features) if config.shared_a else (config.num_experts, config.lora_r, in_features)
        self.lora_a = nn.Parameter(torch.empty(a_shape, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.empty(config.num_experts, out_features, config.lora_r, dtype=torch.float32, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """A as LoRA initialises it (Kaiming uniform, a = sqrt 5), B at zero: the adapted model starts as the backbone."""
        bound = 1 / math.sqrt(self.lora_a.shape[-1])
        self.lora_a.copy_((torch.rand(self.lora_a.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound)
        self.lora_b.zero_()

    def sharded_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters with an expert dimension (dimension 0), by name; a shared A has none."""
        return {"lora_b": self.lora_b} if self.shared_a else {"lora_a": self.lora_a, "lora_b": self.lora_b}

    def forward(
        self, x_TD: Tensor, gate: GateOutput, dispatcher: Dispatcher, mask: GradientMask | None, z_TC: Tensor | None, frozen_TO: Tensor
    ) -> Tensor:
        """W0 x + (alpha / r) * sum_i g_i B_i A_i x, [T, O]; run as a module so that parameter-sharding hooks see it."""
        return dispatcher.mix(x_TD, gate, self, mask, z_TC, frozen_TO)

    def keep(self, first: int, count: int) -> None:
        """Hold only the experts ``first .. first + count`` from now on (expert parallelism)."""
        for name, parameter in self.sharded_parameters().items():
            setattr(self, name, nn.Parameter(parameter.detach()[first : first + count].clone()))
        self.first = first


class Dispatcher(Protocol):
    """Brings tokens and experts together; the expert-parallel ones live in cuma_ds.parallel."""

    def first_rows(self, x_TD: Tensor, experts: Experts, top_k: int) -> Tensor | None:
        """What multiplies every token of the next :meth:`mix` first, [C, D], so that the router's product can do it; None to keep it."""
        ...

    def begin(self, x_TD: Tensor) -> None:
        """What the next :meth:`mix` reads is on its way; the work given to the device from here on may run beside that mix."""
        ...

    def mix(
        self, x_TD: Tensor, gate: GateOutput, experts: Experts, mask: GradientMask | None, z_TC: Tensor | None, frozen_TO: Tensor
    ) -> Tensor:
        """The frozen part [T, O] + (alpha / r) * sum_i g_i B_i A_i x for every token; z [T, C] is x times :meth:`first_rows`, if made."""
        ...


class LocalDispatcher:
    """All experts are here.

    Args:
        stacked: whether A can be read before the experts run; not where parameters come and go with their module (ZeRO-3).
    """

    def __init__(self, stacked: bool = True) -> None:
        self.stacked = stacked

    def first_rows(self, x_TD: Tensor, experts: Experts, top_k: int) -> Tensor | None:
        """See :class:`Dispatcher`."""
        return all_a(x_TD, experts.lora_a, experts.lora_b, top_k) if self.stacked else None

    def begin(self, x_TD: Tensor) -> None:
        """See :class:`Dispatcher`."""

    def mix(
        self, x_TD: Tensor, gate: GateOutput, experts: Experts, mask: GradientMask | None, z_TC: Tensor | None, frozen_TO: Tensor
    ) -> Tensor:
        """See :class:`Dispatcher`."""
        a, b, scale = experts.lora_a, experts.lora_b, experts.scaling
        return mixture(x_TD, gate.weight_TK, gate.expert_TK, a, b, scale, mask, z_TC=z_TC, onto_TO=frozen_TO)


# From cuma_ds/adapters/router.py

class Router(nn.Module):
    """s = W_h h + W_p e_d (method, step 2), or an MLP whose first layer is that sum.

    The concatenation [h (+) e_d] is never built: its second half is one small product per *profile*, looked up per token.
    Layers that share a router (q,k,v; gate,up) ask with the same input; the gate is computed for the first of them only.
    """

    def __init__(self, config: CumaConfig, in_features: int, index: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.sharers = 1
        mlp = config.router == "mlp"
        bias = mlp if config.router_bias is None else config.router_bias
        width = config.router_hidden if mlp else config.num_experts

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=torch.float32, device=device))

        self.weight_h = empty(width, in_features)
        self.weight_p = empty(width, config.profile_dim) if config.profile_dim else None
        self.bias = empty(width) if bias else None
        hidden = [width] * (config.router_layers - 1) + [config.num_experts] if mlp else []
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias, device=device) for i, o in itertools.pairwise(hidden))
        self._cached: _CachedGate | None = None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """W_h ~ N(0, 0.02^2), W_p ~ N(0, 1/P), later layers ~ N(0, 1/H), biases 0."""
        _normal_(self.weight_h, 0.02, generator)
        if self.weight_p is not None:
            _normal_(self.weight_p, 1 / math.sqrt(self.weight_p.shape[1]), generator)
        if self.bias is not None:
            self.bias.zero_()
        for layer in self._linears():
            _normal_(layer.weight, 1 / math.sqrt(layer.in_features), generator)
            if layer.bias is not None:
                layer.bias.zero_()

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def logits(
        self, h_TD: Tensor, profiles_NP: Tensor | None, profile_T: Tensor, beside_CD: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the gate adds up, in float32 (float64 stays): the tokens' logits [T, E], and the profiles' [N, E] or None; h beside^T.

        Args:
            h_TD: [T, D] the adapted linear's input.
            profiles_NP: [N, P] standardised embeddings of the batch's profiles, or None (semantic-only routing).
            profile_T: [T] int64, each token's row in ``profiles_NP``, -1 for padding.
            beside_CD: other rows that ``h_TD`` is to be multiplied with in the same product; their [T, C] comes back last, else None.
        """
        first_TW, *others = project(h_TD, self.weight_h, *([] if beside_CD is None else [beside_CD]))
        s_TW, z_TC = _at_least_float32(first_TW), others[0] if others else None
        bias_W = None if self.bias is None else self.bias.to(s_TW.dtype)
        who_NW = None
        if self.weight_p is not None and profiles_NP is not None:
            weight_p = _at_least_float32(self.weight_p)
            who_NW = F.linear(profiles_NP.to(weight_p.dtype), weight_p).to(s_TW.dtype)
        layers = self._linears()
        if not layers:
            return (s_TW if bias_W is None else s_TW + bias_W), who_NW, z_TC
        if who_NW is not None:
            # An embedding: its gradient is summed in one fixed order, and faster than that of an indexed tensor.
            s_TW = s_TW + F.embedding(profile_T.clamp(min=0), who_NW if bias_W is None else who_NW + bias_W)
        elif bias_W is not None:
            s_TW = s_TW + bias_W
        for layer in layers:
            s_TW = F.dropout(F.relu(s_TW), self.config.dropout, self.training)
            s_TW = F.linear(s_TW, layer.weight.to(s_TW.dtype), None if layer.bias is None else layer.bias.to(s_TW.dtype))
        return s_TW, None, z_TC

    def forward(
        self, x: Tensor, context: RoutingContext, is_leader: bool = True, beside_CD: Tensor | None = None
    ) -> tuple[GateOutput, Tensor | None]:
        """The gate of one layer input, and x beside^T where the gate had to be computed.

        Args:
            x: [B, S, D] or [T, D].
            context: profiles and masks of this forward.
            is_leader: whether the caller is the first of the layers sharing this router; it alone counts statistics.
            beside_CD: as in :meth:`logits`.
        """
        cached = self._cached
        if cached is not None and cached.x() is x and cached.state is context.state and cached.grad == torch.is_grad_enabled():
            cached.readers -= 1
            if not cached.readers:
                self._cached = None
            return cached.gate, None
        tokens = context.state.tokens(x)
        with without_autocast(x):
            x_TD, profiles_NP = x.reshape(-1, x.shape[-1]), context.state.profiles_NP
            hidden_TE, profile_NE, z_TC = self.logits(x_TD, profiles_NP, tokens.profile_T, beside_CD)
        gate = demographic_gate(hidden_TE, profile_NE, tokens.profile_T, self.config.top_k, self.config.gate_norm)
        if is_leader:
            context.collect(self.index, gate, tokens)
        if self.sharers > 1:
            self._cached = _CachedGate(weakref.ref(x), context.state, torch.is_grad_enabled(), gate, self.sharers - 1)
        return gate, z_TC


@dataclass
class _CachedGate:
    """A gate waiting for the other layers that share the router; dropped when the last has read it."""

    x: weakref.ref[Tensor]
    state: RoutingState
    grad: bool
    gate: GateOutput
    readers: int


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _normal_(weight: Tensor, std: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float32) * std)


# From cuma_ds/adapters/layer.py

class AdaptedLinear(nn.Module):
    """Wraps a frozen linear (never copies it) and adds the mixture of experts.

    Args:
        base: the frozen linear, [.., D] -> [.., O].
        config: the adapters' configuration.
        context: who is asking; shared by all layers of the model.
        router: this layer's router, or None for plain LoRA.
        owns_router: whether the router is registered here; layers that share one leave it to the first of them.
    """

    def __init__(
        self,
        base: nn.Module,
        config: CumaConfig,
        context: RoutingContext,
        experts: Experts,
        router: Router | None,
        owns_router: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.context = context
        self.experts = experts
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.owns_router = owns_router
        if owns_router:
            self.router = router
        # A tuple keeps the shared router out of this module's parameters.
        self._router_ref = (router,)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] or [T, D] -> the same with O features, in the dtype of ``x``."""
        if not self.context.enabled:
            return self.base(x)
        tokens = self.context.state.tokens(x)
        (router,) = self._router_ref
        x_TD = F.dropout(x.reshape(-1, x.shape[-1]), self.config.dropout, self.training)
        if router is None:
            gate, z_TC = _whole_gate(tokens), None
        else:
            gate, z_TC = router(x, self.context, self.owns_router, self._first_rows(x_TD))
        mask = self._gradient_mask(gate, tokens)
        self.dispatcher.begin(x_TD)
        out = self.base(x)
        return self.experts(x_TD, gate, self.dispatcher, mask, z_TC, out.reshape(-1, out.shape[-1])).view(out.shape)

    def _first_rows(self, x_TD: Tensor) -> Tensor | None:
        """A of all experts, to be multiplied in the router's product, where both read the same x and learn from the same tokens."""
        dropped = self.training and self.config.dropout > 0
        masked = self.config.gradient_mask != "none" or self.context.state.gradient_mask_NE is not None
        return None if dropped or masked else self.dispatcher.first_rows(x_TD, self.experts, self.config.top_k)

    def _gradient_mask(self, gate: GateOutput, tokens: TokenIndex) -> GradientMask | None:
        """M of the method's table, or None for all ones (the paper)."""
        state = self.context.state
        mask_NE = state.gradient_mask_NE
        if mask_NE is None and self.config.gradient_mask == "dominant" and self.training:
            gate_TE = dense_gate(gate.weight_TK.detach(), gate.expert_TK, self.config.num_experts)
            mass_NE = gate_TE.new_zeros(state.num_profiles, self.config.num_experts).index_add_(0, tokens.row_T, gate_TE)
            mask_NE = F.one_hot(mass_NE.argmax(dim=1), self.config.num_experts).to(mass_NE.dtype)
        return None if mask_NE is None else GradientMask(mask_NE, tokens.profile_T)


def _whole_gate(tokens: TokenIndex) -> GateOutput:
    """Plain LoRA: the one expert answers every real token."""
    weight_T1 = tokens.real_T[:, None].to(torch.float32)
    total_1 = weight_T1.sum(dim=0)
    nothing = total_1.new_zeros(())
    return GateOutput(weight_T1, tokens.real_T[:, None].to(torch.int32) - 1, total_1, total_1, nothing, nothing)


# From cuma_ds/adapters/model.py

class RoutingRecord:
    """What the routers did while recording: one [R, B, E] float32 tensor (mean gate over real tokens) per forward."""

    def __init__(self, router_names: list[str]) -> None:
        self.router_names = router_names
        self.gates: list[Tensor] = []


class CumaModel(nn.Module):
    """Made by :func:`cuma_ds.inject_adapters`; behaves like the Hugging Face model it wraps, plus profiles.

    Attributes:
        base_model: the frozen backbone, its target linears wrapped by :class:`AdaptedLinear`.
        config: the adapters' configuration.
        router_names: the first adapted linear of each router, in module order.
        profile_mean, profile_scale: [P] and [] float32 buffers; e_d goes to the routers as ``(e_d - mean) * scale``.
        sum_over_ranks: set by a distributed engine, so that ``balance_loss`` is that of all ranks' batches joined.
    """

    profile_mean: Tensor
    profile_scale: Tensor

    def __init__(self, base_model: nn.Module, config: CumaConfig, context: RoutingContext, router_names: list[str]) -> None:
        super().__init__()
        self.base_model = base_model
        self.config = config
        self.context = context
        self.router_names = router_names
        device = next(base_model.parameters()).device
        self.register_buffer("profile_mean", torch.zeros(config.profile_dim, device=device))
        self.register_buffer("profile_scale", torch.ones((), device=device))
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None
        self._recording: RoutingRecord | None = None
        head = getattr(base_model, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Linear):
            head.register_forward_pre_hook(_contiguous_input)

    def forward(
        self,
        *args: Any,
        attention_mask: Tensor | None = None,
        profile_embeddings: Tensor | None = None,
        profile_index: Tensor | None = None,
        gradient_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the backbone's own forward with the routers seeing who is asking.

        Args:
            attention_mask: [B, S_total]; zeros are padding and are never routed.
            profile_embeddings: [N, P] raw encoder output (N = B without ``profile_index``); centred and scaled here.
            profile_index: [B] or [B, S] int64 rows of ``profile_embeddings``; -1 keeps a row out of all statistics.
            gradient_mask: [N, E] in [0, 1], share of the weight gradients each profile may send to each expert.

        Returns:
            The backbone's output. While training it also carries ``balance_loss`` (a scalar, summed over routers) unless
            ``config.balance_weight`` is 0.

        Raises:
            ModelError: profiles missing, of the wrong width or number.
        """
        rows = self._rows(args, kwargs)
        self._open(rows, attention_mask, profile_embeddings, profile_index, gradient_mask, collect=True)
        out = self.base_model(*args, attention_mask=attention_mask, **kwargs)
        statistics = self.routing_statistics()
        if self._recording is not None and statistics is not None and statistics.gate_RBE is not None:
            self._recording.gates.append(statistics.gate_RBE.float())
        if self.training and statistics is not None and self.config.balance_weight > 0:
            out.balance_loss = balance_loss(statistics, self.sum_over_ranks)
        return out

    @torch.no_grad()
    def generate(self, *args: Any, profile_embeddings: Tensor | None = None, **kwargs: Any) -> Any:
        """The backbone's ``generate``; each sequence keeps its profile through beams, samples and the KV cache.

        Args:
            profile_embeddings: [B, P], one raw embedding per prompt.
        """
        self._open(self._rows(args, kwargs), None, profile_embeddings, None, None, collect=False)
        return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def routing_statistics(self) -> RoutingStatistics | None:
        """Statistics of the last forward (None without routers)."""
        return RoutingStatistics.stack(self.context.state.statistics)

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        for value in (kwargs.get("input_ids"), kwargs.get("inputs"), kwargs.get("inputs_embeds"), *args):
            if isinstance(value, Tensor):
                return value.shape[0]
        raise ModelError("the model was called without input_ids or inputs_embeds")

    def _open(
        self,
        rows: int,
        attention_mask: Tensor | None,
        profile_embeddings: Tensor | None,
        profile_index: Tensor | None,
        gradient_mask: Tensor | None,
        collect: bool,
    ) -> None:
        width = self.config.profile_dim
        if profile_embeddings is not None and not width:
            raise ModelError("profile_embeddings were given, but these adapters take none (profile_dim is 0)")
        if width and self.context.enabled:
            if profile_embeddings is None:
                raise ModelError(f"profile_embeddings are missing; these adapters need one row of width {width} per sequence")
            if profile_embeddings.dim() != 2 or profile_embeddings.shape[1] != width:
                raise ModelError(f"profile_embeddings have shape {tuple(profile_embeddings.shape)}; expected [sequences, {width}]")
        device = self.profile_scale.device
        if profile_index is None:
            profile_index = torch.arange(rows, device=device)
        if profile_index.shape[0] != rows:
            raise ModelError(f"profile_index has {profile_index.shape[0]} rows for {rows} sequences")
        num_profiles = rows if profile_embeddings is None else profile_embeddings.shape[0]
        if profile_index.device.type == "cpu" and profile_index.numel() and int(profile_index.max()) >= num_profiles:
            raise ModelError(f"profile_index reaches {int(profile_index.max())}, but only {num_profiles} profile embeddings were given")
        profiles_NP = None
        if width and profile_embeddings is not None:
            mean = self.profile_mean
            profiles_NP = (profile_embeddings.to(mean.device, mean.dtype) - mean) * self.profile_scale
        self.context.state = RoutingState(
            profiles_NP=profiles_NP,
            profile_index=profile_index,
            attention_mask_BS=attention_mask,
            gradient_mask_NE=gradient_mask,
            rows=rows,
            num_profiles=num_profiles,
            collect=collect,
            record_sequences=self._recording is not None,
        )

    @torch.no_grad()
    def set_profile_standardisation(self, embeddings_NP: Tensor, rms: float | None) -> None:
        """Centre on the training profiles and scale to the given RMS; None leaves raw embeddings.

        Unit-norm sentence embeddings leave the router collapsed; the centring and scale are part of the model.

        Args:
            embeddings_NP: [N, P] raw embeddings of the distinct training profiles.
            rms: root mean square of the standardised embeddings.
        """
        if embeddings_NP.dim() != 2 or embeddings_NP.shape[1] != self.config.profile_dim:
            shape = tuple(embeddings_NP.shape)
            raise ModelError(f"profile embeddings have shape {shape}; the adapters take width {self.config.profile_dim}")
        if rms is None:
            return
        embeddings = embeddings_NP.to(self.profile_mean.device, torch.float64)
        mean = embeddings.mean(dim=0)
        spread = (embeddings - mean).square().mean().sqrt()
        self.profile_mean.copy_(mean)
        # One single profile has no spread: it maps to zero, whatever the scale.
        self.profile_scale.copy_(rms / spread if spread > 1e-8 else torch.ones_like(spread))

    @contextlib.contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Inside, the model is the bare backbone."""
        self.context.enabled, before = False, self.context.enabled
        try:
            yield
        finally:
            self.context.enabled = before

    @contextlib.contextmanager
    def recording_routing(self) -> Iterator[RoutingRecord]:
        """Inside, every forward appends its mean gate per router and sequence to the record."""
        self._recording, before = RoutingRecord(self.router_names), self._recording
        try:
            yield self._recording
        finally:
            self._recording = before

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, with the profiles this forward had."""
        how = {"use_reentrant": False, "context_fn": self.context.checkpoint_contexts}
        enable = getattr(self.base_model, "activation_checkpointing_enable", None)  # its name in later transformers 5
        if enable is None:
            self.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # type: ignore[operator]
        else:
            enable(activation_checkpointing_kwargs=how)

    def adapted_layers(self) -> Iterator[tuple[str, AdaptedLinear]]:
        """The adapted linears by their name in the backbone, in module order."""
        for name, module in self.base_model.named_modules():
            if isinstance(module, AdaptedLinear):
                yield name, module

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that trains, by name: ``<linear>.experts.lora_a`` and the like."""
        for name, layer in self.adapted_layers():
            parts: dict[str, nn.Module] = {"experts": layer.experts}
            if layer.owns_router and layer.router is not None:
                parts["router"] = layer.router
            for part, module in parts.items():
                for inner, parameter in module.named_parameters():
                    yield f"{name}.{part}.{inner}", parameter

    def adapter_state(self) -> dict[str, Tensor]:
        """Everything the backbone does not have: trained parameters and the profile standardisation (detached, not copied)."""
        return {name: parameter.detach() for name, parameter in self.adapter_parameters()} | self.standardisation()

    def standardisation(self) -> dict[str, Tensor]:
        """The buffers that centre and scale profile embeddings; none when routing knows no profiles."""
        return {"profile_mean": self.profile_mean, "profile_scale": self.profile_scale} if self.config.profile_dim else {}

    @torch.no_grad()
    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Copy a state made by :meth:`adapter_state` in.

        Raises:
            ModelError: names the first missing, unexpected or misshapen tensor.
        """
        own = self.adapter_state()
        foreign = "it belongs to another model or configuration"
        if missing := sorted(own.keys() - state.keys()):
            raise ModelError(f"the adapter state lacks {missing[0]} ({len(missing)} missing); {foreign}")
        if unknown := sorted(state.keys() - own.keys()):
            raise ModelError(f"the adapter state holds {unknown[0]} ({len(unknown)} unexpected); {foreign}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ModelError(f"adapter tensor {name} has shape {tuple(state[name].shape)}; this model needs {tuple(tensor.shape)}")
            tensor.copy_(state[name])


def _contiguous_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``logits_to_keep`` hands the head a strided slice, for which torch copies the whole vocabulary matrix once per sequence."""
    return (args[0].contiguous(), *args[1:])


# From cuma_ds/adapters/inject.py

# Linears of one layer that read the same input, and so may share one router.
_SHARING = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)


def inject_adapters(base: nn.Module, config: CumaConfig, seed: int = 0) -> CumaModel:
    """Freeze ``base`` and put a mixture of LoRA experts beside every linear that ``config.target_modules`` names.

    The base is changed in place (its linears are wrapped, not copied). Adapters are float32, on the device of the linear they
    adapt, and initialised from ``seed`` and the module's name alone, so that every rank and every topology starts equal.

    Args:
        base: a causal language model of transformers (any module with named linears works).
        config: sizes and variants.
        seed: seed of the initialisation.

    Returns:
        The model to train and to call; see :class:`CumaModel`.

    Raises:
        ModelError: a target matches nothing, or ``base`` already has adapters.
    """
    if any(isinstance(module, AdaptedLinear) for module in base.modules()):
        raise ModelError("this model already has adapters; load a fresh backbone before injecting again")
    base.requires_grad_(False)
    context = RoutingContext()
    routers: dict[tuple[str, object], Router] = {}
    names: list[str] = []
    for name in find_targets(base, config.target_modules):
        parent_name, _, leaf = name.rpartition(".")
        parent = base.get_submodule(parent_name)
        linear = base.get_submodule(name)
        in_features, out_features = _features(linear)
        device = next(linear.parameters()).device
        experts = Experts(config, in_features, out_features, device)
        experts.reset_parameters(_generator(seed, name, "experts"))
        router, owns_router = None, False
        if config.has_router:
            key = (parent_name, _sharing_key(leaf) if config.share_router else leaf)
            owns_router = key not in routers
            if owns_router:
                routers[key] = Router(config, in_features, len(routers), device)
                routers[key].reset_parameters(_generator(seed, name, "router"))
                names.append(name)
            else:
                routers[key].sharers += 1
            router = routers[key]
            if router.weight_h.shape[1] != in_features:
                raise ModelError(
                    f"{name} reads {in_features} features but its router {router.weight_h.shape[1]}; set adapters.share_router: false"
                )
        setattr(parent, leaf, AdaptedLinear(linear, config, context, experts, router, owns_router))
    return CumaModel(base, config, context, names)


def find_targets(base: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Names of the linears that ``target_modules`` mean, in module order.

    Raises:
        ModelError: a target matches nothing.
    """
    linears = [name for name, module in base.named_modules() if _is_linear(module)]
    chosen: set[str] = set()
    for target in target_modules:
        matches = [name for name in linears if name == target or name.endswith("." + target)]
        if target == "all-linear":
            head = getattr(base, "get_output_embeddings", lambda: None)()
            matches = [name for name in linears if base.get_submodule(name) is not head]
        if not matches:
            leaves = sorted({name.rpartition(".")[2] for name in linears})
            raise ModelError(
                f"adapters.target_modules: {target!r} matches no linear layer of the model{nearest(target, leaves)}; "
                f"it has {', '.join(leaves)} (or all-linear)"
            )
        chosen.update(matches)
    return [name for name in linears if name in chosen]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _features(linear: nn.Module) -> tuple[int, int]:
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    assert isinstance(linear.weight, torch.Tensor)  # GPT-2's Conv1D holds [D_in, D_out]
    return linear.weight.shape[0], linear.weight.shape[1]


def _sharing_key(leaf: str) -> object:
    return next((group for group in _SHARING if leaf in group), leaf)


def _generator(seed: int, name: str, part: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{part}".encode()))


# From cuma_ds/profiles/linearize.py

TEMPLATES = ("wvs", "generic")

_MISSING = {
    "", "-", "?", "na", "n/a", "nan", "null", "missing", "missing value", "unknown", "refused", "not asked", "not applicable",
    "not available", "no answer", "no response", "prefer not to say", "prefer not to answer", "prefer not to disclose",
    "rather not say", "don't know", "dont know", "do not know", "i don't know",
}  # fmt: skip

# Field names people use, by the one the wvs template reads.
_ALIASES = {
    "country": {"country", "country of residence", "reside country", "nationality country"},
    "age": {"age", "age group", "age band", "age range"},
    "gender": {"gender", "sex"},
    "religion": {"religion", "religious denomination", "denomination"},
    "education": {"education", "education level", "highest education", "degree", "university degree"},
}
_MAN = {"male", "man", "m", "men"}
_WOMAN = {"female", "woman", "f", "women"}
_NOT_RELIGIOUS = {
    "no", "none", "no religion", "not religious", "non-religious", "nonreligious", "unaffiliated",
    "do not belong to a denomination", "no denomination", "no affiliation",
}  # fmt: skip
_BELIEVERS = {
    "yes": "religious", "islam": "Muslim", "christianity": "Christian", "buddhism": "Buddhist", "hinduism": "Hindu",
    "judaism": "Jewish", "jew": "Jewish", "sikhism": "Sikh", "atheism": "atheist",
}  # fmt: skip
_WITH_DEGREE = {"yes", "degree", "university degree", "university", "has a degree"}
_WITHOUT_DEGREE = {"no", "no degree", "no university degree"}
_WITH_ARTICLE = {
    "united states", "united states of america", "usa", "us", "uk", "united kingdom", "netherlands", "philippines", "czech republic",
    "dominican republic", "united arab emirates", "maldives", "bahamas", "gambia", "central african republic",
    "democratic republic of the congo", "solomon islands", "marshall islands",
}  # fmt: skip


def linearize(fields: Mapping[str, Any] | str, template: str = "generic") -> str:
    """Turn a profile into the sentence the encoder reads.

    Args:
        fields: profile fields, or a sentence that is passed through.
        template: ``wvs`` reads country, age, gender, religion and education as one English sentence and adds other
            fields as ``generic`` does; ``generic`` lists ``Name: value.`` in the given order.

    Returns:
        One line, e.g. ``A 55-year-old Buddhist woman living in Thailand.``

    Raises:
        DataError: no field has a usable value (None, NaN, empty, "prefer not to say", ... are not usable).
        ConfigError: an unknown template.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"unknown profile template {template!r}{nearest(template, TEMPLATES)}; allowed: {', '.join(TEMPLATES)}")
    if isinstance(fields, str):
        sentence = " ".join(fields.split())
        if not sentence:
            raise DataError("the profile is empty text; allowed: a sentence, or fields such as country, age, gender")
        return sentence
    values = {str(name): _text(value) for name, value in fields.items() if not is_missing(value)}
    if not values:
        given = ", ".join(str(name) for name in fields) or "none at all"
        raise DataError(f"a profile has no field with an answer (fields given: {given}); at least one is needed, e.g. country")
    return _wvs(values) if template == "wvs" else _generic(values)


def is_missing(value: Any) -> bool:
    """Whether a field's value means that nothing is known (case-insensitive)."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return True
    if isinstance(value, list | tuple | dict | set):
        return not value
    return str(value).strip().lower().replace("’", "'").rstrip(".") in _MISSING


def country_of(fields: Mapping[str, Any] | str) -> str:
    """The profile's country as written, or an empty string."""
    return value_of(fields, "country")


def value_of(fields: Mapping[str, Any] | str, field: str) -> str:
    """What the profile says in one field (under any name the field goes by), or an empty string."""
    if not isinstance(fields, str):
        for name, value in fields.items():
            if _canonical(str(name)) == _canonical(field) and not is_missing(value):
                return _text(value)
    return ""


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | tuple | set):
        return ", ".join(_text(item) for item in value)
    return " ".join(str(value).split())


def _readable(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _canonical(name: str) -> str:
    plain = _readable(name).lower()
    return next((canonical for canonical, names in _ALIASES.items() if plain in names), plain)


def _generic(values: Mapping[str, str]) -> str:
    parts = []
    for name, value in values.items():
        label = _readable(name)
        parts.append(f"{label[:1].upper()}{label[1:]}: {value.rstrip('.')}.")
    return " ".join(parts)


def _wvs(values: Mapping[str, str]) -> str:
    known: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, value in values.items():
        canonical = _canonical(name)
        if canonical in _ALIASES and canonical not in known:
            known[canonical] = value
        else:
            others[name] = value
    if not known:
        return _generic(others)
    before_noun, after_noun = _age(known.get("age"))
    words = [before_noun, _religion(known.get("religion")), _gender(known.get("gender")), after_noun]
    if "country" in known:
        words.append(f"living in {_country(known['country'])}")
    words.append(_education(known.get("education")))
    phrase = " ".join(word for word in words if word)
    sentence = f"{_article(phrase)} {phrase}."
    return f"{sentence} {_generic(others)}" if others else sentence


def _article(phrase: str) -> str:
    first = phrase.split()[0].lower()
    number = re.match(r"\d+", first)
    if number:
        return "An" if number[0].startswith("8") or number[0] in {"11", "18"} else "A"
    return "An" if first[0] in "aeiou" and not first.startswith(("uni", "eu")) else "A"


def _age(age: str | None) -> tuple[str, str]:
    """What stands before the noun ("55-year-old") and after it ("aged 30 to 44")."""
    if age is None:
        return "", ""
    plain = age.lower().removesuffix("years old").removesuffix("years").strip()
    if re.fullmatch(r"\d{1,3}", plain):
        return f"{plain}-year-old", ""
    band = re.fullmatch(r"(\d{1,3})\s*(?:-|–|to)\s*(\d{1,3})", plain)
    if band:
        return "", f"aged {band[1]} to {band[2]}"
    over = re.fullmatch(r"(\d{1,3})\s*(?:\+|(?:and|or)\s+(?:over|older|more|above))", plain)
    if over:
        return "", f"aged {over[1]} or over"
    return "", f"aged {plain}"


def _religion(religion: str | None) -> str:
    if religion is None:
        return ""
    plain = re.sub(r"\s*\(.*?\)", "", religion).strip()
    if plain.lower() in _NOT_RELIGIOUS:
        return "non-religious"
    return _BELIEVERS.get(plain.lower(), plain)


def _gender(gender: str | None) -> str:
    if gender is None:
        return "person"
    plain = gender.lower()
    if plain in _MAN:
        return "man"
    return "woman" if plain in _WOMAN else f"{plain} person"


def _country(country: str) -> str:
    return f"the {country}" if country.lower() in _WITH_ARTICLE else country


def _education(education: str | None) -> str:
    if education is None:
        return ""
    plain = education.lower()
    if plain in _WITH_DEGREE:
        return "with a university degree"
    if plain in _WITHOUT_DEGREE:
        return "without a university degree"
    return f"whose highest education is {education[:1].lower()}{education[1:].rstrip('.')}"


# From cuma_ds/profiles/encoder.py

_POOLINGS = ("mean", "cls", "lasttoken")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class ProfileEncoder:
    """Embeds profile sentences with any sentence-embedding folder that ``transformers`` reads.

    Pooling is what the folder's ``1_Pooling/config.json`` says (mean, cls or lasttoken) and the mean over real tokens
    without one; padding never counts. Vectors have length 1 and dtype float32. Weights are loaded at the first call.

    Args:
        path: a folder, or a hub id that is brought to the local hub cache.
        device: where to embed; default: the first GPU, else the CPU.
        batch_size: sentences per forward.

    Attributes:
        dim: P, width of the vectors.
        fingerprint: sha256 over the folder's weights, configuration and tokenizer.

    Raises:
        ModelError: no such folder, no readable configuration, or modules that would change the vectors.
    """

    def __init__(self, path: str | Path, device: str | torch.device | None = None, batch_size: int = 64) -> None:
        from transformers import AutoConfig

        self.folder = _resolve(str(path))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = batch_size
        self.pooling = _pooling(self.folder)
        try:
            config = AutoConfig.from_pretrained(self.folder)
            self.dim = int(config.hidden_size)
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise ModelError(f"{self.folder} is not a sentence encoder: {_one_line(error)}") from None
        self._longest = int(getattr(config, "max_position_embeddings", 0) or 512)
        if not any(file for pattern in _WEIGHTS for file in self.folder.glob(pattern)):
            raise ModelError(f"{self.folder} holds no encoder weights; expected one of {', '.join(_WEIGHTS)}")

    def __call__(self, sentences: list[str] | str, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Embed sentences.

        Args:
            progress: told (sentences done, in all) after each batch.

        Returns:
            [N, P] float32 on the CPU, rows in the order given (N = 1 for a single string).
        """
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        embeddings_NP = torch.empty(len(texts), self.dim)
        # Sentences of like length share a batch, so that little is spent on padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            embeddings_NP[rows] = self._embed([texts[row] for row in rows])
            if progress is not None:
                progress(start + len(rows), len(order))
        return embeddings_NP

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex digest that changes whenever the vectors could."""
        digest = hashlib.sha256(f"{self.pooling}:{self._max_tokens}".encode())
        patterns = (*_WEIGHTS, "config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json")
        for file in sorted({file for pattern in patterns for file in self.folder.glob(pattern)}):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    @property
    def _max_tokens(self) -> int:
        return min(self._longest, int(_json(self.folder / "sentence_bert_config.json").get("max_seq_length") or self._longest))

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
            model = AutoModel.from_pretrained(self.folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"the sentence encoder {self.folder} cannot be loaded: {_one_line(error)}") from None
        finally:
            if bars:
                logging.enable_progress_bar()
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer, model.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> Tensor:
        tokenizer, model = self._parts
        longest = min(self._max_tokens, tokenizer.model_max_length)
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(self.device)
        hidden_BSP = model(**inputs).last_hidden_state
        pooled_BP = pool(hidden_BSP, inputs["attention_mask"], self.pooling)
        return torch.nn.functional.normalize(pooled_BP.float(), dim=-1).cpu()


def pool(hidden_BSP: Tensor, mask_BS: Tensor, how: str) -> Tensor:
    """One vector per sequence from its real tokens.

    Args:
        hidden_BSP: [B, S, P] hidden states.
        mask_BS: [B, S], 1 for real tokens.
        how: mean | cls (first real token) | lasttoken (last real token).

    Returns:
        [B, P], dtype of ``hidden_BSP``.
    """
    if how == "mean":
        weights_BS1 = mask_BS.unsqueeze(-1).to(hidden_BSP.dtype)
        return (hidden_BSP * weights_BS1).sum(1) / weights_BS1.sum(1).clamp(min=1)
    positions_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    chosen_B = (mask_BS if how == "cls" else positions_S * mask_BS).argmax(dim=1)
    return hidden_BSP[torch.arange(len(hidden_BSP), device=hidden_BSP.device), chosen_B]


def _resolve(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ModelError(f"there is no sentence encoder at {path}; profiles.encoder is a folder or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, ignore_patterns=["onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack"]))
    except Exception as error:
        raise ModelError(f"{path} is neither a folder nor a sentence encoder the hub gives us: {_one_line(error)}") from None


def _pooling(folder: Path) -> str:
    modules = _json(folder / "modules.json", default=[])
    known = ("Transformer", "Pooling", "Normalize")
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind not in known:
            raise ModelError(f"{folder / 'modules.json'} asks for a {kind} module; supported: {', '.join(known)}")
    place = next((str(module.get("path")) for module in modules if str(module.get("type", "")).endswith("Pooling")), "1_Pooling")
    config = _json(folder / place / "config.json")
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    else:
        modes = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    modes = [mode.removesuffix("_tokens").removesuffix("_token") for mode in modes] or ["mean"]
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise ModelError(f"{folder / place / 'config.json'} asks for pooling {' + '.join(modes)}; supported: one of {', '.join(_POOLINGS)}")
    return modes[0]


def _json(file: Path, default: Any = None) -> Any:
    if not file.is_file():
        return {} if default is None else default
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# From cuma_ds/export/modeling.py

EXPORT_FORMAT = 1
ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FOLDER = "adapter_config.json", "adapter_model.safetensors", "base"
# What two models must share for adapters of the one to make sense on the other.
BASE_FACTS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
# Profiles whose embeddings are kept.
_REMEMBERED = 4096

Profile = Mapping[str, Any] | str


class CumaExportConfig(PreTrainedConfig):
    """``config.json`` of an exported folder; what the adapters are stands in ``adapter_config.json``."""

    model_type = "cuma"


class CumaForCausalLM(CumaModel):
    """A frozen backbone with trained adapters; ``forward`` and ``generate`` also take profiles as text or fields.

    What this class does not define (``device``, ``dtype``, ``generation_config``, ...) is the backbone's.

    Attributes:
        export: the content of ``adapter_config.json``.
        encoder_path: sentence encoder for ``profiles``; loaded at the first use.
    """

    config_class = CumaExportConfig
    export: dict[str, Any]
    encoder_path: str | None
    _encoder: ProfileEncoder | None
    _embedded: dict[str, Tensor]

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *_: Any,
        dtype: torch.dtype | str | None = None,
        base_model: str | None = None,
        encoder: str | None = None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> CumaForCausalLM:
        """Load an exported folder (or a hub id of one), in eval mode and frozen.

        Args:
            folder: what ``launchers/export.py --format hf`` wrote.
            dtype: of the backbone; by default the one it was trained with. Adapters are float32.
            base_model: folder or hub id of the backbone, if it is neither where the export says nor beside the export.
            encoder: folder or hub id of the sentence encoder, likewise.
            trust_remote_code: allow code that comes with the *backbone*; only passed on if the training run needed it.
            kwargs: for the backbone's ``from_pretrained`` (``device_map``, ``attn_implementation``, ...).

        Raises:
            CheckpointError: the folder is no export, or its weights were changed.
            ModelError: the backbone is missing or another one.
        """
        hub: dict[str, Any] = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        for key in ("config", "adapter_kwargs", "code_revision", "_from_auto", "_commit_hash", "force_download", "subfolder"):
            kwargs.pop(key, None)
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        place = _export_folder(str(folder), hub)
        export = read_export(place)
        state = _read_weights(place, export)
        facts = export["base"]
        inside = (place / BASE_FOLDER / "config.json").is_file()
        path = base_model or (str(place / BASE_FOLDER) if inside else _moved(export["base_model_name_or_path"], place))
        try:
            base = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=facts["dtype"] if dtype in (None, "auto") else dtype,
                trust_remote_code=bool(trust_remote_code and facts.get("trust_remote_code")),
                **kwargs,
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelError(f"the base model {path} cannot be loaded: {reason} (base_model= names another place)") from None
        _check_base(str(path), base.config, facts)
        named = export["profiles"].get("encoder")
        return cls.of(base, export, state, encoder or (named and _moved(named, place)))

    @classmethod
    def of(cls, base: nn.Module, export: dict[str, Any], state: dict[str, Tensor], encoder: str | None = None) -> CumaForCausalLM:
        """Put the adapters that ``export`` describes into a loaded backbone, in eval mode and frozen."""
        injected = inject_adapters(base, CumaConfig(**export["adapters"]))
        model = cls(injected.base_model, injected.config, injected.context, injected.router_names)
        model.load_adapter_state(state)
        model.export = export
        model.encoder_path = encoder or export["profiles"].get("encoder")
        model._encoder, model._embedded = None, {}
        return model.eval().requires_grad_(False)

    def forward(
        self, *args: Any, profiles: Sequence[Profile] | None = None, profile_embeddings: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The backbone's forward, see :meth:`CumaModel.forward`.

        Args:
            profiles: one per sequence, or a single one for all of them: a sentence, or fields such as ``{"country": "Norway"}``.
            profile_embeddings: [B, P] (or [1, P]) raw sentence embeddings instead of ``profiles``.
        """
        if kwargs.get("profile_index") is None:
            profile_embeddings = self._one_per_row(self._rows(args, kwargs), profiles, profile_embeddings)
        return super().forward(*args, profile_embeddings=profile_embeddings, **kwargs)

    def generate(
        self, *args: Any, profiles: Sequence[Profile] | None = None, profile_embeddings: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The backbone's ``generate``, every prompt with its own profile (arguments as in :meth:`forward`)."""
        profile_embeddings = self._one_per_row(self._rows(args, kwargs), profiles, profile_embeddings)
        return super().generate(*args, profile_embeddings=profile_embeddings, **kwargs)

    def embed_profiles(self, profiles: Sequence[Profile]) -> Tensor:
        """Raw embeddings [N, P] float32 of profiles; a sentence seen lately is not embedded again.

        A field that no training profile had is a warning: the model cannot know what it means.

        Raises:
            ModelError: the adapters take no profiles, or the encoder is missing or another one.
            DataError: a profile without any answer.
        """
        about = self.export["profiles"]
        if not self.config.profile_dim:
            raise ModelError("profiles were given, but these adapters take none (profile_dim is 0)")
        if isinstance(profiles, str | Mapping):
            raise ModelError("profiles is a list with one profile per sequence, not a single profile; write profiles=[...]")
        for profile in profiles:
            for message in unknown_fields(profile, about.get("fields") or ()):
                warnings.warn(message, UserWarning, stacklevel=2)
        sentences = [linearize(profile, about["template"]) for profile in profiles]
        missing = sorted(set(sentences) - self._embedded.keys())
        if missing:
            self._embedded.update(zip(missing, self._load_encoder()(missing), strict=True))
        rows_NP = torch.stack([self._embedded[sentence] for sentence in sentences])
        for oldest in list(self._embedded)[: max(0, len(self._embedded) - _REMEMBERED)]:
            del self._embedded[oldest]
        return rows_NP

    def _load_encoder(self) -> ProfileEncoder:
        if self._encoder is None:
            if self.encoder_path is None:
                raise ModelError("this export names no sentence encoder, so it takes profile_embeddings; or load it with encoder=FOLDER")
            encoder = ProfileEncoder(self.encoder_path)
            known = self.export["profiles"].get("fingerprint")
            what = f"the sentence encoder {encoder.folder}"
            if encoder.dim != self.config.profile_dim:
                raise ModelError(f"{what} has width {encoder.dim}; the adapters take {self.config.profile_dim}")
            if known and encoder.fingerprint != known:
                raise ModelError(f"{what} is not the one these adapters were trained with (its fingerprint differs)")
            self._encoder = encoder
        return self._encoder

    def _one_per_row(self, rows: int, profiles: Sequence[Profile] | None, embeddings: Tensor | None) -> Tensor | None:
        if profiles is not None:
            if embeddings is not None:
                raise ModelError("profiles and profile_embeddings were both given; give one of them")
            embeddings = self.embed_profiles(profiles)
        if embeddings is None or embeddings.dim() != 2:
            return embeddings  # refused further down, where the needed shape is known
        if embeddings.shape[0] not in (1, rows):
            raise ModelError(f"{embeddings.shape[0]} profiles were given for {rows} sequences; give one for each, or a single one for all")
        return embeddings.expand(rows, -1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_model":
                raise
            return getattr(self.base_model, name)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing to remember: an exported folder already carries its code."""


def load_exported(folder: str | Path, dtype: torch.dtype | str | None = None, **kwargs: Any) -> CumaForCausalLM:
    """Load an exported folder with the installed package; no code from the folder runs.

    Arguments and errors as in :meth:`CumaForCausalLM.from_pretrained`.
    """
    return CumaForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)


def unknown_fields(profile: Profile, known: Sequence[str]) -> list[str]:
    """One sentence about each field that no training profile had."""
    if isinstance(profile, str) or not known:
        return []
    plain = {name.replace("_", " ").lower() for name in known}
    messages = []
    for name in profile:
        if str(name).replace("_", " ").lower() not in plain:
            guess = nearest(str(name), known)
            messages.append(f"the profile field {str(name)!r} is unknown to this model{guess}; it was trained with {', '.join(known)}")
    return messages


def read_export(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of an exported folder.

    Raises:
        CheckpointError: it is missing, damaged, or of another kind.
    """
    try:
        export = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind = export["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder} is no exported model: {ADAPTER_CONFIG} is missing or damaged") from None
    if kind != "CUMA" or "adapters" not in export:
        hint = "; import it first (--from-reference)" if kind == "CuMA" else ""
        raise CheckpointError(f"{folder} holds adapters of type {kind}, not an export of cuma-ds{hint}")
    if export.get("format_version") != EXPORT_FORMAT:
        raise CheckpointError(f"{folder} has export format {export.get('format_version')}; this version reads {EXPORT_FORMAT}")
    return export


def file_sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _export_folder(path: str, hub: dict[str, Any]) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no exported model at {path}; expected a folder made by launchers/export.py, or a hub id of one")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, **hub))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is neither a folder nor an exported model the hub gives us: {reason}") from None


def _moved(path: str, export: Path) -> str:
    """A folder that is no longer where the export says, but beside the export; else ``path`` as it is."""
    beside = export.resolve().parent / Path(path).name
    return str(beside) if Path(path).is_absolute() and not Path(path).exists() and beside.is_dir() else path


def _read_weights(folder: Path, export: Mapping[str, Any]) -> dict[str, Tensor]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{folder} is incomplete: {ADAPTER_WEIGHTS} is missing")
    if file_sha256(file) != export["sha256"]:
        raise CheckpointError(f"{file} was changed after the export: its sha256 is not the one in {ADAPTER_CONFIG}; export again")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is no readable safetensors file: {error}") from None


def _check_base(path: str, config: Any, facts: Mapping[str, Any]) -> None:
    for name in BASE_FACTS:
        wanted, there = facts.get(name), base_fact(config, name)
        if wanted is not None and there != wanted:
            raise ModelError(f"{path} is the wrong base model: its {name} is {there}, the adapters were trained on one with {wanted}")


def base_fact(config: Any, name: str) -> Any:
    """One of :data:`BASE_FACTS` from a transformers configuration (of its text part, for models with several)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config if name == "model_type" else text, name, None)
