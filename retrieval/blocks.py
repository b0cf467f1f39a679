"""Cutting a corpus into blocks that a worker reads by itself, without parsing a document.

In: the files of a corpus. Out: `CorpusBlock`s (file names, or a range of one row file) of about equal bytes, in reading
order. The cut depends on the corpus alone, never on the number of workers. Memory: names, and one buffer of a file.
Borders: .jsonl at line breaks, .csv at record borders (quoted line breaks are not borders), .parquet at row groups; a
row group is never divided, and neither is a SQuAD .json. Not covered: reading the blocks (`readers.py`).
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.records import Record
from retrieval.csv_records import csv_records, read_header
from retrieval.sources import SQUAD_SUFFIX, CorpusFile, is_row_format, join_path, open_filesystem, suffix

if TYPE_CHECKING:
    import pyarrow.fs as pafs

    from retrieval.config import CorpusConfig

SMALLEST_BLOCK_BYTES = 64 * 1024
LARGEST_BLOCK_BYTES = 16 * 1024 * 1024
BLOCKS_AIMED_AT = 256
BUFFER_BYTES = 1 << 20
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class CorpusBlock(Record):
    """Some consecutive documents of a corpus, by place: named files, or a range of one row file.

    `files` are relative to `root` (absolute, or a URI). `start` and `end` are bytes of a .jsonl or .csv file and row
    groups of a .parquet file; an `end` of -1 is the file's end. `first_row` counts the lines (.jsonl) or rows before.
    """

    ordinal: int
    root: str
    files: tuple[str, ...]
    start: int
    end: int
    first_row: int
    columns: dict[str, Any]
    max_file_bytes: int
    convert_timeout_s: float


@dataclass(frozen=True)
class Rejection(Record):
    """What could not be read: the file, the place in it ("" for the whole file), why in one line, and its bytes."""

    uri: str
    place: str
    reason: str
    bytes: int

    def is_about(self, doc_ids: Container[str]) -> bool:
        """Whether it names one of these documents: by id, or by a file whose name is the id."""
        return self.place.removeprefix("id ") in doc_ids or self.uri in doc_ids

    def describe(self) -> str:
        """`name, place: reason`."""
        return f"{self.uri}{', ' + self.place if self.place else ''}: {self.reason}"


@dataclass(frozen=True)
class RowRange:
    """A part of a row file; see `CorpusBlock`."""

    start: int
    end: int
    first_row: int
    bytes: int


def cut_blocks(
    root: str, files: tuple[CorpusFile, ...], config: CorpusConfig, block_bytes: int | None = None
) -> tuple[CorpusBlock, ...]:
    """Blocks of about `block_bytes` (by default from the corpus's size): small files together, large row files cut."""
    total = sum(file.size for file in files)
    target = block_bytes or min(LARGEST_BLOCK_BYTES, max(SMALLEST_BLOCK_BYTES, total // BLOCKS_AIMED_AT))
    blocks: list[CorpusBlock] = []

    def add(names: tuple[str, ...], part: RowRange) -> None:
        blocks.append(
            CorpusBlock(
                ordinal=len(blocks),
                root=root,
                files=names,
                start=part.start,
                end=part.end,
                first_row=part.first_row,
                columns=config.columns.model_dump(),
                max_file_bytes=int(config.max_file_mb * MEGABYTE),
                convert_timeout_s=config.convert_timeout_s,
            )
        )

    group: list[str] = []
    filled = 0
    filesystem, inner = open_filesystem(root)
    for file in files:
        cut = is_row_format(file.name) and suffix(file.name) != SQUAD_SUFFIX and file.size > target
        if group and (cut or filled + file.size > target):
            add(tuple(group), RowRange(0, -1, 0, filled))
            group, filled = [], 0
        if cut:
            for part in cut_file(filesystem, join_path(inner, file.name), file, target, config.columns.text):
                add((file.name,), part)
        else:
            group.append(file.name)
            filled += file.size
    if group:
        add(tuple(group), RowRange(0, -1, 0, filled))
    return tuple(blocks)


def cut_file(
    filesystem: pafs.FileSystem, path: str, file: CorpusFile, target: int, text_column: str
) -> Iterator[RowRange]:
    """Ranges of one row file. A file that cannot be cut is one range: reading it says what is wrong with it."""
    import pyarrow as pa

    try:
        if suffix(file.name) == ".jsonl":
            parts = list(_cut_lines(filesystem, path, target))
        elif suffix(file.name) == ".csv":
            parts = list(_cut_csv(filesystem, path, target, text_column))
        else:
            parts = list(_cut_row_groups(filesystem, path, target))
    except (OSError, ValueError, pa.ArrowException):
        parts = []
    yield from parts or [RowRange(0, -1, 0, file.size)]


def _cut_lines(filesystem: pafs.FileSystem, path: str, target: int) -> Iterator[RowRange]:
    start = position = lines = first_row = 0
    with filesystem.open_input_file(path) as file:
        if is_utf16(file.read(4)):
            return
        file.seek(0)
        while data := file.read(BUFFER_BYTES):
            begun = 0  # where in `data` the lines that are not yet counted begin
            while (border := data.find(b"\n", max(begun, start + target - position - 1))) >= 0:
                lines += data.count(b"\n", begun, border + 1)
                begun = border + 1
                yield RowRange(start, position + begun, first_row, position + begun - start)
                start, first_row = position + begun, lines
            lines += data.count(b"\n", begun)
            position += len(data)
    if position > start:
        yield RowRange(start, position, first_row, position - start)


def _cut_csv(filesystem: pafs.FileSystem, path: str, target: int, text_column: str) -> Iterator[RowRange]:
    with filesystem.open_input_file(path) as raw:
        file = io.BufferedReader(raw, BUFFER_BYTES)
        if is_utf16(file.read(4)):
            return
        file.seek(0)
        _, delimiter, start = read_header(file, text_column)
        file.seek(start)
        first_row = 0
        border = base = start
        for rows, (position, _) in enumerate(csv_records(file, delimiter), start=1):
            border = base + position
            if border - start >= target:
                yield RowRange(start, border, first_row, border - start)
                start, first_row = border, rows
    if border > start:
        yield RowRange(start, border, first_row, border - start)


def _cut_row_groups(filesystem: pafs.FileSystem, path: str, target: int) -> Iterator[RowRange]:
    import pyarrow.parquet as pq

    with filesystem.open_input_file(path) as file:
        metadata = pq.read_metadata(file)
        start = filled = rows = first_row = 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            filled += group.total_byte_size
            rows += group.num_rows
            if filled >= target:
                yield RowRange(start, number + 1, first_row, filled)
                start, filled, first_row = number + 1, 0, rows
        if start < metadata.num_row_groups:
            yield RowRange(start, metadata.num_row_groups, first_row, filled)


def is_utf16(head: bytes) -> bool:
    """Whether a file that begins with `head` is marked as UTF-16 (a UTF-32 mark begins the same way, and is none)."""
    return head.startswith((b"\xff\xfe", b"\xfe\xff")) and head[:4] != b"\xff\xfe\x00\x00"
