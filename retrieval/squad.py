"""SQuAD JSON, 1.1 and 2.0: articles, their paragraphs, and the questions about each.

In: a file's text. Out: `Paragraph`s in order, one article in memory at a time, each with its questions as they stand in
the file. A paragraph is a document: its id follows from the article's title and the paragraph's text, so that a corpus
and questions read from the same file, or from two files with the same paragraphs, name the same documents.
Not covered: where a paragraph stands in other documents (`contexts.py`), its questions as records
(`question_files.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrieval.blocks import CorpusBlock, Rejection
from retrieval.records import Document
from retrieval.rows import RowError, refuse_constant, refuse_lone_surrogates, too_large
from retrieval.sources import one_line

if TYPE_CHECKING:
    import pyarrow.fs as pafs

_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder(parse_constant=refuse_constant)


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of an article, and its questions as JSON objects."""

    title: str
    text: str
    questions: tuple[dict[str, Any], ...]
    place: str
    """Where it stands in the file: `data[0].paragraphs[3]`."""

    @property
    def doc_id(self) -> str:
        """The id of the paragraph as a document."""
        return paragraph_id(self.title, self.text)


def paragraph_id(title: str, text: str) -> str:
    """`Super_Bowl_50-0a1b2c3d4e5f`: the article's title and 12 hexadecimal figures of sha256 over title and text."""
    digest = hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()[:12]
    return f"{title.strip() or 'squad'}-{digest}"


def read_paragraphs(data: bytes) -> Iterator[Paragraph]:
    """The paragraphs of a SQuAD file.

    Raises:
        RowError: what is wrong and where, in one line.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8 (byte {error.start})") from error
    found = False
    for number, article in enumerate(_articles(text)):
        found = True
        yield from _paragraphs(article, f"data[{number}]")
    if not found:
        raise RowError("is not SQuAD JSON: its `data` holds no article")


def _articles(text: str) -> Iterator[Any]:
    """The items of the outer object's `data`, decoded one by one: SQuAD's 30 MB of JSON take 150 MB as objects."""
    position = _after(text, 0, "{")
    while True:
        name, position = _value(text, position)
        position = _after(text, position, ":")
        if name == "data":
            break
        _, position = _value(text, position)
        position = _after(text, position, ",", "it has no `data`")
    position = _after(text, position, "[", "its `data` is no list of articles")
    while not text.startswith("]", _skip(text, position)):
        article, position = _value(text, position)
        yield article
        position = _skip(text, position)
        if not text.startswith("]", position):
            position = _after(text, position, ",")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _after(text: str, position: int, mark: str, otherwise: str = "") -> int:
    position = _skip(text, position)
    if not text.startswith(mark, position):
        raise RowError(f"is not SQuAD JSON: {otherwise or f'expected {mark!r} at character {position}'}")
    return position + 1


def _value(text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, _skip(text, position))
    except json.JSONDecodeError as error:
        raise RowError(f"is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"is not JSON that can be read: {one_line(error)}") from error


def _paragraphs(article: Any, place: str) -> Iterator[Paragraph]:
    if not isinstance(article, dict) or not isinstance(article.get("paragraphs"), list):
        raise RowError(f"is not SQuAD JSON: {place} has no list `paragraphs`")
    title = article.get("title") or ""
    for number, paragraph in enumerate(article["paragraphs"]):
        where = f"{place}.paragraphs[{number}]"
        if not isinstance(paragraph, dict) or not isinstance(paragraph.get("context"), str):
            raise RowError(f"is not SQuAD JSON: {where} has no text `context`")
        questions = paragraph.get("qas") or []
        if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
            raise RowError(f"is not SQuAD JSON: {where}.qas is no list of objects")
        try:
            refuse_lone_surrogates(paragraph)
        except RowError as error:
            raise RowError(f"{where} {error}") from error
        yield Paragraph(str(title), paragraph["context"], tuple(questions), where)


def read_squad(filesystem: pafs.FileSystem, path: str, name: str, block: CorpusBlock) -> Iterator[Document | Rejection]:
    """The paragraphs of a SQuAD file as documents, each text once."""
    with filesystem.open_input_stream(path) as file:
        data = file.read(block.max_file_bytes + 1)
    if len(data) > block.max_file_bytes:
        yield Rejection(name, "", too_large(block), int(filesystem.get_file_info(path).size or len(data)))
        return
    seen: set[str] = set()
    try:
        for paragraph in read_paragraphs(data):
            if paragraph.doc_id in seen:
                continue
            seen.add(paragraph.doc_id)
            if paragraph.text.strip():
                title = paragraph.title.replace("_", " ").strip()
                yield Document(paragraph.doc_id, title, paragraph.text)
            else:
                yield Rejection(name, paragraph.place, "holds no text: it is blank", 0)
    except RowError as error:
        yield Rejection(name, "", str(error), len(data))
