"""Phase B of an index build: which rows an index gets, where each row's vector comes from, where shards end.

In: the parts that `embedding.read_part` wrote, and the base version. Out: a plan part per block, `rejected.parquet`,
tombstones of the base version's shards, and a `RowPlan` of counts and places. Runs in one task: it sees hashes of ids
and of texts, 40 bytes a row, and texts only to compare those that the base version seems to hold.
Of documents with one id the first in corpus order stays. Of rows with one text the first is embedded and the others
share its vector; a text that the base version holds is not embedded at all.
Not covered: reading (`embedding.py`), when shards are written anew (`compaction.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrieval.build_job import BuildJob
from retrieval.chunking import embedding_text
from retrieval.compaction import Fill, document_rows, shards_to_merge
from retrieval.documents import Rejection, join_path, open_filesystem, repeated_id
from retrieval.embedding import (
    CHUNKS,
    IDS,
    REJECTED,
    KeySet,
    document_key,
    id_key,
    ids_schema,
    plan_part,
)
from retrieval.parts import Parts, part_name
from retrieval.records import Document
from retrieval.shard_files import MergedPiece, Piece, embedded_here, embedded_in_base, merged_part
from retrieval.shards import REJECTED_FILE, TOMBSTONES_FOLDER, ShardEntry, ShardReader

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    Rows = npt.NDArray[np.int64]
    Keys = npt.NDArray[np.uint64]
    Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class BaseChange:
    """What a build that keeps rows of its base version does to them."""

    kept_documents: int = 0
    kept_rows: int = 0
    kept_tokens: int = 0
    deleted_documents: int = 0
    changed_documents: int = 0
    """Of the deleted ones, those that the corpus blocks bring anew."""
    shards: tuple[ShardEntry, ...] = ()
    """Those that the new version adopts: with live rows, and not merged."""
    deleted_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of those, shard id to its rows that are deleted in the new version, earlier deletions included, where any are."""
    merged: tuple[str, ...] = ()
    """Shards whose live rows are written anew; not empty when the update compacts."""


REJECTIONS_SHOWN = 10


@dataclass(frozen=True)
class RowPlan:
    """What the driver learns of phase B: counts and places, no texts."""

    shards: tuple[tuple[Piece | MergedPiece, ...], ...]
    """New shards in order."""
    embed: tuple[tuple[int, int], ...]
    """(block, texts to embed), of blocks with any."""
    documents: int
    """New and changed documents."""
    rows: int
    """Their chunks."""
    tokens: int
    embedded: int
    reused: int
    """Rows that take their embedding from the base version."""
    shared: int
    """Rows that take their embedding from an earlier row of this build."""
    rejected: int
    rejections: tuple[str, ...]
    """The first ones, in words."""
    base: BaseChange = BaseChange()

    @property
    def first_rejected(self) -> str:
        """In words; empty when there is none."""
        return self.rejections[0] if self.rejections else ""


def plan_rows(job: BuildJob, blocks: int) -> RowPlan:
    """Plan the rows of `blocks` corpus blocks, all of which have been read."""
    import numpy as np

    documents = _Documents.read(job.parts, blocks)
    later = _later_duplicates(job.parts, documents)
    rows = [np.flatnonzero(np.repeat(~gone, chunks)) for gone, chunks in documents.by_block(later, documents.chunks)]
    texts = _Texts.read(job.parts, rows)
    if job.mode == "dense":
        source, embed, reused, shared = _sources(job, texts, rows)
    else:
        source, reused, shared = np.zeros(0, dtype=np.int64), 0, 0
        embed = [np.zeros(0, dtype=np.int64)] * blocks
    start = 0
    for ordinal, kept in enumerate(rows):
        own = source[start : start + len(kept)]
        start += len(kept)
        job.parts.write_arrays(plan_part(job, ordinal), rows=kept, source=own, embed=embed[ordinal])
    base, merged = _change_base(job, documents, later, sum(map(len, rows))) if job.keeps_rows else (BaseChange(), {})
    added = [chunks[~gone] for gone, chunks in documents.by_block(later, documents.chunks)]
    shards = _divide_merged(merged, added, job.shard_chunks)
    rejected, rejections = _write_rejected(job, documents, later)
    return RowPlan(
        shards=tuple(shards),
        embed=tuple((ordinal, len(places)) for ordinal, places in enumerate(embed) if len(places)),
        documents=int((~later & ~documents.unchanged).sum()),
        rows=sum(map(len, rows)),
        tokens=texts.tokens,
        embedded=sum(map(len, embed)),
        reused=reused,
        shared=shared,
        rejected=rejected,
        rejections=rejections,
        base=base,
    )


