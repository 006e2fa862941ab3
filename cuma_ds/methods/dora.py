"""DoRA (arXiv 2402.09353) as PEFT has it: LoRA for the direction of each row of a weight, and a trained length.

W' = m * (W0 + (alpha / r) B A) / ||W0 + (alpha / r) B A||, norms per row of W [O, I]. The norm is a constant in the
backward pass (section 4.3 of the paper).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from cuma_ds.adapters.inject import find_targets
from cuma_ds.config import RunConfig
from cuma_ds.methods.model import Spread
from cuma_ds.methods.peft import PeftMethod

if TYPE_CHECKING:
    from peft import PeftModelForCausalLM

Whole = Callable[[list[nn.Parameter]], contextlib.AbstractContextManager[None]]


class DoraMethod(PeftMethod):
    """See :class:`PeftMethod`. The keys that LoRA has mean the same."""

    def wrapped(self, backbone: nn.Module, config: RunConfig) -> PeftModelForCausalLM:
        """See :class:`PeftMethod`."""
        from peft import LoraConfig, PeftModelForCausalLM, TaskType

        adapters, targets = config.adapters, list(config.adapters.target_modules)
        asked = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            use_dora=True,
            r=adapters.lora_r,
            lora_alpha=adapters.lora_alpha,  # type: ignore[arg-type]  # any number works
            lora_dropout=adapters.dropout,
            # By their short names, which mean the same to PEFT.
            target_modules=find_targets(backbone, targets) if "all-linear" in targets else targets,
        )
        return PeftModelForCausalLM(backbone, asked)

    @classmethod
    def check(cls, skeleton: nn.Module, config: RunConfig) -> None:
        """PEFT must be installed, and targets must match linears of the backbone."""
        super().check(skeleton, config)
        find_targets(skeleton, config.adapters.target_modules)

    def place(self, spread: Spread) -> None:
        """Have a sharded weight whole while its norm is taken, which PEFT does outside of the layer that owns it."""
        if spread.whole is None:
            return
        from peft.tuners.lora import LoraLayer

        for module in self.peft.modules():
            if isinstance(module, LoraLayer):
                read = [*module.get_base_layer().parameters(), *module.lora_A["default"].parameters()]
                _have_whole(module.lora_magnitude_vector["default"], read, spread.whole)


def _have_whole(module: nn.Module, parameters: list[nn.Parameter], whole: Whole) -> None:
    """Make parameters of other modules whole during each forward of a module."""
    opened = contextlib.ExitStack()
    module.register_forward_pre_hook(lambda *_: opened.enter_context(whole(parameters)), prepend=True)
    module.register_forward_hook(lambda *_: opened.close(), always_call=True)
