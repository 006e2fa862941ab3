"""Whether groups pull the same weights in opposite directions: cosines between the gradients of their losses.

Shapes: G groups, W weights, R routers, E experts, O outputs, D inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cuma_ds.adapters.fold import fold, plain_lora, set_lora
from cuma_ds.adapters.model import CumaModel
from cuma_ds.data.batch import EncodedExample, collate
from cuma_ds.errors import ConfigError
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.metrics import gather_cells
from cuma_ds.evaluation.report.model import Cosines, Gradients, Report
from cuma_ds.evaluation.report.routing_plots import plot_interference
from cuma_ds.evaluation.routing import mean_gates
from cuma_ds.evaluation.run import Evaluator, Pictures, check_kind
from cuma_ds.inference.forward import pad_id_of

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interference:
    """Adds the section ``gradients`` to a report: cosines between groups' gradients on the experts and on a dense LoRA.

    The dense LoRA has rank K r, as many as answer a token in the mixture. It is the mixture averaged over all groups,
    cut to its leading K r directions.

    Attributes:
        groups: most groups, those with most held-out answers.
        examples: most examples of each.
    """

    groups: int = 12
    examples: int = 16

    def __call__(self, evaluator: Evaluator, report: Report) -> Pictures:
        """Measure and draw."""
        subject = evaluator.subject
        check_kind(subject, "choice", "--gradients")
        model = subject.model
        if not isinstance(model, CumaModel) or not model.router_names:
            raise ConfigError(
                "--gradients compares experts with a dense LoRA; it needs a model with routers (a run or an export)"
            )
        split = evaluator.splits[0]
        encoded, table = evaluator.encode(split), ChoiceExamples.of(subject.data.splits[split])
        chosen = self._choose(table, subject.config.evaluation.min_answers)
        if len(chosen) < 2:
            raise ConfigError(
                f"--gradients needs two groups with at least {subject.config.evaluation.min_answers} answers in {split}"
            )
        examples = [[encoded[index] for index in indices] for indices in chosen.values()]
        size, pad_id = subject.config.evaluation.batch_size, pad_id_of(subject.renderer.tokenizer)

        def measure(model: CumaModel, what: str) -> Array:
            tell = evaluator.tell(f"{split}: gradients of {what}")
            embeddings_NP = subject.embeddings_NP if model.config.profile_dim else None
            return cosines(group_gradients(model, examples, embeddings_NP, size, pad_id, tell))

        rank = model.config.top_k * model.config.lora_r
        with averaged(
            model, [example for group in examples for example in group], subject.embeddings_NP, size, pad_id, rank
        ) as dense:
            by_kind = {f"dense LoRA, rank {rank}": measure(dense, "a dense LoRA")}
        by_kind[f"CuMA, top {model.config.top_k} of {model.config.num_experts}"] = measure(model, "the experts")
        plot_interference(evaluator.folder / "gradients.png", list(chosen), by_kind)
        caption = (
            "Cosine between the gradients of groups. Dense LoRA: the trained mixture averaged over all groups, cut to "
            "the rank that answers a token in CuMA. Conflicting groups push shared weights in opposite directions "
            "(blue); experts of their own keep them apart."
        )
        rows = {kind: _cosines(cosine_GG) for kind, cosine_GG in by_kind.items()}
        report.gradients = Gradients(split=split, groups=list(chosen), rows=rows)
        return {"gradients.png": caption}

    def _choose(self, table: ChoiceExamples, min_answers: int) -> dict[str, list[int]]:
        cells = gather_cells(table.questions, table.groups, table.counts, min_answers)
        answers: dict[str, float] = {}
        members: dict[str, list[int]] = {}
        for (_, group), rows, count in zip(cells.keys, cells.members, cells.answers, strict=True):
            answers[group] = answers.get(group, 0.0) + float(count)
            members.setdefault(group, []).extend(rows)
        largest = sorted(answers, key=lambda group: -answers[group])[: self.groups]
        return {
            group: sorted(members[group], key=lambda index: -table.counts[index].sum())[: self.examples]
            for group in sorted(largest)
        }


def group_gradients(
    model: CumaModel,
    groups: Sequence[Sequence[EncodedExample]],
    embeddings_NP: Tensor | None,
    batch_size: int,
    pad_id: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The gradient [G, W] float32 of each group's mean loss (method, L_task) with respect to all experts.

    Args:
        model: in eval mode (no dropout); its own gradients and what requires them are left as they were.
        groups: examples of each group.
        embeddings_NP: raw profile embeddings; None for adapters without profiles.
    """
    experts = [parameter for name, parameter in model.adapter_parameters() if ".experts." in name]
    device = experts[0].device
    rows = []
    with _only_trainable(model, experts):
        for number, examples in enumerate(groups, start=1):
            total = sum(sum(example.target_weight) for example in examples)
            gradients = [torch.zeros_like(parameter) for parameter in experts]
            for start in range(0, len(examples), batch_size):
                part = examples[start : start + batch_size]
                batch = collate(part, pad_id).to(device)
                inputs: dict[str, Tensor] = {}
                if embeddings_NP is not None:
                    inputs["profile_embeddings"] = embeddings_NP[[example.profile for example in part]].to(device)
                out = model(**batch.inputs, **inputs)
                loss = -(batch.targets.weight_L * batch.targets.log_probabilities(out.logits)).sum() / total
                found = torch.autograd.grad(loss, experts, allow_unused=True)
                for gradient, more in zip(gradients, found, strict=True):
                    if more is not None:
                        gradient += more
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]).float().cpu())
            if progress is not None:
                progress(number, len(groups))
    return torch.stack(rows)


def cosines(gradients_GW: Tensor) -> Array:
    """Cosine [G, G] of every pair; zero with a group that has no gradient."""
    unit_GW = torch.nn.functional.normalize(gradients_GW.double(), dim=1)
    return (unit_GW @ unit_GW.T).numpy()


@contextmanager
def averaged(
    model: CumaModel,
    examples: Sequence[EncodedExample],
    embeddings_NP: Tensor | None,
    batch_size: int,
    pad_id: int,
    rank: int,
) -> Iterator[CumaModel]:
    """The same backbone with one dense LoRA: the best approximation of rank ``rank`` of the mixture with mean gates.

    The backbone is lent, not copied; ``model`` works again when the context ends.
    """
    gate_RE, device = mean_gates(model, examples, embeddings_NP, batch_size, pad_id), next(model.parameters()).device
    state = {name: truncate(a, b, rank) for name, (a, b) in fold(model, gate_RE).items()}
    layers = dict(model.adapted_layers())
    dense = plain_lora(model, [state])
    try:
        set_lora(dense, state)
        yield dense.to(device)
    finally:
        for name, layer in layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), leaf, layer)


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of rank ``rank`` whose product is nearest to ``b @ a`` (both carry the root of the singular values).

    Args:
        a: [rank, D].
        b: [O, rank].
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    return ((v[:rank] * root[:, None]) @ q_a.T).float(), (q_b @ u[:, :rank] * root).float()


@contextmanager
def _only_trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in parameters}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _cosines(cosine_GG: Array) -> Cosines:
    off = cosine_GG[~np.eye(len(cosine_GG), dtype=bool)]
    return Cosines(
        conflicting=round(float(np.mean(off < 0)), 6),
        mean=round(float(off.mean()), 6),
        mean_absolute=round(float(np.abs(off).mean()), 6),
        cosines=[[round(float(value), 6) for value in row] for row in cosine_GG],
    )
