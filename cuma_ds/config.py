"""One run = one YAML file = nested frozen models: every key, its default, and what it allows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cuma_ds.adapters.config import CumaConfig, Method
from cuma_ds.sentence_format import format_fields

DType = Literal["float32", "bfloat16", "float16"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(_Section):
    """Name, place and seed of a run."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder name of the run under output_dir"
    )
    output_dir: str = Field("runs", description="folder that holds the run folders")
    seed: int = Field(0, ge=0, description="seed of initialisation, data order and dropout")


class ModelSection(_Section):
    """The frozen backbone."""

    path: str = Field(description="folder with config.json and safetensors, or a hub id")
    dtype: DType = Field("bfloat16", description="dtype the frozen backbone is held and run in")
    quantisation: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="how the weights of the frozen backbone's linear layers are kept: in dtype | in 8 bits | in 4 bits "
        "(needs bitsandbytes); embeddings, norms and output head stay in dtype",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="attention implementation of transformers"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    trust_remote_code: bool = Field(False, description="allow code that comes with the model to run")
    init_from: str | None = Field(
        None,
        description="a run folder or an exported folder whose adapters, routers, profile format and split are started "
        "from; null starts from the bare backbone",
    )


class ProfilesSection(_Section):
    """Profiles: how their fields become a sentence, and the sentence a vector."""

    encoder: str | None = Field(
        None, description="folder or hub id of a sentence encoder; needed by method cuma without model.init_from"
    )
    template: Literal["wvs", "generic", "authors"] = Field(
        "generic",
        description="how profile fields become a sentence; authors: as the authors' code writes survey respondents",
    )
    format: str | None = Field(
        None,
        description="a sentence of your own instead of a template, with fields in braces: A person from "
        "{country}[, aged {age}]; a part in square brackets is left out where a field in it has no answer, elsewhere "
        "such a field is Unknown",
    )
    fields: tuple[str, ...] | None = Field(
        None, min_length=1, description="the fields that sentences are made of, in this order; null takes all"
    )
    pooling: Literal["auto", "mean", "mean-all", "last", "cls"] = Field(
        "auto",
        description="how token vectors become one: what the encoder's folder says | their mean | mean-all, with "
        "special tokens and all, as the authors' code | that of the last or first token",
    )
    normalise: bool = Field(True, description="scale the encoder's vectors to length 1")
    max_tokens: int | None = Field(
        None, ge=2, description="sentences are cut after so many tokens; null is what the encoder's folder says"
    )
    standardise: float | None = Field(
        3.0, gt=0, description="RMS that centred profile embeddings are scaled to; null = raw embeddings"
    )
    batch_size: int = Field(64, ge=1, description="sentences per encoder batch")
    cache_dir: str | None = Field(None, description="folder of cached embeddings; default: the user's cache folder")
    keep_text: bool = Field(
        True,
        description="false: the run folder keeps embeddings and numbers instead of profiles and names of groups, see "
        "docs/responsible_use.md",
    )

    @model_validator(mode="after")
    def _check(self) -> ProfilesSection:
        if self.format is None:
            return self
        try:
            named = format_fields(self.format)
        except ValueError as error:
            raise ValueError(f"format is {self.format!r}: {error}") from None
        if self.fields is not None and (lost := [name for name in named if name not in self.fields]):
            raise ValueError(f"format names {lost[0]!r}, which fields leaves out; add it there, or leave fields out")
        return self


class PrefixSection(_Section):
    """Keys and values that stand before those of the prompt (method p_tuning_v2)."""

    virtual_tokens: int = Field(32, ge=1, description="positions of the prefix")
    projection: bool = Field(True, description="make keys and values by an MLP from embeddings of the virtual tokens")
    hidden: int | None = Field(None, ge=1, description="width of that MLP; null is the backbone's")

    @model_validator(mode="after")
    def _check(self) -> PrefixSection:
        if self.hidden is not None and not self.projection:
            raise ValueError(f"hidden is {self.hidden}, but without projection there is no MLP; remove it")
        return self


