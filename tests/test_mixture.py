"""The two strategies of the mixture against the loop-written reference, the cost rule, and who may teach which expert."""

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
from cuma_ds.adapters.experts import LocalDispatcher
from cuma_ds.adapters.mixture import GradientMask, cheaper_strategy, compute_dtype, mixture
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
    )  # nobody asks the last expert
    if kind == "one takes all":
        expert_TK = torch.stack([torch.full((tokens,), 3), torch.full((tokens,), 1)], dim=1).int()
    expert_TK[::5] = -1
    if kind == "nobody":
        expert_TK[:] = -1
    weight_TK = torch.rand(tokens, K, generator=generator).masked_fill(expert_TK < 0, 0.0).requires_grad_()
    a = leaf(rank, D) if shared_a else leaf(E, rank, D)
    return {"x": leaf(tokens, D), "weight": weight_TK, "a": a, "b": leaf(E, out, rank)}, expert_TK


def naive(
    leaves: dict[str, torch.Tensor], expert_TK: torch.Tensor, scale: float, mask: GradientMask | None
) -> torch.Tensor:
    rows = []
    for t, experts in enumerate(expert_TK.tolist()):
        gate = [leaves["weight"].new_zeros(())] * E
        for k, expert in enumerate(experts):
            if expert >= 0:
                gate[expert] = leaves["weight"][t, k]
        row_mask = None if mask is None else mask.mask_NE[max(0, int(mask.profile_T[t]))]
        rows.append(scale * reference_mixture(leaves["x"][t], gate, leaves["a"], leaves["b"], row_mask))
    return torch.stack(rows)


