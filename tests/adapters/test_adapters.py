"""The mixture against a loop-written reference of the equations, variant by variant."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from pydantic import ValidationError
from reference import reference_balance, reference_gate, reference_logits, reference_mixture
from torch import nn
from torch.utils.checkpoint import checkpoint

from cuma_ds.adapters import CumaConfig, CumaModel, balance_loss, inject_adapters
from cuma_ds.adapters.fold import constant_gates, fixed_gate, fold, plain_lora, set_lora
from cuma_ds.errors import ModelError
from cuma_ds.ops import demographic_gate, dense_gate

NORMS = ["topk_softmax", "softmax", "softmax_topk", "softmax_topk_softmax"]
D, O, P, E, R, B, S = 12, 10, 5, 6, 4, 3, 7  # noqa: E741


class Out:
    """What a Hugging Face model returns, reduced to what the tests read."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class TwoLinears(nn.Module):
    """A 'backbone' whose q_proj and v_proj read the same input, as in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, O, bias=False)
        self.v_proj = nn.Linear(D, O)
        self.out = nn.Linear(O, D)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Out:
        q, v = self.q_proj(inputs_embeds), self.v_proj(inputs_embeds)
        return Out(torch.cat([q, v, self.out(q * v)], dim=-1))


def build(dtype: torch.dtype = torch.float64, **options: object) -> CumaModel:
    torch.manual_seed(0)
    values = {
        "num_experts": E,
        "top_k": 2,
        "lora_r": R,
        "lora_alpha": 6,
        "profile_dim": P,
        "router_hidden": 9,
        **options,
    }
    model = inject_adapters(TwoLinears(), CumaConfig(**values)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    if model.config.profile_dim:
        model.set_profile_standardisation(torch.randn(9, P, generator=generator), 3.0)
    return model.train()


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, S, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, :2] = 0
    mask[2, :4] = 0
    return x, mask, torch.randn(B, P, generator=generator, dtype=torch.float64)


def reference(
    model: CumaModel,
    x: torch.Tensor,
    mask: torch.Tensor,
    e: torch.Tensor,
    gradient_mask: torch.Tensor | None,
    share_RE: torch.Tensor,
):
    """Output [B, S, 2 O + D] and the summed balance loss, token by token."""
    config = model.config
    parameters = dict(model.adapter_parameters())
    rows, balance_gates = [], {}
    if config.profile_dim:
        e = (e - model.profile_mean) * model.profile_scale
    for b, s in itertools.product(range(B), range(S)):
        parts = []
        for name in ("q_proj", "v_proj"):
            linear = getattr(model.base_model, name).base
            owner = "q_proj" if config.share_router else name
            real = bool(mask[b, s])
            router = {
                key.split(".router.")[1]: value
                for key, value in parameters.items()
                if key.startswith(f"{owner}.router.")
            }
            if router:
                profile = e[b] if config.profile_dim else None
                logits = reference_logits(x[b, s], profile, router, config.router, config.gate_temperature)
                gate, chosen = reference_gate(logits, config.top_k, config.gate_norm)
            else:
                gate, chosen, logits = [torch.ones((), dtype=x.dtype)], [0], x.new_zeros(1)
            y = linear(x[b, s])
            if real:
                a, up = parameters[f"{name}.experts.lora_a"], parameters[f"{name}.experts.lora_b"]
                row_mask = None if gradient_mask is None else gradient_mask[b]
                y = y + config.lora_alpha / config.lora_r * reference_mixture(x[b, s], gate, a, up, row_mask)
                if name == owner:
                    balance_gates.setdefault(owner, []).append((gate, chosen, logits))
            parts.append(y)
        rows.append(torch.cat([*parts, model.base_model.out(parts[0] * parts[1])]))
    shares = share_RE if config.has_router and config.balance_scope == "run" else [None] * len(balance_gates)
    full = config.balance_probability == "softmax"
    balance = sum(
        reference_balance(gates, share, full) for gates, share in zip(balance_gates.values(), shares, strict=True)
    )
    return torch.stack(rows).view(B, S, -1), balance


def uneven_shares(model: CumaModel) -> torch.Tensor:
    """[R, E] shares that differ between experts and routers."""
    return torch.randn(model.expert_share.shape, generator=torch.Generator().manual_seed(4)).softmax(dim=-1)


def gradients(loss: torch.Tensor, model: CumaModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {**dict(model.adapter_parameters()), "input": x}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads, strict=True)}


def assert_equal_to_reference(
    model: CumaModel, dtype: torch.dtype, tolerance: float, gradient_mask: torch.Tensor | None = None
) -> None:
    x, mask, e = inputs(dtype)
    profiles = e.to(dtype) if model.config.profile_dim else None
    share_RE = model.expert_share = uneven_shares(model)
    out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=profiles, gradient_mask=gradient_mask)
    expected, expected_balance = reference(model, x, mask, e.to(dtype), gradient_mask, share_RE.to(dtype))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    loss, expected_loss = (out.hidden * weights).sum(), (expected * weights).sum()
    if model.config.has_router:
        torch.testing.assert_close(out.balance_loss, expected_balance, rtol=tolerance, atol=tolerance)
        loss, expected_loss = loss + 3 * out.balance_loss, expected_loss + 3 * expected_balance
    torch.testing.assert_close(out.hidden, expected, rtol=tolerance, atol=tolerance)
    ours, theirs = gradients(loss, model, x), gradients(expected_loss, model, x)
    for name in ours:
        scale = max(1.0, float(theirs[name].abs().max()))
        torch.testing.assert_close(ours[name] / scale, theirs[name] / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("shared_a", [False, True])
@pytest.mark.parametrize("share_router", [False, True])
def test_mixture_equals_the_loop_reference_in_float64(
    norm: str, router: str, shared_a: bool, share_router: bool
) -> None:
    model = build(gate_norm=norm, router=router, shared_a=shared_a, share_router=share_router)
    assert_equal_to_reference(model, torch.float64, 1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_mixture_equals_the_loop_reference_in_float32(norm: str, router: str) -> None:
    assert_equal_to_reference(build(torch.float32, gate_norm=norm, router=router), torch.float32, 1e-5)


@pytest.mark.parametrize(
    "options", [{"method": "mixlora"}, {"method": "hydralora"}, {"router": "mlp", "method": "mixlora"}]
)
def test_semantic_only_mixtures_equal_the_reference(options: dict[str, object]) -> None:
    assert_equal_to_reference(build(profile_dim=0, **options), torch.float64, 1e-10)


def test_plain_lora_equals_the_reference() -> None:
    model = build(profile_dim=0, method="lora", num_experts=1, top_k=1)
    assert_equal_to_reference(model, torch.float64, 1e-10)
    assert not any("router" in name for name, _ in model.adapter_parameters())


def test_deeper_mlp_router_and_linear_router_with_bias_equal_the_reference() -> None:
    assert_equal_to_reference(build(router="mlp", router_layers=3), torch.float64, 1e-10)
    assert_equal_to_reference(build(router_bias=True), torch.float64, 1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_gate_temperature_equals_the_reference(norm: str, router: str) -> None:
    assert_equal_to_reference(build(gate_norm=norm, router=router, gate_temperature=0.4), torch.float64, 1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{}, {"router": "mlp"}, {"router_bias": True}, {"gate_temperature": 3.0}])
def test_routing_by_the_profile_alone_equals_the_reference(norm: str, options: dict[str, object]) -> None:
    model = build(gate_norm=norm, router_input="profile", **options)
    assert not any(name.endswith("weight_h") for name, _ in model.adapter_parameters())
    assert_equal_to_reference(model, torch.float64, 1e-10)


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_one_gate_holds_for_a_sequence_routed_by_its_profile_alone(router: str) -> None:
    """So the mixture of a profile is one plain LoRA, exactly."""
    model = build(router_input="profile", router=router).eval()
    x, mask, e = inputs()
    with torch.no_grad():
        own = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e).hidden
        assert all(fixed_gate(one) for one in model.context.routers)
        gates_NRE = [constant_gates(model, e[row]) for row in range(B)]
        states = [{n: (a.double(), b.double()) for n, (a, b) in fold(model, gates).items()} for gates in gates_NRE]
        plain = plain_lora(model, states).double()
        for row, state in enumerate(states):
            set_lora(plain, state)
            real = mask[row].bool()
            folded = plain(inputs_embeds=x[[row]], attention_mask=mask[[row]]).hidden[0]
            torch.testing.assert_close(folded[real], own[row][real], rtol=1e-6, atol=1e-6)


def test_the_profile_alone_cannot_route_where_there_are_no_profiles() -> None:
    with pytest.raises(ValidationError, match="router_input is profile, but method 'mixlora' takes no profiles"):
        CumaConfig(method="mixlora", router_input="profile")


@pytest.mark.parametrize("top_k", [1, 3, E])
def test_any_top_k_equals_the_reference(top_k: int) -> None:
    assert_equal_to_reference(build(top_k=top_k), torch.float64, 1e-10)


@pytest.mark.parametrize("shared_a", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_gradient_mask_scales_weight_gradients_and_nothing_else(shared_a: bool, norm: str) -> None:
    mask = torch.rand(B, E, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mask[0, 1] = mask[1, 2] = 0
    mask[2] = 1
    assert_equal_to_reference(build(shared_a=shared_a, gate_norm=norm), torch.float64, 1e-10, gradient_mask=mask)


def test_gradient_mask_of_ones_is_the_paper_and_of_zeros_freezes_the_experts_only() -> None:
    model = build()
    x, mask, e = inputs()

    def grads(gradient_mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e, gradient_mask=gradient_mask)
        return gradients(out.hidden.square().sum(), model, x)

    free, ones, zeros = grads(None), grads(torch.ones(B, E)), grads(torch.zeros(B, E))
    for name in free:
        torch.testing.assert_close(free[name], ones[name], rtol=1e-12, atol=1e-12)
        if "experts" in name:
            assert not zeros[name].any()
        else:
            assert free[name].any()
            torch.testing.assert_close(free[name], zeros[name], rtol=1e-12, atol=1e-12)


def test_gradient_mask_of_one_profile_moves_only_the_allowed_expert() -> None:
    model = build(gate_norm="softmax")
    x, mask, e = inputs()
    only_expert_4 = torch.zeros(B, E)
    only_expert_4[:, 4] = 1
    out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e, gradient_mask=only_expert_4)
    for name, grad in gradients(out.hidden.square().sum(), model, x).items():
        if "experts" in name:
            moved = {i for i in range(E) if grad[i].any()}
            assert moved == {4}, name


def test_dominant_mask_lets_only_the_main_expert_of_a_profile_learn() -> None:
    model = build(gradient_mask="dominant")
    x, mask, e = inputs()
    with model.recording_routing() as record:
        out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
    dominant = record.gates[0][0].argmax(dim=1)
    grads = gradients(out.hidden.square().sum(), model, x)
    moved = {i for i in range(E) if grads["q_proj.experts.lora_a"][i].any()}
    assert moved == set(dominant.tolist())
    explicit = torch.nn.functional.one_hot(dominant, E).double()
    model_without = build()
    out = model_without(inputs_embeds=x, attention_mask=mask, profile_embeddings=e, gradient_mask=explicit)
    for name, grad in gradients(out.hidden.square().sum(), model_without, x).items():
        torch.testing.assert_close(grad, grads[name])


def test_padding_never_influences_anything() -> None:
    model = build()
    model.shares_per_forward = False
    x, mask, e = inputs()

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
        real = mask.bool()
        statistics = model.routing_statistics()
        loss = out.hidden[real].square().sum() + out.balance_loss
        grads = gradients(loss, model, x)
        return (
            out.hidden[real],
            out.balance_loss,
            statistics.load_RE,
            statistics.entropy_R,
            statistics.tokens,
            *grads.values(),
        )

    before = run(x)
    changed = x.detach().clone()
    changed[mask == 0] = 1e3
    after = run(changed.requires_grad_())
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert float(before[4]) == int(mask.sum())


def test_filler_rows_are_counted_nowhere() -> None:
    model = build()
    model.shares_per_forward = False
    x, mask, e = inputs()
    out = model(inputs_embeds=x[:2], attention_mask=mask[:2], profile_embeddings=e)
    alone = (out.balance_loss, model.routing_statistics().load_RE)
    out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e, profile_index=torch.tensor([0, 1, -1]))
    torch.testing.assert_close(out.balance_loss, alone[0])
    assert torch.equal(model.routing_statistics().load_RE, alone[1])


def test_profiles_by_index_equal_profiles_by_row() -> None:
    model = build()
    x, mask, e = inputs()
    by_row = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e[[2, 0, 2]]).hidden
    by_index = model(
        inputs_embeds=x, attention_mask=mask, profile_embeddings=e, profile_index=torch.tensor([2, 0, 2])
    ).hidden
    torch.testing.assert_close(by_row, by_index)
    packed = torch.tensor([2, 0, 2])[:, None].expand(B, S)
    per_token = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e, profile_index=packed).hidden
    torch.testing.assert_close(by_row, per_token)


def test_who_is_asking_changes_the_answer_only_of_who_asked() -> None:
    model = build()
    x, mask, e = inputs()
    one = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e).hidden
    e = e.clone()
    e[1] *= -1
    two = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e).hidden
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[2], two[2])
    assert not torch.equal(one[1], two[1])


def test_ties_go_to_the_lower_expert() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    gate = demographic_gate(logits, None, torch.zeros(2, dtype=torch.long), 2, "topk_softmax")
    assert gate.expert_TK.tolist() == [[1, 2], [0, 1]]
    assert gate.weight_TK.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert dense_gate(gate.weight_TK, gate.expert_TK, 4).tolist() == [[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0]]


@pytest.mark.parametrize("norm", NORMS)
def test_gate_weights_sum_as_the_norm_says(norm: str) -> None:
    logits = torch.randn(50, 8, dtype=torch.float64)
    sums = demographic_gate(logits, None, torch.zeros(50, dtype=torch.long), 2, norm).weight_TK.sum(dim=1)
    if norm == "softmax_topk":
        top = logits.softmax(dim=1).topk(2, dim=1).values.sum(dim=1)
        torch.testing.assert_close(sums, top)
    else:
        torch.testing.assert_close(sums, torch.ones_like(sums))


RELEASED_BALANCE = {"balance_probability": "gate", "balance_scope": "micro_batch"}


def test_released_balance_is_one_per_router_when_experts_share_evenly_and_e_when_one_takes_all() -> None:
    model = build(top_k=1, gate_norm="topk_softmax", share_router=False, **RELEASED_BALANCE)
    x, mask, e = inputs()
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if "router" in name:
                parameter.zero_()
    out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
    assert float(out.balance_loss) == pytest.approx(2 * E)  # all ties: expert 0 takes everything, in both routers


def test_balance_by_run_is_one_per_router_at_even_shares_or_even_probabilities() -> None:
    model = build(top_k=1, share_router=False)
    x, mask, e = inputs()
    out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
    assert float(out.balance_loss) == pytest.approx(2)  # shares start at 1 / E
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if "router" in name:
                parameter.zero_()
    out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
    assert float(out.balance_loss) == pytest.approx(2)  # the softmax of equal logits is even, whatever the shares are


def test_released_balance_of_split_batches_is_that_of_the_joined_batch() -> None:
    model = build(**RELEASED_BALANCE)
    x, mask, e = inputs()
    out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
    whole = gradients(out.balance_loss, model, x)
    parts = []
    for b in range(B):
        model(inputs_embeds=x[b : b + 1], attention_mask=mask[b : b + 1], profile_embeddings=e[b : b + 1])
        parts.append(model.routing_statistics())
    packed = [torch.cat([p.load_RE.flatten(), p.tokens[None], torch.ones(1, dtype=torch.float64)]) for p in parts]
    losses = [balance_loss(p, sum_over_ranks=lambda _: torch.stack(packed).sum(dim=0)) for p in parts]
    torch.testing.assert_close(torch.stack(losses).mean(), out.balance_loss)
    for name, grad in gradients(torch.stack(losses).mean(), model, x).items():
        torch.testing.assert_close(grad, whole[name])


def test_balance_by_run_of_split_batches_weighted_by_tokens_is_that_of_the_joined_batch() -> None:
    model = build()
    model.shares_per_forward = False
    model.expert_share = uneven_shares(model)
    x, mask, e = inputs()
    out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
    whole = gradients(out.balance_loss, model, x)
    joined = x.new_zeros(())
    for b in range(B):
        part = model(inputs_embeds=x[b : b + 1], attention_mask=mask[b : b + 1], profile_embeddings=e[b : b + 1])
        joined = joined + part.balance_loss * mask[b].sum() / mask.sum()
    torch.testing.assert_close(joined, out.balance_loss)
    for name, grad in gradients(joined, model, x).items():
        torch.testing.assert_close(grad, whole[name])


def test_shares_follow_the_load_of_every_step() -> None:
    """f <- decay * f + (1 - decay) * share of the step; by hand for two steps, one of a router that saw no token."""
    model = build(balance_decay=0.75)
    torch.testing.assert_close(model.expert_share, torch.full_like(model.expert_share, 1 / E), rtol=1e-6, atol=0.0)
    load_E = torch.arange(E, dtype=torch.float64)
    model.update_shares(load_E.expand(len(model.router_names), -1))
    first = 0.75 / E + 0.25 * load_E / load_E.sum()
    torch.testing.assert_close(
        model.expert_share.double(), first.expand(len(model.router_names), -1), rtol=1e-6, atol=1e-7
    )
    before = model.expert_share
    model.update_shares(torch.zeros(len(model.router_names), E))
    torch.testing.assert_close(model.expert_share, before)


def test_without_an_engine_each_training_forward_moves_the_shares_and_no_other_does() -> None:
    model = build(balance_decay=0.75)
    x, mask, e = inputs()
    model.eval()
    model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
    torch.testing.assert_close(model.expert_share, torch.full_like(model.expert_share, 1 / E), rtol=1e-6, atol=0.0)
    model.train()
    model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
    load_RE = model.routing_statistics().load_RE
    expected = 0.75 / E + 0.25 * load_RE / load_RE.sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.expert_share.to(expected.dtype), expected, rtol=1e-6, atol=1e-7)


def test_adapters_start_as_the_backbone_and_do_not_copy_it() -> None:
    torch.manual_seed(0)
    base = TwoLinears()
    weight = base.q_proj.weight
    x, mask, e = inputs(torch.float32)
    expected = base(x).hidden
    model = inject_adapters(base, CumaConfig(num_experts=4, profile_dim=P))
    assert base.q_proj.base.weight is weight
    assert not weight.requires_grad
    torch.testing.assert_close(
        model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e.float()).hidden, expected
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"base_model.{name}" for name, _ in model.adapter_parameters()}


def test_disabled_adapters_are_the_bare_backbone() -> None:
    model = build()
    x, _, e = inputs()
    with model.adapters_disabled():
        bare = model(inputs_embeds=x).hidden
    q, v = model.base_model.q_proj.base(x), model.base_model.v_proj.base(x)
    torch.testing.assert_close(bare, torch.cat([q, v, model.base_model.out(q * v)], dim=-1))
    assert not torch.equal(model(inputs_embeds=x, profile_embeddings=e).hidden, bare)


def test_standardisation_centres_and_scales_the_training_profiles() -> None:
    embeddings = torch.randn(20, P) + 4
    model = inject_adapters(TwoLinears(), CumaConfig(profile_dim=P))
    model.set_profile_standardisation(embeddings, 3.0)
    standard = (embeddings - model.profile_mean) * model.profile_scale
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(P), atol=1e-5, rtol=0)
    assert float(standard.square().mean().sqrt()) == pytest.approx(3.0, rel=1e-5)
    single = inject_adapters(TwoLinears(), CumaConfig(profile_dim=P))
    single.set_profile_standardisation(embeddings[:1], 3.0)
    assert torch.equal((embeddings[:1] - single.profile_mean) * single.profile_scale, torch.zeros(1, P))


def test_state_round_trip_and_clear_refusals() -> None:
    model, other = build(), build()
    state = {name: tensor + 1 for name, tensor in model.adapter_state().items()}
    other.load_adapter_state(state)
    for name, tensor in other.adapter_state().items():
        assert torch.equal(tensor, state[name]), name
    with pytest.raises(ModelError, match=r"lacks profile_mean"):
        other.load_adapter_state({name: t for name, t in state.items() if name != "profile_mean"})
    with pytest.raises(ModelError, match="extra"):
        other.load_adapter_state({**state, "extra": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"q_proj.experts.lora_b has shape"):
        other.load_adapter_state({**state, "q_proj.experts.lora_b": torch.zeros(1)})


def test_initialisation_depends_on_seed_and_name_alone() -> None:
    one = dict(inject_adapters(TwoLinears(), CumaConfig(profile_dim=P), seed=5).adapter_parameters())
    torch.manual_seed(99)
    two = dict(inject_adapters(TwoLinears(), CumaConfig(profile_dim=P), seed=5).adapter_parameters())
    three = dict(inject_adapters(TwoLinears(), CumaConfig(profile_dim=P), seed=6).adapter_parameters())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["q_proj.experts.lora_a"], three["q_proj.experts.lora_a"])
    assert not torch.equal(one["q_proj.experts.lora_a"], one["v_proj.experts.lora_a"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"'q_prj' matches no linear layer.*did you mean 'q_proj'.*out, q_proj, v_proj"),
        (["q_proj", "nothing"], "'nothing'"),
    ],
)
def test_targets_that_match_nothing_are_named(targets: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        inject_adapters(TwoLinears(), CumaConfig(target_modules=targets))


def test_all_linear_and_dotted_targets() -> None:
    assert len(list(inject_adapters(TwoLinears(), CumaConfig(target_modules=["all-linear"])).adapted_layers())) == 3
    nested = nn.ModuleDict({"first": TwoLinears(), "second": TwoLinears()})
    model = inject_adapters(nested, CumaConfig(target_modules=["second.q_proj"]))
    assert [name for name, _ in model.adapted_layers()] == ["second.q_proj"]


def test_wrong_profiles_are_refused_with_the_width_they_need() -> None:
    model = build()
    x, mask, e = inputs()
    with pytest.raises(ModelError, match=f"missing.*width {P}"):
        model(inputs_embeds=x, attention_mask=mask)
    with pytest.raises(ModelError, match=rf"expected \[sequences, {P}\]"):
        model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e[:, :-1])
    with pytest.raises(ModelError, match="profile_index reaches 7"):
        model(inputs_embeds=x, profile_embeddings=e, profile_index=torch.tensor([0, 7, 1]))
    with pytest.raises(ModelError, match="take none"):
        build(profile_dim=0, method="mixlora")(inputs_embeds=x, profile_embeddings=e)
    with pytest.raises(ModelError, match="already has adapters"):
        inject_adapters(model.base_model, CumaConfig())


@pytest.mark.sixteen_bit
def test_bfloat16_backbone_with_float32_adapters_stays_close_to_float32() -> None:
    exact, low = build(torch.float32), build(torch.float32)
    low.base_model.q_proj.base.bfloat16()
    low.base_model.v_proj.base.bfloat16()
    low.base_model.out.bfloat16()
    x, mask, e = inputs(torch.float32)
    a = exact(inputs_embeds=x, attention_mask=mask, profile_embeddings=e.float()).hidden
    b = low(inputs_embeds=x.bfloat16(), attention_mask=mask, profile_embeddings=e.float()).hidden
    assert b.dtype == torch.bfloat16
    assert float((a - b.float()).norm() / a.norm()) < 0.05
    b.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in low.adapter_parameters())


def test_dropout_acts_only_while_training() -> None:
    model = build(dropout=0.5)
    x, mask, e = inputs()

    def run() -> torch.Tensor:
        return model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e).hidden

    assert not torch.equal(run(), run())
    model.eval()
    assert torch.equal(run(), run())


def count_router_calls(model: CumaModel) -> list[int]:
    """A list that grows by the router's index at each of its calls."""
    calls: list[int] = []
    for index, router in enumerate(model.context.routers):
        router.register_forward_hook(lambda *_, index=index: calls.append(index))
    return calls


