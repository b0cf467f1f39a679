"""Where paragraphs stand in documents, word for word.

In: the paragraphs that questions were asked about (SQuAD's contexts), and documents. Out: per paragraph the documents
that hold it, and how its character offsets become theirs. White space and Unicode forms (NFKC) may differ, words may
not. A document that is the paragraph comes before documents that merely contain it. One pass over the documents,
one document in memory at a time. Not covered: paragraphs that a document holds only in parts or in other words.
"""

from __future__ import annotations

import bisect
import collections
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from retrieval.records import Document, Golden

ANCHOR_WORDS = 4
"""A paragraph is looked for at every place that has its first words; shorter ones match whole documents only."""
ANCHOR_CHARS = 8
"""The same for scripts that set no spaces (Chinese, Japanese), where a paragraph may be one word."""
_WORD = re.compile(r"\S+")

Words = tuple[str, ...]


@dataclass(frozen=True)
class _Text:
    words: Words
    """NFKC."""
    spans: tuple[tuple[int, int], ...]
    """Where each stands in the text as it is."""

    @property
    def is_short(self) -> bool:
        """Too little to be told from a phrase inside another paragraph."""
        if len(self.words) >= ANCHOR_WORDS:
            return False
        return sum(char > "\u2e7f" for word in self.words for char in word) < ANCHOR_CHARS

    @classmethod
    def of(cls, text: str) -> _Text:
        found = [(match[0], match.span()) for match in _WORD.finditer(text)]
        words = tuple(word if word.isascii() else unicodedata.normalize("NFKC", word) for word, _ in found)
        return cls(words, tuple(span for _, span in found))


@dataclass(frozen=True)
class Place:
    """One occurrence of a paragraph in a document."""

    doc_id: str
    whole: bool
    """The document is the paragraph and nothing else."""
    _shift: int = 0
    """What to add to an offset, where both have the same characters."""
    _spans: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]] | None = field(default=None, repr=False)
    """Words of the paragraph and of the document, where the characters between or in them differ."""

    def golden(self, start: int, end: int) -> Golden:
        """The paragraph's characters from `start` to `end`, in the document; where forms differ, its whole words."""
        if self._spans is None:
            return Golden(self.doc_id, start + self._shift, end + self._shift)
        own, theirs = self._spans
        first = max(0, bisect.bisect_right(own, start, key=lambda span: span[0]) - 1)
        last = max(first, bisect.bisect_left(own, end, key=lambda span: span[0]) - 1)
        begin, finish = theirs[first][0], theirs[last][1]
        if _length(own[first]) == _length(theirs[first]):
            begin += max(0, start - own[first][0])
        if _length(own[last]) == _length(theirs[last]):
            finish -= max(0, own[last][1] - end)
        return Golden(self.doc_id, begin, finish)


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def find_contexts(contexts: Sequence[str], documents: Iterable[Document]) -> list[list[Place]]:
    """Per context (given each once) its places, in the order of the documents; none where no document holds it."""
    texts = [_Text.of(context) for context in contexts]
    starting: dict[Words, list[int]] = collections.defaultdict(list)
    for number, text in enumerate(texts):
        if text.words:
            starting[text.words[:ANCHOR_WORDS]].append(number)
    first_words = {anchor[0] for anchor in starting}
    places: list[list[Place]] = [[] for _ in contexts]
    for document in documents:
        held = _Text.of(document.text)
        for at, word in enumerate(held.words):
            if word not in first_words:
                continue
            for number in _candidates(starting, held.words[at : at + ANCHOR_WORDS]):
                wanted = texts[number]
                if held.words[at : at + len(wanted.words)] == wanted.words:
                    whole = len(wanted.words) == len(held.words)
                    if whole or not wanted.is_short:
                        places[number].append(_place(contexts[number], wanted, document, held, at))
    return [_best(found) for found in places]


def _candidates(starting: Mapping[Words, Sequence[int]], ahead: Words) -> Iterator[int]:
    """Paragraphs that may begin with the words ahead: those of fewer words begin with fewer."""
    for length in range(1, len(ahead) + 1):
        yield from starting.get(ahead[:length], ())


def _place(context: str, wanted: _Text, document: Document, held: _Text, at: int) -> Place:
    whole = len(wanted.words) == len(held.words)
    spans = held.spans[at : at + len(wanted.words)]
    shift = spans[0][0] - wanted.spans[0][0]
    first, last = wanted.spans[0][0], wanted.spans[-1][1]
    if document.text[spans[0][0] : spans[0][0] + last - first] == context[first:last]:
        return Place(document.doc_id, whole, shift)
    return Place(document.doc_id, whole, 0, (wanted.spans, spans))


def _best(found: list[Place]) -> list[Place]:
    whole = [place for place in found if place.whole]
    first_of: dict[str, Place] = {}
    for place in whole or found:
        first_of.setdefault(place.doc_id, place)
    return list(first_of.values())
