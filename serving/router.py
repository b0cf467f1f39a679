"""Chooses a strategy for a question, and says why. A library inside ingress, so routing costs no hop.

In: a `RouteQuery` and the ratings so far. Out: a `Route`. In this order: the caller's explicit choice; the recipe's
rules over intent, keywords and metadata, of which one may be an A/B test; learned weights, where the intent is known;
the default, where it is not. What the release lacks or the caller may not use is passed over, and the reason says so.
The same seed, request and ratings give the same route.

Metadata that the server itself fills (`RouteQuery.known`, see `known_facts`), whatever a request says about it:
`update_frequency`, as declared for the collections that the hits come from, and `context_length`, the tokens of the
passages found. A request's own values count only where the server does not know. `reasoning_depth` comes from the
caller alone; unless stated it is unknown, and no rule about it applies.
Imports no torch, ray or faiss.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from retrieval.records import Hit
from serving import bandit
from serving.experiments import assign
from serving.intents import Guess, IntentClassifier, KeywordIntents, any_keyword, folded_text
from serving.records import Route, Tally
from serving.router_config import DEFAULT_RULES, MetadataValue, PolicyRule, RouterConfig
from serving.strategies import AUTO, HYBRID, STRATEGIES, require_strategy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# What stands in for a default that cannot be taken.
_FALLBACKS = ("raft", "rag_fewshot", "rag", "finetuned_rag", "finetuned", "base", HYBRID)
# From the knowledge that changes most often to that which never does; `unknown` says nothing.
_FREQUENCIES = ("realtime", "hourly", "daily", "weekly", "monthly", "yearly", "static")


@dataclass(frozen=True)
class RouteQuery:
    """One question to route."""

    question: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the request says about it."""
    requested: str = AUTO
    """A strategy's name, or `auto`."""
    embedding: npt.NDArray[np.float32] | None = None
    """(dim,) float32, unit length, by the pinned index's encoder; none where nothing was searched."""
    user: str = ""
    """Whom A/B tests treat alike; empty: each request is drawn by itself."""
    request_id: str = ""
    allowed: tuple[str, ...] = ()
    """Strategies that the caller may use; none allows all."""
    known: Mapping[str, Any] = field(default_factory=dict)
    """What the server knows about it; see `known_facts`."""


def known_facts(
    hits: Sequence[Hit], update_frequencies: Mapping[str, str], context_tokens: int | None = None
) -> dict[str, Any]:
    """The metadata that the server fills.

    Args:
        hits: The hits that are to be shown, best first.
        update_frequencies: Each collection's, as its recipe declares it; "" names a recipe's only corpus.
        context_tokens: Tokens of the passages found, where they were counted.
    """
    facts: dict[str, Any] = {}
    found = {update_frequencies.get(hit.collection, "unknown") for hit in hits}
    if known := [frequency for frequency in _FREQUENCIES if frequency in found]:
        facts["update_frequency"] = known[0]  # one passage that may be outdated tomorrow decides
    if context_tokens is not None:
        facts["context_length"] = context_tokens
    return facts


