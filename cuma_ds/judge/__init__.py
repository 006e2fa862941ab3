"""A language model as judge of two answers, behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from cuma_ds.judge.calls import JudgeSettings
from cuma_ds.judge.pairs import SCORE, Comparison, Pair, compare

__all__ = ["SCORE", "Comparison", "JudgeSettings", "Pair", "compare"]
