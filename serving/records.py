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
