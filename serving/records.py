"""Answers and their parts, the same online and offline. Imports no torch, ray or faiss."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.records import Record
from retrieval.records import Hit
from training.format import Citation


@dataclass(frozen=True)
class Route(Record):
    """How the strategy was chosen."""

    strategy: str
    intent: str = ""
    confidence: float = 1.0
    reason: str = ""
    propensity: float = 1.0
    """Probability with which this strategy was taken: below 1 where it was drawn (A/B test, learned weights)."""
    experiment: str = ""
    """The A/B test that drew it."""
    require_quote: bool = False
    """An answer without a verified quote became an abstention, or would have."""


@dataclass(frozen=True)
class Usage(Record):
    """Token counts, as OpenAI's API names them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Timings(Record):
    """Milliseconds per hop."""

    retrieval: float = 0.0
    queue: float = 0.0
    generation: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Answer(Record):
    """One answered question. `text` is the raw completion; `finish_reason` is stop, length or error."""

    request_id: str
    question_id: str
    text: str
    reasoning: str
    answer: str
    quotes: tuple[str, ...]
    citations: tuple[Citation, ...]
    strategy: str
    route: Route
    abstained: bool
    finish_reason: str
    error: str = ""
    hits: tuple[Hit, ...] = ()
    usage: Usage = field(default_factory=Usage)
    timings_ms: Timings = field(default_factory=Timings)
    release: str = ""
    standalone: str = ""
    """The question that was searched and answered where it is not the caller's own: a later turn's, made standalone."""
    passages_left_out: int = 0
    """Passages found that did not fit the model's context."""


@dataclass(frozen=True)
class Interaction(Record):
    """One answered question, as feedback keeps it. `at` is seconds since 1970 (UTC)."""

    request_id: str
    at: float
    question: str
    answer: str
    strategy: str
    intent: str = ""
    confidence: float = 1.0
    propensity: float = 1.0
    experiment: str = ""
    release: str = ""
    tenant: str = ""
    key_id: str = ""
    """Of the caller's API key (`Caller.key_id`): only the same key may rate the answer."""
    user: str = ""
    abstained: bool = False
    quotes: tuple[str, ...] = ()
    """Verified ones alone."""
    doc_ids: tuple[str, ...] = ()
    """Documents that the quotes stand in."""
    total_ms: float = 0.0


@dataclass(frozen=True)
class Rating(Record):
    """What a user thinks of an answer: `satisfied` is 1 or 0 (a thumb), or between (stars); a correction is the
    answer that should have been given."""

    request_id: str
    satisfied: float
    correction: str = ""
    comment: str = ""


@dataclass(frozen=True)
class Tally(Record):
    """Ratings of a strategy on an intent, for the router: sums of `satisfied` and of 1 - `satisfied`."""

    intent: str
    strategy: str
    satisfied: float = 0.0
    unsatisfied: float = 0.0
