"""What the workers of an index build do: corpus block → chunks → embeddings → shard files.

In: a `BuildJob` and the number of a block (or the pieces of a shard). Out: parts, shard files, and counts for the
driver; texts stay with the workers. What a block gives depends on the block alone, never on the number of workers, and
a finished part is not made again.
Plain Python over Arrow tables: no Ray in here. Not covered: which rows need an embedding and where their shards end
(`rowplan.py`), who calls these functions (`pipeline.py`).
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from retrieval.chunking import Chunker, embedding_text
from retrieval.config import ChunkingConfig
from retrieval.documents import BlockContent, CorpusBlock, Rejection, join_path, open_filesystem, read_block
from retrieval.encoder import Encoder, EncoderSource, Precision, encoder_tokenizer
from retrieval.parts import Parts, copy_tree, local_or_none, part_name
from retrieval.records import Chunk
from retrieval.shards import (
    BATCH_ROWS,
    CHUNKS_FILE,
    LEXICAL_FOLDER,
    LEXICAL_ROWS,
    SHARDS_FOLDER,
    IndexFile,
    LexicalEntry,
    Mode,
    ShardEntry,
    ShardReader,
    chunk_schema,
    document_digest,
    document_schema,
    new_shard_id,
    open_shards,
    text_key,
    write_shard,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from retrieval.vectors import VectorPolicy

    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]
    Keys = npt.NDArray[np.uint64]

READ, CHUNKS, DOCUMENTS, IDS, REJECTED = "read", "chunks", "documents", "ids", "rejected"
PLAN, VECTORS = "plan", "vectors"
BASE_KEYS = "base_keys.npy"
NO_TEXT = "has no text but headings"

Merge = Literal["reuse", "sync", "delta"]


@dataclass(frozen=True)
class BaseVersion:
    """The version of the index that a build starts from; small, and picklable.

    `merge` says what becomes of its documents. `reuse`: none is kept, but equal texts keep their embeddings (a full
    build). `sync`: those that the corpus still holds unchanged are kept with their rows, and neither cut nor embedded
    again; all others are deleted. `delta`: all are kept but those in `deleted` and those that the blocks bring anew.
    """

    store_uri: str
    ref: str
    """`index/<name>/<version>`"""
    merge: Merge = "reuse"
    deleted: tuple[str, ...] = ()
    """Document ids that a delta deletes."""
    mode: Mode = "dense"
    encoder_digest: str = ""
    precision: str = ""

    def directory(self) -> Path:
        """Its files, verified (once per process)."""
        from cluster.manifest import ArtifactRef
        from cluster.store import Store

        return Store(self.store_uri).open_ref(ArtifactRef.parse(self.ref)).directory()

    def open(self) -> tuple[IndexFile, list[ShardReader]]:
        """Its table of contents and shards."""
        return _open_base(self)


@functools.lru_cache(maxsize=2)
def _open_base(base: BaseVersion) -> tuple[IndexFile, list[ShardReader]]:
    return open_shards(base.directory())


class PassageEncoder(Protocol):
    """What phase C needs of an encoder."""

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors, (n, dim) float32."""


MakeEncoder = Callable[[EncoderSource, Precision, str, int | None], PassageEncoder]
"""(source, precision, device, threads) → encoder: `Encoder`, or a stand-in of a measurement."""


@dataclass(frozen=True)
class BuildJob:
    """What all workers of one build know; small, and picklable."""

    parts: Parts
    """Where unfinished work stands."""
    uri: str
    """Where the artifact's files go."""
    mode: Mode
    source: EncoderSource
    """Embeds the chunks; its tokenizer counts their tokens in both modes."""
    encoder_digest: str
    precision: Precision
    chunking: ChunkingConfig
    policy: VectorPolicy
    shard_chunks: int
    base: BaseVersion | None = None
    removed: Container[str] = frozenset()
    """Ids of documents to leave out; picklable."""
    make_encoder: MakeEncoder = field(default=Encoder)

    @property
    def keeps_rows(self) -> bool:
        """Whether rows of the base version stay, so that unchanged documents are passed over."""
        return self.base is not None and self.base.merge != "reuse"

    @property
    def reuses_embeddings(self) -> bool:
        """Whether the base version's embeddings are of this build's encoder and precision."""
        base = self.base
        return (
            base is not None
            and base.mode == self.mode == "dense"
            and (base.encoder_digest, base.precision) == (self.encoder_digest, self.precision)
        )


# --- A: read and chunk


