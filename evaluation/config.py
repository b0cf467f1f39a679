"""Recipe sections of the evaluation room. Imports no torch, ray or faiss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import Section
from serving.config import ServingRecipe
from serving.router_config import StrategyName

Task = Literal["answers", "labels", "api_calls"]


class EvaluateConfig(Section):
    """What is compared, and on how many questions."""

    task: Task = "answers"
    """How answers are scored. `answers`: EM and F1 against the accepted answers; `labels`: accuracy and macro-F1 over
    the labels that the accepted answers name (yes, no, maybe); `api_calls`: `torch.hub.load(…)` calls, right where
    they match an API of the corpus in the golden API's `metadata.domain`."""
    strategies: tuple[StrategyName, ...] = ("base", "rag", "rag_fewshot", "finetuned", "finetuned_rag", "raft")
    """Strategies compared on the same questions."""
    new_documents: int = Field(default=60, ge=0)
    """Most questions about documents never seen in training."""
    new_questions: int = Field(default=30, ge=0)
    """Most held-out questions about documents seen in training."""
    new_kinds: int = Field(default=0, ge=0)
    """Most questions of kinds never seen in training, about documents never seen either."""
    latency_rows: int = Field(default=6, ge=0)
    """Questions per strategy that are answered once more, one at a time, to measure a lone request's latency."""
    bootstrap_resamples: int = Field(default=2000, ge=100)
    """Resamples behind each 95% interval."""
    window_rows: int = Field(default=32, ge=1)
    """Questions answered and written together; the unit that a resumed run does not repeat."""
    generators: int = Field(default=1, ge=1)
    """Generation actors; on GPUs, one per GPU."""
    retrievers: int = Field(default=1, ge=1)
    """Retrieval actors."""
    cpus_per_actor: float = Field(default=0.5, gt=0)
    """CPUs that each actor claims from Ray; a fraction, so that both kinds fit on two cores."""
    gpus_per_generator: float = Field(default=0, ge=0)
    """GPUs that each generation actor claims."""
    gpus_per_retriever: float = Field(default=0, ge=0)
    """GPUs that each retrieval actor claims."""
    worst_examples: int = Field(default=10, ge=0)
    """Wrong answers that the report shows in full."""


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