class DataSection(_Section):
    """What is asked and answered."""

    source: Literal[
        "wvs-sample",
        "synthetic",
        "jsonl",
        "survey",
        "wvb",
        "global-opinions",
        "subpop",
        "opinionqa",
        "community-alignment",
        "prism",
    ] = Field(
        "jsonl",
        description="wvs-sample (embedded survey answers) | synthetic (known truth) | jsonl (your own rows) | survey "
        "(your own SPSS, Stata, CSV or parquet file) | wvb | global-opinions | subpop | opinionqa | "
        "community-alignment | prism",
    )
    path: str | None = Field(
        None, description="folder made by prepare_data, or the raw files; wvs-sample and synthetic need none"
    )
    map: str | None = Field(
        None,
        description="source survey: the YAML file that says which columns are people and which are questions, see "
        "docs/surveys.md; a prepared folder needs none",
    )
    modes: int = Field(4, ge=2, le=8, description="source synthetic: M, the number of modes that groups fall into")
    separation: float = Field(
        10.0,
        gt=0,
        le=100,
        description="source synthetic: (mu_i - mu_j)^T S^-1 (mu_i - mu_j) / m of the two nearest modes",
    )
    kind: Literal["choice", "chat", "preference"] | None = Field(
        None,
        description="what to make of a source that holds several: community-alignment and prism give chat by default; "
        "preference draws pairs from answers to choice questions",
    )
    max_people: int | None = Field(
        None, ge=1, description="learn from so many people, drawn from those of the training split; null takes all"
    )
    max_examples: int | None = Field(
        None,
        ge=1,
        description="learn from so many answers (conversations, pairs), drawn from those of these people; null takes "
        "all",
    )
    sample_seed: int = Field(0, ge=0, description="seed of both draws")
    questions: tuple[str, ...] | None = Field(
        None, description="question ids to keep (wvs-sample: immigration, poverty); null keeps all"
    )
    min_margin: float = Field(
        0.0,
        ge=0,
        description="preferences: leave out pairs whose chosen answer was scored less than this above the rejected one",
    )
    histogram_targets: bool = Field(
        True, description="merge equal questions of one profile into one example with answer counts"
    )
    example_weight: Literal["uniform", "answers"] = Field(
        "uniform",
        description="weight of a merged example in the loss: 1, or its number of answers (as row-wise training)",
    )
    probe: str | None = Field(
        None,
        description="wvb: samples.tsv of WVB-probe; its answers become a split of their own, and its people are never "
        "trained on",
    )
    weights: bool = Field(
        False,
        description="answers count by survey weights: the rows' key weight (jsonl), W_WEIGHT of the WVS-7 CSV (wvb), "
        "the column that the map names (survey)",
    )
    profile_in_prompt: bool = Field(False, description="also write the profile sentence into the system prompt")
    profile_prompt: str = Field(
        "You are answering for this person: {profile}",
        description="what profile_in_prompt writes; {profile} is the sentence, and alone nothing stands around it",
    )
    system_prompt: str | None = Field(
        None, description="system message of prompts that have none; null leaves it to the chat template"
    )
    prompt_style: Literal["letters", "metadata", "codebook"] = Field(
        "letters",
        description=(
            "letters leaves out the number scale that WorldValuesBench puts before its questions | metadata keeps it | "
            "codebook asks the codebook's short label with all options on one line, as the authors' code (wvb alone)"
        ),
    )
    loss_on: Literal["all", "last"] = Field(
        "all", description="conversations: learn all that the assistant says, or its last answer alone"
    )
    option_order: Literal["fixed", "reversed", "average"] = Field(
        "fixed",
        description=(
            "reversed shows options from the last one on; average (evaluation only) asks both ways and takes the mean"
        ),
    )
    max_length: int = Field(
        256, ge=8, description="tokens of a prompt with its answer; conversations lose early turns to fit"
    )
    on_long_prompt: Literal["refuse", "skip"] = Field(
        "refuse",
        description=(
            "examples that do not fit max_length: stop before the first step and name them, or leave them out and count"
        ),
    )
    on_bad_row: Literal["refuse", "skip"] = Field(
        "refuse",
        description=(
            "rows that cannot be read or written as a prompt: stop before the first step and name the first one, or "
            "leave them out, count and name them"
        ),
    )
    packing: bool = Field(
        False, description="several examples per row of max_length tokens, none seeing another; less padding"
    )
    test_fraction: float = Field(0.3, gt=0, lt=1, description="share of people held out for the test split")
    valid_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of other people held out for choosing settings, e.g. a learning rate"
    )
    heldout_fraction: float | None = Field(
        None, ge=0, lt=1,
        description=(
            "share of countries (or profiles) held out entirely; null = 0.15, but 0 for wvb, global-opinions, subpop, "
            "opinionqa, community-alignment and prism"
        ),
    )  # fmt: skip
    heldout_profile_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the other profiles held out entirely"
    )
    heldout_question_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the questions held out entirely, with everybody's answers to them"
    )
    split_seed: int = Field(0, ge=0, description="seed of the split by person and by country")

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        for key in ("modes", "separation"):
            if self.source != "synthetic" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is {getattr(self, key)}, but only source synthetic reads it; leave it out")
        if self.weights and self.source not in ("jsonl", "wvb", "survey"):
            raise ValueError(
                f"weights is true, but source {self.source} has no survey weights; only jsonl, wvb and survey may"
            )
        if self.map is not None and self.source != "survey":
            raise ValueError(f"map is {self.map}, but source {self.source} reads none; only survey does")
        if self.profile_prompt.count("{profile}") != 1:
            raise ValueError(
                f"profile_prompt is {self.profile_prompt!r}; it must have {{profile}} once, where the sentence stands"
            )
        if self.test_fraction + self.valid_fraction >= 1:
            raise ValueError(
                f"test_fraction {self.test_fraction} and valid_fraction {self.valid_fraction} leave nobody to learn "
                "from; their sum must be below 1"
            )
        if self.probe is not None and self.source != "wvb":
            raise ValueError(f"probe is {self.probe}, but source {self.source} has none; only wvb has")
        if self.weights and not self.histogram_targets and self.example_weight == "uniform":
            raise ValueError(
                "weights is true, but single answers (histogram_targets: false) with example_weight: uniform "
                "all count alike; set example_weight: answers"
            )
        return self

    @property
    def heldout(self) -> float:
        """The share of countries held out, in [0, 1): by the source where ``heldout_fraction`` is null.

        A benchmark keeps all of its countries, so that numbers can be compared with those of others.
        """
        if self.heldout_fraction is not None:
            return self.heldout_fraction
        return 0.15 if self.source in ("wvs-sample", "synthetic", "jsonl", "survey") else 0.0


