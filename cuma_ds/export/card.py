"""The model card of an export: its training, its evaluation, what it is for and what it must not be used for."""

from __future__ import annotations

import re
from pathlib import Path

from cuma_ds.config import RunConfig
from cuma_ds.data.prepared import PreparedData
from cuma_ds.errors import DataError
from cuma_ds.evaluation.report.legend import legend
from cuma_ds.evaluation.report.model import read_report
from cuma_ds.evaluation.report.tables import heading, split_tables
from cuma_ds.inference.modeling import Export, ProfileFacts

_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("Happiness is", return_tensors="pt")
tokens = model.generate(**inputs, {argument}max_new_tokens=20)
```

`FOLDER` is this folder on your disk: with PEFT installed, transformers would take a hub id for a PEFT adapter, so
download it first (`huggingface_hub.snapshot_download`). {profiles}
With cuma-ds installed, `cuma_ds.load_exported(FOLDER)` does the same and runs no code from this folder.
"""
_RISK = """\
## Intended use and risks

Meant for research on how opinions differ between groups of people, and for assistants whose users chose to say who they
are. The model predicts what people with a profile *on average* answered; **it stereotypes by construction**.
Individuals differ from the average of their country, religion or age group, and groups with few answers are represented
badly. Do not use it to infer what a particular person believes, to decide about people (hiring, credit, policing,
health, asylum), to impersonate groups in public debate, or in place of asking them.
Profiles are sensitive personal data: ask for consent, do not log them, and let people leave fields out.
"""
_HEAD = """\
---
license: {licence}
library_name: {library}
pipeline_tag: text-generation
base_model: {name}
tags: [{tags}]
---

# {title}
"""
_SPLITS = {
    "train": "training",
    "test": "test (other people, same countries)",
    "heldout": "held out (never trained on)",
    "heldout_questions": "questions held out (never trained on)",
}


def model_card(export: Export, story: str, base: Path, merged: bool) -> str:
    """README.md of an exported folder.

    Args:
        export: the content of adapter_config.json.
        story: where the adapters come from, as Markdown.
        base: the base model's folder, if it is one; its licence is read there.
        merged: whether the base weights are inside.
    """
    licence, name, adapters = base_licence(base), _short(export["base_model_name_or_path"]), export["adapters"]
    routed = "the token and the profile" if adapters["profile_dim"] else "the token"
    if adapters["method"] == "lora":
        routed = "nothing (one expert)"
    inside = "The base weights are inside, in `base/`." if merged else "The base weights are not inside."
    about = (
        f"A frozen {name} with {adapters['num_experts']} LoRA experts of rank {adapters['lora_r']} beside each of "
        f"{', '.join(adapters['target_modules'])}, {adapters['top_k']} of them active per token, routed by {routed} "
        f"([CuMA](https://arxiv.org/abs/2601.04885)). {inside}"
    )
    argument, profiles = _profiles(export["profiles"], adapters["profile_dim"])
    use = _USE.replace("{argument}", argument).replace("{profiles}", profiles)
    applies = "applies to it and to what is derived from it"
    licence_text = f"The base model's licence {applies}; its folder names none; look it up."
    if licence:
        licence_text = f"The base model's licence ({licence}) {applies}."
    head = _HEAD.format(
        licence=licence or "other",
        library="transformers",
        name=name,
        tags="cuma, lora, mixture-of-experts, pluralistic-alignment",
        title=f"CuMA adapters for {name}",
    )
    return "\n".join([head, about, "", story.strip(), "", use, _RISK, "## Licence", "", licence_text, ""])


def plain_card(config: RunConfig, story: str) -> str:
    """README.md of a folder that holds nothing of this package.

    Args:
        config: the recipe of the run.
        story: where it comes from, as Markdown.
    """
    base, place = config.model.path, Path(config.model.path).expanduser()
    licence, name = base_licence(place), _short(base)
    head = _HEAD.format(
        licence=licence or "other",
        library="transformers" if config.adapters.method == "full" else "peft",
        name=name,
        tags="pluralistic-alignment",
        title=f"{name}, trained",
    )
    about = f"{name}, trained with cuma-ds (method {config.adapters.method})."
    who = (
        "It sees a profile only where the prompt tells it." if config.data.profile_in_prompt else "It sees no profiles."
    )
    return "\n".join([head, f"{about} {who}", "", story.strip(), "", _RISK])


def _profiles(about: ProfileFacts, width: int) -> tuple[str, str]:
    """How profiles are given: an argument of the example, and what to say about it."""
    if not width:
        return "", "These adapters take no profiles."
    encoder = about.get("encoder")
    if not encoder:
        return "profile_embeddings=embeddings, ", (
            f"No sentence encoder is named: give `profile_embeddings` [B, {width}], or load with `encoder=FOLDER`."
        )
    fields = f" Fields it was trained with: {', '.join(about['fields'])}." if about.get("fields") else ""
    return 'profiles=[{"country": "Norway", "age": 34}], ', (
        f"A profile is text or fields, embedded by the sentence encoder {_short(encoder)} (template "
        f"`{about['template']}`); `profile_embeddings` [B, {width}] work too.{fields} `base_model=` and `encoder=` "
        "name other places."
    )


def _short(place: str) -> str:
    """The name of a folder without the folders it is in; a hub id as it is."""
    return Path(place).name if Path(place).is_dir() else place


def run_section(report_folder: Path, config: RunConfig, data: PreparedData, checkpoint: str) -> str:
    """The training and evaluation of a run, as Markdown."""
    kind = {"choice": "choice questions", "chat": "conversations", "preference": "preferences"}[data.kind]
    lines = [
        "## Training", "",
        f"Run `{config.run.name}`, checkpoint `{checkpoint}`: {config.training.objective}, seed {config.run.seed}, "
        f"{config.training.global_batch_size} examples per step, peak learning rate {config.training.learning_rate:g}.",
        *_base_in_training(config),
        f"Data: {data.manifest['source']} ({kind}), split by person; profiles in {len(data.profiles):,} variants.",
        "", "| split | people | answers | profiles |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for split, size in data.manifest["splits"].items():
        lines.append(
            f"| {_SPLITS.get(split, split)} | {size['people']:,} | {size['answers']:,} | {size['profiles']:,} |"
        )
    return "\n".join([*lines, "", "## Evaluation", "", *_metrics(report_folder, checkpoint)])


def _base_in_training(config: RunConfig) -> list[str]:
    """How the base was held, where that is not how this folder uses it."""
    kind = config.model.quantisation
    return [] if kind == "none" else [f"The base was quantised ({kind}) in training and evaluation, and is not here."]


def _metrics(folder: Path, checkpoint: str) -> list[str]:
    """The tables of the run's report, or why there are none."""
    try:
        report = read_report(folder, earlier=False)
    except DataError as error:
        return [f"Not shown: {error}."]
    if report is None:
        return ["Not evaluated yet (`launchers/evaluate.py`)."]
    if report.checkpoint != checkpoint:
        return [f"Not evaluated: the run's report is about {report.checkpoint}."]
    lines = []
    for name, split in report.splits.items():
        lines += [f"### {heading(name, split)}", "", *split_tables(report, split)]
    return [*lines, *legend(report)]


def base_licence(folder: Path) -> str | None:
    """The licence a model folder's README names in its front matter."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    match = re.search(r"^licen[sc]e:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return match[1] if match else None
