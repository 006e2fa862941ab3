"""The method written a second time, as slow loops over tokens and experts, to hold the adapters against.

Nothing here imports the package: it is the equations of the paper in the plainest form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_logits(
    h: Tensor, e: Tensor | None, router: dict[str, Tensor], kind: str, temperature: float = 1.0
) -> Tensor:
    """s = W_r [h (+) e_d] / temperature for one token; the MLP has ReLU between its linears.

    A router without ``weight_h`` reads the profile alone.
    """
    parts = {"weight_h": h} | ({} if e is None else {"weight_p": e})
    parts = {name: part for name, part in parts.items() if name in router}
    s = torch.cat([router[name] for name in parts], dim=1) @ torch.cat(list(parts.values()))
    if "bias" in router:
        s = s + router["bias"]
    if kind == "mlp":
        depth = 0
        while f"layers.{depth}.weight" in router:
            s = router[f"layers.{depth}.weight"] @ torch.relu(s) + router[f"layers.{depth}.bias"]
            depth += 1
    return s / temperature


def reference_gate(s: Tensor, top_k: int, norm: str) -> tuple[list[Tensor], list[int]]:
    """Gate weights (one scalar per expert, zero where not chosen) and the chosen experts."""
    experts = len(s)
    order = sorted(range(experts), key=lambda i: (-float(s[i].detach()), i))
    chosen = list(range(experts)) if norm == "softmax" else order[:top_k]
    exps = [torch.exp(s[i] - s.max()) for i in range(experts)]
    total = sum(exps)
    soft = [x / total for x in exps]
    if norm == "topk_softmax":
        part = sum(exps[i] for i in chosen)
        weights = {i: exps[i] / part for i in chosen}
    elif norm in ("softmax", "softmax_topk"):
        weights = {i: soft[i] for i in chosen}
    else:
        part = sum(torch.exp(soft[i]) for i in chosen)
        weights = {i: torch.exp(soft[i]) / part for i in chosen}
    zero = s.new_zeros(())
    return [weights.get(i, zero) for i in range(experts)], chosen


def reference_mixture(h: Tensor, gate: list[Tensor], a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """sum_i g_i B_i A_i h for one token; a mask m_i scales the gradient of A_i and B_i only."""
    out = h.new_zeros(b.shape[1])
    for i, g in enumerate(gate):
        a_i = a if a.dim() == 2 else a[i]
        b_i = b[i]
        plain = g * (b_i @ (a_i @ h))
        if mask is None:
            out = out + plain
            continue
        # The same value three times; only the parts that may learn carry a gradient to the weights.
        through_inputs = g * (b_i.detach() @ (a_i.detach() @ h))
        through_a = g.detach() * (b_i.detach() @ (a_i @ h.detach()))
        through_b = g.detach() * (b_i @ (a_i.detach() @ h.detach()))
        out = out + through_inputs + mask[i] * (through_a - through_a.detach() + through_b - through_b.detach())
    return out


def reference_balance(
    gates: list[tuple[list[Tensor], list[int], Tensor]], share_E: Tensor | None, full_softmax: bool
) -> Tensor:
    """E * sum_i f_i p_i over real tokens, each with its gate, experts and logits. ``share_E`` None: f_i counted."""
    experts = len(gates[0][0])
    assignments = sum(len(chosen) for _, chosen, _ in gates)
    loss = torch.zeros((), dtype=gates[0][0][0].dtype)
    for i in range(experts):
        f = share_E[i] if share_E is not None else sum(1 for _, chosen, _ in gates if i in chosen) / assignments
        if full_softmax:
            p = sum(torch.exp(logits[i]) / torch.exp(logits).sum() for *_, logits in gates) / len(gates)
        else:
            p = sum(weights[i] for weights, *_ in gates) / len(gates)
        loss = loss + f * p
    return experts * loss


def reference_adamw(
    parameters: list[Tensor], grads: list[list[Tensor]], lr: float, betas: tuple[float, float], eps: float
) -> None:
    """AdamW without weight decay, written out, in place."""
    m = [torch.zeros_like(p) for p in parameters]
    v = [torch.zeros_like(p) for p in parameters]
    for t, step in enumerate(grads, start=1):
        for i, (p, g) in enumerate(zip(parameters, step, strict=True)):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            p -= lr * (m[i] / (1 - betas[0] ** t)) / (torch.sqrt(v[i] / (1 - betas[1] ** t)) + eps)


def reference_learning_rate(step: int, peak: float, warmup: int, total: int, kind: str) -> float:
    """Linear warm-up to the peak, then constant, linear to zero, or half a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[kind]