class TrainingSection(_Section):
    """How the adapters learn."""

    objective: Literal["sft", "dpo", "grpo"] = Field(
        "sft",
        description="sft: conditional supervised fine-tuning | dpo: from pairs of answers (section dpo) | "
        "grpo: from rewards of the model's own answers (sections grpo, rollout, judge)",
    )
    group_field: str | None = Field(
        None, description="profile field, e.g. country, whose larger groups have metrics of their own"
    )
    steps: int = Field(100, ge=1, description="optimizer steps, unless epochs are given")
    epochs: float | None = Field(
        None, gt=0, description="instead of steps: how often each example is met (grpo: how often each prompt)"
    )
    global_batch_size: int = Field(
        12, ge=1, description="examples (dpo: pairs, grpo: prompts) per optimizer step, over all ranks"
    )
    micro_batch_size: int = Field(
        6,
        ge=1,
        description="most examples (dpo: pairs, grpo: completions) per rank in one forward; accumulation follows from "
        "it",
    )
    learning_rate: float = Field(1.0e-3, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="learning-rate schedule after warm-up"
    )
    schedule_steps: int | None = Field(
        None,
        ge=1,
        description="steps that the schedule is laid out for, if the run is to end before it does; null is the run's",
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    router_learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of the routers; null = learning_rate"
    )
    router_weight_decay: float | None = Field(None, ge=0, description="of the routers; null = weight_decay")
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas")
    adam_eps: float = Field(1.0e-8, gt=0, description="AdamW epsilon")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm to this; 0 = no clipping")
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="a step whose loss, gradient or update is not finite: stop and name the cause | learn nothing from "
        "it | also go back to the last checkpoint",
    )

    @model_validator(mode="after")
    def _check(self) -> TrainingSection:
        if self.epochs is None:
            self.check_length(self.steps)
        elif "steps" in self.model_fields_set:
            raise ValueError(f"steps is {self.steps} and epochs is {self.epochs:g}; leave one of them out")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas are {list(self.adam_betas)}; each must be in [0, 1)")
        return self

    def check_length(self, steps: int) -> None:
        """Raise a ValueError if a run of so many steps ends before its warm-up or after its schedule does."""
        if self.warmup_steps > steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} but steps is {steps}; warm-up must end before the run does"
            )
        if self.schedule_steps is not None and self.schedule_steps < steps:
            raise ValueError(
                f"schedule_steps is {self.schedule_steps} but steps is {steps}; nothing would be learned after the "
                "end of the schedule"
            )


