"""One profile as a plain LoRA adapter, for PEFT and multi-LoRA serving engines that know nothing of routing.

With a fixed gate g, sum_i g_i B_i A_i is one low-rank product: the A_i stacked, the g_i B_i side by side. The gate of a
profile is fixed where the router does not look at the token. Elsewhere its mean over prompts is taken, and the error of
that is measured.

Shapes: R routers, E experts, D input features, O output features, r rank of one expert, P profile width.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from cuma_ds.adapters import CumaModel
from cuma_ds.adapters.fold import as_plain_lora, constant_gates, fixed_gate, fold
from cuma_ds.config import ProfilesSection, RunConfig
from cuma_ds.data.batch import EncodedExample, encode_example, encode_pair
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.rows import Row
from cuma_ds.distances import distance, distance_name
from cuma_ds.errors import ConfigError, DataError
from cuma_ds.evaluation.routing import mean_gates
from cuma_ds.export.hf import output_folder
from cuma_ds.export.names import adapter_names
from cuma_ds.export.weights import save_tensors
from cuma_ds.files import full_path
from cuma_ds.inference.forward import forward_batches, pad_id_of
from cuma_ds.inference.modeling import Profile, unknown_fields
from cuma_ds.inference.open import load_trained, profile_facts
from cuma_ds.parallel.backbone import load_tokenizer
from cuma_ds.profiles import ProfileTable, encoder_of, linearize, wording_of
from cuma_ds.runs import Run
from cuma_ds.telemetry.progress import shown

# What vLLM takes as --max-lora-rank (MaxLoRARanks in vllm/config/lora.py).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Divergence(TypedDict, total=False):
    """How far the predictions of a plain LoRA are from the mixture's.

    kl_mean, kl_max: nats per predicted token.  emd_mean, emd_max: between the answer distributions of choice
    questions. No distance to people's answers changes by more.  distance: EMD, or TV for nominal questions.
    """

    kl_mean: float
    kl_max: float
    emd_mean: float
    emd_max: float
    distance: str


class LoraRow(Divergence, total=False):
    """One adapter: its folder, whether it equals the mixture, its rank, and on which prompts the divergence was
    measured.
    """

    name: str
    exact: bool
    rank: int
    prompts: dict[str, int | str]


class LoraSummary(Divergence, total=False):
    """All adapters together.

    adapters: how many there are.  exact: how many of them equal the mixture.  max_lora_rank: the option of vLLM with
    which it takes all of them; none where a rank is above all that vLLM knows.  The divergence is the mean of the means
    and the largest of the largest, over those that are not exact.
    """

    adapters: int
    exact: int
    max_lora_rank: int


class LoraReport(TypedDict):
    """The content of ``report.json``; ``profiles`` has one row per adapter."""

    run: str
    checkpoint: str
    base: str
    summary: LoraSummary
    profiles: list[LoraRow]


def write_lora(
    run_dir: str | Path,
    profiles: Sequence[Profile],
    out: str | Path,
    step: int | None = None,
    prompts: int = 64,
    names: Sequence[str] = (),
) -> LoraReport:
    """Write a PEFT adapter for each profile, each into a folder of its own, and ``out/report.json``.

    No profile text is written. Without names, adapters are numbered in the order of ``profiles``: ``profile-1``, ...

    Args:
        run_dir: a run folder as training leaves it.
        profiles: one adapter is written for each; empty for methods that take no profiles.
        out: a folder that does not exist or is empty.
        step: checkpoint; the newest by default.
        prompts: training prompts to average the gate over, and held-out prompts to measure the divergence on.
        names: what the adapters are called, one for each profile or none at all.

    Raises:
        CumaError: the run, a profile, a name or the output folder cannot be used.
    """
    run = Run.open(run_dir)
    config = run.config()
    _check(config, profiles, prompts)
    folders = adapter_names(max(len(profiles), 1), names)
    trained = run.trained(config, step)
    data, table = trained.data, trained.table
    sentences = [linearize(profile, wording_of(config.profiles)) for profile in profiles]
    known = profile_facts(config, data, table).get("fields", [])
    for message in dict.fromkeys(message for profile in profiles for message in unknown_fields(profile, known)):
        warnings.warn(message, UserWarning, stacklevel=2)
    base = full_path(config.model.path)
    with output_folder(out) as folder:
        model = load_trained(config, trained.adapters, table)
        measure = _Measure(config, data, prompts)
        embeddings = [None] if table is None else list(_embed(sentences, table, config.profiles))
        rows: list[LoraRow] = []
        for name, sentence, embedding in zip(
            shown(folders, "adapters", visible=True), sentences or [""], embeddings, strict=True
        ):
            mixture = measure.mixture(model, sentence, embedding)
            state = fold(model, mixture.gate_RE)
            row: LoraRow = {"name": name, "exact": mixture.exact, "rank": next(iter(state.values()))[0].shape[0]}
            if not mixture.exact:
                with as_plain_lora(model, state) as plain:
                    row |= measure.divergence(mixture, plain)
                row["prompts"] = measure.counts(mixture)
            rows.append(row)
            write_peft(folder / name, state, model, base)
        report: LoraReport = {
            "run": config.run.name,
            "checkpoint": trained.checkpoint.name,
            "base": base,
            "summary": summary(rows),
            "profiles": rows,
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def summary(rows: Sequence[LoraRow]) -> LoraSummary:
    """What all adapters of a report have in common."""
    found: LoraSummary = {"adapters": len(rows), "exact": sum(row["exact"] for row in rows)}
    highest = max(row["rank"] for row in rows)
    if fitting := [rank for rank in _VLLM_RANKS if rank >= highest]:
        found["max_lora_rank"] = fitting[0]
    averaged = [row for row in rows if not row["exact"]]
    if averaged:
        found["kl_mean"] = float(np.mean([row["kl_mean"] for row in averaged]))
        found["kl_max"] = max(row["kl_max"] for row in averaged)
    if averaged and "emd_mean" in averaged[0]:
        found["emd_mean"] = float(np.mean([row["emd_mean"] for row in averaged]))
        found["emd_max"] = max(row["emd_max"] for row in averaged)
        found["distance"] = averaged[0]["distance"]
    return found


def _check(config: RunConfig, profiles: Sequence[Profile], prompts: int) -> None:
    if config.adapters.uses_profiles and not profiles:
        raise ConfigError(
            "--format lora needs at least one --profile, or --profiles FILE: these adapters are routed by who is asking"
        )
    if profiles and not config.adapters.uses_profiles:
        raise ConfigError(f"--profile was given, but method {config.adapters.method!r} takes no profiles; leave it out")
    if prompts < 1:
        raise ConfigError(f"--calibration is {prompts}; at least one prompt is needed")


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
) -> Divergence:
    """How far the plain LoRA's predictions are from the mixture's.

    Args:
        before, after: log-probabilities [positions, V] of each example, of the mixture and of the plain LoRA.
        examples: the prompts.
        nominal: for choice questions, whether the options have no order; None for conversations and preferences.
    """
    kl = torch.cat([(p.exp() * (p - q)).sum(dim=-1) for p, q in zip(before, after, strict=True)]).clamp(min=0)
    found: Divergence = {"kl_mean": float(kl.mean()), "kl_max": float(kl.max())}
    if nominal is not None:
        answers = [
            (p[-1, example.target_token].softmax(dim=0).numpy(), q[-1, example.target_token].softmax(dim=0).numpy())
            for p, q, example in zip(before, after, examples, strict=True)
        ]
        distances = [float(distance(p, q, unordered)) for (p, q), unordered in zip(answers, nominal, strict=True)]
        found |= {"emd_mean": float(np.mean(distances)), "emd_max": max(distances), "distance": distance_name(nominal)}
    return found


class _Mixture(NamedTuple):
    """The mixture as one profile.

    exact: whether no router looks at the token.  gate_RE: its gates, fixed or averaged.  Where it is not exact also the
    prompts it is measured on and its log-probabilities [positions, V] there.
    """

    exact: bool
    gate_RE: Tensor
    examples: list[EncodedExample]
    log_probabilities: list[Tensor]


class _Measure:
    """Asks a model a run's prompts as one profile.

    Args:
        config: the recipe of the run.
        data: its data.
        prompts: most prompts of a split.
    """

    def __init__(self, config: RunConfig, data: PreparedData, prompts: int) -> None:
        tokenizer = load_tokenizer(config.model)
        self._renderer, self._pad_id = Renderer.of(tokenizer, config.data), pad_id_of(tokenizer)
        self._config, self._data, self._prompts = config, data, prompts
        self._split = next((name for name in ("test", "heldout") if len(data.splits[name])), "train")

    def mixture(self, model: CumaModel, sentence: str, embedding_P: Tensor | None) -> _Mixture:
        """The gates of a profile, and what the mixture predicts for it."""
        if all(fixed_gate(router) for router in model.context.routers):
            return _Mixture(True, constant_gates(model, embedding_P), [], [])
        table = None if embedding_P is None else embedding_P[None]
        batch_size, training = self._config.evaluation.batch_size, self._examples("train", sentence)
        gate_RE = mean_gates(model, training, table, batch_size, self._pad_id)
        examples = self._examples(self._split, sentence)
        return _Mixture(False, gate_RE, examples, self._predicted(model, examples, table))

    def divergence(self, mixture: _Mixture, plain: CumaModel) -> Divergence:
        """How far the plain LoRA is from the mixture on held-out prompts."""
        nominal = None
        if self._data.kind == "choice":
            nominal = [row["scale"] == "nominal" for row in self._chosen(self._split)]
        after = self._predicted(plain, mixture.examples, None)
        return divergence(mixture.log_probabilities, after, mixture.examples, nominal)

    def counts(self, mixture: _Mixture) -> dict[str, int | str]:
        """How many prompts were used, and of which split."""
        averaged = min(self._prompts, len(self._data.splits["train"]))
        return {"averaged over": averaged, "measured on": len(mixture.examples), "split": self._split}

    def _chosen(self, split: str) -> list[Row]:
        rows = self._data.splits[split]
        return [rows[int(row)] for row in np.random.default_rng(0).permutation(len(rows))[: self._prompts]]

    def _examples(self, split: str, sentence: str) -> list[EncodedExample]:
        """Prompts of a split as somebody of one profile reads them; of preferences those with the chosen answer."""
        rows: list[Row] = [{**row, "profile": 0} for row in self._chosen(split)]
        if self._data.kind == "preference":
            return [encode_pair(row, self._renderer, [sentence])[0] for row in rows]
        return [encode_example(row, self._renderer, [sentence], self._config.data) for row in rows]

    def _predicted(
        self, model: CumaModel, examples: Sequence[EncodedExample], embeddings_NP: Tensor | None
    ) -> list[Tensor]:
        """Next-token log-probabilities [positions, V] of each example, at the positions that predict a target."""
        device, batch_size = next(model.parameters()).device, self._config.evaluation.batch_size
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        for indices, batch, logits, _ in forward_batches(
            model, examples, embeddings_NP, batch_size, self._pad_id, device=device
        ):
            for row, index in enumerate(indices):
                positions = batch.targets.position_L[batch.targets.row_L == row].unique()
                found[index] = logits[row, positions].cpu().double().log_softmax(dim=-1)
        return found


def _embed(sentences: Sequence[str], table: ProfileTable, profiles: ProfilesSection) -> Tensor:
    """Raw embeddings [N, P]: rows of the run's own table, the encoder's for sentences it does not have."""
    known = dict(zip(table.sentences, table.embeddings, strict=True))
    missing = [sentence for sentence in dict.fromkeys(sentences) if sentence not in known]
    if missing:
        made_by = encoder_of(profiles)
        if made_by.fingerprint != table.fingerprint:
            raise DataError(
                f"the sentence encoder {profiles.encoder} is not the one this run was trained with; restore it"
            )
        known |= dict(zip(missing, made_by(missing), strict=True))
    return torch.stack([known[sentence] for sentence in sentences])
