"""A language model as judge of two answers, behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from cuma_ds.judge.calls import Judge, JudgeDown, JudgeSettings
from cuma_ds.judge.pairs import SCORE, Comparison, Pair, compare, probe, scores

__all__ = ["SCORE", "Comparison", "Judge", "JudgeDown", "JudgeSettings", "Pair", "compare", "probe", "scores"]
