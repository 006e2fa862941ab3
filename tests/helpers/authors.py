"""Checkpoints as the authors' code writes them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

AUTHORS = {
    "shared-a-mlp": {"hydra": True, "layers": 2, "renormalise": True, "qkv": True, "w_i": True},
    "own-a-linear-unshared": {"hydra": False, "layers": 1, "renormalise": True, "qkv": False, "w_i": False},
    "soft": {"hydra": True, "layers": 2, "renormalise": False, "qkv": True, "w_i": True},
    "three-layers-only-qkv-shared": {"hydra": False, "layers": 3, "renormalise": False, "qkv": True, "w_i": False},
    "no-profiles": {"hydra": True, "layers": 1, "renormalise": True, "qkv": False, "w_i": True, "profile_dim": 0},
}


TARGETS = ("q_proj", "v_proj", "gate_proj", "up_proj")


def write_authors_checkpoint(folder: Path, backbone: Path, hydra, layers, renormalise, qkv, w_i, profile_dim=6):
    """A checkpoint in the authors' format, and its model: their equations on the plain backbone, token by token."""
    experts, top_k, rank, alpha, hidden, width = 4, 2, 3, 6, 5, profile_dim
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: 0.4 * torch.randn(*shape, generator=generator)  # noqa: E731
    names = [name for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    tensors, routers, numbers = {}, [], {}
    who = {"row": 0, "e": None}
    for name in names:
        linear = model.get_submodule(name)
        parent, _, leaf = name.rpartition(".")
        group = (
            "qkv"
            if qkv and leaf in ("q_proj", "v_proj")
            else "w_i"
            if w_i and leaf in ("gate_proj", "up_proj")
            else leaf
        )
        if (parent, group) not in numbers:
            numbers[parent, group] = len(routers)
            sizes = [linear.in_features + width, *[hidden] * (layers - 1), experts]
            routers.append([(draw(o, i), draw(o)) for i, o in itertools.pairwise(sizes)])
            for j, (weight, bias) in enumerate(routers[-1]):
                tensors[f"{names[0]}._router_manager.routers.{len(routers) - 1}.mlp.{1 + 3 * j}.weight"] = weight
                tensors[f"{names[0]}._router_manager.routers.{len(routers) - 1}.mlp.{1 + 3 * j}.bias"] = bias
        router = routers[numbers[parent, group]]
        a = [draw(rank, linear.in_features) for _ in range(1 if hydra else experts)]
        b = [draw(linear.out_features, rank) for _ in range(experts)]
        tensors |= {f"{name}.lora_a" if hydra else f"{name}.lora_a.{i}": tensor for i, tensor in enumerate(a)}
        tensors |= {f"{name}.lora_b.{i}": tensor for i, tensor in enumerate(b)}

        def add(module, inputs, output, router=router, a=a, b=b):
            out = output.clone()
            for t, h in enumerate(inputs[0][0]):
                s = h if who["e"] is None else torch.cat([h, who["e"]])
                for j, (weight, bias) in enumerate(router):
                    s = weight @ (torch.relu(s) if j else s) + bias
                soft = torch.exp(s) / torch.exp(s).sum()
                best = sorted(range(experts), key=lambda i: -float(soft[i]))[:top_k]
                total = sum(torch.exp(soft[i]) for i in best)
                for i in best:
                    g = torch.exp(soft[i]) / total if renormalise else soft[i]
                    out[0, t] += alpha / rank * g * (b[i] @ (a[0 if hydra else i] @ h))
            return out

        linear.register_forward_hook(add)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "CuMA", "lora_r": rank, "lora_alpha": alpha, "num_experts": experts, "top_k": top_k,
        "use_hydra_lora": hydra,
        "demographic_embed_dim": profile_dim, "router_hidden_dim": hidden, "num_router_mlp_layers": layers,
        "top_k_routing_strategy": renormalise, "target_modules": list(TARGETS), "share_router_for_qkv": qkv,
        "share_router_for_w_i": w_i,
        "lambda_auxiliary": 0.01, "torch_dtype": "torch.float32", "base_model": "theirs/base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(about))

    @torch.no_grad()
    def logits(ids, embedding):
        who["e"] = embedding if profile_dim else None
        return model(input_ids=ids).logits[0]

    return logits
