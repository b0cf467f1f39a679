"""Recipe sections of the serving room: generation, router, deployments. Imports no torch, ray or faiss."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config import Section
from training.config import TrainingRecipe

StrategyName = Literal["base", "rag", "rag_fewshot", "finetuned", "finetuned_rag", "raft", "hybrid", "auto"]
RoutedStrategy = Literal["base", "rag", "rag_fewshot", "finetuned", "finetuned_rag", "raft", "hybrid"]


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

    strategy: RoutedStrategy
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


# What a question that matches several is taken for: the one with most matches, then
# the first, so that "what is the difference" is analysis although it starts like a fact lookup.
DEFAULT_INTENTS: dict[str, tuple[str, ...]] = {
    "analysis": (
        *("compare", "comparison", "difference", "differences", "differ", "versus", "vs", "trend", "trends"),
        *("analyse", "analyze", "analysis", "pros and cons", "trade-off", "trade-offs"),
        *("比较", "对比", "区别", "差异", "分析", "趋势", "优缺点"),
    ),
    "reasoning": (
        *("why", "explain", "how does", "how do", "how can", "reason", "prove", "derive", "what if", "infer"),
        *("为什么", "为何", "解释", "推理", "推导", "证明", "原因", "怎么会", "如何"),
    ),
    "fact_lookup": (
        *("what is", "what are", "what was", "who", "whose", "when", "where", "which", "how many", "how much"),
        *("how long", "how old", "how large", "how high", "name the", "list"),
        *("是什么", "什么是", "多少", "几", "谁", "哪", "何时", "什么时候", "在哪里", "列出"),
    ),
}

# The source note's selector: metadata first, then the kind of task.
DEFAULT_RULES: tuple[PolicyRule, ...] = (
    PolicyRule(
        strategy="rag",
        metadata={"update_frequency": "daily"},
        reason="knowledge that changes daily is read from the index",
    ),
    PolicyRule(
        strategy="finetuned",
        metadata_above={"reasoning_depth": 3},
        reason="deep reasoning is left to the fine-tuned model",
    ),
    PolicyRule(
        strategy="raft",
        metadata_above={"context_length": 2000},
        reason="long context needs a model trained to ignore distractors",
    ),
    PolicyRule(strategy="rag", intent="fact_lookup", reason="a fact is looked up in the documents"),
    PolicyRule(strategy="finetuned", intent="reasoning", reason="reasoning is left to the fine-tuned model"),
    PolicyRule(strategy="hybrid", intent="analysis", reason="an analysis takes the cited and the closed-book answer"),
)


class RouterConfig(Section):
    """Rules of `auto`, first match wins; nothing matching takes `default`."""

    intents: dict[str, tuple[str, ...]] = DEFAULT_INTENTS
    """Intent name to keywords that reveal it: whole words, or any place in scripts without spaces."""
    rules: tuple[PolicyRule, ...] = DEFAULT_RULES
    """Policy rules in order."""
    default: RoutedStrategy = "hybrid"
    """Strategy for an unknown intent."""

    @model_validator(mode="after")
    def _intents_are_known(self) -> Self:
        stated = self.rules if self.rules != DEFAULT_RULES else ()
        for rule in stated:
            if rule.intent and rule.intent not in self.intents:
                raise ValueError(
                    f"rules name the intent {rule.intent!r}; intents has {', '.join(self.intents) or 'none'}"
                )
        return self


class ServeConfig(Section):
    """The deployments."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback is announced."""
    port: int = Field(default=8000, ge=1, le=65535)
    """HTTP port."""
    max_queued_requests: int = Field(default=64, ge=1)
    """Requests under way at once; one more is answered 429 with Retry-After."""
    generator_replicas: int = Field(default=1, ge=1)
    """Generator replicas."""
    retriever_replicas: int = Field(default=1, ge=1)
    """Retriever replicas."""
    cpus_per_generator: float = Field(default=0.5, gt=0)
    """CPUs that each generator replica claims of Ray; how many it computes on is `generation.threads`."""
    cpus_per_retriever: float = Field(default=0.25, gt=0)
    """CPUs that each retriever replica claims of Ray."""
    gpus_per_generator: float = Field(default=0, ge=0)
    """GPUs of each generator replica."""
    gpus_per_retriever: float = Field(default=0, ge=0)
    """GPUs of each retriever replica."""
    request_timeout_s: float = Field(default=120, gt=0)
    """Deadline of one request, in seconds; then 504."""
    max_body_bytes: int = Field(default=1_000_000, ge=1000)
    """Longest request body; a longer one is answered 413."""


class ServingRecipe(TrainingRecipe):
    """The part of a recipe that the serving room may read."""

    generation: GenerationConfig = GenerationConfig()
    router: RouterConfig = RouterConfig()
    serve: ServeConfig = ServeConfig()
