"""sum_i g_i B_i A_i x (method, step 4), computed in the way that is cheapest for its sizes.

*Dense*: one product with all A, scaling by the gate (zero where not routed), one product with all B. No permutation; work grows with E.
*Grouped*: the (token, expert) pairs are sorted by expert, each expert multiplies its own rows, and the rows are summed back per
token. Work grows with K. Both give the same result, and neither waits for the device where torch has a grouped kernel (on CUDA: bfloat16
on sm_90 and sm_100; elsewhere it reads the group sizes back).

Shapes: T tokens, D input features, O output features, E experts, K active experts, r rank (R in names), N profiles, M = T * K pairs.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cuma_ds.ops import gate_scale, gate_scale_backward, permute_gather, permute_scatter, sort_by_expert

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
) -> Tensor:
    """scale * sum_i g_i B_i A_i x, without the frozen part.

    Args:
        x_TD: [T, D].
        weight_TK, expert_TK: [T, K] the gate: mixture weights, and int32 experts, -1 for padding.
        lora_a: [E, r, D], or [r, D] shared by all experts.
        lora_b: [E, O, r].
        scale: alpha / r.
        mask: scales the *weight* gradients a token sends to an expert; outputs, input and gate gradients are untouched.
        strategy: by default the cheaper one, see :func:`cheaper_strategy`.

    Returns:
        [T, O] in the dtype of ``x_TD``.
    """
    dtype = compute_dtype(x_TD)
    experts, out_features, rank = lora_b.shape
    if strategy is None:
        strategy = cheaper_strategy(experts, weight_TK.shape[1], rank, x_TD.shape[1], out_features, dtype, x_TD.device.type)
    compute = _Dense if strategy == "dense" else _Grouped
    where = x_TD.device.type
    with torch.autocast(where, enabled=False) if torch.amp.is_autocast_available(where) else contextlib.nullcontext():
        # Rounded as x is, whatever multiplies them: experts that travelled here in the dtype of x give the same answers.
        a, b = (lora.to(x_TD.dtype).to(dtype) for lora in (lora_a, lora_b))
        y_TO = compute.apply(x_TD.to(dtype), weight_TK, a, b, expert_TK, scale, *(mask or (None, None)))
    return y_TO.to(x_TD.dtype)


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
    bits = torch.finfo(dtype).bits
    if bits == 64 or any(size * bits % 128 for size in (rank, in_features, out_features)):
        return "dense"  # grouped products take neither float64 nor rows that are not multiples of 16 bytes
    if bits == 32 and torch.compiler.is_compiling():
        return "dense"  # nor does torch.compile trace them in float32
    columns_dense, columns_grouped = experts * rank, top_k * rank
    moved_columns = MOVED_COLUMNS.get(device, MOVED_COLUMNS["cpu"])
    return "grouped" if columns_dense > columns_grouped + moved_columns * top_k else "dense"


# What moving one row costs, in columns of a dense product. GPUs multiply far faster than they move.
MOVED_COLUMNS = {"cpu": 64.0, "cuda": 400.0}


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        expert_TK: Tensor,
        scale: float,
        mask_NE: Tensor | None,
        profile_T: Tensor | None,
    ) -> Tensor:
        z_TER = F.linear(x_TD, lora_a.flatten(0, -2)).unflatten(1, (-1, lora_b.shape[2]))
        h_TER = gate_scale(z_TER, weight_TK, expert_TK, lora_b.shape[0], scale)
        ctx.scale = scale
        ctx.save_for_backward(x_TD, weight_TK, lora_a, lora_b, expert_TK, mask_NE, profile_T, z_TER, h_TER)
        return h_TER.flatten(1) @ _joined(lora_b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TD, weight_TK, lora_a, lora_b, expert_TK, mask_NE, profile_T, z_TER, h_TER = ctx.saved_tensors
        dh_TER = (dy_TO @ _joined(lora_b).T).view_as(h_TER)
        dz, dweight_TK, learning_dz, learning_h = gate_scale_backward(dh_TER, z_TER, weight_TK, expert_TK, ctx.scale, mask_NE, profile_T)
        if mask_NE is None:
            learning_dz, learning_h = dz, h_TER
        dx_TD = dz.flatten(1) @ lora_a.flatten(0, -2) if ctx.needs_input_grad[0] else None
        da = (learning_dz.flatten(1).T @ x_TD).view_as(lora_a) if ctx.needs_input_grad[2] else None
        db = None
        if ctx.needs_input_grad[3]:
            db = (learning_h.flatten(1).T @ dy_TO).view(lora_b.shape[0], lora_b.shape[2], -1).transpose(1, 2)
        return dx_TD, dweight_TK, da, db, None, None, None, None


def _joined(lora_b: Tensor) -> Tensor:
    """[E, O, r] -> [E * r, O]."""
    return lora_b.transpose(1, 2).reshape(-1, lora_b.shape[1])


def _by_group(a: Tensor, b: Tensor, end_E: Tensor) -> Tensor:
    """Rows of ``a`` [M, I] times their expert's ``b`` [E, I, J], or the experts' own ``a`` [I, M] times ``b`` [M, J] as [E, I, J]."""
    if a.is_meta or not a.numel():  # torch has neither shapes for float32 on meta nor sums over no rows on CUDA
        return a.new_zeros((a.shape[0], b.shape[2]) if b.dim() == 3 else (len(end_E), a.shape[0], b.shape[1]))
    product = F.grouped_mm(a, b, offs=end_E)
    if b.dim() == 2:  # what an expert without rows gets is left unwritten by some GPUs (pytorch issue 172439)
        product.masked_fill_((end_E.diff(prepend=end_E.new_zeros(1)) == 0)[:, None, None], 0.0)
    return product  # rows past end_E[-1] are left unwritten too: nobody reads them


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        expert_TK: Tensor,
        scale: float,
        mask_NE: Tensor | None,
        profile_T: Tensor | None,
    ) -> Tensor:
        order_M, position_TK, end_E = sort_by_expert(expert_TK, lora_b.shape[0])
        if lora_a.dim() == 2:
            z_MR = permute_gather(F.linear(x_TD, lora_a), order_M, position_TK)
        else:
            z_MR = _by_group(permute_gather(x_TD, order_M, position_TK), lora_a.transpose(1, 2), end_E)
        weight_M = scale * weight_TK.flatten()[order_M.clamp(min=0)]
        h_MR = (z_MR * weight_M[:, None]).to(z_MR.dtype)
        ctx.scale = scale
        ctx.save_for_backward(x_TD, weight_M, lora_a, lora_b, expert_TK, mask_NE, profile_T, z_MR, h_MR, order_M, position_TK, end_E)
        return permute_scatter(_by_group(h_MR, lora_b.transpose(1, 2), end_E), order_M, position_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TD, weight_M, lora_a, lora_b, expert_TK, mask_NE, profile_T, z_MR, h_MR, order_M, position_TK, end_E = ctx.saved_tensors
        dy_MO = permute_gather(dy_TO, order_M, position_TK)
        dh_MR = _by_group(dy_MO, lora_b, end_E)
        dweight_M = ctx.scale * (dh_MR.float() * z_MR).sum(dim=1)
        dweight_TK = dweight_M[position_TK.clamp(min=0)].masked_fill(position_TK < 0, 0.0)
        dz_MR = (dh_MR * weight_M[:, None]).to(dh_MR.dtype)
        learning_dz, learning_h = dz_MR, h_MR
        if mask_NE is not None and profile_T is not None:
            share_M = _share(mask_NE, profile_T, expert_TK).flatten()[order_M.clamp(min=0), None]
            learning_dz, learning_h = ((rows * share_M).to(rows.dtype) for rows in (dz_MR, h_MR))
        db = _by_group(dy_MO.T, learning_h, end_E) if ctx.needs_input_grad[3] else None
        dx_TD = da = None
        if lora_a.dim() == 2:
            if ctx.needs_input_grad[0]:
                dx_TD = permute_scatter(dz_MR, order_M, position_TK) @ lora_a
            if ctx.needs_input_grad[2]:
                da = permute_scatter(learning_dz, order_M, position_TK).T @ x_TD
        else:
            if ctx.needs_input_grad[0]:
                dx_TD = permute_scatter(_by_group(dz_MR, lora_a, end_E), order_M, position_TK)
            if ctx.needs_input_grad[2]:
                da = _by_group(learning_dz.T, permute_gather(x_TD, order_M, position_TK), end_E)
        return dx_TD, dweight_TK, da, db, None, None, None, None


def _share(mask_NE: Tensor, profile_T: Tensor, expert_TK: Tensor) -> Tensor:
    """The mask of each (token, chosen expert), [T, K]."""
    return mask_NE[profile_T.clamp(min=0)].gather(1, expert_TK.clamp(min=0).long())
