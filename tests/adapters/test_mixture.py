"""The two strategies of the mixture against the loop-written reference, the cost rule, and gradient masks."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from reference import reference_mixture
from torch import nn
from torch.nn import functional as F

from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.adapters import mixture as mixture_module
from cuma_ds.adapters.mixture import MixtureSizes, Routes, cheaper_strategy, compute_dtype, mixture
from cuma_ds.errors import ConfigError
from cuma_ds.ops import library
from cuma_ds.profiles.groups import group_mask

pytestmark = pytest.mark.sixteen_bit

E, K, R, D, O = 6, 2, 4, 16, 12  # noqa: E741


def case(
    tokens: int, shared_a: bool, kind: str = "mixed", rank: int = R, out: int = O
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Leaves of the mixture, and the experts of each token, some of it padding and some experts without any token."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    expert_TK = (
        torch.rand(tokens, E - 1, generator=generator).argsort(dim=1)[:, :K].int()
    )  # no token asks the last expert
    if kind == "one takes all":
        expert_TK = torch.stack([torch.full((tokens,), 3), torch.full((tokens,), 1)], dim=1).int()
    expert_TK[::5] = -1
    if kind == "no token":
        expert_TK[:] = -1
    weight_TK = torch.rand(tokens, K, generator=generator).masked_fill(expert_TK < 0, 0.0).requires_grad_()
    a = leaf(rank, D) if shared_a else leaf(E, rank, D)
    return {"x": leaf(tokens, D), "weight": weight_TK, "a": a, "b": leaf(E, out, rank)}, expert_TK


def naive(
    leaves: dict[str, torch.Tensor], expert_TK: torch.Tensor, scale: float, mask_TE: torch.Tensor | None
) -> torch.Tensor:
    rows = []
    for t, experts in enumerate(expert_TK.tolist()):
        gate = [leaves["weight"].new_zeros(())] * E
        for k, expert in enumerate(experts):
            if expert >= 0:
                gate[expert] = leaves["weight"][t, k]
        row_mask = None if mask_TE is None else mask_TE[t]
        rows.append(scale * reference_mixture(leaves["x"][t], gate, leaves["a"], leaves["b"], row_mask))
    return torch.stack(rows)


def grouped_mm_of_a_gpu(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """torch's grouped product, with NaN where CUDA kernels leave memory unwritten, and refusing what they refuse."""
    if not a.numel():
        raise RuntimeError("strides should be multiple of 16 bytes")
    product = F.grouped_mm(a, b, offs=offs)
    if b.dim() == 3:
        product[offs[-1] :] = torch.nan
    else:
        product[offs == torch.cat([offs.new_zeros(1), offs[:-1]])] = torch.nan
    return product


@pytest.fixture
def gpu_products(monkeypatch):
    monkeypatch.setattr(mixture_module, "F", SimpleNamespace(linear=F.linear, grouped_mm=grouped_mm_of_a_gpu))


@pytest.mark.parametrize("shared_a", [False, True])
@pytest.mark.parametrize("kind", ["mixed", "one takes all", "no token"])
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_grouped_products_use_nothing_that_a_gpu_leaves_unwritten(tokens, kind, shared_a, gpu_products) -> None:
    leaves, expert_TK = case(tokens, shared_a, kind)
    outs = [
        mixture(leaves["x"], Routes(leaves["weight"], expert_TK), leaves["a"], leaves["b"], strategy=s)
        for s in ("grouped", "dense")
    ]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out)) for out in outs]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operators", ["in use", "plain PyTorch"])
