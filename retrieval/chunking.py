"""Cutting documents into chunks along their Markdown structure.

In: a `Document`, the encoder's own tokenizer, a `ChunkingConfig`. Out: `Chunk`s in document order, where
`document.text[chunk.start:chunk.end] == chunk.text`, no chunk has more than `max_tokens` tokens with its title and
heading, and every character that is neither blank nor part of a heading line stands in at least one chunk.
A chunk never crosses a heading of level 1 or 2. Below that, small neighbouring subsections share a chunk while the
whole fits; a section that does not fit is split at the largest boundary that helps: code fence or table, blank line,
line, sentence (also 。！？), word. The pieces of a divided table have its column names at the end of their heading.
Title and heading take at most half of `max_tokens`: where they would take more, the heading loses its top levels, and
what is still too long is cut at its end (`…`); the document keeps them whole.
Not covered: what `sections.py` does not see, and one character that alone is more than `max_tokens` tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrieval.config import ChunkingConfig
from retrieval.records import Chunk, Document
from retrieval.sections import Section, common_path, has_blocks, section_groups, strip_span, tables

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HEADING_SEPARATOR = " > "
SEGMENT_CHARS = 16_384
"""A longer section is cut into such segments before it is split. The splitter is linear on prose (0.7 MB/s of English
on 2 cores), but twice the length took it 2.4 to 3 times as long on a line without any boundary."""
CHARS_PER_TOKEN = 16
"""A chunk has at most this many characters per token of `max_tokens`: a WordPiece tokenizer calls 100 characters
without a space, such as Base64, one unknown token, however long they go on."""
HEADERS_KEPT = 64
_SENTENCE_END = re.compile(r"[.!?]\s|[。！？]")


@dataclass(frozen=True)
class _Header:
    """Title and heading as a chunk has them, and their tokens."""

    title: str
    heading: str
    tokens: int


def embedding_text(title: str, heading: str, text: str) -> str:
    """What the encoder reads for a chunk: `title | heading`, a line break, the text."""
    header = " | ".join(part for part in (title, heading) if part)
    return f"{header}\n{text}" if header else text


def chunk_document(document: Document, tokenizer: Tokenizer, config: ChunkingConfig) -> list[Chunk]:
    """`document` in chunks; to cut many documents, make one `Chunker`."""
    return Chunker(tokenizer, config).chunk(document)


class Chunker:
    """Cuts documents for one tokenizer and one policy."""

    def __init__(self, tokenizer: Tokenizer, config: ChunkingConfig) -> None:
        """Leaves `tokenizer` as it is: truncation and padding are switched off in a copy."""
        from tokenizers import Tokenizer as Copy

        self._tokenizer = Copy.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = config
        self._most_chars = config.max_tokens * CHARS_PER_TOKEN
        self._counted = ("", 0)
        self._headers: dict[tuple[str, tuple[str, ...]], _Header] = {}

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` without special tokens."""
        if text != self._counted[0]:  # the last check of a piece and its record count the same text
            self._counted = (text, len(self._tokenizer.encode(text, add_special_tokens=False)))
        return self._counted[1]

    def chunk(self, document: Document) -> list[Chunk]:
        """The chunks of `document`, in order of their place."""
        chunks: list[Chunk] = []
        seen: dict[str, int] = {}
        for group in section_groups(document):
            for header, start, end in self._spans(document, group):
                text = document.text[start:end]
                occurrence = seen.get(text, 0)
                seen[text] = occurrence + 1
                chunks.append(
                    Chunk(
                        chunk_id=_chunk_id(document.doc_id, text, occurrence),
                        doc_id=document.doc_id,
                        title=header.title,
                        heading=header.heading,
                        text=text,
                        start=start,
                        end=end,
                        tokens=self._count(header, text),
                        uri=document.uri,
                        metadata=document.metadata,
                    )
                )
        return chunks

    def _count(self, header: _Header, text: str) -> int:
        return self.count_tokens(embedding_text(header.title, header.heading, text))

    def _spans(self, document: Document, group: Sequence[Section]) -> Iterator[tuple[_Header, int, int]]:
        """(header, start, end) of each chunk of neighbouring sections that may share one."""
        position = 0
        while position < len(group):
            section = group[position]
            span = self._fits(document, [section])
            if span is None:
                yield from self._split(document, section)
                position += 1
                continue
            taken = 1
            while self._config.merge and position + taken < len(group):
                wider = self._fits(document, group[position : position + taken + 1])
                if wider is None:
                    break
                span, taken = wider, taken + 1
            yield span
            position += taken

    def _fits(self, document: Document, sections: Sequence[Section]) -> tuple[_Header, int, int] | None:
        path = common_path([section.path for section in sections])
        first = sections[0]
        start = first.start if first.path == path else first.heading_start
        start, end = strip_span(document.text, start, sections[-1].end)
        if end - start > self._most_chars:
            return None
        header = self._header(document.title, path)
        return (
            (header, start, end) if self._count(header, document.text[start:end]) <= self._config.max_tokens else None
        )

    def _header(self, title: str, path: tuple[str, ...]) -> _Header:
        """Title and heading in at most half of `max_tokens`."""
        key = (title, path)
        if key not in self._headers:
            if len(self._headers) >= HEADERS_KEPT:
                self._headers.clear()
            self._headers[key] = self._short_header(title, path)
        return self._headers[key]

    def _short_header(self, title: str, path: tuple[str, ...]) -> _Header:
        budget = room = self._config.max_tokens // 2
        heading = HEADING_SEPARATOR.join(path)
        while (tokens := self.count_tokens(embedding_text(title, heading, ""))) > budget:
            if len(path) > 1:
                path = path[1:]
                heading = HEADING_SEPARATOR.join(path)
            elif self.count_tokens(heading) > budget // 2:
                heading = self._shorten(heading, budget // 2)
            else:
                title = self._shorten(title, room - self.count_tokens(f" | {heading}" if heading else ""))
                room -= 1  # a tokenizer need not add up
        return _Header(title, heading, tokens)

    def _shorten(self, text: str, most_tokens: int) -> str:
        """The longest beginning of `text`, with `…`, of at most `most_tokens` tokens; "" where there is none."""
        fits, too_long = 0, len(text)
        while fits + 1 < too_long:
            middle = (fits + too_long) // 2
            if self.count_tokens(text[:middle].rstrip() + "…") <= most_tokens:
                fits = middle
            else:
                too_long = middle
        return text[:fits].rstrip() + "…" if fits else ""

    def _split(self, document: Document, section: Section) -> Iterator[tuple[_Header, int, int]]:
        start, end = strip_span(document.text, section.start, section.end)
        text = document.text[start:end]
        plain = self._header(document.title, section.path)
        blocks = has_blocks(text)
        for begin, stop, columns in self._regions(text, plain) if blocks else [(0, len(text), "")]:
            header = self._with_columns(document.title, section.path, columns, plain) if columns else plain
            for first, last in self._pieces(header, text, begin, stop, blocks):
                # A single character may leave no room for a header.
                fits = self._count(header, text[first:last]) <= self._config.max_tokens
                yield header if fits else _Header("", "", 0), start + first, start + last

    def _regions(self, text: str, plain: _Header) -> Iterator[tuple[int, int, str]]:
        """(begin, stop, columns): each table that must be divided, and what lies between them."""
        begin = 0
        for table in tables(text):
            rows = text[table.start : table.end]
            if len(rows) > self._most_chars or self._count(plain, rows) > self._config.max_tokens:
                yield begin, table.start, ""
                yield table.start, table.end, table.columns
                begin = table.end
        yield begin, len(text), ""

    def _with_columns(self, title: str, path: tuple[str, ...], columns: str, plain: _Header) -> _Header:
        """The header with a table's columns, where both take no more than half of the chunk."""
        heading = HEADING_SEPARATOR.join([*path, columns])
        tokens = self.count_tokens(embedding_text(title, heading, ""))
        return _Header(title, heading, tokens) if tokens <= self._config.max_tokens // 2 else plain

    def _pieces(self, header: _Header, text: str, begin: int, stop: int, blocks: bool) -> Iterator[tuple[int, int]]:
        """Spans of `text[begin:stop]` that fit under `header`, as far as a single character does."""
        capacity = self._config.max_tokens - header.tokens
        for from_, to in segments(text, begin, stop):
            for first, last in self._cut(header, text, from_, to, capacity, blocks):
                for place in range(first, last, self._most_chars):
                    yield from self._within(header, text, place, min(place + self._most_chars, last), capacity)

    def _within(self, header: _Header, text: str, first: int, last: int, capacity: int) -> Iterator[tuple[int, int]]:
        """The span itself, or smaller ones where it has too many tokens: a tokenizer need not add up."""
        if last - first > 1 and self._count(header, text[first:last]) > self._config.max_tokens:
            if capacity > 1:
                for begin, stop in self._cut(header, text, first, last, capacity // 2, False):
                    yield from self._within(header, text, begin, stop, capacity // 2)
            else:
                middle = (first + last) // 2
                yield from self._within(header, text, first, middle, 1)
                yield from self._within(header, text, middle, last, 1)
        elif text[first:last].strip():
            yield first, last

    def _cut(
        self, header: _Header, text: str, begin: int, stop: int, capacity: int, blocks: bool
    ) -> Iterator[tuple[int, int]]:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter

        # A callback is as fast as the library's own call of the tokenizer, and does not copy the tokenizer (6 MB for
        # 30,000 words) for each capacity.
        splitter = (MarkdownSplitter if blocks else TextSplitter).from_callback(
            self._counter(header), capacity, min(self._config.overlap_tokens, capacity // 2)
        )
        for offset, piece in splitter.chunk_indices(text[begin:stop]):
            yield begin + offset, begin + offset + len(piece)

    def _counter(self, header: _Header) -> Callable[[str], int]:
        """Tokens that a text adds to `header`: a tokenizer may join characters over the line break between them."""
        return lambda text: max(0, self._count(header, text) - header.tokens)


def segments(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Spans of at most `SEGMENT_CHARS` of `text[start:stop]`, each but the last cut in its second half: at a blank
    line, else a line, a sentence, a space, or anywhere."""
    while stop - start > SEGMENT_CHARS:
        middle, latest = start + SEGMENT_CHARS // 2, start + SEGMENT_CHARS
        border = max(text.rfind("\n\n", middle, latest), text.rfind("\r\n\r\n", middle, latest))
        if border < 0:
            border = text.rfind("\n", middle, latest)
        if border < 0:
            border = max((match.end() for match in _SENTENCE_END.finditer(text, middle, latest)), default=-1)
        if border < 0:
            border = text.rfind(" ", middle, latest)
        border = border if border > 0 else latest
        yield start, border
        start = border
    yield start, stop


def _chunk_id(doc_id: str, text: str, occurrence: int) -> str:
    return hashlib.sha256(json.dumps([doc_id, text, occurrence]).encode()).hexdigest()[:20]
