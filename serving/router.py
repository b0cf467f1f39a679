"""Chooses a strategy for a question, and says why.

In: the question, the request's metadata, what the caller asked for. Out: a `Route`. In this order: the caller's
explicit choice; the recipe's rules over metadata and intent; the default. A rule whose strategy the release lacks is
passed over, and the reason says so. A library inside ingress, so routing costs no hop.
Not covered: learned weights and feedback. Imports no torch, ray or faiss.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from serving.records import Route
from serving.router_config import PolicyRule, RouterConfig
from serving.strategies import AUTO, HYBRID, STRATEGIES, require_strategy
from training.format import fold

# What stands in for a default that the release lacks.
_FALLBACKS = ("raft", "rag_fewshot", "rag", "finetuned", "base")
_CJK = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")


class Router:
    """Routes questions by a recipe's rules."""

    def __init__(self, config: RouterConfig, available: Collection[str] = (*STRATEGIES, HYBRID, AUTO)) -> None:
        """`available` are the strategies that the release can serve; without it, all."""
        self._available = tuple(available)
        self._intents = config.intents
        self._rules = config.rules
        self._default = config.default
        self._patterns = {word: _pattern(word) for words in self._intents.values() for word in words}
        self._patterns |= {word: _pattern(word) for rule in self._rules for word in rule.keywords}

    def route(self, question: str, metadata: Mapping[str, Any] | None = None, requested: str = AUTO) -> Route:
        """The strategy for one question.

        Args:
            question: The question's text.
            metadata: What the caller says about it (`update_frequency`, `reasoning_depth`, `context_length`, …).
            requested: A strategy's name, or `auto`.

        Raises:
            UserError: `requested` is no strategy, or the release lacks a part that it needs.
        """
        require_strategy(requested, self._available)
        if requested != AUTO:
            return Route(requested, reason="asked for by the caller")
        text = fold(question)[0].casefold()
        intent, confidence, words = self._intent(text)
        passed_over: list[str] = []
        for rule in self._rules:
            if not self._applies(rule, text, intent, metadata or {}):
                continue
            if rule.strategy in self._available:
                found = f" (recognised by {', '.join(f'“{word}”' for word in words)})" if rule.intent else ""
                return Route(
                    rule.strategy,
                    intent=intent,
                    confidence=confidence if rule.intent else 1.0,
                    reason=_with_passed_over(rule.reason + found, passed_over),
                )
            passed_over.append(rule.strategy)
        reason = "no rule applies, so the default is taken"
        if self._default in self._available:
            chosen: str = self._default
        else:
            passed_over.append(self._default)
            chosen = next(name for name in _FALLBACKS if name in self._available)
            reason = "no rule applies, so the best that this release has is taken"
        return Route(chosen, intent=intent, confidence=confidence, reason=_with_passed_over(reason, passed_over))

    def _intent(self, text: str) -> tuple[str, float, tuple[str, ...]]:
        """The intent with most matching keywords, its share of all matches, and the keywords that matched."""
        matches = {
            intent: tuple(word for word in words if self._patterns[word].search(text))
            for intent, words in self._intents.items()
        }
        total = sum(map(len, matches.values()))
        if not total:
            return "", 0.0, ()
        best = max(matches, key=lambda intent: len(matches[intent]))
        return best, len(matches[best]) / total, matches[best]

    def _applies(self, rule: PolicyRule, text: str, intent: str, metadata: Mapping[str, Any]) -> bool:
        return (
            (not rule.intent or rule.intent == intent)
            and (not rule.keywords or any(self._patterns[word].search(text) for word in rule.keywords))
            and all(_equal(metadata.get(key), value) for key, value in rule.metadata.items())
            and all(_above(metadata.get(key), bound) for key, bound in rule.metadata_above.items())
        )


def _pattern(word: str) -> re.Pattern[str]:
    """Whole words where the script has spaces, anywhere in the text where it has none."""
    folded = fold(word)[0].casefold()
    escaped = re.escape(folded)
    return re.compile(escaped if _CJK.search(folded) else rf"(?<!\w){escaped}(?!\w)")


def _equal(found: Any, wanted: str | int | float | bool) -> bool:
    if found is None:
        return False
    return found == wanted or str(found).strip().casefold() == str(wanted).strip().casefold()


def _above(found: Any, bound: float) -> bool:
    """OpenAI's API sends metadata as text, so numbers may come as either."""
    try:
        return float(found) > bound
    except (TypeError, ValueError):
        return False


def _with_passed_over(reason: str, passed_over: list[str]) -> str:
    if not passed_over:
        return reason
    names = ", ".join(dict.fromkeys(passed_over))
    return f"{reason}; {names} came first, but this release lacks a part of it"
