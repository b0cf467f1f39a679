"""A corpus as the index build reads it: list, cut into blocks, sample, read, digest.

In: the recipe's `corpus` section. Out: `CorpusBlock`s that any Ray worker reads by itself, their documents in a fixed
order, and what could not be read. The caller never holds the corpus: names, and a bounded sample of texts.
Not covered: two documents with one id in different blocks (only the index build sees all ids).
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from cluster.errors import UserError
from retrieval.blocks import BUFFER_BYTES, MEGABYTE, CorpusBlock, Rejection, cut_blocks, is_utf16
from retrieval.readers import read_file
from retrieval.records import Document
from retrieval.sources import (
    CONVERTED_SUFFIXES,
    SQUAD_SUFFIX,
    TEXT_SUFFIXES,
    CorpusFile,
    is_row_format,
    join_path,
    list_files,
    open_filesystem,
    suffix,
)

if TYPE_CHECKING:
    import pyarrow.fs as pafs

    from retrieval.config import CorpusConfig

__all__ = [
    "BlockContent",
    "CorpusBlock",
    "CorpusScan",
    "Rejection",
    "corpus_digest",
    "join_path",
    "open_filesystem",
    "read_block",
    "read_documents",
    "repeated_id",
    "scan_corpus",
]

READING_FORMAT = 1
"""Raised when the same files should give other documents."""
SAMPLE_BLOCKS = 32
SAMPLE_DOCUMENTS = 128
SAMPLE_CHARS = 4000
SAMPLE_CONVERTED = 8
SAMPLE_CONVERT_TIMEOUT_S = 20.0
DIGEST_THREADS = 8


@dataclass(frozen=True)
class CorpusScan:
    """One pass over a corpus's files: how it divides, and a seeded sample of its texts."""

    blocks: tuple[CorpusBlock, ...]
    sample: tuple[str, ...]
    """At most 128 texts of at most 4000 characters."""
    files: int
    bytes: int
    ignored: int
    """Files of other formats below the path."""
    ignored_formats: str = ""
    """Their suffixes, in words."""


@dataclass(frozen=True)
class BlockContent:
    """What one block holds, in order."""

    documents: list[Document]
    rejected: list[Rejection]


def scan_corpus(
    config: CorpusConfig, seed: int, block_bytes: int | None = None, key: str = "corpus.path"
) -> CorpusScan:
    """List the corpus and cut it into blocks of about `block_bytes` (by default from its size).

    Documents are not read, but for the sample: up to 128, from up to 32 blocks chosen by `seed`.

    Raises:
        UserError: naming `key`, when nothing is there, or no file of a known format.
    """
    listed = list_files(config.path, key)
    blocks = cut_blocks(listed.root, listed.files, config, block_bytes)
    total = sum(file.size for file in listed.files)
    return CorpusScan(blocks, _sample(blocks, seed), len(listed.files), total, listed.ignored, listed.ignored_formats)


def read_block(block: CorpusBlock) -> BlockContent:
    """The documents of one block. Of documents with one id, all but the first are rejected."""
    content = BlockContent([], [])
    seen: set[str] = set()
    for name in block.files:
        for item in read_file(block, name):
            if isinstance(item, Rejection):
                content.rejected.append(item)
            elif item.doc_id in seen:
                content.rejected.append(repeated_id(item, name))
            else:
                seen.add(item.doc_id)
                content.documents.append(item)
    return content


def repeated_id(document: Document, name: str = "") -> Rejection:
    """What becomes of a document, read from file `name`, whose id an earlier one has."""
    reason = "has the id of an earlier document: ids must differ"
    place = f"id {document.doc_id}" if name != document.doc_id else ""
    return Rejection(name or document.uri, place, reason, len(document.text.encode()))


def read_documents(config: CorpusConfig, key: str = "corpus.path") -> Iterator[Document]:
    """All documents in order, for tests and tools; what cannot be read is left out, or raises with `corpus.strict`."""
    listed = list_files(config.path, key)
    for block in cut_blocks(listed.root, listed.files, config):
        content = read_block(block)
        if config.strict and content.rejected:
            raise UserError(f"{key}: {content.rejected[0].describe()} (corpus.strict)")
        yield from content.documents


