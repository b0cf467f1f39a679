"""PDF pages as Markdown: paragraphs, and headings told by their type size.

In: a PDF's bytes. Out: Markdown. Lines of one block of text become one paragraph, words cut by a hyphen at a line's end
are joined, a paragraph goes on over a page break where its sentence does, and lines that stand at the top or bottom of
most pages (page numbers, repeated running heads) are left out. It reads text as pdfminer.six lays it out: a converter
that looks for tables took justified prose in two columns for tables.
Not covered: tables (their cells come out as text), and scanned pages (there is no text in them).
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HEADING_RATIO = 1.15
HEADING_CHARS = 160
HEADING_LEVELS = 3
PAGES_FOR_RUNNING_HEADS = 4
_WORD_CUT = re.compile(r"(\w+)[-\u2010\u00ad]$")
_SENTENCE_END = re.compile(r"[.!?:;。！？：；…][\"'”’)\]]*$")
_UNSPACED = "\u3000-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"


@dataclass
class _Block:
    """Neighbouring lines of one size."""

    lines: list[str]
    size: float


def pdf_markdown(data: bytes) -> str:
    """The text of a PDF as Markdown; raises pdfminer's errors for what is no readable PDF."""
    pages = [_page_blocks(page) for page in _pages(data)]
    _drop_running_heads(pages)
    body = _body_size(pages)
    sizes = sorted({block.size for page in pages for block in page if _is_heading(block, body)}, reverse=True)
    levels = {size: min(place, HEADING_LEVELS) for place, size in enumerate(sizes, start=1)}
    words = Counter(re.findall(r"\w+(?:-\w+)*", "\n".join(line for page in pages for b in page for line in b.lines)))
    parts: list[str] = []
    for page in pages:
        for place, block in enumerate(page):
            text = _join_lines(block.lines, words)
            if _is_heading(block, body):
                parts.append(f"{'#' * levels[block.size]} {text}")
            elif place == 0 and parts and _goes_on(parts[-1], text):
                parts[-1] = _join_lines([parts[-1], text], words)
            else:
                parts.append(re.sub(r"^(#{1,6}\s|```|~~~)", r"\\\1", text))
    return "\n\n".join(parts)


def _pages(data: bytes) -> Iterator[Any]:
    from pdfminer.high_level import extract_pages
    from pdfminer.layout import LAParams

    yield from extract_pages(io.BytesIO(data), laparams=LAParams(all_texts=True))


def _text_boxes(layout: Any) -> Iterator[Any]:
    from pdfminer.layout import LTFigure, LTTextContainer

    for element in layout:
        if isinstance(element, LTTextContainer):
            yield element
        elif isinstance(element, LTFigure):
            yield from _text_boxes(element)


def _page_blocks(page: Any) -> list[_Block]:
    blocks: list[_Block] = []
    for box in _text_boxes(page):
        fresh = True
        for line in box:
            text = " ".join(line.get_text().replace("\0", "").split())
            if not text:
                continue
            size = _line_size(line)
            if fresh or blocks[-1].size != size:
                blocks.append(_Block([], size))
                fresh = False
            blocks[-1].lines.append(text)
    return blocks


def _line_size(line: Any) -> float:
    """The type size that most characters of a line have, in points, to the half."""
    sizes = Counter(round(character.size * 2) / 2 for character in line if hasattr(character, "size"))
    return sizes.most_common(1)[0][0] if sizes else 0.0


def _body_size(pages: list[list[_Block]]) -> float:
    sizes: Counter[float] = Counter()
    for page in pages:
        for block in page:
            sizes[block.size] += sum(len(line) for line in block.lines)
    return sizes.most_common(1)[0][0] if sizes else 0.0


def _is_heading(block: _Block, body: float) -> bool:
    text = " ".join(block.lines)
    return block.size >= body * HEADING_RATIO and len(text) <= HEADING_CHARS and any(char.isalpha() for char in text)


def _drop_running_heads(pages: list[list[_Block]]) -> None:
    """Take off the first and last two lines of pages that stand there on more than half of them: word for word (the
    first of them is kept), or but for one number that counts the pages."""
    if len(pages) < PAGES_FOR_RUNNING_HEADS:
        return
    for end in (0, -1):
        for _ in range(2):
            forms = [_running_forms(page[end].lines[end], at) if page else [] for at, page in enumerate(pages)]
            shown = Counter(form for some in forms for form in some)
            kept: set[str] = set()
            for page, some in zip(pages, forms, strict=True):
                repeated = next((form for form in some if shown[form] * 2 > len(pages)), None)
                if repeated is None:
                    continue
                if repeated == some[0] and repeated not in kept:
                    kept.add(repeated)
                    continue
                del page[end].lines[end]
                if not page[end].lines:
                    del page[end]


def _running_forms(line: str, page: int) -> list[str]:
    """The line, and the line with each of its numbers in turn given as its distance from the page's place."""
    numbers = list(re.finditer(r"\d{1,6}", line))[:8]
    return [line, *(f"{line[: n.start()]}\0{int(n[0]) - page}\0{line[n.end() :]}" for n in numbers)]


def _goes_on(before: str, after: str) -> bool:
    return not before.startswith("#") and not _SENTENCE_END.search(before) and after[:1].islower()


def _join_lines(lines: list[str], words: Counter[str]) -> str:
    """One line; a word cut at a line's end is written as the document writes it elsewhere, otherwise without hyphen."""
    text = lines[0]
    for line in lines[1:]:
        cut = _WORD_CUT.search(text)
        rest = re.match(r"[^\W\d_]+", line)
        if cut and rest and rest[0][0].islower():
            keep = f"{cut[1]}-{rest[0]}" in words and cut[1] + rest[0] not in words
            text = text[: cut.end(1)] + ("-" if keep else "") + line
        elif re.search(f"[{_UNSPACED}]$", text) and re.match(f"[{_UNSPACED}]", line):
            text += line
        else:
            text += " " + line
    return text
