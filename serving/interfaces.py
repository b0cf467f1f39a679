"""What the parts of the serving graph hand each other: pins, callers, searches, and the doors between deployments.

A request is answered by one release from its first hop to its last: `Pins` travel with it. The functions that reach
the retriever, the generator and the feedback store are protocols, so that everything above them runs without Ray.
Imports no torch, ray or faiss.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from retrieval.filters import Filter
from retrieval.records import Hit
from serving.engine import Completion, GenerationRequest
from serving.records import Interaction, Rating, Tally

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from serving.conversation import Conversation


@dataclass(frozen=True)
class Pins:
    """The release that answers a request, down to its artifacts (`kind/name/version`)."""

    release: str
    index: str = ""
    """Empty: nothing is retrieved."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Adapter's role (`raft`, `finetuned`) to its artifact, which is also its name in the engine."""
    base_digest: str = ""
    """Digest of the base model; empty takes the recipe's unchecked."""
    router: str = ""
    """The intent classifier; empty: intents by keywords."""


@dataclass(frozen=True)
class Caller:
    """Who asks, as the server knows it from the API key; never from the request's body."""

    tenant: str = ""
    key_id: str = ""
    """Names the key without revealing it."""
    groups: frozenset[str] = frozenset()
    filter: Filter | None = None
    """Only matching documents exist for this caller."""
    strategies: tuple[str, ...] = ()
    """Strategies that the caller may use; none allows all."""


ANYBODY = Caller()


@dataclass(frozen=True)
class SearchQuery:
    """One search. `filter` and `groups` are the caller's, joined with what the request asks for; `k` 0 only embeds."""

    text: str
    k: int
    groups: frozenset[str] = frozenset()
    filter: Filter | None = None
    embed: bool = False
    """Whether the query's embedding is wanted, too."""
    traceparent: str = ""
    """W3C trace context of the span around the call; empty: not traced."""


@dataclass(frozen=True)
class Found:
    """Hits, best first, fewer than k where the caller may see fewer; `embedding` is (dim,) float32, unit length."""

    hits: tuple[Hit, ...]
    embedding: npt.NDArray[np.float32] | None = None


class Search(Protocol):
    """Reaches the retriever."""

    async def __call__(self, query: SearchQuery, pins: Pins) -> Found:
        """The passages of the pinned index."""
        ...


@dataclass(frozen=True)
class Embedded:
    """Texts as an encoder sees them."""

    vectors: npt.NDArray[np.float32]
    """(n, dim) float32, rows of unit length."""
    tokens: tuple[int, ...]
    """Tokens of each text, special ones included, before anything is cut."""
    max_tokens: int
    """Most tokens that the encoder reads; a longer text is cut there."""


class Embed(Protocol):
    """Reaches the retriever's encoder."""

    async def __call__(self, texts: Sequence[str], pins: Pins) -> Embedded:
        """Embeddings by the pinned index's encoder.

        Raises:
            UserError: The index has no encoder.
        """
        ...


class Generate(Protocol):
    """Reaches the generator."""

    async def __call__(self, request: GenerationRequest, pins: Pins) -> Completion:
        """One completion; `request.adapter` is an artifact of `pins.adapters`. Asked again once where the replica died
        before it answered."""
        ...


class Stream(Protocol):
    """Reaches the generator."""

    def __call__(self, request: GenerationRequest, pins: Pins) -> AsyncGenerator[str | Completion, None]:
        """Text pieces, then the completion. Asked again once where the replica died before the first piece; later it
        raises `StreamBrokenError`."""
        ...


class PartUnavailableError(Exception):
    """A part of the graph is gone or full for now: the caller may try again."""


class StreamBrokenError(Exception):
    """A replica died in the middle of an answer: what was sent is not the whole."""


class Live(Protocol):
    """Knows the release that answers now (serving/live_releases.py)."""

    def current(self) -> Conversation:
        """The conversation of the release that is promoted now; a request takes it once and keeps it to its end."""
        ...


