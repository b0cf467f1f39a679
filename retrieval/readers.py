"""Reading the files of a block: text, Markdown, converted formats, rows, and the paragraphs of SQuAD files.

In: a `CorpusBlock`. Out: a `Document` or a `Rejection` per document, in order. Nothing raises for bad content: a
malformed, empty, binary, wrongly encoded, too large or unconvertible file is a `Rejection` with a one-line reason.
Text is kept exactly as read, so that character offsets stay true; only a byte-order mark is taken off. Text is UTF-8,
or UTF-16 with a byte-order mark (said in `metadata.encoding`); nothing else is guessed.
Not covered: what converts .html, .pdf, .docx and .pptx (`conversion.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from retrieval.blocks import CorpusBlock, Rejection, is_utf16
from retrieval.conversion import convert_file
from retrieval.converters import ConversionError
from retrieval.records import Document
from retrieval.rows import read_csv, read_lines, read_parquet
from retrieval.sections import first_heading
from retrieval.sources import (
    MARKDOWN_SUFFIXES,
    SQUAD_SUFFIX,
    TEXT_SUFFIXES,
    is_row_format,
    join_path,
    one_line,
    open_filesystem,
    suffix,
)
from retrieval.squad import read_squad

if TYPE_CHECKING:
    import pyarrow.fs as pafs


def read_file(block: CorpusBlock, name: str) -> Iterator[Document | Rejection]:
    """The documents of one file of `block` and what could not be read, in order."""
    filesystem, root = open_filesystem(block.root)
    path = join_path(root, name)
    try:
        if is_row_format(name):
            yield from _rows(filesystem, path, name, block)
        else:
            yield _file(filesystem, path, name, block)
    except OSError as error:
        yield Rejection(name, "", f"cannot be read: {one_line(error)}", 0)


def _rows(filesystem: pafs.FileSystem, path: str, name: str, block: CorpusBlock) -> Iterator[Document | Rejection]:
    readers = {".jsonl": read_lines, ".csv": read_csv, ".parquet": read_parquet, SQUAD_SUFFIX: read_squad}
    some = False
    for item in readers[suffix(name)](filesystem, path, name, block):
        some = True
        yield item
    size = int(filesystem.get_file_info(path).size or 0)
    if not some and block.start == 0 and (block.end < 0 or block.end >= size):
        yield Rejection(name, "", "is empty: it holds no rows", size)


def _file(filesystem: pafs.FileSystem, path: str, name: str, block: CorpusBlock) -> Document | Rejection:
    with filesystem.open_input_stream(path) as file:
        data = file.read(block.max_file_bytes + 1)
    if len(data) > block.max_file_bytes:
        size = int(filesystem.get_file_info(path).size or len(data))
        return Rejection(name, "", f"has more than {block.max_file_bytes / 1e6:g} MB (corpus.max_file_mb)", size)
    if not data:
        return Rejection(name, "", "is empty", 0)
    if suffix(name) in TEXT_SUFFIXES:
        return _text_document(name, data)
    return _converted_document(name, data, block)


def _converted_document(name: str, data: bytes, block: CorpusBlock) -> Document | Rejection:
    try:
        text, title = convert_file(data, suffix(name), block.convert_timeout_s, block.max_file_bytes)
    except ConversionError as error:
        return Rejection(name, "", str(error), len(data))
    if not text.strip():
        return Rejection(name, "", "holds no text (a scan needs OCR first)", len(data))
    return Document(name, title or first_heading(text) or PurePosixPath(name).stem, text, name)


def _text_document(name: str, data: bytes) -> Document | Rejection:
    try:
        text, encoding = decode_text(data)
    except ValueError as error:
        return Rejection(name, "", str(error), len(data))
    if not text.strip():
        return Rejection(name, "", "holds no text: it is blank", len(data))
    title = PurePosixPath(name).stem
    if suffix(name) in MARKDOWN_SUFFIXES:
        title = first_heading(text) or title
    return Document(name, title, text, name, {"encoding": encoding} if encoding else {})


def decode_text(data: bytes) -> tuple[str, str]:
    """(text, "" or "utf-16"); raises ValueError with the byte that is neither UTF-8 nor marked UTF-16."""
    encoding = "utf-16" if is_utf16(data[:4]) else "utf-8-sig"
    zero = data.find(b"\0") if encoding != "utf-16" else -1
    if zero >= 0:
        raise ValueError(f"is binary, or UTF-16 without its mark (a zero byte at byte {zero})")
    try:
        return data.decode(encoding), "" if encoding == "utf-8-sig" else encoding
    except UnicodeDecodeError as error:
        if error.end >= len(data) and "end" in error.reason:
            raise ValueError(f"is cut off in the middle of a character (byte {error.start})") from error
        shown = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise ValueError(f"is not {shown} (byte {error.start}): convert it to UTF-8") from error
