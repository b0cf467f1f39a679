"""Metrics, spans and feedback notes that cannot fail a request, whatever the observer or the feedback door does.

In: an `Observer` and a `FeedbackDoor`, or none. Out: calls that return. What goes wrong is logged by its type alone.
Not covered: what is measured where (serving/telemetry.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from serving.interfaces import FeedbackDoor, Observer, SpanContext, Took
from serving.records import Answer, Interaction, Tally

logger = logging.getLogger(__name__)


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - an answer matters more than its measurement
        logger.warning("%s failed: %s", what, type(error).__name__)


class OpenSpan:
    """A span that opens, or does not."""

    def __init__(
        self, observer: Observer | None, name: str, attributes: dict[str, str | int | float | bool], parent: str = ""
    ) -> None:
        """Opens at once where a `with` block begins, below `parent` or else what is open there; `attributes` hold no
        user's text."""
        self._observer, self._name, self._attributes, self._parent = observer, name, attributes, parent
        self._span: SpanContext | None = None
        self.traceparent = ""

    def __enter__(self) -> OpenSpan:
        """Opens it."""
        if self._observer is not None:
            with _harmless("a span"):
                self._span = self._observer.span(self._name, self._parent, **self._attributes).__enter__()
                self.traceparent = self._span.traceparent
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        if self._span is not None:
            with _harmless("a span"):
                self._span.__exit__(kind, error, trace)

    def set(self, **attributes: str | int | float | bool) -> None:
        """Attributes known only now."""
        if self._span is not None:
            with _harmless("a span"):
                self._span.set(**attributes)


class Watch:
    """What a conversation tells others about its answers."""

    def __init__(self, observer: Observer | None, feedback: FeedbackDoor | None) -> None:
        """Either may be missing."""
        self._observer, self._feedback = observer, feedback

    def span(self, name: str, **attributes: str | int | float | bool) -> OpenSpan:
        """A span around a hop."""
        return OpenSpan(self._observer, name, attributes)

    def tallies(self) -> Sequence[Tally]:
        """The newest known ratings; none where they cannot be had."""
        if self._feedback is not None:
            with _harmless("reading the tallies"):
                return self._feedback.tallies()
        return ()

    def answered(self, answer: Answer, interaction: Interaction, cached_tokens: int) -> None:
        """Counts an answer and keeps it for its rating."""
        if self._observer is not None:
            times = answer.timings_ms
            with _harmless("measuring an answer"):
                self._observer.answer(
                    Took(
                        strategy=answer.strategy,
                        retrieval_s=times.retrieval / 1000,
                        queue_s=times.queue / 1000,
                        generation_s=times.generation / 1000,
                        prompt_tokens=answer.usage.prompt_tokens,
                        completion_tokens=answer.usage.completion_tokens,
                        verified=sum(citation.verified for citation in answer.citations),
                        quotes=len(answer.citations),
                        cached_tokens=cached_tokens,
                    )
                )
        if self._feedback is not None:
            with _harmless("keeping an answer for its rating"):
                self._feedback.note(interaction)