@pytest.mark.parametrize(("share_router", "expected"), [(True, [0]), (False, [0, 1])])
def test_a_router_runs_once_for_the_layers_that_share_it(share_router: bool, expected: list[int]) -> None:
    model = build(share_router=share_router)
    x, mask, e = inputs()
    calls = count_router_calls(model)
    model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
    assert calls == expected
    model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e * 2)
    assert calls == expected * 2, "the same input with other profiles has another gate"


class Recomputed(TwoLinears):
    """TwoLinears whose projections are recomputed in the backward pass."""

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Out:
        def project(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.q_proj(x), self.v_proj(x)

        contexts = self.q_proj.context.checkpoint_contexts
        q, v = checkpoint(project, inputs_embeds, use_reentrant=False, context_fn=contexts)
        return Out(torch.cat([q, v, self.out(q * v)], dim=-1))


def test_a_shared_router_runs_again_when_its_layers_are_recomputed_and_is_counted_once() -> None:
    """The recomputed projections read the very tensor that the first ones read, whose gate must not be taken."""
    plain, recomputing = build(), build()
    recomputing.base_model.__class__ = Recomputed
    x, mask, e = inputs()
    results = []
    for model in (plain, recomputing):
        model.shares_per_forward = False
        calls = count_router_calls(model)
        out = model(inputs_embeds=x, attention_mask=mask, profile_embeddings=e)
        loss = out.hidden.square().sum() + out.balance_loss
        grads = gradients(loss, model, x)
        statistics = model.routing_statistics()
        results.append([statistics.load_RE, statistics.probability_sum_RE, statistics.entropy_R, *grads.values()])
        assert calls == ([0] if model is plain else [0, 0])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_gate_of_one_input_is_kept_and_those_of_earlier_layers_are_not() -> None:
    chain = nn.Sequential(*(nn.ModuleDict({"q_proj": nn.Linear(D, D)}) for _ in range(3)))
    model = inject_adapters(chain, CumaConfig(method="mixlora", target_modules=("q_proj",)))
    model._open(torch.zeros(B, S, dtype=torch.long), None, None, None, collect=False)
    seen = []
    with torch.no_grad():
        x = torch.randn(B, S, D)
        for block in chain:
            x = x * 2
            seen.append(weakref.ref(x))
            x = block["q_proj"](x)
    assert [reference() is not None for reference in seen] == [False, False, True]