class Router:
    """Routes questions by a recipe's rules and by what users thought of the answers."""

    def __init__(
        self,
        config: RouterConfig,
        available: Collection[str] = (*STRATEGIES, HYBRID, AUTO),
        classifier: IntentClassifier | None = None,
        seed: int = 0,
    ) -> None:
        """`available` are the strategies that the release can serve (without it, all); without a `classifier`,
        intents are recognised by the recipe's keywords.

        Raises:
            UserError: a rule names an intent that the classifier does not know.
        """
        self._available = tuple(available)
        self._config = config
        self._rules = config.rules_in_force()
        if classifier is not None:
            _check_intents(config, classifier)
        self._keywords = KeywordIntents(config.intents)
        self._classifier = classifier
        self._seed = seed
        self._patterns = {rule.keywords: any_keyword(rule.keywords) for rule in self._rules if rule.keywords}

    def route(self, query: RouteQuery, tallies: Sequence[Tally] = ()) -> Route:
        """The strategy for one question; `tallies` are the ratings so far.

        Raises:
            UserError: `requested` is no strategy, the release lacks a part that it needs, or the caller may not use it.
        """
        require_strategy(query.requested, self._available, query.allowed)
        if query.requested != AUTO:
            return Route(query.requested, reason="asked for by the caller")
        decision = _Decision(query, self._available, self._guess(query))
        return self._by_rules(decision) or self._learned(decision, tallies) or self._default(decision)

    def _guess(self, query: RouteQuery) -> Guess:
        if self._classifier is None or (self._classifier.needs_embedding and query.embedding is None):
            return self._keywords.classify(query.question)
        return self._classifier.classify(query.question, query.embedding)

    def _by_rules(self, decision: _Decision) -> Route | None:
        query = decision.query
        text, metadata = folded_text(query.question), {**query.metadata, **query.known}
        for rule in self._rules:
            if not self._applies(rule, text, decision.guess.intent, metadata):
                continue
            shares = {name: share for name, share in _shares(rule).items() if share > 0}
            open_shares = {name: share for name, share in shares.items() if decision.can_take(name)}
            decision.require_quote |= rule.require_quote  # whatever stands in for a rule keeps its promise
            if not open_shares:
                continue
            found = f" ({decision.guess.how})" if rule.intent and decision.guess.how else ""
            if not rule.split:
                [strategy], propensity = open_shares, 1.0
            else:
                unit = query.user or query.request_id or query.question
                strategy, propensity = assign(rule.experiment, unit, open_shares)
                found += f"; the A/B test {rule.experiment} drew {strategy} ({propensity:.0%})"
            return decision.route(
                strategy, rule.reason + found, bool(rule.intent), propensity=propensity, experiment=rule.experiment
            )
        return None

    def _learned(self, decision: _Decision, tallies: Sequence[Tally]) -> Route | None:
        intent, learning = decision.guess.intent, self._config.learning
        strategies = [name for name in dict.fromkeys(learning.strategies) if intent and decision.can_take(name)]
        if not strategies:
            return None
        of_intent = [tally for tally in tallies if tally.intent == intent]
        rng = bandit.seeded(self._seed, decision.query.request_id or decision.query.question)
        strategy, propensity = bandit.choose(learning, strategies, of_intent, rng)
        reason = f"learned from ratings of {intent}: {bandit.ratings_in_words(strategies, of_intent)}"
        return decision.route(strategy, reason, True, propensity=propensity)

    def _default(self, decision: _Decision) -> Route:
        guess = decision.guess
        unknown = f"the intent is not known{f' ({guess.how})' if guess.how else ''}"
        why = f"no rule applies to the intent {guess.intent}" if guess.intent else unknown
        if decision.can_take(self._config.default):
            return decision.route(self._config.default, f"{why}, so the default is taken", True)
        chosen = next((name for name in _FALLBACKS if decision.can_take(name, say=False)), None)
        if chosen is None:
            raise UserError(
                f"this key may use {', '.join(decision.query.allowed)}, but this release has "
                f"{', '.join(name for name in self._available if name != AUTO)}"
            )
        return decision.route(chosen, f"{why}, so the best of what is left is taken", True)

    def _applies(self, rule: PolicyRule, text: str, intent: str, metadata: Mapping[str, Any]) -> bool:
        return (
            (not rule.intent or rule.intent == intent)
            and (not rule.keywords or self._patterns[rule.keywords].search(text) is not None)
            and all(_equal(metadata.get(key), value) for key, value in rule.metadata.items())
            and all(_above(metadata.get(key), bound) for key, bound in rule.metadata_above.items())
        )


class _Decision:
    """One question on its way through the router, and what had to be passed over."""

    def __init__(self, query: RouteQuery, available: Collection[str], guess: Guess) -> None:
        self.query = query
        self.guess = guess
        self.require_quote = False
        self._available = available
        self._lacking: dict[str, str] = {}

    def can_take(self, strategy: str, *, say: bool = True) -> bool:
        """Whether the release has the strategy and the caller may use it; if not, the reason will `say` so."""
        if strategy not in self._available:
            problem = "this release lacks a part of it"
        elif self.query.allowed and strategy not in self.query.allowed:
            problem = "this key may not use it"
        else:
            return True
        if say:
            self._lacking.setdefault(strategy, problem)
        return False

    def route(
        self, strategy: str, reason: str, by_intent: bool, *, propensity: float = 1.0, experiment: str = ""
    ) -> Route:
        """The finished route; its confidence is that of the intent where that decided, else 1."""
        passed_over = "".join(f"; {name} is passed over, because {problem}" for name, problem in self._lacking.items())
        return Route(
            strategy,
            intent=self.guess.intent,
            confidence=self.guess.confidence if by_intent else 1.0,
            reason=reason + passed_over,
            propensity=propensity,
            experiment=experiment,
            require_quote=self.require_quote,
        )


def _check_intents(config: RouterConfig, classifier: IntentClassifier) -> None:
    if config.rules == DEFAULT_RULES:
        return
    for rule in config.rules:
        if rule.intent and rule.intent not in classifier.intents:
            near = difflib.get_close_matches(rule.intent, classifier.intents, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(classifier.intents[:8])}"
            raise UserError(
                f"router.rules name the intent {rule.intent!r}, which the trained classifier does not know: {known}"
            )


def _shares(rule: PolicyRule) -> Mapping[str, float]:
    if rule.strategy is not None:
        return {rule.strategy: 1.0}
    return {str(name): share for name, share in rule.split.items()}


def _equal(found: Any, wanted: MetadataValue | tuple[MetadataValue, ...]) -> bool:
    if found is None:
        return False
    if isinstance(wanted, tuple):
        return any(_equal(found, one) for one in wanted)
    return found == wanted or str(found).strip().casefold() == str(wanted).strip().casefold()


def _above(found: Any, bound: float) -> bool:
    """OpenAI's API sends metadata as text, so numbers may come as either."""
    try:
        return float(found) > bound
    except (TypeError, ValueError):
        return False