class DpoSection(_Section):
    """Learning from pairs of answers (objective dpo)."""

    beta: float = Field(0.1, gt=0, description="how strongly the reference holds; rewards are beta times log-ratios")
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = Field(
        "sigmoid", description="sigmoid (DPO) | ipo | hinge (SLiC) | robust (label noise of rate label_smoothing)"
    )
    reference: Literal["start", "base"] = Field(
        "start", description="start: the model the run started from | base: the bare backbone, as the authors' code"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs that may be the wrong way round; sigmoid and robust read it"
    )
    length_normalised: bool = Field(False, description="log-probabilities per token instead of their sum")
    ld_alpha: float = Field(
        1.0, ge=0, le=1, description="weight of the tokens by which one answer is longer than the other; 1 keeps all"
    )
    sft_weight: float = Field(0.0, ge=0, description="weight of the chosen answer's own loss per token")
    soft_labels: bool = Field(
        False,
        description="equal pairs that people of one group answered both ways: their share instead of 1 as the label",
    )
    margin: Literal["ignore", "shift", "weight"] = Field(
        "ignore",
        description="scores of the data: ignore | shift, how much further apart the answers must be | weight of a pair",
    )
    margin_scale: float = Field(1.0, gt=0, description="margins of the data are multiplied by this")

    @model_validator(mode="after")
    def _check(self) -> DpoSection:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing is {self.label_smoothing}, but loss {self.loss} does not read it")
        if self.soft_labels and self.loss == "hinge":
            raise ValueError(
                "soft_labels is true, but the hinge loss learns the answer of the majority, however large it is; "
                "use sigmoid, robust or ipo"
            )
        if self.soft_labels and self.margin == "shift":
            raise ValueError(
                "soft_labels is true, which asks equal pairs for one share, but margin: shift asks each of them for a "
                "distance of its own; turn one of them off"
            )
        return self


