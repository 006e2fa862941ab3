"""What a mixture of LoRA experts looks like: sizes, router kind, gate normalisation, sharing."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

GateNorm = Literal["topk_softmax", "softmax", "softmax_topk", "softmax_topk_softmax"]
Method = Literal[
    "cuma",
    "mixlora",
    "hydralora",
    "hydralora-original",
    "lora",
    "dora",
    "p_tuning_v2",
    "full",
    "vanilla",
    "persona",
    "few_shot",
]

# What each method fixes; a recipe that asks for something else under the same name is refused.
_METHOD_FIXES: dict[str, dict[str, object]] = {
    "cuma": {},
    "mixlora": {"shared_a": False},
    "hydralora": {"shared_a": True},
    "hydralora-original": {
        "shared_a": True,
        "share_router": False,
        "router": "linear",
        "gate_norm": "softmax",
        "balance_weight": 0.0,
    },
    "lora": {"num_experts": 1, "top_k": 1, "shared_a": False, "balance_weight": 0.0},
}
# Methods without a mixture, with the keys that each reads. In a recipe, all other keys of the section are mistakes.
_READS: dict[str, tuple[str, ...]] = {
    "dora": ("lora_r", "lora_alpha", "target_modules", "dropout"),
    "p_tuning_v2": (),
    "full": (),
    "vanilla": (),
    "persona": (),
    "few_shot": (),
}
_WITHOUT_EXPERTS: dict[str, object] = {"num_experts": 1, "top_k": 1, "balance_weight": 0.0}


class CumaConfig(BaseModel):
    """The adapters of one model (CuMA, arXiv 2601.04885, section 3; baselines are special cases).

    ``method`` names what trains (docs/method.md). The mixtures are presets of the other keys: ``cuma`` routes on the
    token and the profile; ``mixlora`` (own A) and ``hydralora`` (shared A) route on the token alone; ``lora`` is one
    expert without a router. All others read few of the keys, or none.

    Raises:
        pydantic.ValidationError: impossible values, e.g. ``top_k`` above ``num_experts``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = Field(
        "cuma",
        description="what trains: cuma | mixlora (semantic only, own A) | hydralora (semantic only, shared A) | "
        "hydralora-original (as its authors publish it: all experts, no balance) | lora | dora | p_tuning_v2 (section "
        "prefix) | full (the backbone); or nothing: vanilla (the model as it is) | persona (profile in the prompt) | "
        "few_shot (answers of the same group in the prompt)",
    )
    num_experts: int = Field(8, ge=1, le=512, description="E, experts per adapted linear")
    top_k: int = Field(2, ge=1, le=512, description="K, experts that answer for one token")
    lora_r: int = Field(8, ge=1, le=16384, description="r, rank of one expert")
    lora_alpha: float = Field(16.0, gt=0, description="the mixture is scaled by lora_alpha / lora_r")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "v_proj"), min_length=1, description="names (or dotted suffixes) of the linear layers to adapt"
    )
    router: Literal["linear", "mlp"] = Field("linear", description="the paper's linear router, or an MLP with ReLU")
    router_hidden: int = Field(256, ge=1, description="hidden width of the MLP router")
    router_layers: int = Field(2, ge=2, description="number of linear layers of the MLP router")
    router_bias: bool | None = Field(None, description="bias in the router's linears; by default only in the MLP")
    router_input: Literal["token_and_profile", "profile"] = Field(
        "token_and_profile",
        description="what the router reads: token_and_profile (paper) | profile, so that one gate holds for the whole "
        "sequence and a profile's mixture is one plain LoRA (method cuma)",
    )
    gate_temperature: float = Field(
        1.0, gt=0, description="router logits are divided by this before the gate; below 1 fewer experts decide"
    )
    gate_norm: GateNorm = Field(
        "topk_softmax",
        description="topk_softmax (paper) | softmax (all experts) | softmax_topk (not renormalised) | "
        "softmax_topk_softmax",
    )
    shared_a: bool = Field(False, description="one A for all experts of a linear (HydraLoRA style)")
    share_router: bool = Field(True, description="one router for q,k,v of a layer and one for gate,up")
    balance_weight: float = Field(0.01, ge=0, description="lambda of the load-balance loss; 0 switches it off")
    balance_probability: Literal["softmax", "gate"] = Field(
        "softmax",
        description="p_i of the load-balance loss: softmax, over all experts, so that unused ones are revived | gate, "
        "after the top-k (the authors' code and release 0.1.0), whose gradient vanishes for unused experts",
    )
    balance_scope: Literal["run", "micro_batch"] = Field(
        "run",
        description="f_i of the load-balance loss: run, a running share over whole optimizer steps, the same for any "
        "micro_batch_size and number of ranks | micro_batch, the shares of each forward (the authors' code and "
        "release 0.1.0)",
    )
    balance_decay: float = Field(
        0.5, ge=0, lt=1, description="with balance_scope: run, weight of the shares before this step"
    )
    gradient_mask: Literal["none", "dominant", "groups"] = Field(
        "none",
        description="which experts learn from whom: none, all that answer (paper) | dominant, only a profile's main "
        "expert | groups, those that gradient_groups names",
    )
    gradient_groups: dict[str, dict[str, tuple[int, ...]]] | None = Field(
        None,
        description="with gradient_mask: groups, the experts that each value of one profile field may teach, e.g. "
        "{country: {Germany: [0, 1], Thailand: [2], '*': [3]}}; * is everybody else (all experts if left out)",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the experts' input and between router layers")
    profile_dropout: float = Field(
        0.0, ge=0, lt=1, description="in training, share of examples whose profile is hidden from the routers"
    )
    profile_noise: float = Field(
        0.0,
        ge=0,
        description="in training, standard deviation of the noise on standardised profiles, in units of their RMS",
    )
    profile_dim: int = Field(
        0, ge=0, description="P, width of the profile embedding; 0 = no demographics; set from the encoder in a run"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_method(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        method = values.get("method", "cuma")
        if isinstance(method, str) and method in _READS:
            return cls._without_experts(method, values)
        fixes = _METHOD_FIXES.get(method, {}) if isinstance(method, str) else {}
        for key, fixed in fixes.items():
            if key in values and _typed(cls.model_fields[key], values[key]) != fixed:
                raise ValueError(f"method {method!r} means {key}: {fixed}, but {key}: {values[key]} was asked for")
        return {**values, **fixes}

    @classmethod
    def _without_experts(cls, method: str, values: dict[str, object]) -> dict[str, object]:
        """The section of a method that is no mixture. A resolved recipe has every key, each with the value it has when
        it is left out.
        """
        unread = {key: field.default for key, field in cls.model_fields.items()} | _WITHOUT_EXPERTS
        for key in ("method", *_READS[method]):
            del unread[key]
        for key in values.keys() & unread.keys():
            if _typed(cls.model_fields[key], values[key]) != unread[key]:
                raise ValueError(
                    f"method {method!r} does not read {key}, but {key}: {values[key]} was given; remove it"
                )
        return {**values, **_WITHOUT_EXPERTS}

    @model_validator(mode="after")
    def _check(self) -> CumaConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k} but num_experts is {self.num_experts}; top_k must not exceed num_experts"
            )
        if (self.gradient_mask == "groups") != (self.gradient_groups is not None):
            raise ValueError("gradient_mask: groups and gradient_groups go together; one of them is missing")
        if self.gradient_groups is not None:
            if len(self.gradient_groups) != 1:
                raise ValueError(
                    f"gradient_groups has {len(self.gradient_groups)} profile fields; exactly one is allowed"
                )
            for field, groups in self.gradient_groups.items():
                for value, experts in groups.items():
                    if not experts or any(not 0 <= expert < self.num_experts for expert in experts):
                        wanted = f"expected one or more of 0 to {self.num_experts - 1}"
                        raise ValueError(f"gradient_groups.{field}.{value} lists the experts {list(experts)}; {wanted}")
        if self.blurs_profiles and self.method != "cuma":
            raise ValueError(
                f"profile_dropout and profile_noise need profiles, which method {self.method!r} does not take; "
                "leave them out, or use method 'cuma'"
            )
        if self.router_input == "profile" and self.method != "cuma":
            raise ValueError(
                f"router_input is profile, but method {self.method!r} takes no profiles; use method 'cuma'"
            )
        if self.profile_dim and self.method != "cuma":
            raise ValueError(
                f"method {self.method!r} takes no profiles, but profile_dim is {self.profile_dim}; use method 'cuma'"
            )
        return self

    @property
    def scaling(self) -> float:
        """alpha / r, the factor on the mixture's output."""
        return self.lora_alpha / self.lora_r

    @property
    def has_router(self) -> bool:
        """False for plain LoRA, which is one expert with gate 1, and for methods that are no mixture."""
        return self.method in ("cuma", "mixlora", "hydralora", "hydralora-original")

    @property
    def active_experts(self) -> int:
        """Experts that answer for one token: all of them without a top-k."""
        return self.num_experts if self.gate_norm == "softmax" else self.top_k

    @property
    def blurs_profiles(self) -> bool:
        """Whether training hides profiles or adds noise to them."""
        return self.profile_dropout > 0 or self.profile_noise > 0

    @property
    def uses_profiles(self) -> bool:
        """Whether routing depends on the profile."""
        return self.method == "cuma"


def unread_keys(method: str) -> set[str]:
    """Keys of the section that a recipe of this method must leave out, or give the one value that the method fixes.

    Args:
        method: any text; nothing is known of a method that does not exist.
    """
    if method in _READS:
        return CumaConfig.model_fields.keys() - {"method", *_READS[method]}
    return set(_METHOD_FIXES.get(method, {}))


def _typed(field: FieldInfo, value: object) -> object:
    """The value as the field reads it (the text "false" of a recipe as False), unchanged where the field refuses it."""
    try:
        return TypeAdapter(field.rebuild_annotation()).validate_python(value)
    except ValidationError:
        return value