def document_key(doc_id: str, digest: bytes) -> tuple[int, int]:
    """128 bits over a document's id and content, as two uint64."""
    whole = hashlib.blake2b(digest + doc_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(whole[:8], "little"), int.from_bytes(whole[8:], "little")


def id_key(doc_id: str) -> int:
    """64 bits over a document id."""
    return int.from_bytes(hashlib.blake2b(doc_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def write_base_keys(job: BuildJob) -> int:
    """Write the sorted keys of the base version's live documents for `read_part` to look in; returns their number."""
    import numpy as np

    assert job.base is not None
    keys = [
        document_key(doc_id, digest)
        for shard in job.base.open()[1]
        for batch in shard.document_batches(("doc_id", "digest"))
        for doc_id, digest in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    ]
    array = np.array(keys, dtype=np.uint64).reshape(-1, 2)
    job.parts.write_array(BASE_KEYS, KeySet.of(array).keys)
    return len(array)


class KeySet:
    """A set of 128-bit keys in 16 bytes each, which may lie in a memory-mapped file."""

    def __init__(self, keys: Keys) -> None:
        """Wrap keys that are sorted: (n, 2) uint64."""
        self.keys = keys

    @classmethod
    def of(cls, keys: Keys) -> KeySet:
        """The set of `keys`, (n, 2) uint64 in any order."""
        import numpy as np

        return cls(keys[np.lexsort((keys[:, 1], keys[:, 0]))])

    def __contains__(self, key: tuple[int, int]) -> bool:
        import numpy as np

        high, low = self.keys[:, 0], self.keys[:, 1]
        first, last = (int(np.searchsorted(high, np.uint64(key[0]), side)) for side in ("left", "right"))
        return bool((low[first:last] == np.uint64(key[1])).any())


def read_part(job: BuildJob, block: CorpusBlock) -> dict[str, Any]:
    """Phase A for one block: read it, cut what is new, write its parts; returns counts.

    Counts: ordinal, documents, unchanged, chunks, tokens, rejected, removed, and the first rejection in words.
    """
    done = part_name(READ, block.ordinal, ".json")
    if job.parts.exists(done):
        counts: dict[str, Any] = job.parts.read_json(done)
        return counts
    content = read_block(block)
    rows = _cut(job, content)
    job.parts.write_table(part_name(DOCUMENTS, block.ordinal, ".parquet"), rows.documents)
    job.parts.write_table(part_name(CHUNKS, block.ordinal, ".parquet"), rows.chunks)
    job.parts.write_table(part_name(IDS, block.ordinal, ".parquet"), rows.ids)
    rejected = [rejection.to_row() for rejection in rows.rejected]
    job.parts.write_table(part_name(REJECTED, block.ordinal, ".parquet"), _table(rejected, Rejection.schema()))
    counts = {
        "ordinal": block.ordinal,
        "documents": len(rows.ids),
        "unchanged": len(rows.ids) - len(rows.documents),
        "chunks": len(rows.chunks),
        "tokens": sum(rows.chunks["tokens"].to_pylist()),
        "rejected": len(rejected),
        "removed": rows.removed,
        "first_rejected": rows.rejected[0].describe() if rejected else "",
    }
    job.parts.write_json(done, counts)
    return counts


@dataclass(frozen=True)
class _BlockRows:
    documents: pa.Table
    """`document_schema`, of new and changed documents."""
    chunks: pa.Table
    """`chunk_schema` and `text_check`: 64 more bits of the text, so that equal means equal."""
    ids: pa.Table
    """One row per document, unchanged ones included."""
    rejected: list[Rejection]
    removed: int


def ids_schema() -> pa.Schema:
    """doc_id, id_key, the document's key (two halves), uri, bytes, chunks (0 when unchanged), unchanged."""
    import pyarrow as pa

    names = {"doc_id": pa.string(), "id_key": pa.uint64(), "key_high": pa.uint64(), "key_low": pa.uint64()}
    others = {"uri": pa.string(), "bytes": pa.int64(), "chunks": pa.int64(), "unchanged": pa.bool_()}
    return pa.schema(list((names | others).items()))


def _cut(job: BuildJob, content: BlockContent) -> _BlockRows:
    import pyarrow as pa

    chunker = _chunker(job.source, job.chunking)
    unchanged = KeySet(job.parts.read_array(BASE_KEYS)) if job.keeps_rows else ()
    documents: list[dict[str, Any]] = []
    chunks: list[dict[str, Any]] = []
    ids: list[dict[str, Any]] = []
    rejected = list(content.rejected)
    removed = 0
    for document in content.documents:
        if document.doc_id in job.removed:
            removed += 1
            continue
        digest = document_digest(document)
        high, low = document_key(document.doc_id, digest)
        size = len(document.text.encode("utf-8", "surrogatepass"))
        row = {"doc_id": document.doc_id, "id_key": id_key(document.doc_id), "key_high": high, "key_low": low}
        row |= {"uri": document.uri, "bytes": size, "chunks": 0, "unchanged": (high, low) in unchanged}
        if not row["unchanged"]:
            cut = [_chunk_row(chunk) for chunk in chunker.chunk(document)]
            if not cut:
                rejected.append(Rejection(document.uri, f"id {document.doc_id}", NO_TEXT, size))
                continue
            row["chunks"] = len(cut)
            chunks += cut
            documents.append({**document.to_row(), "digest": digest})
        ids.append(row)
    checked = chunk_schema().append(pa.field("text_check", pa.uint64()))
    tables = (_table(documents, document_schema()), _table(chunks, checked), _table(ids, ids_schema()))
    return _BlockRows(*tables, rejected, removed)


def _chunk_row(chunk: Chunk) -> dict[str, Any]:
    text = embedding_text(chunk.title, chunk.heading, chunk.text)
    return {**chunk.to_row(), "text_key": text_key(text), "text_check": text_check(text)}


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=schema)


@functools.lru_cache(maxsize=4)
def _chunker(source: EncoderSource, chunking: ChunkingConfig) -> Chunker:
    """One per worker process: reading the tokenizer takes longer than cutting a small block."""
    return Chunker(encoder_tokenizer(source.directory()), chunking)


# --- C: embed


def vectors_part(ordinal: int, precision: str, embed: Rows) -> str:
    """Name of the part with the embeddings of the rows `embed` of a block; other rows have another name."""
    rows = hashlib.blake2b(precision.encode() + embed.astype("<i8").tobytes(), digest_size=8).hexdigest()
    return part_name(VECTORS, ordinal, f"-{rows}.npy")


class EmbedParts:
    """Phase C: embeds what `rowplan.py` says of each block; one per actor, which loads the encoder once."""

    def __init__(self, job: BuildJob, device: str, threads: int | None) -> None:
        """Load nothing yet: an actor whose blocks are all finished needs no model."""
        self._job = job
        self._device = device
        self._threads = threads
        self._encoder: PassageEncoder | None = None

    def embed(self, ordinal: int) -> dict[str, Any]:
        """Embed one block's rows unless that is done; returns ordinal, texts embedded now, and seconds of encoding."""
        rows = self._job.parts.read_arrays(part_name(PLAN, ordinal, ".npz"))["embed"]
        name = vectors_part(ordinal, self._job.precision, rows)
        if not len(rows) or self._job.parts.exists(name):
            return {"ordinal": ordinal, "texts": 0, "seconds": 0.0}
        columns = ("title", "heading", "text")
        table = self._job.parts.read_table(part_name(CHUNKS, ordinal, ".parquet"), columns).take(rows)
        texts = [embedding_text(*row) for row in zip(*(table[column].to_pylist() for column in columns), strict=True)]
        if self._encoder is None:
            job = self._job
            self._encoder = job.make_encoder(job.source, job.precision, self._device, self._threads)
        began = time.perf_counter()
        vectors = self._encoder.encode_passages(texts)
        seconds = time.perf_counter() - began
        self._job.parts.write_array(name, vectors)
        return {"ordinal": ordinal, "texts": len(texts), "seconds": seconds}


# --- D: shards


@dataclass(frozen=True)
class Piece:
    """Kept rows `start` to `stop` of one block: a part of a shard."""

    ordinal: int
    start: int
    stop: int


def build_shard(job: BuildJob, pieces: Sequence[Piece], threads: int | None = None) -> ShardEntry:
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


def _write_pieces(job: BuildJob, pieces: Sequence[Piece], directory: Path) -> ShardEntry:
    vectors = _piece_vectors(job, pieces) if job.mode == "dense" else None
    return write_shard(directory, _piece_documents(job, pieces), _piece_chunks(job, pieces), vectors, job.policy)


def _piece_rows(job: BuildJob, piece: Piece) -> Rows:
    rows: Rows = job.parts.read_arrays(part_name(PLAN, piece.ordinal, ".npz"))["rows"]
    return rows[piece.start : piece.stop]


def _piece_chunks(job: BuildJob, pieces: Sequence[Piece]) -> Iterator[pa.RecordBatch]:
    for piece in pieces:
        table = job.parts.read_table(part_name(CHUNKS, piece.ordinal, ".parquet"), chunk_schema().names)
        yield from _batches(table.take(_piece_rows(job, piece)))


def _piece_documents(job: BuildJob, pieces: Sequence[Piece]) -> Iterator[pa.RecordBatch]:
    import pyarrow.compute as pc

    for piece in pieces:
        owners = job.parts.read_table(part_name(CHUNKS, piece.ordinal, ".parquet"), ["doc_id"])["doc_id"]
        here = owners.take(_piece_rows(job, piece)).unique()
        documents = job.parts.read_table(part_name(DOCUMENTS, piece.ordinal, ".parquet"))
        yield from _batches(documents.filter(pc.is_in(documents["doc_id"], here)))


def _batches(table: pa.Table) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = table.combine_chunks().to_batches(max_chunksize=BATCH_ROWS)
    return batches


def _piece_vectors(job: BuildJob, pieces: Sequence[Piece]) -> Iterator[Vectors]:
    vectors = _VectorSource(job)
    for piece in pieces:
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
        return self._job.parts.read_arrays(part_name(PLAN, ordinal, ".npz"))

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


# --- lexical files


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


def text_check(text: str) -> int:
    """64 bits that are independent of `text_key`."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"check").digest(), "little"
    )
