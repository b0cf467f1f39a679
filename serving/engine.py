"""What every inference engine offers: requests in, completions and streams out.

In: chat messages, the adapter to use, sampling. Out: a completion with its finish reason, token counts and times.
A request that cannot be served ends in a completion whose `error` is set; only `close` ends the engine.
Not covered: prompts and answers (serving/answering.py), the HTTP API. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from training.format import Message

FinishReason = Literal["stop", "length", "error"]
ErrorCode = Literal["", "context_length_exceeded", "unknown_adapter", "cancelled", "closed", "internal"]


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to generate. `adapter` None is the base model; temperature 0 is greedy; `seed` fixes the draws."""

    request_id: str
    messages: tuple[Message, ...]
    adapter: str | None = None
    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    traceparent: str = ""
    """W3C trace context of the span around the call; empty: not traced. Engines ignore it."""


@dataclass(frozen=True)
class Completion:
    """One finished request. `text` ends before the stop string or the end-of-turn token, and neither is counted in
    `completion_tokens`. With `finish_reason` error, `error` says why in words and `error_code` for programs."""

    request_id: str
    text: str = ""
    finish_reason: FinishReason = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_ms: float = 0.0
    generation_ms: float = 0.0
    error: str = ""
    error_code: ErrorCode = ""
    cached_tokens: int = 0
    """Prompt tokens that a prefix cache spared the engine."""


@dataclass(frozen=True)
class Ticket:
    """A request under way: `completion` is set when it ends, `cancel()` frees its slot at the next step."""

    completion: Future[Completion]
    cancel: Callable[[], None]


class CompletionStream(Protocol):
    """Text pieces as they are generated; whole characters, never part of a stop string."""

    def __iter__(self) -> Iterator[str]:
        """The pieces; ends when the completion has ended, also when it ended in an error."""
        ...

    def result(self) -> Completion:
        """Waits for the end; its `text` is all pieces joined."""
        ...

    def cancel(self) -> None:
        """Stops generating and frees the slot."""
        ...


class Engine(Protocol):
    """Generates tokens for (messages, adapter, sampling)."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests; a replica whose engine does not is replaced."""
        ...

    def submit(self, request: GenerationRequest, on_text: Callable[[str], None] | None = None) -> Ticket:
        """Queues a request without waiting. `on_text` is called on the engine's thread and must return at once."""
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Generates all requests together and returns their completions in the order given."""
        ...

    def stream(self, request: GenerationRequest) -> CompletionStream:
        """Queues a request and hands its text out as it is generated."""
        ...

    def load_adapter(self, name: str, directory: Path) -> None:
        """Loads an adapter beside the others while requests go on; returns when requests may ask for it.

        Raises:
            ArtifactError: The directory holds no adapter, or it does not fit the base model.
        """
        ...

    def unload_adapter(self, name: str) -> None:
        """Frees an adapter once the requests that use it have ended; without effect when it is not loaded."""
        ...

    def close(self) -> None:
        """Ends requests under way with `error_code` closed and frees the model; safe to call twice."""
        ...