@dataclass(frozen=True)
class _Documents:
    """Hashes of all documents, in corpus order; `sizes` divides them by block."""

    sizes: list[int]
    ids: Keys
    keys: Keys
    """(n, 2): id and content."""
    chunks: Rows
    unchanged: Flags

    @classmethod
    def read(cls, parts: Parts, blocks: int) -> _Documents:
        import numpy as np

        columns = ["id_key", "key_high", "key_low", "chunks", "unchanged"]
        none = ids_schema().empty_table()  # a delta may bring no blocks at all
        tables = (parts.read_table(part_name(IDS, ordinal, ".parquet"), columns) for ordinal in range(blocks))
        arrays = [[table[name].to_numpy() for name in columns] for table in itertools.chain([none], tables)]
        ids, high, low, chunks, unchanged = (np.concatenate(column) for column in zip(*arrays, strict=True))
        return cls([len(block[0]) for block in arrays[1:]], ids, np.stack([high, low], axis=1), chunks, unchanged)

    def by_block(self, *arrays: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], ...]]:
        """Slices of `arrays` (n, …) for each block in turn."""
        start = 0
        for size in self.sizes:
            yield tuple(array[start : start + size] for array in arrays)
            start += size


def _later_duplicates(parts: Parts, documents: _Documents) -> Flags:
    """Which documents have the id of an earlier one, (n,) bool. Ids are read only where their hashes are equal."""
    import numpy as np

    order = np.argsort(documents.ids, kind="stable")
    same = documents.ids[order][1:] == documents.ids[order][:-1]
    suspects = np.zeros(len(order), dtype=bool)
    suspects[order[1:][same]] = suspects[order[:-1][same]] = True
    later = np.zeros(len(order), dtype=bool)
    seen: set[str] = set()
    for ordinal, (block_suspects, block_later) in enumerate(documents.by_block(suspects, later)):
        places = np.flatnonzero(block_suspects)
        if not len(places):
            continue
        names = parts.read_table(part_name(IDS, ordinal, ".parquet"), ["doc_id"])["doc_id"].take(places).to_pylist()
        for place, name in zip(places, names, strict=True):
            block_later[place] = name in seen
            seen.add(name)
    return later


