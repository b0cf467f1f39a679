"""Phase D of an index build: the files of a shard from finished parts, and BM25 over shards.

In: a `BuildJob` and the pieces of a shard, or shards that stand under a URI. Out: their files there, and the entries
for `index.json`. A vector comes from the part of the block that embedded its text first, or from the base version.
Not covered: what a shard's files hold (`shards.py`), where shards end (`rowplan.py`).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.build_job import BuildJob
from retrieval.chunking import embedding_text
from retrieval.embedding import CHUNKS, DOCUMENTS, plan_part, vectors_part
from retrieval.parts import copy_tree, local_or_none, part_name
from retrieval.shards import (
    BATCH_ROWS,
    CHUNKS_FILE,
    LEXICAL_FOLDER,
    LEXICAL_ROWS,
    SHARDS_FOLDER,
    LexicalEntry,
    ShardEntry,
    ShardReader,
    chunk_schema,
    new_shard_id,
    write_shard,
)
from retrieval.sources import join_path, open_filesystem

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Kept rows `start` to `stop` of one block: a part of a shard."""

    ordinal: int
    start: int
    stop: int


@dataclass(frozen=True)
class MergedPiece:
    """Rows `start` to `stop` of those that stay of one shard of the base version, which is written anew."""

    shard_id: str
    start: int
    stop: int


def merged_part(shard_id: str) -> str:
    """Name of the part with the rows that stay of a shard of the base version: sorted, (n,) int64."""
    return f"merged/{shard_id}.npy"


def build_shard(job: BuildJob, pieces: Sequence[Piece | MergedPiece], threads: int | None = None) -> ShardEntry:
    """Phase D for one shard: write all its files under `job.uri`; returns its entry for `index.json`."""
    if threads is not None and job.mode == "dense":
        import faiss

        faiss.omp_set_num_threads(threads)
    shard_id = new_shard_id()
    target = join_path(job.uri, f"{SHARDS_FOLDER}/{shard_id}")
    local = local_or_none(target)
    if local is not None:
        return _write_pieces(job, pieces, local)
    with tempfile.TemporaryDirectory() as folder:
        entry = _write_pieces(job, pieces, Path(folder) / shard_id)
        copy_tree(Path(folder) / shard_id, target)
    return entry


def _write_pieces(job: BuildJob, pieces: Sequence[Piece | MergedPiece], directory: Path) -> ShardEntry:
    vectors = _piece_vectors(job, pieces) if job.mode == "dense" else None
    return write_shard(directory, _piece_documents(job, pieces), _piece_chunks(job, pieces), vectors, job.policy)


def _merged_rows(job: BuildJob, piece: MergedPiece) -> tuple[ShardReader, Rows]:
    """The shard of the base version, and the piece's rows in it."""
    assert job.base is not None
    shard = next(shard for shard in job.base.open()[1] if shard.entry.shard_id == piece.shard_id)
    return shard, job.parts.read_array(merged_part(piece.shard_id))[piece.start : piece.stop]


def _piece_rows(job: BuildJob, piece: Piece) -> Rows:
    rows: Rows = job.parts.read_arrays(plan_part(job, piece.ordinal))["rows"]
    return rows[piece.start : piece.stop]


def _piece_chunks(job: BuildJob, pieces: Sequence[Piece | MergedPiece]) -> Iterator[pa.RecordBatch]:
    for piece in pieces:
        if isinstance(piece, MergedPiece):
            shard, rows = _merged_rows(job, piece)
            yield from shard.batches(rows)
            continue
        table = job.parts.read_table(part_name(CHUNKS, piece.ordinal, ".parquet"), chunk_schema().names)
        yield from _batches(table.take(_piece_rows(job, piece)))


def _piece_documents(job: BuildJob, pieces: Sequence[Piece | MergedPiece]) -> Iterator[pa.RecordBatch]:
    import pyarrow.compute as pc

    for piece in pieces:
        if isinstance(piece, MergedPiece):
            shard, rows = _merged_rows(job, piece)
            here = shard.column("doc_id").take(rows).unique()
            yield from (batch.filter(pc.is_in(batch.column("doc_id"), here)) for batch in shard.document_batches())
            continue
        owners = job.parts.read_table(part_name(CHUNKS, piece.ordinal, ".parquet"), ["doc_id"])["doc_id"]
        here = owners.take(_piece_rows(job, piece)).unique()
        documents = job.parts.read_table(part_name(DOCUMENTS, piece.ordinal, ".parquet"))
        yield from _batches(documents.filter(pc.is_in(documents["doc_id"], here)))


def _batches(table: pa.Table) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = table.combine_chunks().to_batches(max_chunksize=BATCH_ROWS)
    return batches


