"""A reward that a judge gives: whether the person would prefer the completion to their own preferred answer."""

from __future__ import annotations

from typing import Any

from cuma_ds.config import JudgeSection
from cuma_ds.errors import ConfigError
from cuma_ds.judge import Judge, JudgeDown, JudgeSettings, Pair, probe, scores


class JudgeReward:
    """Asks a judge about each completion and the person's own preferred answer.

    That is the chosen one of a preference, and what a conversation really went on with. Both are shown in both orders.
    Verdicts are kept in the user's cache folder, so that a run that goes on is told the same.

    Args:
        section: of the recipe.

    Raises:
        ConfigError: the ``openai`` package is missing.
    """

    def __init__(self, section: JudgeSection) -> None:
        self.judge = Judge(JudgeSettings(**section.model_dump()))

    def check(self) -> str:
        """Ask the judge one question.

        Returns:
            What the user should be told; "" for nothing.

        Raises:
            ConfigError: the judge refuses the key or does not know the model, or gives no verdict for another reason.
            JudgeDown: it does not answer.
        """
        if probe(self.judge):
            return ""
        return (
            f"{self.judge} gave a first verdict that cannot be read; only A, B and tie can "
            "(raise judge.max_tokens for a judge that thinks aloud first)"
        )

    def __call__(
        self, prompts: list[Any], completions: list[str], profiles: list[Any], **columns: list[Any]
    ) -> list[float | None]:
        """1 where the completion is preferred, 1/2 for a tie, 0 where the person's own answer is; the mean of both
        orders. None where a call failed or a verdict could not be read.

        Raises:
            JudgeDown: the judge does not answer any more, or no longer takes the key or the model.
        """
        own = columns["chosen"] if "chosen" in columns else columns["answer"]
        told = zip(profiles, prompts, completions, own, strict=True)
        pairs = [Pair(profile["sentence"], prompt, text, known, person=0) for profile, prompt, text, known in told]
        try:
            return scores(pairs, self.judge)
        except ConfigError as error:
            raise JudgeDown(str(error)) from None
