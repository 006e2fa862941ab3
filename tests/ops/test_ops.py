"""The compiled operators against plain PyTorch, and plain PyTorch against loops and finite differences."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import reference_gate
from torch import Tensor

from cuma_ds import ops
from cuma_ds.errors import ConfigError, ModelError
from cuma_ds.ops import GATE_NORMS, library, reference

ROOT = Path(__file__).parents[2]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and library.architectures else [])
compiled = pytest.mark.skipif(bool(library.reason), reason=f"compiled operators are not in use: {library.reason}")
# T, E, K, N: nothing, one, odd sizes, many experts, more tokens than one chunk, the sizes of the benchmark
GATE_SHAPES = [
    (0, 4, 2, 1), (1, 1, 1, 1), (1, 8, 2, 3), (7, 5, 3, 2), (33, 33, 8, 64), (65, 512, 8, 3), (1300, 8, 2, 9),
    (10_000, 64, 2, 4),
]  # fmt: skip


def gate_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with ties (rounded to quarters), profiles, and an index with padding."""
    tokens, experts, _, profiles = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(tokens, experts, generator=generator) * 8).round() / 4
    profile = (torch.randn(profiles, experts, generator=generator) * 8).round() / 4
    index = torch.randint(-1, profiles, (tokens,), generator=generator)
    return hidden.to(device, dtype), profile.to(device), index.to(device)


def close(one: Tensor, other: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(one.double().cpu(), other.double().cpu(), rtol=tolerance, atol=tolerance)


@compiled
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", GATE_NORMS)
@pytest.mark.parametrize("with_profiles", [True, False])
@pytest.mark.parametrize("shape", GATE_SHAPES, ids=str)
def test_gate_equals_plain_pytorch_forward_and_backward(shape, with_profiles: bool, norm: str, device: str) -> None:
    for dtype in FLOATS:
        hidden, profile, index = gate_inputs(shape, dtype, device)
        results, gradients = [], []
        for place, gate in ((device, ops.demographic_gate), ("cpu", reference.demographic_gate)):
            h = hidden.to(place).detach().requires_grad_()
            p = profile.to(place).detach().requires_grad_()
            out = gate(h, p if with_profiles else None, index.to(place), shape[2], norm)
            down = torch.randn(out.weight_TK.shape, generator=torch.Generator().manual_seed(1)).to(place)
            sums = torch.linspace(-1, 2, shape[1]).to(place)
            ((out.weight_TK * down).sum() + (out.weight_sum_E * sums).sum()).backward()
            results.append(out)
            gradients.append((h.grad, p.grad if with_profiles else p))
        ours, theirs = results
        assert torch.equal(ours.expert_TK.cpu(), theirs.expert_TK)
        assert torch.equal(ours.load_E.cpu(), theirs.load_E)
        for name in ("weight_TK", "weight_sum_E", "entropy", "invalid"):
            close(getattr(ours, name), getattr(theirs, name))
        close(gradients[0][0], gradients[1][0], dtype)
        scale = max(1.0, gradients[1][1].abs().max().item()) if gradients[1][1].numel() else 1.0
        close(gradients[0][1] / scale, gradients[1][1] / scale)


@pytest.mark.parametrize("norm", GATE_NORMS)
def test_plain_gate_equals_the_loop_reference(norm: str) -> None:
    hidden, profile, index = gate_inputs((40, 6, 3, 4), torch.float32, "cpu")
    out = reference.demographic_gate(hidden.double(), profile.double(), index, 3, norm)
    dense = ops.dense_gate(out.weight_TK, out.expert_TK, 6)
    entropy = 0.0
    for t in range(40):
        if index[t] < 0:
            assert not dense[t].any()
            assert (out.expert_TK[t] == -1).all()
            continue
        weights, chosen = reference_gate((hidden[t] + profile[index[t]]).double(), 3, norm)
        torch.testing.assert_close(dense[t], torch.stack(weights))
        assert out.expert_TK[t].tolist() == chosen
        entropy -= sum(float(w) * math.log(float(w)) for w in weights if w > 0)
    assert float(out.entropy) == pytest.approx(entropy)
    torch.testing.assert_close(out.weight_sum_E, dense.sum(dim=0))
    assert out.load_E.tolist() == [int((out.expert_TK == e).sum()) for e in range(6)]


@pytest.mark.parametrize("norm", GATE_NORMS)
def test_plain_gate_passes_gradcheck(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    profile = torch.randn(2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 1, -1, 1, 0, 1])

    def weights(h: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        out = reference.demographic_gate(h, p, index, 2, norm)
        return out.weight_TK, out.weight_sum_E

    assert torch.autograd.gradcheck(weights, (hidden, profile))


def scale_inputs(
    tokens: int, experts: int, top_k: int, rank: int, shared: bool, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(tokens, 1 if shared else experts, rank, generator=generator).to(device, dtype)
    weight = torch.rand(tokens, top_k, generator=generator).to(device)
    expert = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].to(torch.int32)
    expert[torch.rand(tokens, generator=generator) < 0.2] = -1
    return z, weight, expert.to(device)


SCALE_SHAPES = [
    (0, 4, 2, 8),
    (1, 1, 1, 1),
    (9, 8, 2, 8),
    (31, 5, 5, 3),
    (40, 512, 8, 4),
    (600, 8, 2, 64),
    (10_000, 8, 2, 8),
]


@compiled
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SCALE_SHAPES, ids=str)
def test_gate_scale_equals_plain_pytorch_forward_and_backward(shape, shared: bool, device: str) -> None:
    tokens, experts, _, rank = shape
    for dtype in FLOATS:
        z, weight, expert = scale_inputs(*shape, shared, dtype, device)
        ours = ops.gate_scale(z, weight, expert, experts, 1.5)
        exact = [t.cpu().double() if t.is_floating_point() else t.cpu() for t in (z, weight, expert)]
        close(ours, reference.gate_scale(*exact, experts, 1.5), dtype)
        assert torch.equal(
            ours, reference.gate_scale(z, weight, expert, experts, 1.5)
        )  # rounded once, at the same place
        d_out = torch.randn(tokens, experts, rank, generator=torch.Generator().manual_seed(4)).to(device, dtype)
        grads = []
        for scale, (rows, gate, chosen) in (
            (ops.gate_scale, (z, weight, expert)),
            (reference.gate_scale, (z, weight, expert)),
            (reference.gate_scale, exact),
        ):
            leaves = [rows.detach().requires_grad_(), gate.detach().requires_grad_()]
            out = scale(*leaves, chosen, experts, 1.5)
            grads.append(torch.autograd.grad(out, leaves, d_out.to(out)))
        assert shared or torch.equal(grads[0][0], grads[1][0])
        for one, other in zip(grads[0], grads[2], strict=True):
            largest = max(1.0, float(other.abs().max())) if other.numel() else 1.0
            close(one / largest, other / largest, dtype)


@pytest.mark.parametrize("shared", [False, True])
def test_plain_gate_scale_passes_gradcheck(shared: bool) -> None:
    z, weight, expert = scale_inputs(7, 4, 2, 3, shared, torch.float64)
    leaves = z.requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: reference.gate_scale(a, b, expert, 4, 0.7), leaves)