class GrpoSection(_Section):
    """Learning from rewards of the model's own answers (objective grpo)."""

    rewards: tuple[str, ...] = Field(
        ("answer",),
        min_length=1,
        description="answer | log_score | survey (choice questions), judge (section judge), or module:function",
    )
    reward_weights: tuple[float, ...] | None = Field(None, description="one for each of rewards; null weighs all by 1")
    length_penalty: float = Field(0.0, ge=0, description="subtracted for an answer of rollout.max_new_tokens tokens")
    group_size: int = Field(8, ge=2, description="completions of each prompt, which are compared with each other")
    loss: Literal["grpo", "dr_grpo", "dapo"] = Field(
        "dapo", description="grpo: mean per completion | dr_grpo: by the longest length | dapo: mean over all tokens"
    )
    kl_weight: float = Field(0.0, ge=0, description="weight of the KL divergence (k3) from the reference; 0 needs none")
    reference: Literal["start", "base"] = Field("start", description="as dpo.reference")
    epsilon: float = Field(0.2, gt=0, description="probability ratios below 1 - epsilon are clipped")
    epsilon_high: float | None = Field(None, gt=0, description="those above 1 + epsilon_high; null is epsilon")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="advantages are divided by the rewards' standard deviation in the group | step | not"
    )
    mask_truncated: bool = Field(False, description="leave out completions that reached rollout.max_new_tokens")
    iterations: int = Field(1, ge=1, description="optimizer steps on each rollout")
    advantage: Literal["prompt", "history"] = Field(
        "prompt",
        description="rewards are compared with those of the same prompt | with all so far of training.group_field",
    )
    robust: Literal["none", "groupdro"] = Field(
        "none", description="groupdro: groups of training.group_field with low rewards weigh more"
    )
    robust_step: float = Field(0.1, gt=0, description="step size of the weights of groupdro")


class RolloutSection(_Section):
    """How the model's own answers are generated (objective grpo)."""

    temperature: float = Field(1.0, gt=0, description="of sampling; the loss takes log-probabilities at it, too")
    top_p: float = Field(1.0, gt=0, le=1, description="smallest share of probability that tokens are drawn from")
    max_new_tokens: int = Field(128, ge=1, description="longest completion")
    batch_size: int = Field(64, ge=1, description="completions that are written at once on a rank")
    backbone: Literal["auto", "gathered", "sharded"] = Field(
        "auto", description="a sharded backbone is gathered once per rollout | for each token | what memory allows"
    )
    keep: int = Field(
        2, ge=0, description="completions of each step that are kept in completions.jsonl, without profiles"
    )


class JudgeSection(_Section):
    """The model that judges answers, behind an OpenAI-compatible endpoint (reward judge)."""

    url: str = Field(description="base address, e.g. http://localhost:8000/v1", pattern=r"^https?://")
    model: str = Field(description="its name there")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable that holds the key")
    concurrency: int = Field(8, ge=1, description="most calls at a time")
    timeout: float = Field(60.0, gt=0, description="seconds of one call")
    retries: int = Field(5, ge=0, description="of a call that failed; waits grow")
    max_tokens: int = Field(256, ge=1, description="longest verdict")


class ParallelSection(_Section):
    """Where parameters live and how tokens meet experts."""

    deepspeed_config: str = Field(
        "zero2_sharded_backbone",
        description="a JSON file, or the name of one in ds_configs/ (see ds_configs/README.md)",
    )
    ep_size: int = Field(
        1, ge=1, description="ranks that share one set of experts; divides num_experts and the world size"
    )
    dispatch: Literal["auto", "all_to_all", "gather_experts"] = Field(
        "auto", description="move tokens, move experts, or the cheaper"
    )
    overlap_dispatch: bool = Field(
        False,
        description="tokens and experts are sent while the frozen product runs (not yet tried on a GPU)",
    )
    timeout_seconds: int = Field(120, ge=10, description="seconds to wait for a silent peer before stopping")


class CheckpointSection(_Section):
    """How often the run can be resumed from."""

    every: int = Field(50, ge=0, description="steps between checkpoints; 0 = only at the end")
    keep_last: int = Field(2, ge=1, description="complete checkpoints kept")
    keep_every: int = Field(0, ge=0, description="also keep those of steps that this divides; 0 = none")


class TelemetrySection(_Section):
    """What the run tells while it runs."""

    log_every: int = Field(1, ge=1, description="steps between rows of metrics.jsonl and TensorBoard")
    tensorboard: bool = Field(True, description="write TensorBoard events")
    progress: bool = Field(True, description="progress bar on rank 0")


