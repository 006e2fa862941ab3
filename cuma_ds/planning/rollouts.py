"""Whether a rank has room for the whole backbone while it generates (``rollout.backbone: auto``).

Shapes: V vocabulary.
"""

from __future__ import annotations

import psutil
import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig

from cuma_ds.parallel.backbone import full_bytes
from cuma_ds.parallel.deepspeed_compat import held
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.quantised import QuantisedLinear
from cuma_ds.parallel.topology import Topology

# Share of the free memory that is counted with; the rest is for what allocators cannot use.
USABLE = 0.9


def holds_whole_backbone(engine: AdapterEngine, sequences: int, length: int) -> bool:
    """Whether each rank has memory for its sharded backbone as a whole and for what generating needs beside it.

    What is there already (shards, adapters, optimizer states) is measured, not predicted. All ranks call this and get
    the same answer.

    Args:
        engine: between two steps.
        sequences: that are written at once on a rank.
        length: most tokens of a sequence, prompt included.
    """
    backbone, device = engine.model.backbone, engine.topology.device
    config = backbone.config
    assert isinstance(config, PretrainedConfig)
    embedding = backbone.get_input_embeddings().weight  # type: ignore[operator]
    copies = engine.shards > 1 or held(embedding).device.type != device.type
    needed = (full_bytes(backbone) if copies else 0) + unpacked_bytes(backbone)
    needed += generation_bytes(config.get_text_config(), embedding.element_size(), sequences, length)
    fits = torch.tensor(int(needed <= USABLE * free_bytes(engine.topology)), device=device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    return bool(fits)


def unpacked_bytes(backbone: nn.Module) -> int:
    """Bytes of the largest quantised weight while it is unpacked; 0 without."""
    packings = [layer.packing for layer in backbone.modules() if isinstance(layer, QuantisedLinear)]
    return max((packing.shape.numel() * packing.dtype.itemsize for packing in packings), default=0)


def generation_bytes(text: PretrainedConfig, itemsize: int, sequences: int, length: int) -> int:
    """Bytes of keys and values, of the hidden states that reading all prompts at once needs, and of logits.

    Args:
        text: configuration of the language model.
        itemsize: bytes of a number in the backbone's dtype.
        sequences, length: as in :func:`holds_whole_backbone`.
    """
    # While a layer's cache grows it exists twice.
    cache = (text.num_hidden_layers + 1) * keys_and_values(text) * length
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    hidden = (4 * text.hidden_size + 3 * inner) * length
    # One position in the backbone's dtype, and its probabilities in float32 with two sorted copies.
    logits = text.vocab_size * (itemsize + 4 * 5)
    return sequences * (itemsize * (cache + hidden) + logits)


def keys_and_values(text: PretrainedConfig) -> int:
    """Numbers that a layer keeps of one token."""
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * (getattr(text, "num_key_value_heads", None) or heads) * head


def free_bytes(topology: Topology) -> int:
    """Memory that this rank may still use: of its GPU, or its share of the machine's where ranks run on CPUs."""
    if topology.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(topology.device)
        cached = torch.cuda.memory_reserved(topology.device) - torch.cuda.memory_allocated(topology.device)
        return free + cached
    ranks = [0] * topology.world
    dist.all_gather_object(ranks, topology.local_rank)
    here = max(1, max(ranks) + 1)
    return psutil.virtual_memory().available // here