@pytest.mark.parametrize("strategy", ["dense", "grouped"])
@pytest.mark.parametrize("kind", ["mixed", "one takes all"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared_a", [False, True])
def test_both_strategies_equal_the_loop_forward_and_backward(
    shared_a, masked, kind, strategy, operators, monkeypatch
) -> None:
    if operators == "plain PyTorch":
        monkeypatch.setattr(library, "supports", lambda *_: False)
    leaves, expert_TK = case(23, shared_a, kind)
    mask_TE = torch.rand(23, E, generator=torch.Generator().manual_seed(1)) if masked else None
    share_TK = None if mask_TE is None else mask_TE.gather(1, expert_TK.clamp(min=0).long())
    expected = naive(leaves, expert_TK, 1.5, mask_TE)
    d_out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    routes = Routes(leaves["weight"], expert_TK, share_TK)
    out = mixture(leaves["x"], routes, leaves["a"], leaves["b"], 1.5, strategy)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y, list(leaves.values()), d_out) for y in (out, expected)]
    for name, one, other in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("strategy", ["dense", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_few_tokens_and_16_bit_inputs(tokens: int, dtype: torch.dtype, strategy: str) -> None:
    leaves, expert_TK = case(tokens, False, rank=8, out=16)  # rows of 16 bytes, as grouped products want them
    x = leaves["x"].detach().to(dtype).requires_grad_()
    out = mixture(x, Routes(leaves["weight"], expert_TK), leaves["a"], leaves["b"], strategy=strategy)
    assert (out.shape, out.dtype) == ((tokens, 16), dtype)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert all(leaves[name].grad.dtype == torch.float32 for name in ("a", "b", "weight"))
    weight, a, b = (leaves[name].detach().double() for name in ("weight", "a", "b"))
    exact = mixture(x.detach().double(), Routes(weight, expert_TK), a, b)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    largest = max(1.0, float(exact.abs().max())) if tokens else 1.0
    torch.testing.assert_close(out.double(), exact, rtol=0.0, atol=tolerance * largest)


@pytest.mark.parametrize("strategy", ["dense", "grouped"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_product_with_a_shared_a_may_be_done_before(masked: bool, strategy: str) -> None:
    """All-to-all sends A x instead of x where A is shared."""
    leaves, expert_TK = case(11, True)
    share_TK = torch.rand(11, K, generator=torch.Generator().manual_seed(1)) if masked else None
    routes = Routes(leaves["weight"], expert_TK, share_TK)
    z = leaves["x"] @ leaves["a"].T
    outs = [mixture(x, routes, a, leaves["b"], strategy=strategy) for x, a in ((z, None), (leaves["x"], leaves["a"]))]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    for name in ("x", "weight", "b") + (() if masked else ("a",)):
        grads = [torch.autograd.grad(out.square().sum(), leaves[name], retain_graph=True)[0] for out in outs]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_cost_rule_takes_the_strategy_that_multiplies_less_and_what_grouped_products_can_take() -> None:
    def choose(
        experts: int, top_k: int, rank: int, dtype: torch.dtype = torch.float32, width: int = 2048, device: str = "cpu"
    ) -> str:
        return cheaper_strategy(MixtureSizes(experts, top_k, rank, width, width), dtype, device)

    for experts, top_k in itertools.product((8, 64), (1, 2)):  # growing ranks change the answer once at most
        chosen = [choose(experts, top_k, rank) for rank in (4, 8, 16, 32, 64, 128)]
        assert chosen == sorted(chosen)
    assert choose(8, 8, 64) == "dense"  # all experts answer: sorting saves nothing
    assert choose(1, 1, 64) == "dense"
    assert choose(128, 4, 16) == "grouped"
    assert [choose(8, 2, rank) for rank in (4, 8, 64)] == ["dense", "dense", "grouped"]
    assert choose(8, 2, 64, device="cuda") == "dense"  # rows are dearer to move there
    assert choose(64, 2, 64, device="cuda") == "grouped"
    for device in (
        "cpu",
        "cuda",
    ):  # torch's grouped products take neither float64 nor rows that are not multiples of 16 bytes
        assert choose(64, 2, 64, torch.float64, device=device) == "dense"
        assert choose(64, 2, 68, torch.bfloat16, device=device) == "dense"
        assert choose(64, 2, 64, width=2049, device=device) == "dense"
    assert choose(8, 2, 64, device="meta") == choose(8, 2, 64)


def test_16_bit_products_are_computed_in_float32_only_on_cpus_without_units_for_them(monkeypatch) -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)

    def computed_with(*units: str) -> tuple[torch.dtype, torch.dtype]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True) | {"amx_int8": False})
        return compute_dtype(x), compute_dtype(x.half())

    assert computed_with() == (torch.float32, torch.float32)
    assert compute_dtype(x.to("meta")) == torch.bfloat16
    assert compute_dtype(x.double()) == torch.float64
    for unit in ("amx_tile", "avx512_bf16"):
        assert computed_with(unit) == (torch.bfloat16, torch.float32)
    assert computed_with("amx_fp16") == (torch.float32, torch.float16)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, D)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.q_proj(inputs_embeds)


