"""From a run folder to its report: the backbone, one checkpoint of adapters, the data it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cuma_ds.adapters import CumaModel, inject_adapters
from cuma_ds.config import RunConfig, load_config
from cuma_ds.data.batching import EncodedExample, encode_example
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import Renderer
from cuma_ds.errors import CheckpointError, DataError
from cuma_ds.evaluation.chat import chat_losses
from cuma_ds.evaluation.choice import predict_choices
from cuma_ds.evaluation.examples import ChoiceExamples, swap_profiles
from cuma_ds.evaluation.metrics import gather_cells
from cuma_ds.evaluation.references import collapse_reference, has_training_answers, oracle_reference
from cuma_ds.evaluation.report import Report, chat_split, choice_pictures, choice_split, expert_picture, write_report
from cuma_ds.parallel.backbone import load_backbone, load_tokenizer
from cuma_ds.parallel.checkpoint import find_checkpoint, read_adapters
from cuma_ds.profiles import ProfileTable

# Called with (what is being run, examples done, examples in all).
Progress = Callable[[str, int, int], None]


def evaluate_run(run_dir: str | Path, step: int | None = None, overrides: Sequence[str] = (), progress: Progress | None = None) -> Report:
    """Evaluate one checkpoint of a run and write ``run_dir/evaluation/``.

    Args:
        run_dir: a run folder as training leaves it (config.yaml, data/, profiles.safetensors, checkpoints/).
        step: which checkpoint; the newest complete one by default.
        overrides: ``section.key=value`` on top of the run's recipe, e.g. ``evaluation.min_answers=50``.
        progress: told how far each pass is.

    Raises:
        CumaError: the folder, its checkpoint, data or model cannot be used; says which and why.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise CheckpointError(f"{run_dir} is no run folder: there is no config.yaml; expected what launchers/train.py leaves")
    config = load_config(run_dir / "config.yaml", list(overrides))
    checkpoint = find_checkpoint(run_dir, step)
    data = PreparedData.load(run_dir / "data")
    table = ProfileTable.load(run_dir / "profiles.safetensors") if config.adapters.uses_profiles else None
    if table is not None and table.sentences != data.sentences:
        raise DataError(
            f"{run_dir}: profiles.safetensors and data/ hold different profiles; this run folder was put together from two runs"
        )
    model = load_trained(config, read_adapters(checkpoint), table)
    renderer = Renderer(
        load_tokenizer(config.model), config.data.max_length, config.data.profile_in_prompt, config.data.system_prompt
    )
    folder = run_dir / "evaluation"
    folder.mkdir(exist_ok=True)
    judge = Judge(model, renderer, data, table.embeddings if table is not None else None, config, folder, progress)
    splits, pictures = judge.chat() if data.kind == "chat" else judge.choice()
    summary = {
        "run": config.run.name,
        "checkpoint": checkpoint.name,
        "kind": data.kind,
        "min_answers": config.evaluation.min_answers,
        "splits": splits,
    }
    return write_report(folder, summary, pictures)


def load_trained(config: RunConfig, adapters: dict[str, Tensor], table: ProfileTable | None) -> CumaModel:
    """The backbone with trained adapters, in eval mode.

    Args:
        adapters: as :func:`cuma_ds.parallel.checkpoint.read_adapters` returns them.
        table: embedded profiles; None for methods without profiles.
    """
    width = table.embeddings.shape[1] if table is not None else 0
    model = inject_adapters(load_backbone(config.model), config.adapters.model_copy(update={"profile_dim": width}))
    model.load_adapter_state(adapters)
    return model.eval()