def corpus_digest(config: CorpusConfig, key: str = "corpus.path") -> str:
    """sha256 over all that decides the documents: names and content of the files that are read, the columns of row
    formats, and the converter's version where files are converted. Other files do not count.

    Raises:
        UserError: naming `key`, when nothing is there, or a file cannot be read.
    """
    listed = list_files(config.path, key)
    filesystem, root = open_filesystem(listed.root)
    largest = int(config.max_file_mb * MEGABYTE)

    def digest_file(file: CorpusFile) -> list[str]:
        if file.size > largest and (not is_row_format(file.name) or suffix(file.name) == SQUAD_SUFFIX):
            return [file.name, f"more than {largest} bytes"]
        return [file.name, _digest(filesystem, join_path(root, file.name))]

    digest = hashlib.sha256(json.dumps([READING_FORMAT]).encode())
    if any(is_row_format(file.name) for file in listed.files):
        digest.update(json.dumps(config.columns.model_dump(), sort_keys=True).encode())
    if any(suffix(file.name) in CONVERTED_SUFFIXES for file in listed.files):
        digest.update(converter_version().encode())
    with ThreadPoolExecutor(DIGEST_THREADS) as threads:
        for entry in threads.map(digest_file, listed.files):
            digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def converter_version() -> str:
    """The installed converter, so that installing it or another version gives a new index; "" without one."""
    try:
        return f"markitdown {metadata.version('markitdown')}"
    except metadata.PackageNotFoundError:
        return ""


def _digest(filesystem: pafs.FileSystem, path: str) -> str:
    digest = hashlib.sha256()
    try:
        with filesystem.open_input_stream(path) as file:
            while data := file.read(BUFFER_BYTES):
                digest.update(data)
    except OSError:
        return "cannot be read"  # reading rejects it; once it can be read, the digest is another
    return digest.hexdigest()


def _sample(blocks: tuple[CorpusBlock, ...], seed: int) -> tuple[str, ...]:
    """Texts of blocks chosen by `seed`; files that must be converted first are read only where others give too few."""
    chosen = random.Random(seed).sample(blocks, min(SAMPLE_BLOCKS, len(blocks)))
    each = -(-SAMPLE_DOCUMENTS // max(1, len(chosen)))
    texts: list[str] = []
    for block in chosen:
        texts += itertools.islice(_plain_texts(block), each)
    if len(texts) < SAMPLE_CONVERTED:
        converted = ((block, name) for block in chosen for name in block.files if suffix(name) in CONVERTED_SUFFIXES)
        for block, name in itertools.islice(converted, SAMPLE_CONVERTED):
            seconds = min(block.convert_timeout_s, SAMPLE_CONVERT_TIMEOUT_S)
            texts += _texts(dataclasses.replace(block, convert_timeout_s=seconds), name)
    return tuple(texts[:SAMPLE_DOCUMENTS])


def _plain_texts(block: CorpusBlock) -> Iterator[str]:
    """Beginnings of the block's texts that need no conversion; no more than the beginning of a text file is read."""
    filesystem, root = open_filesystem(block.root)
    for name in block.files:
        if is_row_format(name):
            yield from _texts(block, name)
        elif suffix(name) in TEXT_SUFFIXES:
            with contextlib.suppress(OSError, UnicodeError):
                with filesystem.open_input_stream(join_path(root, name)) as file:
                    data = file.read(4 * SAMPLE_CHARS)
                encoding = "utf-16" if is_utf16(data[:4]) else "utf-8-sig"
                yield codecs.getincrementaldecoder(encoding)().decode(data)[:SAMPLE_CHARS]


def _texts(block: CorpusBlock, name: str) -> Iterator[str]:
    return (item.text[:SAMPLE_CHARS] for item in read_file(block, name) if isinstance(item, Document))