class EvaluationSection(_Section):
    """How a trained run is judged."""

    batch_size: int = Field(16, ge=1, description="prompts per forward")
    min_answers: int = Field(
        30,
        ge=1,
        description=(
            "groups with fewer test answers (subgroups with fewer people) are left out of reports; "
            "the oracle is made of at least as many training answers"
        ),
    )
    min_subgroup: int = Field(
        5, ge=2, description="people a group needs to count in macro accuracy and sigma-inequity, which name nobody"
    )
    few_shot: int = Field(
        3, ge=1, description="method few_shot: answers of the person's group that stand before each question"
    )
    bootstrap: int = Field(
        1000, ge=0, description="bootstrap samples of people behind the 95% intervals; 0 = no intervals"
    )
    max_people: int | None = Field(
        None, ge=1, description="most people of each split, drawn at random with all of their answers; null takes all"
    )
    max_examples: int | None = Field(
        None,
        ge=1,
        description="most answers (conversations, pairs) of each split, drawn at random from those of max_people; "
        "null takes all",
    )
    sample_seed: int = Field(0, ge=0, description="seed of both draws")


# Keys that decide what is learned and that release 0.1.0 did not have, with the value that says what it did.
NEW_SINCE_0_1_0: dict[tuple[str, str], object] = {
    ("adapters", "balance_probability"): "gate",
    ("adapters", "balance_scope"): "micro_batch",
    ("adapters", "balance_decay"): 0.5,
    ("data", "prompt_style"): "metadata",
    ("data", "option_order"): "fixed",
    ("data", "weights"): False,
    ("data", "probe"): None,
    (
        "data",
        "on_long_prompt",
    ): "refuse",  # it cut prompts; a run that did so cannot go on, all others are as with this value
    ("data", "on_bad_row"): "refuse",
    ("data", "min_margin"): 0.0,
    ("data", "modes"): 4,
    ("data", "separation"): 10.0,
    ("data", "heldout_question_fraction"): 0.0,
    ("data", "map"): None,
    ("data", "max_people"): None,
    ("data", "max_examples"): None,
    ("data", "sample_seed"): 0,
    ("data", "profile_prompt"): "You are answering for this person: {profile}",
    ("data", "loss_on"): "all",
    ("profiles", "format"): None,
    ("profiles", "fields"): None,
    ("profiles", "pooling"): "auto",
    ("profiles", "normalise"): True,
    ("profiles", "max_tokens"): None,
    ("profiles", "keep_text"): True,
    ("data", "valid_fraction"): 0.0,
    ("model", "init_from"): None,
    ("model", "quantisation"): "none",
    ("training", "group_field"): None,
    ("training", "router_learning_rate"): None,
    ("training", "router_weight_decay"): None,
    ("adapters", "router_input"): "token_and_profile",
    ("adapters", "gate_temperature"): 1.0,
    ("adapters", "profile_dropout"): 0.0,
    ("adapters", "profile_noise"): 0.0,
    ("training", "schedule_steps"): None,
}
# Defaults that decide what is learned and that have changed, with their value in release 0.1.0.
CHANGED_SINCE_0_1_0: dict[tuple[str, str], object] = {("data", "heldout_fraction"): 0.15}


# Two ways to say how long a run is. A file that says one replaces what earlier files say in the other.
LENGTHS = ("steps", "epochs")
# Sections that one objective or method alone reads. In other recipes they are mistakes.
OWNER = {"dpo": "dpo", "grpo": "grpo", "rollout": "grpo", "judge": "grpo", "prefix": "p_tuning_v2"}
# Methods that ask the model as it is, each in its own way.
NOTHING_TRAINS = ("vanilla", "persona", "few_shot")


def _named(values: Mapping[str, object], section: str, key: str) -> object:
    """A value of a recipe whose sections may be mappings or models; None where it is left out."""
    keys = values.get(section)
    return keys.get(key) if isinstance(keys, dict) else getattr(keys, key, None)


