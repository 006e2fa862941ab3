"""scale * sum_i g_i B_i A_i x (method, step 4), computed in the way that is cheaper for its sizes.

Both ways give the same result.

*Dense*: one product with all A, scaling by the gate (zero for experts that a token is not routed to), one product with
all B. Nothing is sorted. The work grows with E.
*Grouped*: the (token, expert) pairs are sorted by expert, each expert multiplies its own rows, and the rows are summed
per token. The work grows with K. It does not wait for the device where torch has a grouped kernel (bfloat16 on sm_90
and sm_100).

Shapes: T tokens, I input features, O output features, E experts, K active experts, r rank (R in names), M = T * K
pairs.
"""

from __future__ import annotations

import contextlib
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cuma_ds.adapters.pairs import Pairs, add_up, gather, rows_of_pairs, sort_by_expert
from cuma_ds.ops import gate_scale

Strategy = Literal["dense", "grouped"]


class Routes(NamedTuple):
    """The experts of every token.

    weight_TK: [T, K] mixture weights, zero for padding.  expert_TK: [T, K] int32, -1 for padding.
    share_TK: [T, K] in [0, 1], the share of its weight gradients that a token sends to that expert (the gradient mask
    of docs/method.md). None is one everywhere, as in the paper.
    """

    weight_TK: Tensor
    expert_TK: Tensor
    share_TK: Tensor | None = None


class MixtureSizes(NamedTuple):
    """The sizes that the choice between dense and grouped depends on."""

    experts: int
    top_k: int
    rank: int
    in_features: int
    out_features: int


def mixture(
    x_TI: Tensor,
    routes: Routes,
    lora_a: Tensor | None,
    lora_b: Tensor,
    scale: float = 1.0,
    strategy: Strategy | None = None,
) -> Tensor:
    """scale * sum_i g_i B_i A_i x.

    Args:
        x_TI: [T, I].
        routes: the gate. Its ``share_TK`` changes the gradients of ``lora_a`` and ``lora_b`` only.
        lora_a: [E, r, I], or [r, I] shared by all experts. None where ``x_TI`` was multiplied by a shared A already.
        lora_b: [E, O, r].
        scale: alpha / r.
        strategy: by default the cheaper one, see :func:`cheaper_strategy`.

    Returns:
        [T, O] in the dtype of ``x_TI``.
    """
    weight_TK, expert_TK, share_TK = routes
    if share_TK is not None:
        # The first mixture gives the value and the gradients of x and the gate. The second one teaches A and B.
        fixed_a = None if lora_a is None else lora_a.detach()
        value_TO = mixture(x_TI, Routes(weight_TK, expert_TK), fixed_a, lora_b.detach(), scale, strategy)
        taught = Routes((weight_TK * share_TK).detach(), expert_TK)
        return with_gradient_of(value_TO, mixture(x_TI.detach(), taught, lora_a, lora_b, scale, strategy))
    experts, out_features, rank = lora_b.shape
    sizes = MixtureSizes(experts, weight_TK.shape[1], rank, x_TI.shape[1], out_features)
    strategy = strategy or cheaper_strategy(sizes, compute_dtype(x_TI), x_TI.device.type)
    with without_autocast(x_TI):
        b_EOR = _rounded(lora_b, x_TI)
        if strategy == "dense":
            z_TER = (x_TI if lora_a is None else times_a(x_TI, lora_a)).to(b_EOR.dtype).unflatten(1, (-1, rank))
            h_TER = gate_scale(z_TER, weight_TK, expert_TK, experts, scale)
            y_TO = h_TER.flatten(1) @ b_EOR.transpose(1, 2).flatten(0, 1)
        else:
            # Padding goes to the first expert with weight zero, so that every row of a product is written.
            pairs = sort_by_expert(expert_TK.clamp(min=0), experts)
            weight_M = weight_TK.masked_fill(expert_TK < 0, 0.0).flatten().index_select(0, pairs.order_M)
            if lora_a is not None and lora_a.dim() == 3:
                z_MR = _Shrink.apply(x_TI.to(b_EOR.dtype), _rounded(lora_a, x_TI), *pairs)
            else:
                z_TR = x_TI if lora_a is None else times_a(x_TI, lora_a)
                z_MR = rows_of_pairs(z_TR.to(b_EOR.dtype), pairs)
            h_MR = (z_MR * (scale * weight_M)[:, None]).to(z_MR.dtype)
            y_TO = _Expand.apply(h_MR, b_EOR.transpose(1, 2), *pairs)
    return y_TO.to(x_TI.dtype)


def times_a(x_TI: Tensor, lora_a: Tensor) -> Tensor:
    """x A^T, [T, E * r] or [T, r], in the compute dtype of ``x_TI``. ``lora_a`` is [E, r, I] or [r, I]."""
    with without_autocast(x_TI):
        return F.linear(x_TI.to(compute_dtype(x_TI)), _rounded(lora_a, x_TI).flatten(0, -2))


