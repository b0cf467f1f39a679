"""Shapes of embeddings (OpenAI's), search and feedback (ours), and the list of models.

In: request bodies, embeddings, hits. Out: checked values and JSON-ready dicts.
Embeddings: https://platform.openai.com/docs/api-reference/embeddings; the official client asks for base64, which is the
vector's float32 values in little-endian order. A text longer than the encoder reads is refused, not cut.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from retrieval.filters import Filter
from retrieval.records import Hit
from serving.api_errors import ApiError, invalid
from serving.chat_shapes import EMBEDDING_MODEL, MAX_USER, hit_row
from serving.interfaces import Embedded
from serving.records import Rating
from serving.request_bodies import Body, Unsupported, read_filter

MAX_INPUTS = 256
"""Texts of one embeddings request; OpenAI takes 2,048, on larger machines than a laptop."""
MAX_K = 100
MAX_QUERY = 20_000
STARS = 5


class EmbeddingRequest(Body):
    """The body of POST /v1/embeddings."""

    unsupported: ClassVar[Unsupported] = {"dimensions": (None,)}

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = Field(default=None, max_length=MAX_USER)

    def texts(self) -> list[str]:
        """The texts to embed.

        Raises:
            ApiError: There is no such model, no text, an empty one, or too many.
        """
        if self.model not in (EMBEDDING_MODEL, "embedding"):
            raise ApiError(
                404,
                f"model: there is no such model; embeddings are made by {EMBEDDING_MODEL}",
                code="model_not_found",
                param="model",
            )
        inputs = [self.input] if isinstance(self.input, str) else self.input
        texts = [text for text in inputs if isinstance(text, str)]
        if len(texts) < len(inputs):
            raise invalid("input", "text only; tokens are not supported", "unsupported_parameter")
        if not 1 <= len(texts) <= MAX_INPUTS:
            raise invalid("input", f"1 to {MAX_INPUTS} texts, not {len(texts)}")
        if not all(text.strip() for text in texts):
            raise invalid("input", "a text is empty")
        return texts

    def response(self, embedded: Embedded) -> dict[str, Any]:
        """OpenAI's list of embeddings.

        Raises:
            ApiError: A text is longer than the encoder reads.
        """
        for place, tokens in enumerate(embedded.tokens):
            if tokens > embedded.max_tokens:
                param = f"input.{place}" if isinstance(self.input, list) else "input"
                reason = f"the text has {tokens} tokens, and the encoder reads {embedded.max_tokens}"
                raise invalid(param, reason, "context_length_exceeded")
        data = [
            {"object": "embedding", "index": place, "embedding": self._encoded(vector)}
            for place, vector in enumerate(embedded.vectors)
        ]
        total = sum(embedded.tokens)
        usage = {"prompt_tokens": total, "total_tokens": total}
        return {"object": "list", "data": data, "model": EMBEDDING_MODEL, "usage": usage}

    def _encoded(self, vector: Any) -> str | list[float]:
        values = vector.astype("<f4")
        if self.encoding_format == "base64":
            return base64.b64encode(values.tobytes()).decode("ascii")
        return [float(value) for value in values]


class SearchRequest(Body):
    """The body of POST /v1/search."""

    query: str = Field(min_length=1, max_length=MAX_QUERY)
    k: int = Field(default=5, ge=1, le=MAX_K)
    filter: dict[str, Any] | None = None
    """Only matching documents, among those that the key opens."""

    def wanted(self) -> Filter | None:
        """The filter."""
        if not self.query.strip():
            raise invalid("query", "it is empty")
        return read_filter(self.filter)


class FeedbackRequest(Body):
    """The body of POST /v1/feedback: at most one of `rating`, `stars` and `satisfied`; a correction alone says that the
    answer was wrong."""

    request_id: str = Field(min_length=1, max_length=200)
    """The `id` of the answer."""
    rating: Literal["up", "down"] | None = None
    stars: int | None = Field(default=None, ge=1, le=STARS)
    satisfied: float | None = Field(default=None, ge=0, le=1)
    correction: str | None = None
    """The answer that should have been given."""
    comment: str | None = None

    def to_rating(self) -> Rating:
        """The rating, as feedback keeps it.

        Raises:
            ApiError: It says nothing, or the same in two ways.
        """
        stated = [name for name in ("rating", "stars", "satisfied") if getattr(self, name) is not None]
        if len(stated) > 1:
            raise invalid(stated[1], f"give one of rating, stars and satisfied, not also {stated[0]}")
        if not stated and not (self.correction or "").strip():
            raise invalid("rating", "give rating (up or down), stars (1 to 5), satisfied (0 to 1) or a correction")
        return Rating(self.request_id, self._satisfied(), self.correction or "", self.comment or "")

    def _satisfied(self) -> float:
        if self.stars is not None:
            return (self.stars - 1) / (STARS - 1)
        if self.satisfied is not None:
            return self.satisfied
        return 1.0 if self.rating == "up" else 0.0


def search_response(hits: Sequence[Hit], release: str) -> dict[str, Any]:
    """A list of hits, best first."""
    return {"object": "list", "data": [hit_row(hit) for hit in hits], "release": release}


def feedback_response(rating: Rating) -> dict[str, Any]:
    """What was stored."""
    return {"object": "feedback", "request_id": rating.request_id, "satisfied": rating.satisfied}


def model_row(name: str, created: int) -> dict[str, Any]:
    """OpenAI's model object."""
    return {"id": name, "object": "model", "created": created, "owned_by": "rayft"}