class Judge:
    """One model asked about every split: bare, trained, and trained with profiles swapped.

    Args:
        model: in eval mode.
        embeddings_NP: raw profile embeddings; None for methods without profiles (then there is nothing to swap).
        folder: where pictures go.
    """

    def __init__(
        self,
        model: CumaModel,
        renderer: Renderer,
        data: PreparedData,
        embeddings_NP: Tensor | None,
        config: RunConfig,
        folder: Path,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.renderer = renderer
        self.data = data
        self.embeddings_NP = embeddings_NP
        self.config = config
        self.folder = folder
        self.progress = progress
        self.splits = [name for name in ("test", "heldout") if len(data.splits[name])]
        if not self.splits:
            raise DataError("there is nothing to evaluate on: the splits test and heldout are empty; hold out more people")

    def choice(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Sections of the summary and pictures, for choice questions."""
        train = ChoiceExamples.of(self.data.splits["train"])
        limit = self.config.evaluation.min_answers
        sections: dict[str, Any] = {}
        pictures: dict[str, str] = {}
        for name in self.splits:
            examples = ChoiceExamples.of(self.data.splits[name])
            rows = {"collapse": collapse_reference(train, examples)}
            if has_training_answers(train, examples):
                rows["oracle"] = oracle_reference(train, examples)
            results = self._passes(predict_choices, name, examples.questions, examples.groups)
            rows |= {row: result.probabilities for row, result in results.items()}
            sections[name] = choice_split(examples, rows, limit)
            if not pictures and sections[name]["cells"]:
                pictures = choice_pictures(self.folder, sections[name])
                trained = results["trained"]
                if trained.gates_MRE is not None:
                    seen = gather_cells(examples.questions, examples.groups, examples.counts, limit).examples
                    pictures |= expert_picture(
                        self.folder,
                        trained.router_names,
                        [examples.questions[index] for index in seen],
                        [examples.groups[index] for index in seen],
                        [float(examples.counts[index].sum()) for index in seen],
                        trained.gates_MRE[seen],
                    )
        return sections, pictures

    def chat(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Sections of the summary and pictures, for conversations; groups are drawn from ``min_answers`` conversations on."""
        sections: dict[str, Any] = {}
        pictures: dict[str, str] = {}
        for name in self.splits:
            groups = list(self.data.splits[name]["group"])
            profiles = self.data.splits[name]["profile"]
            named = [group or f"profile {profile}" for group, profile in zip(groups, profiles, strict=True)]
            results = self._passes(chat_losses, name, [""] * len(named), named)
            sections[name] = chat_split(results)
            gates_MRE = results["trained"].gates_MRE
            if not pictures and gates_MRE is not None:
                cells = gather_cells([""] * len(named), named, [[1.0]] * len(named), self.config.evaluation.min_answers)
                seen = cells.examples
                pictures = expert_picture(
                    self.folder,
                    self.model.router_names,
                    [""] * len(seen),
                    [named[index] for index in seen],
                    [1.0] * len(seen),
                    gates_MRE[seen],
                )
        return sections, pictures

    def _passes(self, run: Callable[..., Any], split: str, units: Sequence[str], groups: Sequence[str]) -> dict[str, Any]:
        """``run`` (predict_choices or chat_losses) on a split, by row name: before, trained, and swapped where there are profiles."""
        examples = self._encode(split)

        def go(label: str, **options: Any) -> Any:
            told = self.progress
            tell = None if told is None else (lambda done, total: told(f"{split}: {label}", done, total))
            return run(
                self.model,
                examples,
                batch_size=self.config.evaluation.batch_size,
                pad_id=self._pad_id,
                device=next(self.model.parameters()).device,
                progress=tell,
                **options,
            )

        with self.model.adapters_disabled():
            results = {"before": go("before training", embeddings_NP=None)}
        results["trained"] = go("trained", embeddings_NP=self.embeddings_NP, record=True)
        if self.embeddings_NP is not None:
            swapped = swap_profiles(units, groups, [example.profile for example in examples])
            results["swapped"] = go("profiles swapped", embeddings_NP=self.embeddings_NP, profiles=swapped)
        return results

    def _encode(self, split: str) -> list[EncodedExample]:
        return [encode_example(row, self.renderer, self.data.sentences, self.config.data) for row in self.data.splits[split]]

    @property
    def _pad_id(self) -> int:
        tokenizer = self.renderer.tokenizer
        return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
