"""The structure of a Markdown document: headings, the sections below them, tables and code fences.

In: a document's text. Out: character offsets into it. Linear in the text's length.
Not covered: Setext headings (underlined with === or ---), headings inside block quotes or lists, and heading lines of
more than 1,000 characters (they are text).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from retrieval.records import Document

LONGEST_HEADING_LINE = 1000
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_FENCE_LINE = re.compile(r"^ {0,3}(?:`{3}|~{3})", re.MULTILINE)
# A row with a pipe, and below it the line of dashes that makes it a table's header (GitHub Flavored Markdown, 4.10).
# Spaces are bounded, so that no line makes the search quadratic.
_TABLE = re.compile(
    r"^[ \t]{0,9}(\|[^\n]{0,2000})\n[ \t]{0,9}\|?[ \t]{0,9}:?-+:?[ \t]{0,9}(?:\|[ \t]{0,9}:?-*:?[ \t]{0,9}){1,200}\r?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Section:
    """Text under one heading, up to the next heading of any level."""

    path: tuple[str, ...]
    """Headings from the top to this one, without the document's title."""
    level: int
    """0 before the first heading."""
    heading_start: int
    start: int
    end: int


@dataclass(frozen=True)
class Table:
    """A table with a header row, from `start` to `end`; `columns` as `a | b`."""

    columns: str
    start: int
    end: int


def first_heading(text: str) -> str:
    """The first level-1 Markdown heading of `text`, or ""."""
    return next((heading for _, _, level, heading in _heading_lines(text) if level == 1), "")


def strip_span(text: str, start: int, end: int) -> tuple[int, int]:
    """`start` and `end` moved inwards over white space."""
    part = text[start:end]
    lead = len(part) - len(part.lstrip())
    return start + lead, start + max(lead, len(part.rstrip()))


def common_path(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The headings that all `paths` begin with."""
    common = paths[0]
    for path in paths[1:]:
        same = 0
        while same < min(len(common), len(path)) and common[same] == path[same]:
            same += 1
        common = common[:same]
    return common


def section_groups(document: Document) -> Iterator[list[Section]]:
    """Sections that may share a chunk: those between two headings of level 1 or 2. Blank sections are left out."""
    group: list[Section] = []
    for section in _sections(document):
        if section.level in (1, 2):
            yield group
            group = []
        if document.text[section.start : section.end].strip():
            group.append(section)
    yield group


def has_blocks(text: str) -> bool:
    """Whether `text` has a code fence or a table, which are worth keeping whole."""
    return bool(_FENCE_LINE.search(text) or ("|" in text and _TABLE.search(text)))


def tables(text: str) -> list[Table]:
    """The tables of `text`, in order."""
    found: list[Table] = []
    place = 0
    while match := _TABLE.search(text, place):
        end = place = match.end()
        while place < len(text):
            line_end = text.find("\n", place + 1)
            line_end = len(text) if line_end < 0 else line_end
            if not text[place:line_end].strip().startswith("|"):
                break
            end = place = line_end
        cells = [" ".join(cell.split()) for cell in match[1].strip().strip("|").split("|")]
        found.append(Table(" | ".join(cell for cell in cells if cell), match.start(), end))
    return found


def _heading_lines(text: str) -> Iterator[tuple[int, int, int, str]]:
    """(line start, line end with its break, level, heading) of each ATX heading outside code fences."""
    fence = ""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        line = text[start : min(end, start + LONGEST_HEADING_LINE)].rstrip("\n")
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
        elif mark:
            fence = mark[1]
        elif end - start <= LONGEST_HEADING_LINE and (heading := _HEADING.match(line)):
            name = _without_closing_marks(heading[2].strip())
            if name:
                yield start, end, len(heading[1]), name
        start = end


def _without_closing_marks(heading: str) -> str:
    """`Area ##` is written `Area`; `C#` stays."""
    bare = heading.rstrip("#")
    return heading if bare and not bare[-1].isspace() else bare.rstrip()


def _sections(document: Document) -> Iterator[Section]:
    """Sections with text, in order. A level-1 heading that repeats the title is not part of the path."""
    stack: list[tuple[int, str]] = []
    level, heading_start, start = 0, 0, 0

    def section(end: int) -> Section:
        path = tuple(name for depth, name in stack if not (depth == 1 and name == document.title))
        return Section(path, level, heading_start, start, end)

    for line_start, line_end, next_level, name in _heading_lines(document.text):
        yield section(line_start)
        stack = [entry for entry in stack if entry[0] < next_level]
        stack.append((next_level, name))
        level, heading_start, start = next_level, line_start, line_end
    yield section(len(document.text))