def grouped_mm_of_a_gpu(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """torch's grouped product, with NaN in all that its CUDA kernels may leave unwritten, and refusing what they refuse."""
    if not a.numel():
        raise RuntimeError("strides should be multiple of 16 bytes")
    product = F.grouped_mm(a, b, offs=offs)
    if b.dim() == 3:
        product[offs[-1] :] = torch.nan
    else:
        product[offs == torch.cat([offs.new_zeros(1), offs[:-1]])] = torch.nan
    return product


@pytest.fixture(params=[False, True], ids=["rows in place", "all rows at once"])
def at_once(request, monkeypatch) -> None:
    """As CPUs mix, and as GPUs do."""
    if request.param:
        monkeypatch.setattr(mixture_module, "_in_place", lambda x: False)


@pytest.fixture
def gpu_products(monkeypatch):
    monkeypatch.setattr(mixture_module, "_in_place", lambda x: False)
    monkeypatch.setattr(mixture_module, "F", SimpleNamespace(linear=F.linear, grouped_mm=grouped_mm_of_a_gpu))


@pytest.mark.parametrize("shared_a", [False, True])
@pytest.mark.parametrize("kind", ["mixed", "one takes all", "nobody"])
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_grouped_products_use_nothing_that_a_gpu_leaves_unwritten(tokens, kind, shared_a, gpu_products) -> None:
    leaves, expert_TK = case(tokens, shared_a, kind)
    outs = [
        mixture(leaves["x"], leaves["weight"], expert_TK, leaves["a"], leaves["b"], strategy=s)
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
    shared_a, masked, kind, strategy, operators, at_once, monkeypatch
) -> None:
    if operators == "plain PyTorch":
        monkeypatch.setattr(library, "supports", lambda *_: False)
    leaves, expert_TK = case(23, shared_a, kind)
    mask = None
    if masked:
        profile_T = torch.arange(23) % 3
        mask = GradientMask(
            torch.rand(3, E, generator=torch.Generator().manual_seed(1)), profile_T.masked_fill(expert_TK[:, 0] < 0, -1)
        )
    expected = naive(leaves, expert_TK, 1.5, mask)
    d_out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    out = mixture(leaves["x"], leaves["weight"], expert_TK, leaves["a"], leaves["b"], 1.5, mask, strategy)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y, list(leaves.values()), d_out) for y in (out, expected)]
    for name, one, other in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("strategy", ["dense", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_few_tokens_and_16_bit_inputs(tokens: int, dtype: torch.dtype, strategy: str, at_once: None) -> None:
    leaves, expert_TK = case(tokens, False, rank=8, out=16)  # rows of 16 bytes, as grouped products want them
    x = leaves["x"].detach().to(dtype).requires_grad_()
    arguments = (leaves["weight"], expert_TK, leaves["a"], leaves["b"])
    out = mixture(x, *arguments, strategy=strategy)
    assert (out.shape, out.dtype) == ((tokens, 16), dtype)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert all(leaves[name].grad.dtype == torch.float32 for name in ("a", "b", "weight"))
    exact = mixture(x.detach().double(), *(t.detach().double() if t.is_floating_point() else t for t in arguments))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    largest = max(1.0, float(exact.abs().max())) if tokens else 1.0
    torch.testing.assert_close(out.double(), exact, rtol=0.0, atol=tolerance * largest)


@pytest.mark.parametrize("onto_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared_a", [False, True])
@pytest.mark.parametrize("strategy", ["dense", "grouped"])
def test_the_frozen_part_is_added_and_learns_through(strategy, shared_a, dtype, onto_dtype, at_once) -> None:
    leaves, expert_TK = case(11, shared_a, rank=8, out=16)
    x = leaves["x"].detach().to(dtype)
    arguments = (x, leaves["weight"], expert_TK, leaves["a"], leaves["b"])
    onto = torch.randn(11, 16, generator=torch.Generator().manual_seed(3)).to(onto_dtype).requires_grad_()
    kept = onto.detach().clone()
    out = mixture(*arguments, strategy=strategy, onto_TO=onto)
    expected = onto + mixture(*arguments, strategy=strategy)
    assert out.dtype == expected.dtype
    tolerance = 1e-5 if dtype == onto_dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(onto, kept)
    names = [onto, leaves["weight"], leaves["a"], leaves["b"]]
    d_out = torch.randn(11, 16, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    for one, other in zip(*(torch.autograd.grad(y, names, d_out) for y in (out, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_cost_rule_takes_the_strategy_that_multiplies_less_and_what_grouped_products_can_take(monkeypatch) -> None:
    def choose(
        experts: int, top_k: int, rank: int, dtype: torch.dtype = torch.float32, width: int = 2048, device: str = "cpu"
    ) -> str:
        return cheaper_strategy(experts, top_k, rank, width, width, dtype, device)

    def answers() -> list[str]:
        for experts, top_k, width in itertools.product(
            (8, 64), (1, 2), (2048, 2049)
        ):  # growing ranks change the answer once at most
            chosen = [choose(experts, top_k, rank, width=width) for rank in (1, 2, 4, 8, 16, 32, 64, 128)]
            assert chosen == sorted(chosen)
        assert choose(8, 8, 64) == "dense"  # everybody answers: sorting saves nothing
        assert choose(1, 1, 64) == "dense"
        assert choose(128, 4, 16) == choose(128, 4, 16, width=2049) == "grouped"
        return [choose(8, 2, 1), choose(8, 2, 8), choose(8, 2, 64)]

    monkeypatch.setattr(library, "supports", lambda dtype, device: True)
    assert answers() == ["dense", "grouped", "grouped"]
    assert choose(8, 2, 8, torch.bfloat16) == "dense"  # compiled in float32 alone
    monkeypatch.setattr(library, "supports", lambda dtype, device: False)
    assert answers() == ["dense", "dense", "grouped"]
    assert choose(8, 2, 64, device="cuda") == "dense"  # rows are dearer to move there
    assert choose(64, 2, 64, device="cuda") == "grouped"
    assert choose(64, 2, 64, torch.float64, device="cuda") == "dense"  # torch's grouped products take no float64
    assert choose(64, 2, 4, torch.bfloat16, device="cuda") == choose(64, 2, 64, width=2049, device="cuda") == "dense"
    assert choose(8, 2, 64, device="meta") == choose(8, 2, 64)


def test_16_bit_products_are_computed_in_float32_only_on_cpus_without_units_for_them(monkeypatch) -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    for unit in ("amx_tile", "avx512_bf16", "amx_fp16"):
        monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda: False)
    assert compute_dtype(x) == compute_dtype(x.half()) == torch.float32
    assert compute_dtype(x.to("meta")) == torch.bfloat16
    assert compute_dtype(x.double()) == torch.float64
    for unit in ("amx_tile", "avx512_bf16"):
        with monkeypatch.context() as there:
            there.setattr(torch.cpu, f"_is_{unit}_supported", lambda: True)
            assert (compute_dtype(x), compute_dtype(x.half())) == (torch.bfloat16, torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: True)
    assert compute_dtype(x.half()) == torch.float16


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, D)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.q_proj(inputs_embeds)


def taught(mask_NE: torch.Tensor | None = None, **options: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, E] each, for three people: mean gate of an expert, and whether its A and its B got a gradient from that person."""
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
    on_meta = [
        t.detach().to("meta").requires_grad_(t.is_floating_point())
        for t in (leaves["x"], leaves["weight"], expert_TK, leaves["a"], leaves["b"])
    ]
    out = mixture(*on_meta, strategy="grouped")
    out.backward(torch.empty_like(out))
    assert [t.grad.shape for t in on_meta if t.requires_grad] == [t.shape for t in on_meta if t.requires_grad]
    assert cheaper_strategy(E, K, 64, 64, 64, torch.float32) == "grouped"
    wide = [torch.randn(8, 64), leaves["weight"].detach(), expert_TK, torch.randn(E, 64, 64), torch.randn(E, 64, 64)]
    for i in (0, 1, 3, 4):
        wide[i].requires_grad_()
    outs = [call(*wide) for call in (torch.compile(mixture, backend="aot_eager", fullgraph=True), mixture)]
    grads = [torch.autograd.grad(out.square().sum(), [t for t in wide if t.requires_grad]) for out in outs]
    for one, other in zip([outs[0], *grads[0]], [outs[1], *grads[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))


class QueryAndValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, O)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return torch.cat([self.q_proj(inputs_embeds), self.v_proj(inputs_embeds)], dim=-1)


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({"top_k": 6}, [(6, 24)]),  # q's router and its A; v has the gate already
        ({"top_k": 6, "router": "mlp", "router_hidden": 10, "share_router": False}, [(10, 24), (10, 24)]),
        ({"shared_a": True, "gate_norm": "softmax"}, [(6, 4)]),
        ({"top_k": 6, "profile_dim": 0}, [(6, 24)]),
        ({"num_experts": 64, "lora_r": 32}, [(64,)]),  # experts multiply their own rows
        ({"num_experts": 64, "lora_r": 32, "shared_a": True}, [(64, 32)]),
        ({"top_k": 6, "dropout": 0.5}, [(6,)]),  # A reads another x than the router
        ({"top_k": 6, "gradient_mask": "dominant"}, [(6,)]),  # and learns from others
    ],
    ids=str,
)
def test_the_router_and_all_a_are_one_product_where_they_may_be_and_nothing_else_changes(
    options, products, monkeypatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "cuma_ds.adapters.router.project",
        lambda x, *weights: seen.append(tuple(map(len, weights))) or mixture_module.project(x, *weights),
    )
    results = []
    for stacked in (True, False):
        torch.manual_seed(0)
        config = {
            "num_experts": E,
            "top_k": 2,
            "lora_r": R,
            "target_modules": ("q_proj", "v_proj"),
            "profile_dim": 5,
        } | options
        model = inject_adapters(QueryAndValue(), CumaConfig(**config)).train()
        for _, layer in model.adapted_layers():
            nn.init.normal_(layer.experts.lora_b)
            layer.dispatcher = LocalDispatcher(stacked)
        x, e = torch.randn(3, 7, D, requires_grad=True), torch.randn(3, 5)
        out = model(inputs_embeds=x, **({"profile_embeddings": e} if config["profile_dim"] else {}))
        if stacked:
            assert seen == products
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(parameter.grad for _, parameter in model.adapter_parameters())])
    assert {len(widths) for widths in seen[len(products) :]} == {1}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
