"""Reading a user's documents: BEIR `corpus.jsonl`, or .txt / .md files.

In: a path (local, or any pyarrow filesystem URI). Out: `Document` records in a fixed order, or the same corpus cut into
`CorpusBlock`s (byte ranges or file names, never text) that any Ray worker reads for itself.
Text is kept exactly as read, so that character offsets stay true.
Not covered: PDF, HTML and Office files.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.records import Record
from retrieval.chunking import first_heading
from retrieval.records import Document

if TYPE_CHECKING:
    import pyarrow.fs as pafs

TEXT_SUFFIXES = (".txt", ".md", ".markdown")
MARKDOWN_SUFFIXES = (".md", ".markdown")
SMALLEST_BLOCK_BYTES = 64 * 1024
LARGEST_BLOCK_BYTES = 16 * 1024 * 1024
BLOCKS_AIMED_AT = 256
SAMPLE_DOCUMENTS = 128
SAMPLE_CHARS = 4000


@dataclass(frozen=True)
class CorpusBlock(Record):
    """Some consecutive documents of a corpus, by place: bytes `start` to `end` of a .jsonl file, or named files.

    `path` is absolute; `files` are relative to it and empty for a .jsonl file.
    """

    ordinal: int
    path: str
    start: int
    end: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class CorpusScan:
    """One pass over a corpus: how it divides, how many documents it has, and a seeded sample of their text."""

    blocks: tuple[CorpusBlock, ...]
    documents: int
    sample: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """Where the documents stand, with the filesystem that reads them."""

    filesystem: pafs.FileSystem
    root: str
    files: tuple[tuple[str, int], ...]
    """(name relative to root, bytes) in reading order; empty for a .jsonl file."""
    jsonl_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.jsonl_bytes or sum(size for _, size in self.files)


def read_documents(path: str) -> Iterator[Document]:
    """The documents at `path`, in order: lines of a .jsonl file, or files by sorted relative name.

    Raises:
        UserError: naming `corpus.path`, for a missing path, an empty corpus, a duplicate id, or an unreadable document.
    """
    for _, _, document in _documents_with_place(_locate(path)):
        yield document


def scan_corpus(path: str, seed: int, block_bytes: int | None = None) -> CorpusScan:
    """Check every document and cut the corpus into blocks of about `block_bytes` (by default from its size).

    The cut depends on the corpus alone, so the rows that follow from it do not depend on the number of workers.
    Holds ids and a bounded sample, never the corpus.
    """
    source = _locate(path)
    target = block_bytes or min(LARGEST_BLOCK_BYTES, max(SMALLEST_BLOCK_BYTES, source.total_bytes // BLOCKS_AIMED_AT))
    blocks: list[CorpusBlock] = []
    sample = _Reservoir(SAMPLE_DOCUMENTS, seed)
    files: list[str] = []
    block_start = filled = count = end = 0
    for place, size, document in _documents_with_place(source):
        if filled and filled + size > target:
            blocks.append(CorpusBlock(len(blocks), source.root, block_start, end, tuple(files)))
            block_start, files, filled = end, [], 0
        if source.files:
            files.append(place)
        end += size
        filled += size
        count += 1
        sample.offer(document.text[:SAMPLE_CHARS])
    blocks.append(CorpusBlock(len(blocks), source.root, block_start, end, tuple(files)))
    return CorpusScan(tuple(blocks), count, tuple(sample.kept))


def read_block(block: CorpusBlock) -> list[Document]:
    """The documents of one block (already checked by `scan_corpus`)."""
    if block.files:
        filesystem, root = open_filesystem(block.path)
        return [_read_text_file(filesystem, root, name) for name in block.files]
    filesystem, root = open_filesystem(block.path)
    with filesystem.open_input_file(root) as file:
        file.seek(block.start)
        data = file.read(block.end - block.start)
    lines = data.split(b"\n")
    return [
        _parse_line(line, f"{block.path} (block {block.ordinal})") for line in lines if line.strip(b"\xef\xbb\xbf \t\r")
    ]


def corpus_digest(path: str) -> str:
    """sha256 over the names and content of the files that `read_documents` reads; other files do not count."""
    from cluster.stage import digest_path

    source = _locate(path)
    if not source.files:
        return digest_path(source.root)
    digest = hashlib.sha256()
    for name, _ in source.files:
        digest.update(json.dumps([name, digest_path(join_path(source.root, name))]).encode())
    return digest.hexdigest()


class _Reservoir:
    """A uniform sample of a stream of unknown length (Vitter's algorithm R), the same for the same seed."""

    def __init__(self, size: int, seed: int) -> None:
        self.kept: list[str] = []
        self._size, self._seen, self._random = size, 0, random.Random(seed)

    def offer(self, text: str) -> None:
        self._seen += 1
        if len(self.kept) < self._size:
            self.kept.append(text)
            return
        slot = self._random.randrange(self._seen)
        if slot < self._size:
            self.kept[slot] = text


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem behind a local path or a URI, and the path inside it."""
    import pyarrow.fs as pafs

    if "://" in path:
        filesystem, inner = pafs.FileSystem.from_uri(path)
        return filesystem, inner
    return pafs.LocalFileSystem(), str(Path(path).expanduser().absolute())


def join_path(root: str, name: str) -> str:
    """`name` under `root`, for local paths and URIs alike."""
    return f"{root.rstrip('/')}/{name}" if name else root


def _locate(path: str) -> _Source:
    import pyarrow.fs as pafs

    if not path:
        raise UserError(
            "corpus.path is empty: set it to a corpus.jsonl or to a folder of .txt / .md documents "
            "(--set corpus.path=…)"
        )
    try:
        filesystem, inner = open_filesystem(path)
        info = filesystem.get_file_info(inner)
    except (OSError, ValueError) as error:
        raise UserError(f"corpus.path: cannot read {path}: {_one_line(error)}") from error
    root = path.rstrip("/") if "://" in path else inner
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"corpus.path: {path} does not exist: give a corpus.jsonl or a folder of .txt / .md documents")
    if info.type == pafs.FileType.File:
        return _locate_file(filesystem, root, info)
    corpus_file = filesystem.get_file_info(join_path(inner, "corpus.jsonl"))
    if corpus_file.type == pafs.FileType.File:
        return _locate_file(filesystem, join_path(root, "corpus.jsonl"), corpus_file)
    files = _text_files(filesystem, inner)
    if not files:
        raise UserError(f"corpus.path: {path} holds no .txt or .md documents and no corpus.jsonl")
    return _Source(filesystem, root, files, 0)


def _locate_file(filesystem: pafs.FileSystem, root: str, info: pafs.FileInfo) -> _Source:
    name = PurePosixPath(root).name
    if info.size == 0:
        raise UserError(f"corpus.path: {root} is empty: it must hold at least one document")
    if name.lower().endswith(".jsonl"):
        return _Source(filesystem, root, (), info.size)
    if name.lower().endswith(TEXT_SUFFIXES):
        return _Source(filesystem, root.removesuffix(f"/{name}") or "/", ((name, info.size),), 0)
    raise UserError(f"corpus.path: {root} is not a .jsonl, .txt or .md file")


def _text_files(filesystem: pafs.FileSystem, inner: str) -> tuple[tuple[str, int], ...]:
    import pyarrow.fs as pafs

    found = []
    for info in filesystem.get_file_info(pafs.FileSelector(inner, recursive=True)):
        name = info.path.removeprefix(inner.rstrip("/")).lstrip("/")
        hidden = any(part.startswith(".") for part in name.split("/"))
        if info.type == pafs.FileType.File and name.lower().endswith(TEXT_SUFFIXES) and not hidden:
            found.append((name, info.size))
    return tuple(sorted(found))


def _documents_with_place(source: _Source) -> Iterator[tuple[str, int, Document]]:
    """(file name or "", bytes that it takes, document); sizes of a .jsonl file add up to its length without its end."""
    documents = _file_documents(source) if source.files else _line_documents(source)
    seen: set[bytes] = set()
    some_text = False
    for place, size, document in documents:
        key = hashlib.blake2b(document.doc_id.encode(), digest_size=16).digest()
        if key in seen:
            raise UserError(
                f"corpus.path: {source.root} has two documents with the id {document.doc_id!r}: ids must differ"
            )
        seen.add(key)
        some_text = some_text or bool(document.text.strip())
        yield place, size, document
    if not some_text:
        raise UserError(
            f"corpus.path: {source.root} holds no text: it must hold at least one document that is not blank"
        )


def _file_documents(source: _Source) -> Iterator[tuple[str, int, Document]]:
    filesystem, root = open_filesystem(source.root)
    for name, size in source.files:
        yield name, size, _read_text_file(filesystem, root, name)


def _line_documents(source: _Source) -> Iterator[tuple[str, int, Document]]:
    filesystem, root = open_filesystem(source.root)
    with filesystem.open_input_file(root) as raw, io.BufferedReader(raw) as lines:
        passed = 0
        for number, line in enumerate(lines, start=1):
            passed += len(line)
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            yield "", passed, _parse_line(line, f"{source.root}:{number}")
            passed = 0


def _parse_line(line: bytes, where: str) -> Document:
    try:
        row: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"corpus.path: {where} is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"corpus.path: {where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise UserError(f"corpus.path: {where} is not a JSON object with _id, title and text")
    doc_id, text = row.get("_id"), row.get("text")
    if isinstance(doc_id, bool) or not isinstance(doc_id, str | int) or doc_id == "":
        raise UserError(f"corpus.path: {where} has no _id: every document needs one")
    if not isinstance(text, str):
        raise UserError(f"corpus.path: {where} has no text: every document needs a string")
    title, uri, metadata = row.get("title") or "", row.get("uri") or "", row.get("metadata") or {}
    if not isinstance(title, str) or not isinstance(uri, str) or not isinstance(metadata, dict):
        raise UserError(f"corpus.path: {where}: title and uri must be strings and metadata an object")
    _refuse_lone_surrogates(f"{doc_id}{title}{uri}{text}", where)
    return Document(str(doc_id), title, text, uri, metadata)


def _refuse_lone_surrogates(text: str, where: str) -> None:
    """JSON may spell half a character (`\\ud800`), which no Parquet file or tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"corpus.path: {where} holds half a UTF-16 character (a lone surrogate)") from error


def _read_text_file(filesystem: pafs.FileSystem, root: str, name: str) -> Document:
    try:
        with filesystem.open_input_stream(join_path(root, name)) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = join_path(root, name)
        raise UserError(
            f"corpus.path: {where} is not UTF-8 (byte {error.start}): convert it, or move it away"
        ) from error
    except OSError as error:
        raise UserError(f"corpus.path: cannot read {join_path(root, name)}: {_one_line(error)}") from error
    title = PurePosixPath(name).stem
    if name.lower().endswith(MARKDOWN_SUFFIXES):
        title = first_heading(text) or title
    return Document(name, title, text, name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