def with_gradient_of(value: Tensor, learner: Tensor) -> Tensor:
    """``value``, whose gradient also flows into ``learner`` as if that had been added."""
    return value + (learner - learner.detach())


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which products have the dtypes they are given."""
    where = x.device.type
    on = torch.amp.is_autocast_available(where) and torch.is_autocast_enabled(where)
    return torch.autocast(where, enabled=False) if on else contextlib.nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of ``x``, but float32 for 16-bit tensors on a CPU without units for 16-bit products."""
    units = {torch.bfloat16: ("amx_tile", "avx512_bf16"), torch.float16: ("amx_fp16",)}
    if x.device.type != "cpu" or x.dtype not in units:
        return x.dtype
    has = torch.cpu.get_capabilities()
    return x.dtype if any(has.get(unit, False) for unit in units[x.dtype]) else torch.float32


def cheaper_strategy(sizes: MixtureSizes, dtype: torch.dtype, device: str = "cpu") -> Strategy:
    """Dense or grouped, by the work per token (benchmarks/layer.py fits the constants, docs/performance.md has them).

    Dense multiplies E r columns. Grouped multiplies K r columns, but moves K rows of x and of the result per token.
    """
    bits = torch.finfo(dtype).bits
    if bits == 64 or any(size * bits % 128 for size in (sizes.rank, sizes.in_features, sizes.out_features)):
        return "dense"  # torch's grouped products take neither float64 nor rows that are not multiples of 16 bytes
    if bits == 32 and torch.compiler.is_compiling():
        return "dense"  # torch.compile does not trace them in float32
    moved_columns = MOVED_COLUMNS.get(device, MOVED_COLUMNS["cpu"])
    return "grouped" if sizes.experts * sizes.rank > sizes.top_k * (sizes.rank + moved_columns) else "dense"


# What moving one row costs, in columns of a dense product. GPUs multiply far faster than they move.
MOVED_COLUMNS = {"cpu": 64.0, "cuda": 900.0}


class AutogradContext(Protocol):
    """What torch gives to the forward and the backward of an autograd function."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Shrink(torch.autograd.Function):
    """The rows of x, repeated per chosen expert and multiplied by its A: [T, I] -> [M, r], sorted by expert.

    The repeated rows are gathered again in the backward pass, because keeping them costs K times the memory of x.
    """

    @staticmethod
    def forward(
        ctx: AutogradContext, x_TI: Tensor, a_ERI: Tensor, order_M: Tensor, position_TK: Tensor, end_E: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TI, a_ERI, order_M, position_TK, end_E)
        rows_MI = gather(x_TI, Pairs(order_M, position_TK, end_E))
        return _grouped_mm(rows_MI, a_ERI.transpose(1, 2), end_E)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dz_MR,) = grads
        x_TI, a_ERI, *saved = ctx.saved_tensors
        pairs = Pairs(*saved)
        dx_TI = da_ERI = None
        if ctx.needs_input_grad[0]:
            dx_TI = add_up(_grouped_mm(dz_MR, a_ERI, pairs.end_E), pairs)
        if ctx.needs_input_grad[1]:
            da_ERI = _grouped_mm(dz_MR.T, gather(x_TI, pairs), pairs.end_E)
        return dx_TI, da_ERI, None, None, None


class _Expand(torch.autograd.Function):
    """The rows of h, multiplied by their expert's B and summed per token: [M, r] -> [T, O]."""

    @staticmethod
    def forward(
        ctx: AutogradContext, h_MR: Tensor, b_ERO: Tensor, order_M: Tensor, position_TK: Tensor, end_E: Tensor
    ) -> Tensor:
        ctx.save_for_backward(h_MR, b_ERO, order_M, position_TK, end_E)
        return add_up(_grouped_mm(h_MR, b_ERO, end_E), Pairs(order_M, position_TK, end_E))

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_MR, b_ERO, *saved = ctx.saved_tensors
        pairs = Pairs(*saved)
        dy_MO = gather(grads[0], pairs)
        dh_MR = db_ERO = None
        if ctx.needs_input_grad[0]:
            dh_MR = _grouped_mm(dy_MO, b_ERO.transpose(1, 2), pairs.end_E)
        if ctx.needs_input_grad[1]:
            db_ERO = _grouped_mm(h_MR.T, dy_MO, pairs.end_E)
        return dh_MR, db_ERO, None, None, None


def _grouped_mm(a: Tensor, b: Tensor, end_E: Tensor) -> Tensor:
    """Rows of ``a`` [M, I] times their expert's ``b`` [E, I, J], or per expert ``a`` [I, M] times ``b`` [M, J]."""
    if a.is_meta or not a.numel():  # torch has neither shapes for float32 on meta nor sums over no rows on CUDA
        return a.new_zeros((a.shape[0], b.shape[2]) if b.dim() == 3 else (len(end_E), a.shape[0], b.shape[1]))
    product = F.grouped_mm(a, b, offs=end_E)
    if b.dim() == 2:  # some GPUs do not write the result of an expert without rows (pytorch issue 172439)
        product.masked_fill_((end_E.diff(prepend=end_E.new_zeros(1)) == 0)[:, None, None], 0.0)
    return product


def _rounded(lora: Tensor, x: Tensor) -> Tensor:
    """The weights rounded to the dtype of ``x``, in its compute dtype.

    Experts sent between ranks in the dtype of x are rounded alike.
    """
    return lora.to(x.dtype).to(compute_dtype(x))