@dataclass(frozen=True)
class _Texts:
    """Hashes of the texts of all rows, in row order."""

    keys: Keys
    checks: Keys
    tokens: int

    @classmethod
    def read(cls, parts: Parts, rows: list[Rows]) -> _Texts:
        import numpy as np

        keys, checks, tokens = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.uint64)], 0
        for ordinal, kept in enumerate(rows):
            table = parts.read_table(part_name(CHUNKS, ordinal, ".parquet"), ["text_key", "text_check", "tokens"])
            keys.append(table["text_key"].to_numpy()[kept])
            checks.append(table["text_check"].to_numpy()[kept])
            tokens += int(table["tokens"].to_numpy()[kept].sum())
        return cls(np.concatenate(keys), np.concatenate(checks), tokens)

    def firsts(self) -> Rows:
        """For each row, the first row with its text: (n,) int64."""
        import numpy as np

        order = np.lexsort((self.checks, self.keys))  # stable: equal texts stay in row order
        keys, checks = self.keys[order], self.checks[order]
        begins = np.ones(len(order), dtype=bool)
        begins[1:] = (keys[1:] != keys[:-1]) | (checks[1:] != checks[:-1])
        found = np.empty(len(order), dtype=np.int64)
        found[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
        return found


def _sources(job: BuildJob, texts: _Texts, rows: list[Rows]) -> tuple[Rows, list[Rows], int, int]:
    """Where each row's vector comes from, the rows to embed of each block, rows reused, rows shared."""
    import numpy as np

    firsts = texts.firsts()
    is_first = firsts == np.arange(len(firsts))
    in_base = _find_in_base(job, texts, rows, is_first)
    source = np.empty(len(firsts), dtype=np.int64)
    embed: list[Rows] = []
    start = 0
    for ordinal, kept in enumerate(rows):
        block = slice(start, start + len(kept))
        start += len(kept)
        new = np.flatnonzero(is_first[block] & (in_base[block] < 0))
        embed.append(kept[new])
        source[block] = embedded_in_base(in_base[block])
        source[block][new] = embedded_here(ordinal, np.arange(len(new), dtype=np.int64))
    source = source[firsts]
    return source, embed, int((is_first & (in_base >= 0)).sum()), int((~is_first).sum())


def _find_in_base(job: BuildJob, texts: _Texts, rows: list[Rows], is_first: Flags) -> Rows:
    """The base version's global row with the same text, -1 where there is none: (n,) int64; only for first rows."""
    import numpy as np

    found = np.full(len(is_first), -1, dtype=np.int64)
    if job.base is None or not job.reuses_embeddings:
        return found
    _, shards = job.base.open()
    keys = np.concatenate([shard.text_keys() for shard in shards])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    start = 0
    for ordinal, kept in enumerate(rows):
        block = slice(start, start + len(kept))
        start += len(kept)
        places = np.minimum(np.searchsorted(keys, texts.keys[block]), len(keys) - 1)
        candidates = np.flatnonzero((keys[places] == texts.keys[block]) & is_first[block])
        if len(candidates):
            there = order[places[candidates]]
            equal = _same_texts(job, ordinal, kept[candidates], shards, there)
            found[block][candidates[equal]] = there[equal]
    return found


def _same_texts(job: BuildJob, ordinal: int, rows: Rows, shards: list[ShardReader], there: Rows) -> Flags:
    """Whether block rows and global base rows hold the same text, pair by pair: (n,) bool."""
    import numpy as np

    columns = ("title", "heading", "text")
    table = job.parts.read_table(part_name(CHUNKS, ordinal, ".parquet"), columns).take(rows)
    ours = [embedding_text(*row) for row in zip(*(table[name].to_pylist() for name in columns), strict=True)]
    equal = np.zeros(len(rows), dtype=bool)
    offset = 0
    for shard in shards:
        inside = np.flatnonzero((there >= offset) & (there < offset + shard.rows))
        inside = inside[np.argsort(there[inside])]  # in row order, as the shard's text lies
        theirs = shard.search_texts(there[inside] - offset)
        equal[inside] = [text == ours[place] for place, text in zip(inside, theirs, strict=True)]
        offset += shard.rows
    return equal


def _divide(blocks: list[Rows], most: int) -> list[tuple[Piece, ...]]:
    """Consecutive blocks in shards of at most `most` rows, given the rows of each document by block.

    A block that is larger is cut between documents; a document is never divided, so a larger one has its own shard.
    """
    shards: list[tuple[Piece, ...]] = []
    pieces: list[Piece] = []
    filled = 0

    def close() -> None:
        nonlocal pieces, filled
        if pieces:
            shards.append(tuple(pieces))
        pieces, filled = [], 0

    for ordinal, chunks in enumerate(blocks):
        total = int(chunks.sum())
        start = 0
        for rows in [total] if total <= most else [int(count) for count in chunks]:
            if filled + rows > most:
                close()
            if rows and pieces and pieces[-1].ordinal == ordinal:
                pieces[-1] = Piece(ordinal, pieces[-1].start, start + rows)
            elif rows:
                pieces.append(Piece(ordinal, start, start + rows))
            start += rows
            filled += rows
    close()
    return shards


def _divide_merged(merged: dict[str, Rows], blocks: list[Rows], most: int) -> list[tuple[Piece | MergedPiece, ...]]:
    """`_divide` over the shards that are written anew (the rows of each of their documents), then the blocks."""
    names = list(merged)
    return [
        tuple(
            MergedPiece(names[piece.ordinal], piece.start, piece.stop)
            if piece.ordinal < len(names)
            else Piece(piece.ordinal - len(names), piece.start, piece.stop)
            for piece in pieces
        )
        for pieces in _divide([*merged.values(), *blocks], most)
    ]


def _write_rejected(job: BuildJob, documents: _Documents, later: Flags) -> tuple[int, tuple[str, ...]]:
    """Write `rejected.parquet`; returns its rows and the first ones in words."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rejected, first = 0, list[str]()
    filesystem, path = open_filesystem(join_path(job.uri, REJECTED_FILE))
    with (
        filesystem.open_output_stream(path) as sink,
        pq.ParquetWriter(sink, Rejection.schema(), compression="zstd") as writer,
    ):
        for ordinal, (repeated,) in enumerate(documents.by_block(later)):
            table = job.parts.read_table(part_name(REJECTED, ordinal, ".parquet"))
            if repeated.any():
                table = pa.concat_tables([table, _repeated(job.parts, ordinal, np.flatnonzero(repeated))])
            if len(table):
                shown = table.slice(0, REJECTIONS_SHOWN - len(first)).to_pylist()
                first += [Rejection.from_row(row).describe() for row in shown]
                writer.write_table(table)
                rejected += len(table)
    return rejected, tuple(first)


def _repeated(parts: Parts, ordinal: int, places: Rows) -> pa.Table:
    import pyarrow as pa

    table = parts.read_table(part_name(IDS, ordinal, ".parquet"), ["doc_id", "uri", "bytes"]).take(places)
    rows = [
        dataclasses.replace(repeated_id(Document(row["doc_id"], "", "", row["uri"])), bytes=row["bytes"]).to_row()
        for row in table.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=Rejection.schema())


def _change_base(
    job: BuildJob, documents: _Documents, later: Flags, new_rows: int
) -> tuple[BaseChange, dict[str, Rows]]:
    """What stays and what goes of the base version, and for each shard to write anew the rows of its documents.

    Writes the tombstones of the shards that stay under `job.uri`, and the rows of the others as parts.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    assert job.base is not None
    keep = _KeepsDocument(job, documents, later)
    kept_documents = kept_rows = kept_tokens = deleted_documents = changed_documents = 0
    living: list[tuple[ShardReader, Flags]] = []
    for shard in job.base.open()[1]:
        gone: list[str] = []
        for batch in shard.document_batches(("doc_id", "digest")):
            pairs = zip(*(column.to_pylist() for column in batch.columns), strict=True)
            gone += [doc_id for doc_id, digest in pairs if not keep(doc_id, digest)]
            kept_documents += len(batch)
        kept_documents -= len(gone)
        deleted_documents += len(gone)
        changed_documents += sum(map(keep.is_replaced, gone))
        deleted = np.zeros(shard.rows, dtype=bool)
        deleted[shard.tombstones] = True
        deleted |= pc.is_in(shard.column("doc_id"), pa.array(gone, pa.string())).to_numpy()
        kept_rows += int((~deleted).sum())
        kept_tokens += int(shard.column("tokens").to_numpy()[~deleted].sum())
        if not deleted.all():
            living.append((shard, deleted))
    shards, deleted_rows, merged = _settle_shards(job, living, new_rows)
    change = BaseChange(
        kept_documents=kept_documents,
        kept_rows=kept_rows,
        kept_tokens=kept_tokens,
        deleted_documents=deleted_documents,
        changed_documents=changed_documents,
        shards=tuple(shards),
        deleted_rows=deleted_rows,
        merged=tuple(merged),
    )
    return change, merged


def _settle_shards(
    job: BuildJob, living: list[tuple[ShardReader, Flags]], new_rows: int
) -> tuple[list[ShardEntry], dict[str, int], dict[str, Rows]]:
    """Of shards with their deleted rows: those that stay, how many rows each of them misses, and the rows of each
    document of those that are written anew."""
    import numpy as np

    fills = [Fill(shard.rows, int(deleted.sum())) for shard, deleted in living]
    chosen = shards_to_merge(job.compaction, fills, new_rows) if job.compaction is not None else set()
    shards: list[ShardEntry] = []
    deleted_rows: dict[str, int] = {}
    merged: dict[str, Rows] = {}
    for place, (shard, deleted) in enumerate(living):
        shard_id = shard.entry.shard_id
        if place in chosen:
            rows = np.flatnonzero(~deleted)
            merged[shard_id] = document_rows(shard, rows)
            job.parts.write_array(merged_part(shard_id), rows)
            continue
        shards.append(shard.entry)
        if deleted.any():
            deleted_rows[shard_id] = int(deleted.sum())
            Parts(job.uri).write_array(f"{TOMBSTONES_FOLDER}/{shard_id}.npy", np.flatnonzero(deleted))
    return shards, deleted_rows, merged


class _KeepsDocument:
    """Whether a document of the base version stays; see `BaseVersion`."""

    def __init__(self, job: BuildJob, documents: _Documents, later: Flags) -> None:
        assert job.base is not None
        self._job = job
        self._all = job.base.merge == "delta"
        self._deleted = set(job.base.deleted)
        same = ~later & documents.unchanged
        self._unchanged = KeySet.of(documents.keys[same])
        self._replaced = set(documents.ids[~later & ~documents.unchanged].tolist())

    def is_replaced(self, doc_id: str) -> bool:
        """Whether the blocks bring the document with other content."""
        return id_key(doc_id) in self._replaced

    def __call__(self, doc_id: str, digest: bytes) -> bool:
        if document_key(doc_id, digest) in self._unchanged:
            return True
        if not self._all or doc_id in self._deleted or doc_id in self._job.removed:
            return False
        return not self.is_replaced(doc_id)
