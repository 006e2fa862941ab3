"""The model of a recipe without weights: its shapes, and which of its frozen parameters are whole while it runs."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch, EncodedExample, pack
from cuma_ds.errors import ModelError
from cuma_ds.files import first_line
from cuma_ds.methods import METHODS
from cuma_ds.methods.model import AdaptedModel, Spread
from cuma_ds.parallel.quantised import quantised_weights
from cuma_ds.profiles import ProfileTable

_ATTENTION = "counted_attention"


@dataclass(frozen=True)
class Setup:
    """What decides the shapes of a model and of its activations.

    backbone: its configuration.  config: the recipe, with ``adapters.profile_dim`` set; its ``model.path`` is not read.
    """

    backbone: PretrainedConfig
    config: RunConfig

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone."""
        return getattr(torch, self.config.model.dtype)

    @property
    def text(self) -> PretrainedConfig:
        """The part of the backbone's configuration that describes the language model."""
        return self.backbone.get_text_config()

    def build(self) -> AdaptedModel:
        """The adapted model on the meta device, with an attention that computes shapes alone.

        Raises:
            ModelError: no causal language model has this configuration, or the targets match nothing.
        """
        return self.build_packable()[0]

    def build_packable(self) -> tuple[AdaptedModel, set[nn.Parameter]]:
        """The same, and the weights that ``model.quantisation`` packs; none where it cannot pack all that are large.

        Raises:
            ModelError: as above, or the recipe quantises a model that cannot be.
        """
        AttentionInterface.register(_ATTENTION, _attention)
        with torch.device("meta"):
            try:
                base = AutoModelForCausalLM.from_config(
                    copy.deepcopy(self.backbone), dtype=self.dtype, attn_implementation=_ATTENTION
                )
            except (ValueError, KeyError) as error:
                raise ModelError(f"no causal language model has this configuration: {first_line(error)}") from None
            packable = self._packable(base)
            return METHODS[self.config.adapters.method](base, self.config).train(), packable

    def _packable(self, base: nn.Module) -> set[nn.Parameter]:
        kind = self.config.model.quantisation
        try:
            return {base.get_parameter(name) for name in quantised_weights(base, "nf4" if kind == "none" else kind)}
        except ModelError:
            if kind != "none":
                raise
            return set()

    def work(self, sequences: int, length: int, kept: int) -> tuple[Batch, ProfileTable | None]:
        """A micro batch without storage, logits wanted at the last ``kept`` positions, and the profiles it names."""
        places = list(range(length - kept, length))
        examples = [
            EncodedExample([0] * length, places, [0] * kept, [1.0] * kept, profile) for profile in range(sequences)
        ]
        profiles_NP = torch.zeros(sequences, self.config.adapters.profile_dim, device="meta")
        table = ProfileTable([], profiles_NP) if self.config.adapters.uses_profiles else None
        return pack(examples, 0, length).to("meta"), table


def read_model_config(path: str | Path) -> PretrainedConfig:
    """A ``config.json`` (or the folder it is in) as transformers reads it.

    Raises:
        ModelError: it is missing, broken, or of a kind transformers does not know.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError):
        raise ModelError(f"cannot read the model configuration {path}") from None
    kind = values.pop("model_type", None) if isinstance(values, dict) else None
    if not isinstance(kind, str):
        wanted = "a JSON object with a model_type, as in a Hugging Face model's config.json"
        raise ModelError(f"{path}: a model configuration is {wanted}")
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from None


class Gathering:
    """Follows which frozen parameters of a model are whole while it runs, as if they were sharded.

    The rules are those of ZeRO-3 with nothing kept for reuse: a module's parameters are gathered before its forward
    and its backward, and released after each. They are followed by hooks, because recomputation stops early and layers
    below the first trained one have no backward.

    Args:
        model: has hooks from here on.
        changed: called after each change of ``live``.

    Attributes:
        live: parameters that are whole now.
        gathered: all that were, in the order in which they were gathered, some several times.
    """

    def __init__(self, model: AdaptedModel, changed: Callable[[], None] = lambda: None) -> None:
        self.live: set[nn.Parameter] = set()
        self.gathered: list[nn.Parameter] = []
        self._in_backward: list[nn.Parameter] = []
        self._changed = changed
        model.place(Spread(lambda experts: (0, experts), whole=self._whole))
        for module in model.modules():
            if own := [p for p in module.parameters(recurse=False) if not p.requires_grad]:
                self._watch(module, own)

    def _need(self, own: list[nn.Parameter]) -> None:
        self.gathered.extend(parameter for parameter in own if parameter not in self.live)
        self.live.update(own)
        self._changed()

    def _release(self, own: list[nn.Parameter]) -> None:
        self.live.difference_update(own)
        self._changed()

    @contextlib.contextmanager
    def _whole(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        self._need(parameters)
        yield
        self._release(parameters)

    def _watch(self, module: nn.Module, own: list[nn.Parameter]) -> None:
        def before_backward(_: Tensor) -> None:
            self._release(self._in_backward)
            self._need(own)
            self._in_backward = own

        def after_forward(_: nn.Module, __: object, out: object) -> None:
            self._release(own)
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(before_backward)

        module.register_forward_pre_hook(lambda *_: self._need(own))
        module.register_forward_hook(after_forward)


def gathered_parameters(setup: Setup, model: AdaptedModel) -> list[nn.Parameter]:
    """Frozen parameters in the order in which one micro step gathers them when they are sharded, some several times.

    The model is of no further use: it has hooks and has run.
    """
    gathering = Gathering(model)
    if setup.config.model.gradient_checkpointing:
        model.recompute_activations()  # after the hooks, as in the engine: it may register hooks of its own
    model(*setup.work(1, 2, 2)).logits.sum().backward()
    return gathering.gathered


class _FlashAttention(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its output and one float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, query_BHSC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor) -> Tensor:
        out_BHSC = torch.empty_like(query_BHSC)
        log_sum_BHS = query_BHSC.new_empty(query_BHSC.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query_BHSC, key_BHSC, value_BHSC, out_BHSC, log_sum_BHS)
        return out_BHSC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query_BHSC, key_BHSC, value_BHSC, *_ = ctx.saved_tensors
        return torch.empty_like(query_BHSC), torch.empty_like(key_BHSC), torch.empty_like(value_BHSC)


def _attention(
    module: nn.Module, query_BHSC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, S, C] -> [B, S, H, C]; grouped keys and values are repeated."""
    groups = query_BHSC.shape[1] // key_BHSC.shape[1]
    if groups > 1:
        key_BHSC, value_BHSC = (tensor.repeat_interleave(groups, dim=1) for tensor in (key_BHSC, value_BHSC))
    return _FlashAttention.apply(query_BHSC, key_BHSC, value_BHSC).transpose(1, 2).contiguous(), None
