"""One profile as a plain LoRA adapter, for PEFT and multi-LoRA serving engines that know nothing of routing.

With a fixed gate g, sum_i g_i B_i A_i is one low-rank product: the A_i stacked, the g_i B_i side by side. The gate of one profile is fixed
where the router does not look at the token; elsewhere its mean over prompts is taken, and what that costs is measured.

Shapes: R routers, E experts, D input features, O output features, r rank of one expert, P profile width.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cuma_ds.adapters import CumaModel
from cuma_ds.adapters.fold import constant_gates, fixed_gate, fold, plain_lora, set_lora
from cuma_ds.data.batch import EncodedExample, encode_example
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.rows import Row
from cuma_ds.errors import ConfigError, DataError
from cuma_ds.evaluation.metrics import distance, distance_name
from cuma_ds.export.hf import output_folder
from cuma_ds.export.weights import save_tensors
from cuma_ds.files import full_path
from cuma_ds.inference.forward import forward_batches, pad_id_of
from cuma_ds.inference.modeling import Profile, unknown_fields
from cuma_ds.inference.open import load_trained
from cuma_ds.parallel.backbone import load_tokenizer
from cuma_ds.profiles import ProfileEncoder, ProfileTable, linearize
from cuma_ds.runs import Run


def write_lora(
    run_dir: str | Path, profiles: Sequence[Profile], out: str | Path, step: int | None = None, prompts: int = 64
) -> dict[str, Any]:
    """Write ``out/profile-N/`` for the N-th profile, each a PEFT adapter, and ``out/report.json``.

    No profile text is written: adapters are numbered in the order of ``profiles``.

    Args:
        run_dir: a run folder as training leaves it.
        profiles: whom the adapters are for; empty for methods that take no profiles.
        out: a folder that does not exist or is empty.
        step: checkpoint; the newest by default.
        prompts: training prompts that the gate is averaged over, and held-out prompts that the divergence is measured on.

    Returns:
        The report: for each profile ``exact``, ``rank``, and without exactness ``kl_mean``, ``kl_max`` (nats per predicted token) and
        ``emd_mean``, ``emd_max`` (between the answer distributions; no distance to people's answers changes by more) and their
        ``distance`` (EMD, or TV for nominal questions).

    Raises:
        CumaError: the run, a profile or the output folder cannot be used.
    """
    run = Run.open(run_dir)
    config = run.config()
    if config.adapters.uses_profiles and not profiles:
        raise ConfigError("--format lora needs at least one --profile: these adapters are routed by who is asking")
    if profiles and not config.adapters.uses_profiles:
        raise ConfigError(f"--profile was given, but method {config.adapters.method!r} takes no profiles; leave it out")
    if prompts < 1:
        raise ConfigError(f"--calibration is {prompts}; at least one prompt is needed")
    trained = run.trained(config, step)
    data, table = trained.data, trained.table
    sentences = [linearize(profile, config.profiles.template) for profile in profiles]
    known = list(dict.fromkeys(name for profile in data.profiles for name in profile["fields"]))
    for profile in profiles:
        for message in unknown_fields(profile, known):
            warnings.warn(message, UserWarning, stacklevel=2)
    with output_folder(out) as folder:
        model = load_trained(config, trained.adapters, table)
        tokenizer = load_tokenizer(config.model)
        renderer = Renderer.of(tokenizer, config.data)
        embeddings = [None] if table is None else list(_embed(sentences, table, str(config.profiles.encoder)))
        measure = _Measure(config.evaluation.batch_size, pad_id_of(tokenizer))

        def chosen(split: str) -> list[Row]:
            rows = data.splits[split]
            return [rows[int(row)] for row in np.random.default_rng(0).permutation(len(rows))[:prompts]]

        def examples(split: str, sentence: str) -> list[EncodedExample]:
            return [encode_example({**row, "profile": 0}, renderer, [sentence], config.data) for row in chosen(split)]

        split = next((name for name in ("test", "heldout") if len(data.splits[name])), "train")
        nominal = [row["scale"] == "nominal" for row in chosen(split)] if data.kind == "choice" else None
        found = []
        for sentence, embedding in zip(sentences or [""], embeddings, strict=True):
            exact = all(fixed_gate(router) for router in model.context.routers)
            gate_RE = (
                constant_gates(model, embedding)
                if exact
                else measure.mean_gates(model, examples("train", sentence), embedding)
            )
            held_out = [] if exact else examples(split, sentence)
            found.append((exact, gate_RE, held_out, [] if exact else measure.distributions(model, held_out, embedding)))
        states = [fold(model, gate_RE) for _, gate_RE, _, _ in found]
        plain = plain_lora(model, states)
        rows = []
        for number, (state, (exact, _, held_out, before)) in enumerate(zip(states, found, strict=True), start=1):
            rank = next(iter(state.values()))[0].shape[0]
            row: dict[str, Any] = {"exact": exact, "rank": rank}
            if not exact:
                set_lora(plain, state)
                row |= divergence(before, measure.distributions(plain, held_out, None), held_out, nominal)
                row["prompts"] = {
                    "averaged over": min(prompts, len(data.splits["train"])),
                    "measured on": len(held_out),
                    "split": split,
                }
            rows.append(row)
            write_peft(folder / f"profile-{number}", state, model, full_path(config.model.path))
        report = {"run": config.run.name, "checkpoint": trained.checkpoint.name, "profiles": rows}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def write_peft(folder: Path, state: Mapping[str, tuple[Tensor, Tensor]], model: CumaModel, base: str) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT, vLLM and SGLang read them."""
    folder.mkdir()
    rank = next(iter(state.values()))[0].shape[0]
    alpha = float(model.config.scaling * rank)
    linears = dict(model.adapted_layers())
    tensors = {}
    for name, (a, b) in state.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    targets = list(model.config.target_modules)
    if "all-linear" in targets:
        targets = sorted({name.rpartition(".")[2] for name in state})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # some readers take an integer alone
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": any(type(layer.base).__name__ == "Conv1D" for layer in linears.values()),
        "inference_mode": True,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def divergence(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    examples: Sequence[EncodedExample],
    nominal: Sequence[bool] | None,
) -> dict[str, Any]:
    """How far the plain LoRA's predictions are from the mixture's.

    Args:
        before, after: log-probabilities [positions, V] of each example, of the mixture and of the plain LoRA.
        examples: the prompts.
        nominal: for choice questions, whose options' letters are the targets, whether the options have no order; None for chats.
    """
    kl = torch.cat([(p.exp() * (p - q)).sum(dim=-1) for p, q in zip(before, after, strict=True)]).clamp(min=0)
    found: dict[str, Any] = {"kl_mean": float(kl.mean()), "kl_max": float(kl.max())}
    if nominal is not None:
        answers = [
            (p[-1, example.target_token].softmax(dim=0).numpy(), q[-1, example.target_token].softmax(dim=0).numpy())
            for p, q, example in zip(before, after, examples, strict=True)
        ]
        distances = [float(distance(p, q, unordered)) for (p, q), unordered in zip(answers, nominal, strict=True)]
        found |= {"emd_mean": float(np.mean(distances)), "emd_max": max(distances), "distance": distance_name(nominal)}
    return found


class _Measure:
    """Runs examples through a model as one profile."""

    def __init__(self, batch_size: int, pad_id: int) -> None:
        self.batch_size, self.pad_id = batch_size, pad_id

    def mean_gates(self, model: CumaModel, examples: Sequence[EncodedExample], embedding_P: Tensor | None) -> Tensor:
        """Mean gate [R, E] over all real tokens of the prompts."""
        total_RE, tokens = torch.zeros(()), 0
        for indices, _, _, gates_BRE in self._run(model, examples, embedding_P, record=True):
            for row, index in enumerate(indices):
                assert gates_BRE is not None
                total_RE = total_RE + gates_BRE[row].double() * len(examples[index].input_ids)
                tokens += len(examples[index].input_ids)
        return total_RE / tokens

    def distributions(
        self, model: CumaModel, examples: Sequence[EncodedExample], embedding_P: Tensor | None
    ) -> list[Tensor]:
        """Next-token log-probabilities [positions, V] of each example, at the positions that predict a target."""
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        for indices, batch, logits, _ in self._run(model, examples, embedding_P):
            for row, index in enumerate(indices):
                positions = batch.targets.position_L[batch.targets.row_L == row].unique()
                found[index] = logits[row, positions].cpu().double().log_softmax(dim=-1)
        return found

    def _run(
        self, model: CumaModel, examples: Sequence[EncodedExample], embedding_P: Tensor | None, record: bool = False
    ) -> Any:
        embeddings = None if embedding_P is None else embedding_P[None]
        device = next(model.parameters()).device
        return forward_batches(model, examples, embeddings, self.batch_size, self.pad_id, device=device, record=record)


def _embed(sentences: Sequence[str], table: ProfileTable, encoder: str) -> Tensor:
    """Raw embeddings [N, P]: rows of the run's own table, the encoder's for sentences it does not have."""
    known = dict(zip(table.sentences, table.embeddings, strict=True))
    missing = [sentence for sentence in dict.fromkeys(sentences) if sentence not in known]
    if missing:
        made_by = ProfileEncoder(encoder)
        if made_by.fingerprint != table.fingerprint:
            raise DataError(f"the sentence encoder {encoder} is not the one this run was trained with; restore it")
        known |= dict(zip(missing, made_by(missing), strict=True))
    return torch.stack([known[sentence] for sentence in sentences])