@compiled
def test_operators_pass_opcheck() -> None:
    """Schema, autograd registration, traced shapes and ahead-of-time dispatch, with and without optional arguments."""
    names = torch.ops.cuma_ds
    hidden, profile, index = gate_inputs((9, 6, 2, 3), torch.float32, "cpu")
    hidden.requires_grad_(), profile.requires_grad_()
    z, weight, expert = scale_inputs(9, 6, 2, 4, False, torch.float32)
    d_out = torch.randn(9, 6, 4)
    leaf = [t.clone().requires_grad_() for t in (z, weight)]
    out = ops.demographic_gate(hidden.detach(), profile.detach(), index, 2, "softmax_topk")
    cases = [
        (names.gate, (hidden, profile, index, 2, 0)),
        (names.gate, (hidden, None, index, 6, 1)),
        (
            names.gate_backward,
            (
                hidden.detach(),
                profile.detach(),
                index,
                out.weight_TK,
                out.expert_TK,
                torch.rand(9, 2),
                torch.rand(6),
                2,
            ),
        ),
        (names.gate_scale, (*leaf, expert, 6, 2.0)),
        (names.gate_scale_backward, (d_out, z, weight, expert, 2.0)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments)


@compiled
def test_operators_are_traced_checkpointed_and_run_on_meta() -> None:
    hidden, profile, index = gate_inputs((20, 6, 2, 3), torch.float32, "cpu")
    z, _, _ = scale_inputs(20, 6, 2, 4, False, torch.float32)

    def mixture(h: Tensor, p: Tensor, z: Tensor) -> Tensor:
        out = ops.demographic_gate(h, p, index.to(h.device), 2, "topk_softmax")
        return ops.gate_scale(z, out.weight_TK, out.expert_TK, 6, 2.0)

    leaves = [t.clone().requires_grad_() for t in (hidden, profile, z)]
    expected = torch.autograd.grad(mixture(*leaves).square().sum(), leaves)
    traced = torch.compile(mixture, backend="aot_eager", fullgraph=True)
    again = torch.utils.checkpoint.checkpoint(mixture, *leaves, use_reentrant=False)
    for out in (traced(*leaves), again):
        for one, other in zip(torch.autograd.grad(out.square().sum(), leaves), expected, strict=True):
            assert torch.equal(one, other)
    assert mixture(*(t.to("meta") for t in (hidden, profile, z))).shape == (20, 6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixture(hidden, profile, z), mixture(*leaves))


@compiled
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    shape = (5000, 16, 2, 7)
    hidden, profile, index = gate_inputs(shape, torch.float32, "cpu")
    threads = torch.get_num_threads()

    def run(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        h, p = hidden.clone().requires_grad_(), profile.clone().requires_grad_()
        out = ops.demographic_gate(h, p, index, 2, "softmax_topk")
        (out.weight_TK.square().sum() + out.weight_sum_E.square().sum()).backward()
        return [*out, h.grad, p.grad]

    try:
        for one, other in zip(run(1), run(3), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_that_are_not_finite_are_reported_and_padding_ones_ignored(value: float, dtype: torch.dtype) -> None:
    hidden, profile, index = gate_inputs((30, 4, 2, 2), dtype, "cpu")
    index[3], index[4] = -1, 1
    hidden[3, 1] = value
    ops.demographic_gate(hidden, profile, index, 2, "topk_softmax")
    hidden[4, 2] = value
    with pytest.raises(ModelError, match="logits of 1 of 30 tokens are NaN or inf"):
        ops.demographic_gate(hidden, profile, index, 2, "topk_softmax")


def test_mistaken_arguments_are_named_with_what_was_expected() -> None:
    hidden, profile, index = gate_inputs((10, 4, 2, 3), torch.float32, "cpu")
    z, weight, expert = scale_inputs(10, 4, 2, 5, False, torch.float32)

    def gate(**changes: object) -> object:
        values = {"hidden": hidden, "profile": profile, "index": index, "top_k": 2, "norm": "topk_softmax", **changes}
        return lambda: ops.demographic_gate(*values.values())

    cases = [
        (gate(hidden=hidden[0]), r"hidden_logits_TE has shape \[4\]; expected \[\*, \*\]"),
        (gate(hidden=hidden.long()), "hidden_logits_TE is int64; expected float32 or bfloat16"),
        (gate(profile=profile[:, :3]), r"profile_logits_NE has shape \[3, 3\]; expected \[\*, 4\]"),
        (gate(profile=profile.to("meta")), "profile_logits_NE is on meta; the other arguments are on cpu"),
        (gate(index=index[:9]), r"profile_index_T has shape \[9\]; expected \[10\]"),
        (gate(index=index.int()), "profile_index_T is int32; expected int64"),
        (gate(index=torch.full((10,), 3)), "profile_index_T reaches 3; expected -1 .padding. or a row below 3"),
        (gate(index=torch.full((10,), -2)), "profile_index_T reaches -2"),
        (gate(top_k=5), "top_k is 5; expected 1 to the number of experts, 4"),
        (gate(norm="sparsemax"), "norm is 'sparsemax'; allowed are topk_softmax"),
        (lambda: ops.gate_scale(z[:, :3], weight, expert, 4), "z_TER has 3 experts; expected 4, or 1"),
        (lambda: ops.gate_scale(z, weight[:, :1], expert, 4), r"expert_TK has shape \[10, 2\]; expected \[10, 1\]"),
        (lambda: ops.gate_scale(z, weight, expert.long(), 4), "expert_TK is int64; expected int32"),
    ]
    for call, message in cases:
        with pytest.raises(ModelError, match=message):
            call()


@compiled
def test_the_operators_themselves_refuse_what_would_read_out_of_bounds() -> None:
    """Even called without the checks of the package."""
    names = torch.ops.cuma_ds
    hidden, profile, index = gate_inputs((10, 4, 2, 3), torch.float32, "cpu")
    z, weight, expert = scale_inputs(10, 4, 2, 5, False, torch.float32)
    cases = [
        (
            lambda: names.gate(hidden, profile, index + 5, 2, 0),
            "profile_index is . at token .; expected -1 .padding. or below 3",
        ),
        (lambda: names.gate(hidden, profile, index[:5], 2, 0), r"profile_index has shape \[5\]; expected \[10\]"),
        (lambda: names.gate(hidden, profile.double(), index, 2, 0), "profile_logits is float64; expected float32"),
        (lambda: names.gate(hidden, profile, index, 5, 0), "top_k is 5; expected 1 to 4"),
        (lambda: names.gate(hidden, profile, index, 2, 7), "norm is 7"),
        (lambda: names.gate_scale(z, weight, expert + 9, 4, 1.0), "expert has an index out of range"),
        (lambda: names.gate_scale_backward(z, z, weight, expert + 9, 1.0), "expert has an index out of range"),
        (lambda: names.gate_scale_backward(z[:, :, :4], z, weight, expert, 1.0), r"d_out has shape \[10, 4, 4\]"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_the_module_tells_what_is_in_use_and_why_not(monkeypatch) -> None:
    environment = {**os.environ, "CUMA_DS_OPS": "reference", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "cuma_ds.ops"], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.stdout.startswith("operators: plain PyTorch (CUMA_DS_OPS=reference)\n"), done.stderr
    assert re.match(r"operators: (compiled for the CPU|plain PyTorch \()", ops.describe())
    monkeypatch.setenv("CUMA_DS_OPS", "fast")
    with pytest.raises(ConfigError, match="CUMA_DS_OPS is 'fast'; allowed are auto and reference"):
        library._load()


@compiled
def test_operators_of_another_version_are_not_used(monkeypatch) -> None:
    monkeypatch.setattr(library, "_SCHEMAS", 1)  # as source that has not been compiled yet
    assert library._load().startswith("they were built from another version of the source; run: python setup.py")


def test_operators_use_no_streams() -> None:
    """Those of a libstdc++ that is linked statically crash beside the one that torch has loaded."""
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix in (".h", ".cpp", ".cu"):
            assert not re.search(r"#include <(\w*stream|iomanip)>", file.read_text()), file
