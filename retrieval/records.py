"""Documents, chunks, passages, hits and questions: the records that the other rooms read.

Offsets are character offsets into `Document.text`: `document.text[start:end] == chunk.text`. The heading is a field
of its own, joined to the text only for embedding and prompting. Imports no torch, ray or faiss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.records import Record

UNANSWERABLE = "unanswerable"
"""`metadata.kind` of questions that the documents do not answer."""


@dataclass(frozen=True)
class Document(Record):
    """One source document, as read."""

    doc_id: str
    title: str
    text: str
    uri: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk(Record):
    """A span of a document; `chunk_id` hashes doc_id, text and occurrence."""

    chunk_id: str
    doc_id: str
    title: str
    heading: str
    text: str
    start: int
    end: int
    tokens: int
    uri: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Passage(Record):
    """What a model is shown, in training and in serving alike."""

    chunk_id: str
    doc_id: str
    title: str
    heading: str
    uri: str
    text: str
    start: int
    end: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, chunk: Chunk) -> Passage:
        """The passage that shows `chunk`."""
        return cls(
            chunk.chunk_id,
            chunk.doc_id,
            chunk.title,
            chunk.heading,
            chunk.uri,
            chunk.text,
            chunk.start,
            chunk.end,
            chunk.metadata,
        )


@dataclass(frozen=True)
class Hit(Record):
    """A passage found by a search; rank counts from 1, a higher score is better.

    `collection` names the collection it came from; empty in a recipe without collections.
    """

    passage: Passage
    score: float
    rank: int
    collection: str = ""


@dataclass(frozen=True)
class Golden(Record):
    """Where a question's answer stands: a document, or a character span of it."""

    doc_id: str
    start: int | None = None
    end: int | None = None

    def matches(self, passage: Passage | Chunk) -> bool:
        """Whether the passage holds this golden span whole (or is of the document, where no span is given).

        A span that a chunk boundary cuts counts for the passage that holds its larger part.
        """
        if passage.doc_id != self.doc_id:
            return False
        if self.start is None or self.end is None:
            return True
        overlap = min(self.end, passage.end) - max(self.start, passage.start)
        return overlap * 2 > self.end - self.start


@dataclass(frozen=True)
class Question(Record):
    """A question with its accepted answers and golden places; `split` is train, test_new_questions, test_new_documents
    or test_new_kinds (empty: not yet split). `metadata.kind` names the kind of question where there is one;
    `metadata.doc_id` the document that an unanswerable question was asked about, where that is known."""

    question_id: str
    text: str
    answers: tuple[str, ...] = ()
    golden: tuple[Golden, ...] = ()
    split: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def unanswerable(self) -> bool:
        """Whether it is known to have no answer in the documents, so that an abstention answers it; a question that
        merely comes without answers (BEIR's queries) is not."""
        marked = self.metadata.get("kind") == UNANSWERABLE or self.metadata.get("is_impossible") is True
        return (marked or self.metadata.get("answerable") is False) and not self.answers and not self.golden

    @property
    def documents(self) -> tuple[str, ...]:
        """Ids of the documents that it is about, each once: the golden ones, or an unanswerable question's."""
        if self.golden:
            return tuple(dict.fromkeys(golden.doc_id for golden in self.golden))
        asked_about = self.metadata.get("doc_id") if self.unanswerable else None
        return (str(asked_about),) if asked_about else ()
