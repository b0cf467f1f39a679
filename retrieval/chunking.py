"""Cutting documents into chunks along their Markdown structure.

In: a `Document`, the encoder's own tokenizer, a `ChunkingConfig`. Out: `Chunk`s in document order, where
`document.text[chunk.start:chunk.end] == chunk.text` and every character that is neither blank nor part of a heading
line stands in at least one chunk.
A chunk never crosses a heading of level 1 or 2. Below that, small neighbouring subsections share a chunk while the
whole fits; a section that does not fit is split at the largest semantic boundary (blank line, line, sentence, word).
Not covered: Setext headings (underlined with === or ---), and headings inside block quotes or lists.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrieval.config import ChunkingConfig
from retrieval.records import Chunk, Document

if TYPE_CHECKING:
    from semantic_text_splitter import TextSplitter
    from tokenizers import Tokenizer

HEADING_SEPARATOR = " > "
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t\r]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass(frozen=True)
class _Section:
    """Text under one heading, up to the next heading of any level."""

    path: tuple[str, ...]
    """Headings from the top to this one, without the document's title."""
    level: int
    """0 before the first heading."""
    heading_start: int
    start: int
    end: int


def embedding_text(title: str, heading: str, text: str) -> str:
    """What the encoder reads for a chunk: `title | heading`, a line break, the text."""
    header = _header(title, heading)
    return f"{header}\n{text}" if header else text


def first_heading(text: str) -> str:
    """The first level-1 Markdown heading of `text`, or ""."""
    return next((heading for _, _, level, heading in _heading_lines(text) if level == 1), "")


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
        self._splitters: dict[int, TextSplitter] = {}

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` without special tokens."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def chunk(self, document: Document) -> list[Chunk]:
        """The chunks of `document`, in order of their place.

        A chunk has at most `max_tokens` tokens, title and heading included. Where title and heading take more than
        half of that, the text still gets half of `max_tokens`.
        """
        chunks: list[Chunk] = []
        seen: dict[str, int] = {}
        for group in _groups(document):
            for heading, start, end in self._spans(document, group):
                text = document.text[start:end]
                occurrence = seen.get(text, 0)
                seen[text] = occurrence + 1
                chunks.append(
                    Chunk(
                        chunk_id=_chunk_id(document.doc_id, text, occurrence),
                        doc_id=document.doc_id,
                        title=document.title,
                        heading=heading,
                        text=text,
                        start=start,
                        end=end,
                        tokens=self.count_tokens(embedding_text(document.title, heading, text)),
                        uri=document.uri,
                        metadata=document.metadata,
                    )
                )
        return chunks

    def _spans(self, document: Document, group: Sequence[_Section]) -> Iterator[tuple[str, int, int]]:
        """(heading, start, end) of each chunk of neighbouring sections that may share one."""
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

    def _fits(self, document: Document, sections: Sequence[_Section]) -> tuple[str, int, int] | None:
        path = _common_path([section.path for section in sections])
        first = sections[0]
        start = first.start if first.path == path else first.heading_start
        start, end = _strip(document.text, start, sections[-1].end)
        heading = HEADING_SEPARATOR.join(path)
        whole = embedding_text(document.title, heading, document.text[start:end])
        return (heading, start, end) if self.count_tokens(whole) <= self._config.max_tokens else None

    def _split(self, document: Document, section: _Section) -> Iterator[tuple[str, int, int]]:
        heading = HEADING_SEPARATOR.join(section.path)
        header_tokens = self.count_tokens(_header(document.title, heading) + "\n")
        capacity = max(self._config.max_tokens - header_tokens, self._config.max_tokens // 2)
        start, end = _strip(document.text, section.start, section.end)
        for offset, piece in self._splitter(capacity).chunk_indices(document.text[start:end]):
            yield heading, start + offset, start + offset + len(piece)

    def _splitter(self, capacity: int) -> TextSplitter:
        if capacity not in self._splitters:
            from semantic_text_splitter import TextSplitter

            overlap = min(self._config.overlap_tokens, capacity // 2)
            splitter = TextSplitter.from_huggingface_tokenizer(self._tokenizer, capacity, overlap)
            self._splitters[capacity] = splitter
        return self._splitters[capacity]


def _header(title: str, heading: str) -> str:
    return " | ".join(part for part in (title, heading) if part)


def _chunk_id(doc_id: str, text: str, occurrence: int) -> str:
    return hashlib.sha256(json.dumps([doc_id, text, occurrence]).encode()).hexdigest()[:20]


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _common_path(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    common = paths[0]
    for path in paths[1:]:
        same = 0
        while same < min(len(common), len(path)) and common[same] == path[same]:
            same += 1
        common = common[:same]
    return common


def _heading_lines(text: str) -> Iterator[tuple[int, int, int, str]]:
    """(line start, line end with its break, level, heading) of each ATX heading outside code fences."""
    fence = ""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        line = text[start:end].rstrip("\n")
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
        elif mark:
            fence = mark[1]
        elif (heading := _HEADING.match(line)) and heading[2].strip():
            yield start, end, len(heading[1]), heading[2].strip()
        start = end


def _sections(document: Document) -> Iterator[_Section]:
    """Sections with text, in order. A level-1 heading that repeats the title is not part of the path."""
    stack: list[tuple[int, str]] = []
    level, heading_start, start = 0, 0, 0

    def section(end: int) -> _Section:
        path = tuple(name for depth, name in stack if not (depth == 1 and name == document.title))
        return _Section(path, level, heading_start, start, end)

    for line_start, line_end, next_level, name in _heading_lines(document.text):
        yield section(line_start)
        stack = [entry for entry in stack if entry[0] < next_level]
        stack.append((next_level, name))
        level, heading_start, start = next_level, line_start, line_end
    yield section(len(document.text))


def _groups(document: Document) -> Iterator[list[_Section]]:
    """Sections that may share a chunk: those between two headings of level 1 or 2. Blank sections are left out."""
    group: list[_Section] = []
    for section in _sections(document):
        if section.level in (1, 2):
            yield group
            group = []
        if document.text[section.start : section.end].strip():
            group.append(section)
    yield group
