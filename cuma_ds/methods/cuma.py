"""CuMA and the mixtures that are special cases of it: cuma_ds.adapters behind the interface of a method.

Shapes: N examples of a micro batch, P profile width, R routers, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from cuma_ds.adapters import CumaModel, inject_adapters
from cuma_ds.adapters.blur import blurred
from cuma_ds.adapters.experts import Experts
from cuma_ds.adapters.inject import find_targets
from cuma_ds.config import RunConfig
from cuma_ds.data.batch import PROFILE_SEED, Batch, ModelInputs
from cuma_ds.methods.model import AdaptedModel, ExpertShapes, Output, Placement, Spread, Trained
from cuma_ds.profiles import ProfileTable


class CumaMethod(AdaptedModel):
    """A frozen backbone with routed LoRA experts.

    Args:
        backbone: whole or sharded; it is changed in place.
        config: the recipe, with ``adapters.profile_dim`` set.

    Attributes:
        cuma: the adapted model, called as a model of transformers is.

    Raises:
        ModelError: a target matches nothing, or the backbone already has adapters.
    """

    def __init__(self, backbone: nn.Module, config: RunConfig) -> None:
        super().__init__()
        self.cuma = inject_adapters(backbone, config.adapters, config.run.seed)
        self.cuma.shares_per_forward = False  # end_step moves them, once per optimizer step
        self.router_names = self.cuma.router_names
        self._rms = config.profiles.standardise
        self._mask_NE: Tensor | None = None

    @classmethod
    def check(cls, skeleton: nn.Module, config: RunConfig) -> None:
        """Targets must match linears of the backbone."""
        find_targets(skeleton, config.adapters.target_modules)

    @property
    def backbone(self) -> nn.Module:
        """See :class:`AdaptedModel`."""
        return self.cuma.base_model

    @property
    def inference_model(self) -> CumaModel:
        """See :class:`AdaptedModel`."""
        return self.cuma

    def forward(self, batch: Batch, table: ProfileTable | None = None) -> Output:
        """See :class:`AdaptedModel`."""
        inputs = model_inputs(batch, table, self.cuma.profile_scale.device, self._mask_NE)
        if self.training and self.cuma.config.blurs_profiles and PROFILE_SEED in batch.extras:
            inputs["profile_embeddings"] = self._blurred(inputs["profile_embeddings"], batch.extras[PROFILE_SEED])
        out = self.cuma(**inputs)
        return Output(out.logits, getattr(out, "balance_loss", None), self.cuma.routing_statistics())

    def _blurred(self, raw_NP: Tensor, seed_N: Tensor) -> Tensor:
        assert self._rms is not None
        mean, scale = self.cuma.profile_mean, self.cuma.profile_scale
        return blurred((raw_NP - mean) * scale, seed_N, self.cuma.config, self._rms) / scale + mean

    def trained_parameters(self) -> Iterator[Trained]:
        """See :class:`AdaptedModel`. The experts' A and B have an expert dimension, a shared A has none."""
        layers = [layer for _, layer in self.cuma.adapted_layers()]
        experts = {id(p) for layer in layers for p in layer.experts.sharded_parameters().values()}
        routers = {id(p) for router in self.cuma.context.routers for p in router.parameters()}
        for name, parameter in self.cuma.adapter_parameters():
            placement: Placement = "per_expert" if id(parameter) in experts else "replicated"
            yield Trained(name, parameter, placement, id(parameter) in routers)

    def state(self) -> dict[str, Tensor]:
        """The centre and scale of profile embeddings, and the running shares of the balance loss."""
        kept = {f"param/{name}": buffer for name, buffer in self.cuma.standardisation().items()}
        return kept | {f"balance/{name}": buffer for name, buffer in self.cuma.balance_state().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Trained parameters and the profile standardisation."""
        return self.cuma.adapter_state()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`AdaptedModel`."""
        self.cuma.load_adapter_state(dict(tensors))

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """See :class:`AdaptedModel`."""
        return self.cuma.adapters_disabled()

    def expert_shapes(self) -> list[ExpertShapes]:
        """See :class:`AdaptedModel`."""
        return [shapes_of(layer.experts) for _, layer in self.cuma.adapted_layers()]

    def place(self, spread: Spread) -> None:
        """See :class:`AdaptedModel`."""
        self.cuma.sum_over_ranks = spread.sum_over_ranks
        if spread.dispatcher is not None:
            for _, layer in self.cuma.adapted_layers():
                layer.experts.keep(*spread.experts(layer.experts.num_experts))
                layer.dispatcher = spread.dispatcher

    def prepare(self, profiles_NP: Tensor | None, mask_NE: Tensor | None) -> None:
        """Centre and scale profile embeddings by those of the training examples."""
        self._mask_NE = mask_NE
        if profiles_NP is not None:
            self.cuma.set_profile_standardisation(profiles_NP, self._rms)

    def recompute_activations(self) -> None:
        """See :class:`AdaptedModel`. Recomputed routers see the profiles that the forward had."""
        self.cuma.enable_gradient_checkpointing()

    def end_step(self, load_RE: Tensor | None) -> None:
        """Move the running shares of the balance loss."""
        if load_RE is not None:
            self.cuma.update_shares(load_RE)


class CumaInputs(ModelInputs, total=False):
    """Keyword arguments of a :class:`~cuma_ds.adapters.model.CumaModel`."""

    profile_embeddings: Tensor
    profile_index: Tensor
    gradient_mask: Tensor


def model_inputs(
    batch: Batch, table: ProfileTable | None, device: torch.device, mask_NE: Tensor | None = None
) -> CumaInputs:
    """What an adapted model is called with for one batch.

    Args:
        batch: on any device.
        table: the run's profiles; None for a method that takes none.
        device: of the model.
        mask_NE: gradient mask of each row of the table.
    """
    rows_N = batch.profile_rows_N
    batch = batch.to(device)
    inputs = CumaInputs(**batch.inputs, profile_index=batch.profile_BS)
    if table is not None:
        inputs["profile_embeddings"] = table.embeddings[rows_N].to(device)
    if mask_NE is not None:
        inputs["gradient_mask"] = mask_NE[rows_N].to(device)
    return inputs


def shapes_of(experts: Experts) -> ExpertShapes:
    """Sizes of one linear's experts over all ranks."""
    out_features, rank = experts.lora_b.shape[1:]
    return ExpertShapes(experts.num_experts, rank, experts.lora_a.shape[-1], out_features, experts.shared_a)
