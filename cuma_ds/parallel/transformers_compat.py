"""Every name of transformers' loading that it may change without notice. Read in transformers 5.23.0.

Each says what it relies on; tests/test_compat.py checks that.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class WeightNames:
    """The names that ``from_pretrained`` gives the tensors of a checkpoint.

    Relies on ``get_model_conversion_mapping`` listing renamings and conversions, and on ``rename_source_key``.
    """

    def __init__(self, backbone: PreTrainedModel, names: dict[str, torch.Tensor]) -> None:
        mapping = get_model_conversion_mapping(backbone)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = backbone.base_model_prefix
        self._names = names

    def of(self, key: str) -> tuple[str, bool]:
        """The parameter that a key becomes, which may be none of the model's, and whether its content is converted."""
        name, converter = rename_source_key(key, self._renamings, self._converters, self._prefix, self._names)
        if name not in self._names and key in self._names:
            return key, False
        return name, converter is not None


def keeps_float32(backbone: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether ``from_pretrained`` in this dtype keeps some weights in float32."""
    # Relies on ``_get_dtype_plan`` naming them.
    return bool(backbone._get_dtype_plan(dtype))
