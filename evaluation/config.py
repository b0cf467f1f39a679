"""Recipe sections of the evaluation room. Imports no torch, ray or faiss."""

from __future__ import annotations

from pydantic import Field

from cluster.config import Section
from serving.config import ServingRecipe, StrategyName


class EvaluateConfig(Section):
    """What is compared, and on how many questions."""

    strategies: tuple[StrategyName, ...] = ("base", "rag", "rag_fewshot", "finetuned", "finetuned_rag", "raft")
    """Strategies compared on the same questions."""
    new_documents: int = Field(default=60, ge=0)
    """Most questions about documents never seen in training."""
    new_questions: int = Field(default=30, ge=0)
    """Most held-out questions about documents seen in training."""
    bootstrap_resamples: int = Field(default=2000, ge=100)
    """Resamples behind each 95% interval."""
    window_rows: int = Field(default=64, ge=1)
    """Questions answered and written together; the unit that a resumed run does not repeat."""


class PricesConfig(Section):
    """Prices behind the cost figures, in US dollars."""

    cpu_core_hour: float = Field(default=0.04, ge=0)
    """One CPU core for one hour."""
    gpu_hour: float = Field(default=2.5, ge=0)
    """One GPU for one hour."""


class EvaluationRecipe(ServingRecipe):
    """The part of a recipe that the evaluation room may read."""

    evaluate: EvaluateConfig = EvaluateConfig()
    prices: PricesConfig = PricesConfig()
