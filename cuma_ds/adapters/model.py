"""A frozen backbone with adapters, called with the profile of every sequence.

Shapes: B sequences, S positions, N profiles of the batch, P profile width, E experts, R routers.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from cuma_ds.adapters.balance import RoutingStatistics, balance_loss, follow_shares
from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.context import RoutingContext, RoutingState
from cuma_ds.adapters.layer import AdaptedLinear
from cuma_ds.errors import ModelError


class RoutingRecord:
    """What the routers did while recording. gates: [R, B, E] float32 mean gates over real tokens, one per forward."""

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
        expert_share: [R, E] float32 buffer, the running shares f_i of the balance loss (``config.balance_scope: run``).
        shares_per_forward: whether each training forward moves ``expert_share``. An engine that knows where optimizer
            steps end sets it to False and calls :meth:`update_shares`.
        sum_over_ranks: set by a distributed engine, so that shares and ``balance_loss`` are those of all ranks' batches
            joined.
    """

    profile_mean: Tensor
    profile_scale: Tensor
    expert_share: Tensor

    def __init__(self, base_model: nn.Module, config: CumaConfig, context: RoutingContext) -> None:
        super().__init__()
        self.base_model = base_model
        self.config = config
        self.context = context
        self.router_names = [name for name, layer in self.adapted_layers() if layer.router is not None]
        device = next(base_model.parameters()).device
        self.register_buffer("profile_mean", torch.zeros(config.profile_dim, device=device))
        self.register_buffer("profile_scale", torch.ones((), device=device))
        share_RE = torch.full((len(self.router_names), config.num_experts), 1 / config.num_experts, device=device)
        self.register_buffer("expert_share", share_RE, persistent=False)
        self.shares_per_forward = True
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
        """Run the backbone's own forward, with each token routed by its profile too.

        Args:
            attention_mask: [B, S_total]; zeros are padding and are never routed. Without ``position_ids``, left-padded
                rows count their positions from their first real token, as in ``generate``.
            profile_embeddings: [N, P] raw encoder output (N = B without ``profile_index``); centred and scaled here.
            profile_index: [B] or [B, S] int64 rows of ``profile_embeddings``; -1 keeps a row out of all statistics.
            gradient_mask: [N, E] in [0, 1], share of the weight gradients each profile may send to each expert.

        Returns:
            The backbone's output. While training it also carries ``balance_loss`` (a scalar, summed over routers)
            unless ``config.balance_weight`` is 0.

        Raises:
            ModelError: profiles missing, of the wrong width or number.
        """
        profile_BS = self._profile_BS(self._inputs(args, kwargs), profile_index)
        self._open(profile_BS, profile_embeddings, attention_mask, gradient_mask, collect=True)
        if kwargs.get("position_ids") is None and self.takes_positions and _left_padded(attention_mask):
            kwargs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -profile_BS.shape[1] :]
        out = self.base_model(*args, attention_mask=attention_mask, **kwargs)
        statistics = self.routing_statistics()
        if self._recording is not None and statistics is not None and statistics.gate_RBE is not None:
            self._recording.gates.append(statistics.gate_RBE.float())
        if self.training and statistics is not None and self.config.balance_weight > 0:
            by_run = self.config.balance_scope == "run"
            out.balance_loss = balance_loss(statistics, self.expert_share if by_run else None, self.sum_over_ranks)
            if by_run and self.shares_per_forward:
                load_RE = statistics.load_RE.detach()
                self.update_shares(load_RE if self.sum_over_ranks is None else self.sum_over_ranks(load_RE))
        return out

    def update_shares(self, load_RE: Tensor) -> None:
        """Move the running shares of the balance loss by one optimizer step.

        Args:
            load_RE: [R, E] top-k assignments of the whole step, summed over its micro batches and all ranks.
        """
        self.expert_share = follow_shares(self.expert_share, load_RE, self.config.balance_decay)

    @torch.no_grad()
    def generate(self, *args: Any, profile_embeddings: Tensor | None = None, **kwargs: Any) -> Any:
        """The backbone's ``generate``; each sequence keeps its profile through beams, samples and the KV cache.

        Args:
            profile_embeddings: [B, P], one raw embedding per prompt.
        """
        profile_BS = self._profile_BS(self._inputs(args, kwargs), None)
        self._open(profile_BS, profile_embeddings, None, None, collect=False)
        return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    @property
    def takes_positions(self) -> bool:
        """Whether the backbone's forward names ``position_ids``. Some of the others read positions off the mask."""
        return "position_ids" in inspect.signature(self.base_model.forward).parameters

    def routing_statistics(self) -> RoutingStatistics | None:
        """Statistics of the last forward (None without routers)."""
        return RoutingStatistics.stack(self.context.state.statistics)

    def _inputs(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        for value in (kwargs.get("input_ids"), kwargs.get("inputs"), kwargs.get("inputs_embeds"), *args):
            if isinstance(value, Tensor):
                return value
        raise ModelError("the model was called without input_ids or inputs_embeds")

    def _profile_BS(self, inputs: Tensor, profile_index: Tensor | None) -> Tensor:
        """[B, S] profile row of every input position, from [B], [B, S] or None (sequence b has row b)."""
        rows, length = inputs.shape[:2]
        if profile_index is None:
            profile_index = torch.arange(rows, device=self.profile_scale.device)
        if profile_index.shape[0] != rows:
            raise ModelError(f"profile_index has {profile_index.shape[0]} rows for {rows} sequences")
        return profile_index[:, None].expand(-1, length) if profile_index.dim() == 1 else profile_index

    def _open(
        self,
        profile_BS: Tensor,
        profile_embeddings: Tensor | None,
        attention_mask: Tensor | None,
        gradient_mask: Tensor | None,
        collect: bool,
    ) -> None:
        """Start a forward: check the profiles and put them into the routing context."""
        width = self.config.profile_dim
        if profile_embeddings is not None and not width:
            raise ModelError("profile_embeddings were given, but these adapters take none (profile_dim is 0)")
        if width and self.context.enabled:
            if profile_embeddings is None:
                raise ModelError(
                    f"profile_embeddings are missing; these adapters need one row of width {width} per sequence"
                )
            if profile_embeddings.dim() != 2 or profile_embeddings.shape[1] != width:
                raise ModelError(
                    f"profile_embeddings have shape {tuple(profile_embeddings.shape)}; expected [sequences, {width}]"
                )
        num_profiles = profile_BS.shape[0] if profile_embeddings is None else profile_embeddings.shape[0]
        checked = profile_embeddings is not None and profile_BS.device.type == "cpu" and profile_BS.numel() > 0
        if checked and int(profile_BS.max()) >= num_profiles:
            raise ModelError(
                f"profile_index reaches {int(profile_BS.max())}, but only {num_profiles} profile embeddings were given"
            )
        profiles_NP = None
        if width and profile_embeddings is not None:
            mean = self.profile_mean
            profiles_NP = (profile_embeddings.to(mean.device, mean.dtype) - mean) * self.profile_scale
        by_softmax = self.config.balance_weight > 0 and self.config.balance_probability == "softmax"
        self.context.state = RoutingState(
            profiles_NP=profiles_NP,
            profile_BS=profile_BS,
            attention_mask_BS=attention_mask,
            gradient_mask_NE=gradient_mask,
            num_profiles=num_profiles,
            collect=collect,
            full_softmax=self.training and by_softmax,
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
            raise ModelError(
                f"profile embeddings have shape {shape}; the adapters take width {self.config.profile_dim}"
            )
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
        """Recompute activations in the backward pass, with the profiles of the forward."""
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
        """The trained parameters by name: ``<linear>.experts.lora_a``, ``<linear>.router.weight_h`` and so on."""
        for name, layer in self.adapted_layers():
            for part, module in (("experts", layer.experts), ("router", layer.router)):
                for inner, parameter in [] if module is None else module.named_parameters():
                    yield f"{name}.{part}.{inner}", parameter

    def adapter_state(self) -> dict[str, Tensor]:
        """Trained parameters and the profile standardisation by name, detached and not copied."""
        return {name: parameter.detach() for name, parameter in self.adapter_parameters()} | self.standardisation()

    def standardisation(self) -> dict[str, Tensor]:
        """The buffers that centre and scale profile embeddings. Empty when the routers take no profiles."""
        return (
            {"profile_mean": self.profile_mean, "profile_scale": self.profile_scale} if self.config.profile_dim else {}
        )

    def balance_state(self) -> dict[str, Tensor]:
        """The running shares of the balance loss, which a checkpoint must keep. Empty where the loss has none."""
        remembers = self.config.balance_weight > 0 and self.config.balance_scope == "run" and len(self.router_names) > 0
        return {"expert_share": self.expert_share} if remembers else {}

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
                raise ModelError(
                    f"adapter tensor {name} has shape {tuple(state[name].shape)}; "
                    f"this model needs {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])


def _left_padded(mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a mask [B, S_total] begins with padding in any row."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all())


def _contiguous_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy the slice of ``logits_to_keep``: for a strided one torch copies the vocabulary matrix per sequence."""
    return (args[0].contiguous(), *args[1:])