def taught(mask_NE: torch.Tensor | None = None, **options: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, E] each, for three profiles: mean gate of an expert, and whether its A and its B got a gradient from it."""
    torch.manual_seed(0)
    model = inject_adapters(
        Linear(), CumaConfig(num_experts=E, top_k=3, lora_r=R, target_modules=("q_proj",), profile_dim=5, **options)
    )
    ((_, layer),) = model.adapted_layers()
    nn.init.normal_(layer.experts.lora_b)
    x, e = torch.randn(3, 7, D), torch.randn(3, 5) * 3
    gates, a, b = [], [], []
    for n in range(3):
        model.train().zero_grad()
        with model.recording_routing() as record:
            own = None if mask_NE is None else mask_NE[n : n + 1]
            model(
                inputs_embeds=x[n : n + 1], profile_embeddings=e[n : n + 1], gradient_mask=own
            ).square().sum().backward()
        gates.append(record.gates[0][0, 0])
        a.append(layer.experts.lora_a.grad.flatten(1).any(dim=1))
        b.append(layer.experts.lora_b.grad.flatten(1).any(dim=1))
    return torch.stack(gates), torch.stack(a), torch.stack(b)


def test_without_a_mask_everyone_teaches_the_experts_that_answer() -> None:
    gate_NE, a_NE, b_NE = taught()
    assert torch.equal(a_NE, gate_NE > 0)
    assert torch.equal(b_NE, gate_NE > 0)
    assert ((gate_NE > 0).sum(dim=1) > 1).all()


def test_dominant_lets_each_person_teach_the_expert_with_most_of_its_gate_alone() -> None:
    gate_NE, a_NE, b_NE = taught(gradient_mask="dominant")
    main_NE = torch.nn.functional.one_hot(gate_NE.argmax(dim=1), E).bool()
    assert torch.equal(a_NE, main_NE)
    assert torch.equal(b_NE, main_NE)


PEOPLE = [{"country": "Germany", "age": 30}, {"Country": "Thailand"}, {"age": 50}, "A person without fields."]


def test_groups_let_each_group_teach_its_own_experts_alone() -> None:
    groups = {"country": {"Germany": (0, 1), "Thailand": (2, 3), "*": (4, 5)}}
    mask_NE = group_mask(PEOPLE, groups, E)
    assert mask_NE.tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]
    gate_NE, a_NE, b_NE = taught(mask_NE, gradient_mask="groups", gradient_groups=groups)
    allowed_NE = (gate_NE > 0) & (mask_NE[:3] > 0)
    assert torch.equal(a_NE, allowed_NE)
    assert torch.equal(b_NE, allowed_NE)
    assert allowed_NE.any()
    assert not torch.equal(allowed_NE, gate_NE > 0)


def test_people_outside_the_listed_groups_teach_all_experts_unless_told_otherwise() -> None:
    mask_NE = group_mask(PEOPLE, {"country": {"Germany": (0,)}}, 2)
    assert mask_NE.tolist() == [[1, 0], [1, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"county": {"Germany": (0,)}},
            r"no profile has the field 'county' \(did you mean 'country'\?\); they have country, age",
        ),
        (
            {"country": {"Germony": (0,)}},
            r"gradient_groups.country: nobody's country is 'Germony' \(did you mean 'Germany'\?\)",
        ),
    ],
)
def test_groups_that_nobody_is_in_are_refused(groups: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        group_mask(PEOPLE, groups, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_mask": "groups"}, "gradient_mask: groups and gradient_groups go together"),
        ({"gradient_groups": {"country": {"Germany": [0]}}}, "gradient_mask: groups and gradient_groups go together"),
        (
            {"gradient_mask": "groups", "gradient_groups": {}},
            "gradient_groups has 0 profile fields; exactly one is allowed",
        ),
        (
            {"gradient_mask": "groups", "gradient_groups": {"country": {"Germany": [8]}}},
            r"experts \[8\]; expected one or more of 0 to 7",
        ),
        ({"gradient_mask": "groups", "gradient_groups": {"country": {"Germany": []}}}, r"lists the experts \[\]"),
    ],
)
def test_mistaken_group_tables_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CumaConfig(**options)


def test_autocast_changes_the_frozen_part_alone() -> None:
    torch.manual_seed(0)
    model = inject_adapters(
        Linear(), CumaConfig(num_experts=E, top_k=2, lora_r=R, target_modules=("q_proj",), profile_dim=5)
    ).eval()
    ((_, layer),) = model.adapted_layers()
    nn.init.normal_(layer.experts.lora_b)
    x, e = torch.randn(3, 7, D), torch.randn(3, 5)

    def parts() -> tuple[torch.Tensor, torch.Tensor]:
        with model.adapters_disabled():
            frozen = model(inputs_embeds=x)
        return frozen, model(inputs_embeds=x, profile_embeddings=e) - frozen

    _, exact = parts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frozen, added = parts()
    assert frozen.dtype == torch.bfloat16
    torch.testing.assert_close(added, exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("operators", ["in use", "plain PyTorch"])
def test_grouped_has_shapes_on_meta_and_is_traced_where_it_can_be(operators: str, monkeypatch) -> None:
    if operators == "plain PyTorch":
        monkeypatch.setattr(library, "supports", lambda dtype, device: False)
    leaves, expert_TK = case(8, False)
    x, weight, a, b = (t.detach().to("meta").requires_grad_() for t in leaves.values())
    out = mixture(x, Routes(weight, expert_TK.to("meta")), a, b, strategy="grouped")
    out.backward(torch.empty_like(out))
    assert all(t.grad.shape == t.shape for t in (x, weight, a, b))
    assert cheaper_strategy(MixtureSizes(E, K, 64, 64, 64), torch.float32) == "grouped"
    wide = [torch.randn(8, 64), leaves["weight"].detach(), torch.randn(E, 64, 64), torch.randn(E, 64, 64)]
    x, weight, a, b = (t.requires_grad_() for t in wide)
    traced = torch.compile(mixture, backend="aot_eager", fullgraph=True)
    outs = [call(x, Routes(weight, expert_TK), a, b) for call in (traced, mixture)]
    grads = [torch.autograd.grad(out.square().sum(), wide) for out in outs]
    for one, other in zip([outs[0], *grads[0]], [outs[1], *grads[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))