class RunConfig(_Section):
    """Everything one run needs, as read from a recipe (STYLE: one YAML = one run)."""

    run: RunSection = RunSection()
    model: ModelSection
    profiles: ProfilesSection = ProfilesSection()
    adapters: CumaConfig = CumaConfig()
    prefix: PrefixSection | None = None
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    dpo: DpoSection | None = None
    grpo: GrpoSection | None = None
    rollout: RolloutSection | None = None
    judge: JudgeSection | None = None
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    telemetry: TelemetrySection = TelemetrySection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="before")
    @classmethod
    def _with_own_sections(cls, values: dict[str, object]) -> dict[str, object]:
        """Sections of the objective and the method that the recipe leaves out have their defaults; the judge has none.
        Method persona puts the profile into the prompt.
        """
        objective, method = _named(values, "training", "objective"), _named(values, "adapters", "method")
        own = [name for name, owner in OWNER.items() if owner in (objective, method) and name != "judge"]
        values = {**{name: {} for name in own}, **values}
        data = values.setdefault("data", {})
        if method == "persona" and isinstance(data, dict):
            values["data"] = {"profile_in_prompt": True, **data}
        return values

    @model_validator(mode="after")
    def _check_sections(self) -> RunConfig:
        chosen = {"training.objective": self.training.objective, "adapters.method": self.adapters.method}
        for name, owner in OWNER.items():
            if getattr(self, name) is not None and owner not in chosen.values():
                key = "adapters.method" if owner in get_args(Method) else "training.objective"
                raise ValueError(
                    f"section {name!r} belongs to {key}: {owner}, but this recipe says {chosen[key]}; "
                    f"remove the section, or change the {key.rpartition('.')[2]}"
                )
        if self.grpo is not None:
            if ("judge" in self.grpo.rewards) != (self.judge is not None):
                has = (
                    "needs section judge" if self.judge is None else "does not name judge, but there is a section judge"
                )
                raise ValueError(f"grpo.rewards {list(self.grpo.rewards)} {has}; add or remove one of them")
            weights = self.grpo.reward_weights
            if weights is not None and len(weights) != len(self.grpo.rewards):
                raise ValueError(f"grpo.reward_weights has {len(weights)} numbers for {len(self.grpo.rewards)} rewards")
            if self.training.group_field is None and (self.grpo.advantage, self.grpo.robust) != ("prompt", "none"):
                raise ValueError("grpo.advantage: history and grpo.robust: groupdro need training.group_field")
            ends = {"checkpoint.every": self.checkpoint.every}
            if self.training.epochs is None:  # epochs end with a whole rollout
                ends["training.steps"] = self.training.steps
            for key, number in ends.items():
                if number % self.grpo.iterations:
                    raise ValueError(
                        f"{key} is {number}, but a checkpoint lies between two rollouts, which last "
                        f"grpo.iterations {self.grpo.iterations} steps each; make it a multiple"
                    )
        return self

    @model_validator(mode="after")
    def _check_method(self) -> RunConfig:
        method, in_prompt = self.adapters.method, self.data.profile_in_prompt
        if (method == "persona" and not in_prompt) or (method == "vanilla" and in_prompt):
            other = {"persona": "vanilla", "vanilla": "persona"}[method]
            raise ValueError(
                f"data.profile_in_prompt is {str(in_prompt).lower()}, which is adapters.method {other}, not {method}; "
                "change one of them"
            )
        if method in NOTHING_TRAINS and self.model.init_from is not None:
            raise ValueError(
                f"model.init_from is set, but adapters.method {method} asks the model as it is; leave it out"
            )
        if method == "p_tuning_v2" and self.model.gradient_checkpointing:
            raise ValueError(
                "model.gradient_checkpointing is true, but with it transformers passes no keys and values to a layer, "
                "and adapters.method p_tuning_v2 trains those; set it to false"
            )
        if method == "p_tuning_v2" and self.data.packing:
            raise ValueError(
                "data.packing is true, but adapters.method p_tuning_v2 has one prefix per row, which the examples of "
                "a row cannot share; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> RunConfig:
        for name in ("dpo", "grpo"):
            section = getattr(self, name)
            if section is not None and section.reference == "base" and self.adapters.method == "full":
                raise ValueError(
                    f"{name}.reference: base is the bare backbone, which adapters.method full trains away; use "
                    "reference: start"
                )
        return self

    @model_validator(mode="after")
    def _check_texts(self) -> RunConfig:
        rewards = () if self.grpo is None else self.grpo.rewards
        needs = {
            "data.profile_in_prompt: true": self.data.profile_in_prompt,
            "adapters.method: few_shot": self.adapters.method == "few_shot",
            "adapters.gradient_groups": self.adapters.gradient_groups is not None,
            "training.group_field": self.training.group_field is not None,
            "a reward that reads profiles": any(name == "judge" or ":" in name for name in rewards),
        }
        for what, asked in needs.items():
            if asked and not self.profiles.keep_text:
                raise ValueError(f"profiles.keep_text is false, but {what} needs the profiles; leave one of them out")
        return self

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.rollout is not None and self.rollout.max_new_tokens >= self.data.max_length:
            raise ValueError(
                f"rollout.max_new_tokens is {self.rollout.max_new_tokens}, which leaves no room for a prompt in "
                f"data.max_length {self.data.max_length}; raise data.max_length"
            )
        if self.adapters.uses_profiles and self.profiles.encoder is None and self.model.init_from is None:
            raise ValueError(
                "profiles.encoder is missing; method 'cuma' needs a sentence encoder (a folder or a hub id)"
            )
        if self.data.packing and self.adapters.gradient_mask != "none" and not self.adapters.uses_profiles:
            raise ValueError(
                f"data.packing is true, but adapters.gradient_mask {self.adapters.gradient_mask} tells sequences "
                "apart, and method "
                f"{self.adapters.method!r} has no profiles to do it by; turn one of them off"
            )
        for key in ("router_learning_rate", "router_weight_decay"):
            if getattr(self.training, key) is not None and not self.adapters.has_router:
                raise ValueError(
                    f"training.{key} is {getattr(self.training, key)}, but method {self.adapters.method!r} has no "
                    "routers; leave it out"
                )
        if self.adapters.blurs_profiles and self.training.objective == "grpo":
            raise ValueError(
                "adapters.profile_dropout and adapters.profile_noise are for objectives sft and dpo: completions are "
                "rewarded as the person's own, so their profile is not hidden; leave them out"
            )
        if self.adapters.blurs_profiles and self.profiles.standardise is None:
            raise ValueError(
                "adapters.profile_dropout and adapters.profile_noise are about standardised profiles, but "
                "profiles.standardise is null; set it, e.g. to 3.0"
            )
        why = {
            "full": "trains the backbone, and packed weights cannot train",
            "dora": "measures the backbone's weights, and packed weights are none",
        }.get(self.adapters.method)
        if self.model.quantisation != "none" and why is not None:
            raise ValueError(
                f"model.quantisation is {self.model.quantisation}, but adapters.method {self.adapters.method} {why}; "
                "set model.quantisation: none"
            )
        if self.adapters.num_experts % self.parallel.ep_size:
            raise ValueError(
                f"parallel.ep_size is {self.parallel.ep_size}, which does not divide adapters.num_experts "
                f"{self.adapters.num_experts}"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """The run's own folder, ``output_dir/name``."""
        return Path(self.run.output_dir) / self.run.name

    def to_yaml(self) -> str:
        """The resolved recipe, every key written out; sections of other objectives are left out."""
        values = {name: one for name, one in json.loads(self.model_dump_json()).items() if one is not None}
        if self.training.epochs is not None:
            del values["training"]["steps"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def section_model(name: str) -> type[BaseModel]:
    """The model of a section, optional or not."""
    annotation = RunConfig.model_fields[name].annotation
    models = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and one is not type(None)]
    assert issubclass(models[0], BaseModel)
    return models[0]
