"""Recipe sections of the serving room: generation, router, deployments. Imports no torch, ray or faiss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import Section
from training.config import TrainingRecipe

StrategyName = Literal["base", "rag", "rag_fewshot", "finetuned", "finetuned_rag", "raft", "hybrid", "auto"]


class GenerationConfig(Section):
    """How answers are generated, online and offline alike."""

    engine: Literal["transformers"] = "transformers"
    """Inference engine."""
    passages: int = Field(default=3, ge=1)
    """k: passages shown to strategies that retrieve."""
    examples: int = Field(default=2, ge=0)
    """Worked examples in the prompt of `rag_fewshot`."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Most tokens of a completion."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    batch_rows: int = Field(default=16, ge=1)
    """Most requests generated together."""
    threads: int = Field(default=2, ge=1)
    """Torch threads of an engine on CPU."""


class PolicyRule(Section):
    """One routing rule; it applies when every condition that it states holds."""

    strategy: StrategyName
    """Strategy to take."""
    reason: str
    """Shown in the response."""
    intent: str = ""
    """Intent that must have been recognised."""
    keywords: tuple[str, ...] = ()
    """Any of these words in the question (folded to lower case)."""
    metadata: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Request metadata that must be equal (`update_frequency: daily`)."""
    metadata_above: dict[str, float] = Field(default_factory=dict)
    """Request metadata that must be greater (`reasoning_depth: 3`, `context_length: 2000`)."""


class RouterConfig(Section):
    """Rules of `auto`, first match wins; nothing matching takes `default`."""

    intents: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Intent name to keywords that reveal it."""
    rules: tuple[PolicyRule, ...] = ()
    """Policy rules in order."""
    default: StrategyName = "hybrid"
    """Strategy for an unknown intent."""


class ServeConfig(Section):
    """The deployments."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback is announced."""
    port: int = Field(default=8000, ge=1, le=65535)
    """HTTP port."""
    max_queued_requests: int = Field(default=64, ge=1)
    """Requests waiting at ingress before 429."""
    generator_replicas: int = Field(default=1, ge=1)
    """Generator replicas."""
    retriever_replicas: int = Field(default=1, ge=1)
    """Retriever replicas."""
    gpus_per_generator: float = Field(default=0, ge=0)
    """GPUs of each generator replica."""
    gpus_per_retriever: float = Field(default=0, ge=0)
    """GPUs of each retriever replica."""
    request_timeout_s: float = Field(default=120, gt=0)
    """Deadline of one request."""


class ServingRecipe(TrainingRecipe):
    """The part of a recipe that the serving room may read."""

    generation: GenerationConfig = GenerationConfig()
    router: RouterConfig = RouterConfig()
    serve: ServeConfig = ServeConfig()
