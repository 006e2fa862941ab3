"""sum_i g_i B_i A_i x (method, step 4), computed in the way that is cheapest for its sizes.

*Dense*: one product with all A, scaling by the gate (zero where not routed), one product with all B. No permutation; work grows with E.
The product with all A reads what the router reads: where one router product comes with it (:func:`project`), both are one.
*Grouped*: the (token, expert) pairs are sorted by expert, each expert multiplies its own rows, and the rows are summed back per
token. Work grows with K. CPUs multiply rows where they are; GPUs sort copies of them and multiply all at once, without waiting for the
device where torch has a grouped kernel (bfloat16 on sm_90 and sm_100; elsewhere it reads the group sizes back). All give the same result.

Shapes: T tokens, D input features, O output features, E experts, K active experts, r rank (R in names), N profiles, M = T * K pairs,
C columns of the product with all A: E * r, or r when A is shared.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cuma_ds.ops import (
    Pairs,
    gate_scale,
    gate_scale_backward,
    grouped_expand,
    grouped_outer,
    grouped_shrink,
    grouped_way,
    permute_gather,
    permute_scatter,
    sort_by_expert,
)

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
        dz, dweight_TK, learning_dz, learning_h = gate_scale_backward(
            dh_TER, z_TER, weight_TK, expert_TK, ctx.scale, mask_NE, profile_T
        )
        if mask_NE is None:
            learning_dz, learning_h = dz, h_TER
        da = db = None
        if ctx.needs_input_grad[8]:
            da = (learning_dz.flatten(1).T @ x_TD).view(ctx.shape_of_a)
        if ctx.needs_input_grad[2]:
            db = (learning_h.flatten(1).T @ dy_TO).view(lora_b.shape[0], lora_b.shape[2], -1).transpose(1, 2)
        return (
            dz.flatten(1),
            dweight_TK,
            db,
            None,
            None,
            None,
            None,
            None,
            da,
            dy_TO if ctx.needs_input_grad[9] else None,
        )


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
        z_MR = (
            permute_gather(rows_TC, pairs.order_M, pairs.position_TK)
            if own_a is None
            else _Rows(rows_TC, pairs).shrink(own_a)
        )
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
