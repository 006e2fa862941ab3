"""The rewards of a run: found once at start, then called with the completions of each rollout.

A reward is a plain callable ``reward(prompts, completions, profiles, **columns) -> list of float or None``, with one
entry per completion; docs/preferences.md says how to write one.

Shapes: M completions of this rank, F columns: rewards and what is logged beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuma_ds.config import RunConfig
from cuma_ds.data.asked import conversation
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.rows import Row
from cuma_ds.errors import ConfigError, nearest
from cuma_ds.training.rollout import verifiable
from cuma_ds.training.rollout.answers import Answers
from cuma_ds.training.rollout.callables import Reward, RewardInput, called, imported_reward
from cuma_ds.training.rollout.judged import JudgeReward

Array = NDArray[np.float64]


# By kind of the data: what a reward is told of each completion, beside its length and its person's country.
COLUMNS: dict[str, tuple[str, ...]] = {
    "choice": ("question_id", "question", "options", "counts", "scale", "option"),
    "chat": ("answer",),
    "preference": ("chosen", "rejected"),
}
_ALWAYS = ("group", "completion_tokens")
# Rewards with a name, and the kinds of data that they know the right answer of.
NAMED: dict[str, tuple[str, ...]] = {
    "answer": ("choice", "preference"),
    "log_score": ("choice",),
    "survey": ("choice",),
    "judge": ("chat", "preference"),
}


class Rewards:
    """The rewards of one run.

    Args:
        config: of an objective with rewards.
        data: what it learns from.
        renderer: that showed the prompts.

    Attributes:
        names: of F columns: the rewards, then ``length`` (share of ``rollout.max_new_tokens``) where it counts, and for
            choice questions ``no_option`` and ``survey_match`` (1 - EMD of a prompt's completions), which only count
            for the log.
        weights: of each column in the sum.

    Raises:
        ConfigError: a reward that cannot be found, called or used with this kind of data.
    """

    def __init__(self, config: RunConfig, data: PreparedData, renderer: Renderer) -> None:
        assert config.grpo is not None
        assert config.rollout is not None
        self._kind, self._profiles = data.kind, data.profiles
        self._renderer = renderer
        self._longest = config.rollout.max_new_tokens
        self._biased = config.grpo.scale_rewards == "group" and "survey" in config.grpo.rewards
        specs = config.grpo.rewards
        repeated = [name for place, name in enumerate(specs) if name in specs[:place]]
        if repeated:
            raise ConfigError(f"grpo.rewards names {repeated[0]!r} twice; grpo.reward_weights weighs it")
        self._rewards = {spec: self._find(spec, config) for spec in specs}
        beside = {"length": -config.grpo.length_penalty} if config.grpo.length_penalty else {}
        beside |= {"no_option": 0.0, "survey_match": 0.0} if self._kind == "choice" else {}
        self.names = (*(spec.replace(":", ".") for spec in specs), *beside)
        self.weights = (*(config.grpo.reward_weights or (1.0,) * len(specs)), *beside.values())

    def check(self, say: Callable[[str], None]) -> None:
        """Ask a judge whether it is there, and say what the user should know. Only one rank needs to.

        Raises:
            ConfigError: the judge refuses the key, does not know the model, or gives no verdict.
            JudgeDown: it does not answer.
        """
        judge = self._rewards.get("judge")
        if isinstance(judge, JudgeReward) and (told := judge.check()):
            say(told)
        if self._biased:
            say(
                "grpo.rewards has survey, and grpo.scale_rewards is group: dividing by the standard deviation of each "
                "group moves the optimum away from people's distribution; batch or none do not"
            )

    def __call__(self, answers: Sequence[Answers]) -> Array:
        """[M, F] numbers of the completions in their order; nan where a reward gave None.

        All columns are nan where every reward gave None.

        Raises:
            RewardError: a reward raised, or returned something that is no reward.
            JudgeDown: the judge does not answer any more.
        """
        if not answers:
            return np.zeros((0, len(self.names)))
        told, beside = self._input(answers), self._beside(answers)
        values = [called(spec, reward, told) for spec, reward in self._rewards.items()]
        left_out_M = np.isnan(values).all(axis=0)
        values_MF = np.stack([*values, *(beside[name] for name in self.names[len(values) :])], axis=1)
        values_MF[left_out_M] = np.nan
        return values_MF

    def _find(self, spec: str, config: RunConfig) -> Reward:
        if ":" in spec:
            return imported_reward(spec, (*COLUMNS[self._kind], *_ALWAYS))
        if spec not in NAMED:
            raise ConfigError(
                f"grpo.rewards: there is no reward {spec!r}{nearest(spec, NAMED)}; "
                f"expected {', '.join(NAMED)}, or module:function for one of your own"
            )
        if self._kind not in NAMED[spec]:
            fitting = ", ".join(name for name, kinds in NAMED.items() if self._kind in kinds)
            raise ConfigError(
                f"grpo.rewards: reward {spec!r} is for data of kind {' and '.join(NAMED[spec])}, this data is of kind "
                f"{self._kind}; it can have {fitting}, or module:function for one of your own"
            )
        assert config.grpo is not None
        if spec == "judge":
            assert config.judge is not None
            return JudgeReward(config.judge)
        if spec == "survey":
            if config.grpo.group_size < 3:
                raise ConfigError(
                    f"grpo.group_size is {config.grpo.group_size}, but reward 'survey' compares the answers of a group "
                    "with each other and with people's; it needs at least 3"
                )
            return partial(verifiable.survey, group_size=config.grpo.group_size)
        return {"answer": verifiable.answer, "log_score": verifiable.log_score}[spec]

    def _input(self, answers: Sequence[Answers]) -> RewardInput:
        prompts, completions, profiles = [], [], []
        columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS[self._kind], *_ALWAYS)}
        for one in answers:
            told = {**one.row, "answer": _last_answer(one.row)}
            for text, tokens in zip(one.texts, one.lengths, strict=True):
                prompts.append(list(conversation(one.row, self._renderer)))
                completions.append(text)
                profiles.append(self._profiles[one.row["profile"]])
                told |= {"completion_tokens": tokens, "option": self._option(one, text)}
                for name, column in columns.items():
                    column.append(told[name])
        return RewardInput(prompts, completions, profiles, columns)

    def _option(self, answers: Answers, text: str) -> int | None:
        return verifiable.chosen_option(text, answers.row.get("options", ()), self._renderer.option_order == "reversed")

    def _beside(self, answers: Sequence[Answers]) -> dict[str, Array]:
        """The columns that are no rewards."""
        found = {"length": np.array([tokens / self._longest for one in answers for tokens in one.lengths])}
        if self._kind == "choice":
            chosen = [[self._option(one, text) for text in one.texts] for one in answers]
            found["no_option"] = np.array([float(option is None) for options in chosen for option in options])
            matches = [
                verifiable.match(options, one.row["counts"], one.row["scale"] == "nominal")
                for one, options in zip(answers, chosen, strict=True)
            ]
            found["survey_match"] = np.repeat(matches, [len(options) for options in chosen])
        return found


def _last_answer(row: Row) -> str:
    """What a conversation really went on with; "" for other rows."""
    own = [message["content"] for message in row.get("messages", ()) if message["role"] == "assistant"]
    return own[-1] if own else ""