class UnknownRequestError(Exception):
    """There is no answer of that id to rate: rated already too long ago, never given, or another caller's."""


class FeedbackUnavailableError(Exception):
    """The feedback store cannot be reached now; answers go on without it. The text holds no user's words."""


class FeedbackOffError(FeedbackUnavailableError):
    """`feedback.url` is empty: none is taken."""


class FeedbackDoor(Protocol):
    """Reaches the feedback store."""

    def note(self, interaction: Interaction) -> None:
        """Keeps an answer for its rating; returns at once and never raises."""
        ...

    async def rate(self, rating: Rating, caller: Caller) -> None:
        """Stores a rating durably before it returns; a later one of the same answer replaces it.

        Raises:
            UnknownRequestError: See there.
            FeedbackUnavailableError: It could not be stored.
            UserError: `satisfied` is not within 0 and 1, or a text is too long.
        """
        ...

    def tallies(self) -> Sequence[Tally]:
        """The newest known counts per intent and strategy; at once, at most some seconds old."""
        ...


class KeyRing(Protocol):
    """Knows API keys."""

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        ...

    def caller(self, authorization: str | None) -> Caller:
        """The caller of an `Authorization` header.

        Raises:
            ApiError: 401 where keys are required and this is none (serving/api_errors.py).
        """
        ...


class Quotas(Protocol):
    """Counts what a key has used."""

    async def admit(self, caller: Caller, *, takes_tokens: bool = True) -> None:
        """Counts one request; one that takes no tokens is let in when those of the day are used up.

        Raises:
            ApiError: 429 with Retry-After when the quota is used up.
        """
        ...

    def spend(self, caller: Caller, tokens: int) -> None:
        """Counts tokens after an answer; at once."""
        ...

    def close(self) -> None:
        """Writes what is counted and not written yet; on shutdown."""
        ...


@dataclass(frozen=True)
class Took:
    """What an answer took: seconds per hop, tokens, quotes and how many of them verified."""

    strategy: str
    retrieval_s: float
    queue_s: float
    generation_s: float
    prompt_tokens: int
    completion_tokens: int
    verified: int
    quotes: int
    cached_tokens: int = 0
    """Of the prompt: what the engine did not compute again."""


class Observer(Protocol):
    """Metrics and spans; every call returns at once and never raises."""

    def request(self, *, strategy: str, outcome: str, seconds: float) -> None:
        """A request has ended: outcome `ok`, `abstained`, `cut` or an error's code."""
        ...

    def first_token(self, *, strategy: str, seconds: float) -> None:
        """A stream's first piece of text was sent."""
        ...

    def answer(self, took: Took) -> None:
        """An answer is there."""
        ...

    def in_flight(self, requests: int) -> None:
        """Requests under way now."""
        ...

    def count(self, event: str) -> None:
        """Something to watch happened: `retried`, `stream_broken`, `refused`, `cancelled`, `release_taken_up`,
        `release_refused`."""
        ...

    def span(self, name: str, parent: str = "", **attributes: str | int | float | bool) -> SpanContext:
        """A span around a request or a hop (`request`, `route`, `retrieve`, `generate`; on the replicas `search` and
        `engine`). `parent` is a W3C traceparent from outside this process (the caller's header, a hop's request);
        empty: the span that is open here."""
        ...

    def close(self) -> None:
        """Sends what is not sent yet; on shutdown."""
        ...


class SpanContext(Protocol):
    """A span that is open inside a `with` block."""

    def __enter__(self) -> SpanContext:
        """Opens it."""
        ...

    def __exit__(self, *exception: object) -> None:
        """Closes it; an exception marks it as failed, without its message."""
        ...

    @property
    def traceparent(self) -> str:
        """What to hand to the next hop; empty where nothing is traced."""
        ...

    def set(self, **attributes: str | int | float | bool) -> None:
        """Attributes known only now (strategy, release, tokens); never the user's text."""
        ...

    def content(self, **texts: str) -> None:
        """The user's text (`question`, `answer`): recorded only with `telemetry.trace_content`."""
        ...
