"""The events of a streamed answer, as chat completions and as plain completions.

In: pieces of text, then the answer. Out: OpenAI's chunks, in this order: the role (chats), the text, one that ends the
choice with our details and, in chats, the annotations of the whole text; then the usage, where it was asked for.
Not covered: how they are sent (serving/event_stream.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving.chat_shapes import completion, details, usage
from serving.citation_shapes import answer_fields, message_fields, url_citations
from serving.completions_shapes import TEXT_COMPLETION
from serving.records import Answer
from training.format import Labels


@dataclass
class StreamEvents:
    """Writes the events of one stream."""

    request_id: str
    model: str
    created: int
    question: str
    labels: Labels
    shapes: Sequence[str]
    with_usage: bool
    chat: bool
    written: str = ""
    """The text so far."""

    def opening(self) -> list[dict[str, Any]]:
        """Before any text."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of text."""
        self.written += text
        return self._chunk({"content": text})

    def ending(self, answer: Answer) -> list[dict[str, Any]]:
        """After all text."""
        annotations = url_citations(answer, self.written, self.labels)
        delta = {"annotations": annotations, **message_fields(answer, self.question, self.shapes)}
        last = self._chunk(delta, answer.finish_reason)
        events = [{**last, **answer_fields(answer, self.shapes), "rayft": details(answer)}]
        if self.with_usage:
            events.append({**self._chunk({}), "choices": [], "usage": usage(answer)})
        return events

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else TEXT_COMPLETION
        content = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        chunk = completion(kind, self.request_id, self.model, self.created, finish_reason, **content)
        return {**chunk, "usage": None} if self.with_usage else chunk