def _piece_vectors(job: BuildJob, pieces: Sequence[Piece | MergedPiece]) -> Iterator[Vectors]:
    vectors = _VectorSource(job)
    for piece in pieces:
        if isinstance(piece, MergedPiece):
            shard, rows = _merged_rows(job, piece)
            assert shard.vectors is not None, f"{piece.shard_id} holds no vectors"
            yield from (shard.vectors[rows[start : start + BATCH_ROWS]] for start in range(0, len(rows), BATCH_ROWS))
            continue
        sources = vectors.plan(piece.ordinal)["source"][piece.start : piece.stop]
        for start in range(0, len(sources), BATCH_ROWS):
            yield vectors.gather(sources[start : start + BATCH_ROWS])


def embedded_here(ordinal: int, places: Rows) -> Rows:
    """Source of rows whose vectors are rows `places` of a block's vectors part."""
    return (ordinal << 32) + places


def embedded_in_base(rows: Rows) -> Rows:
    """Source of rows whose vectors are those of global `rows` of the base version."""
    return -1 - rows


class _VectorSource:
    """Vectors by source (`embedded_here`, `embedded_in_base`); keeps a few parts open."""

    def __init__(self, job: BuildJob) -> None:
        self._job = job
        self.plan = functools.lru_cache(maxsize=4)(self._plan)
        self._part = functools.lru_cache(maxsize=4)(self._read_part)

    def _plan(self, ordinal: int) -> dict[str, Rows]:
        return self._job.parts.read_arrays(plan_part(self._job, ordinal))

    def _read_part(self, ordinal: int) -> Vectors:
        name = vectors_part(ordinal, self._job.precision, self.plan(ordinal)["embed"])
        return self._job.parts.read_array(name)

    def gather(self, sources: Rows) -> Vectors:
        """(n, dim) float32."""
        import numpy as np

        found: Vectors | None = None
        for part in np.unique(np.where(sources < 0, -1, sources >> 32)):
            here = np.flatnonzero(sources < 0 if part < 0 else sources >> 32 == part)
            if part < 0:
                vectors = self._from_base(-1 - sources[here])
            else:
                vectors = self._part(int(part))[sources[here] & 0xFFFFFFFF]
            if found is None:
                found = np.empty((len(sources), vectors.shape[1]), dtype=np.float32)
            found[here] = vectors
        assert found is not None, "no rows to gather vectors for"
        return found

    def _from_base(self, rows: Rows) -> Vectors:
        import numpy as np

        assert self._job.base is not None
        index, shards = self._job.base.open()
        owners = np.searchsorted(np.array(index.offsets()), rows, side="right") - 1
        found: Vectors | None = None
        for owner in np.unique(owners):
            here = np.flatnonzero(owners == owner)
            vectors = shards[owner].vectors
            assert vectors is not None, f"{self._job.base.ref} holds no vectors"
            if found is None:
                found = np.empty((len(rows), vectors.shape[1]), dtype=np.float32)
            found[here] = vectors[rows[here] - index.offsets()[owner]]
        assert found is not None
        return found


@dataclass(frozen=True)
class LexicalShard:
    """A shard as the lexical files see it."""

    entry: ShardEntry
    offset: int
    """Its first global row."""
    deleted: Rows | None = None
    """Rows of the shard that this version deletes."""


def build_lexical(uri: str, place: int, shards: Sequence[LexicalShard]) -> LexicalEntry:
    """BM25 over the live rows of `shards`, whose files stand under `uri`, into `lexical/<place>/` there.

    `rows.npy` gives the global row of each BM25 row.
    """
    import numpy as np

    from retrieval.lexical import LexicalIndex

    rows: list[Rows] = []
    lexical = LexicalIndex.build(text for shard in shards for text in _live_texts(uri, shard, rows))
    folder = f"{LEXICAL_FOLDER}/{place}"
    target = join_path(uri, folder)
    with tempfile.TemporaryDirectory() as temporary:
        lexical.save(Path(temporary) / "files")
        found = np.concatenate(rows)
        np.save(Path(temporary) / "files" / LEXICAL_ROWS, found, allow_pickle=False)
        copy_tree(Path(temporary) / "files", target)
    return LexicalEntry(folder, len(found))


def _live_texts(uri: str, shard: LexicalShard, rows: list[Rows]) -> Iterator[str]:
    """What BM25 reads of each live row; appends the global rows to `rows`."""
    import numpy as np
    import pyarrow as pa

    filesystem, path = open_filesystem(join_path(uri, f"{SHARDS_FOLDER}/{shard.entry.shard_id}/{CHUNKS_FILE}"))
    live = np.ones(shard.entry.rows, dtype=bool)
    if shard.deleted is not None:
        live[shard.deleted] = False
    rows.append(np.flatnonzero(live) + shard.offset)
    row = 0
    with filesystem.open_input_file(path) as file:
        reader = pa.ipc.open_file(file)
        for place in range(reader.num_record_batches):
            batch = reader.get_batch(place)
            fields = (batch.column(name).to_pylist() for name in ("title", "heading", "text"))
            for values in zip(*fields, strict=True):
                if live[row]:
                    yield embedding_text(*values)
                row += 1
