"""The recipe's `router` section: intents, policy rules, A/B tests, learned weights. Imports no torch, ray or faiss."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config import Section
from training.router_config import IntentTraining

StrategyName = Literal["base", "rag", "rag_fewshot", "finetuned", "finetuned_rag", "raft", "hybrid", "auto"]
RoutedStrategy = Literal["base", "rag", "rag_fewshot", "finetuned", "finetuned_rag", "raft", "hybrid"]
MetadataValue = str | int | float | bool

SHARES_TOLERANCE = 1e-6
QUOTING: tuple[RoutedStrategy, ...] = ("raft", "rag_fewshot", "hybrid")
"""Strategies whose model was taught or shown to quote the passages."""


class PolicyRule(Section):
    """One routing rule; it applies when every condition that it states holds."""

    strategy: RoutedStrategy | None = None
    """Strategy to take; or `split`."""
    split: dict[RoutedStrategy, float] = Field(default_factory=dict)
    """An A/B test instead of one strategy: shares by strategy, which add up to 1. A user gets the same strategy each
    time (drawn from `experiment` and the request's `user`); where a request names no user, each request is drawn."""
    experiment: str = ""
    """Name of the A/B test; `split` needs one. Another name draws the users anew."""
    reason: str
    """Shown in the response."""
    intent: str = ""
    """Intent that must have been recognised."""
    keywords: tuple[str, ...] = ()
    """Any of these words in the question (folded to lower case)."""
    metadata: dict[str, MetadataValue | tuple[MetadataValue, ...]] = Field(default_factory=dict)
    """Request metadata that must be equal, or equal to one of several (`update_frequency: [daily, hourly]`)."""
    metadata_above: dict[str, float] = Field(default_factory=dict)
    """Request metadata that must be greater (`reasoning_depth: 3`, `context_length: 2000`)."""
    require_quote: bool = False
    """An answer none of whose quotes verifies becomes an abstention, and nothing is streamed before that is known. It
    holds for whatever stands in for a strategy that the release lacks, too. A caller who asks for a strategy by name
    gets that strategy, without this condition."""

    @model_validator(mode="after")
    def _takes_one_way(self) -> Self:
        if (self.strategy is None) == (not self.split):
            raise ValueError("a rule takes a `strategy` or a `split`" + (", not both" if self.split else ""))
        if bool(self.split) != bool(self.experiment):
            raise ValueError(
                "`split` needs the name of its `experiment`" if self.split else "`experiment` needs a `split`"
            )
        if any(share < 0 or not math.isfinite(share) for share in self.split.values()):
            raise ValueError(f"split: shares are 0 or more, got {self.split}")
        without = [name for name in (self.strategy, *self.split) if name and name not in QUOTING]
        if self.require_quote and without:
            raise ValueError(
                f"`require_quote` needs a strategy that quotes ({', '.join(QUOTING)}); {without[0]} would never answer"
            )
        total = sum(self.split.values())
        if self.split and abs(total - 1) > SHARES_TOLERANCE:
            raise ValueError(f"split of {self.experiment}: shares must add up to 1, got {total:g}")
        return self


# What a question that matches several is taken for: the one with most matches, then
# the first, so that "what is the difference" is analysis although it starts like a fact lookup.
DEFAULT_INTENTS: dict[str, tuple[str, ...]] = {
    "analysis": (
        *("compare", "compared", "comparing", "comparison", "contrast", "difference", "differences", "differ"),
        *("similarities", "versus", "vs", "better", "best way", "trend", "trends", "analyse", "analyze", "analysis"),
        *("evaluate", "evaluation", "assess", "assessment", "summarise", "summarize", "summary", "overview"),
        *("pros and cons", "trade-off", "trade-offs", "advantages", "disadvantages", "strengths", "weaknesses"),
        *("implications", "discuss", "outline"),
        *("比较", "对比", "相比", "区别", "差异", "差别", "异同", "有何不同", "有什么不同", "不同之处", "分析", "趋势"),
        *("优缺点", "优劣", "利弊", "优势", "劣势", "权衡", "哪个更", "哪种更", "更好", "更适合", "更划算"),
        *("评估", "评价", "总结", "概括", "归纳", "综述", "概述", "讨论"),
    ),
    "reasoning": (
        *(
            "why",
            "explain",
            "how does",
            "how do",
            "how did",
            "how can",
            "how would",
            "how should",
            "how to",
            "how come",
        ),
        *("how is it that", "reason", "reasons", "prove", "proof", "derive", "infer", "deduce", "what if"),
        *("what would happen", "what happens", "cause", "causes", "caused", "fix", "troubleshoot"),
        *("为什么", "为何", "为啥", "解释", "推理", "推导", "推断", "证明", "原因", "原理", "机制", "导致", "造成"),
        *("怎么", "怎样", "怎会", "如何", "凭什么", "如果", "假如", "假设", "排查"),
    ),
    "fact_lookup": (
        *("what", "what's", "what’s", "who", "who's", "who’s", "whose", "whom", "when", "where", "which"),
        *("how many", "how much", "how long", "how old", "how large", "how big", "how high", "how tall", "how far"),
        *("how deep", "how fast", "how heavy", "how wide", "how often", "name the", "list", "tell me", "give me"),
        *("is there", "are there", "is it", "does", "did", "can i", "do i", "do you", "define", "definition"),
        *(
            "什么",
            "啥",
            "多少",
            "多久",
            "多长",
            "多大",
            "多高",
            "多远",
            "多重",
            "多深",
            "多快",
            "谁",
            "哪",
            "何时",
            "何地",
        ),
        *("几个", "几点", "几年", "几天", "几月", "几号", "几次", "几种", "几岁", "几位", "几家", "几页", "第几"),
        *("星期几", "周几", "列出", "列举", "定义", "是否", "有没有", "能不能", "可不可以", "吗", "请告诉"),
    ),
}

# The source note's selector: metadata first, then the kind of task.
DEFAULT_RULES: tuple[PolicyRule, ...] = (
    PolicyRule(
        strategy="rag",
        metadata={"update_frequency": ("daily", "hourly", "realtime")},
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


class LearningConfig(Section):
    """How ratings move the choice of strategy where an intent is known and no rule applies."""

    strategies: tuple[RoutedStrategy, ...] = ()
    """Strategies to choose among, per intent; none learns nothing and takes `default`. Rules come first: an intent
    that a rule decides is not learned. Of the default rules, those about metadata alone stay in force."""
    exploration: float = Field(default=0.1, ge=0, le=1)
    """Share of questions on which a strategy is drawn at random at first; it decays as 1 / (1 + ratings / `decay`)."""
    decay: float = Field(default=100, gt=0)
    """Ratings of an intent after which its exploration has halved."""
    draws: int = Field(default=200, ge=1)
    """Posterior draws with which the probability of each choice is estimated and logged."""


class RouterConfig(IntentTraining):
    """Rules of `auto`, first match wins; nothing matching takes `default`."""

    intents: dict[str, tuple[str, ...]] = DEFAULT_INTENTS
    """Intent name to keywords that reveal it: whole words, or any place in scripts without spaces. A trained
    classifier (`examples`) takes their place."""
    rules: tuple[PolicyRule, ...] = DEFAULT_RULES
    """Policy rules in order, instead of the default ones."""
    default: RoutedStrategy = "hybrid"
    """Strategy for an unknown intent."""
    threshold: float | None = Field(default=None, ge=0, le=1)
    """Calibrated confidence below which an intent counts as unknown; none takes the one that training chose."""
    learning: LearningConfig = LearningConfig()

    @model_validator(mode="after")
    def _intents_are_known(self) -> Self:
        blank = [intent for intent, words in self.intents.items() if not all(map(str.strip, words))]
        if blank or not all(word.strip() for rule in self.rules for word in rule.keywords):
            raise ValueError(
                f"{f'intents.{blank[0]}' if blank else 'rules'}: a keyword is blank: it would always match"
            )
        if self.examples:
            return self  # what the classifier knows, the router checks
        for rule in self.rules if self.rules != DEFAULT_RULES else ():
            if rule.intent and rule.intent not in self.intents:
                raise ValueError(
                    f"rules name the intent {rule.intent!r}; intents has {', '.join(self.intents) or 'none'}"
                )
        return self

    def rules_in_force(self) -> tuple[PolicyRule, ...]:
        """`rules`; of the default ones, with strategies to learn, those that no intent decides."""
        if self.rules == DEFAULT_RULES and self.learning.strategies:
            return tuple(rule for rule in self.rules if not rule.intent)
        return self.rules
