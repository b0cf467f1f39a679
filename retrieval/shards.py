"""Shards: the immutable parts of an index, written once and read by row.

In: batches of documents, chunks and vectors. Out: `shards/<shard_id>/` (documents.parquet, chunks.arrow, attributes,
vectors.npy, index.faiss) and `index.json`, which lists the shards in order. A global row is the rows of the shards
before, plus the row in the shard. A shard never changes: later versions of an index add shards, and name the rows that
they delete in `tombstones/<shard_id>.npy`.
Chunk rows are memory-mapped, so one row costs a page, not the shard. The caller has verified the files' digests;
readers still refuse what does not have the shape that `index.json` says.
Not covered: which rows belong to a shard (`pipeline.py`), searching (`vectors.py`, `retriever.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ArtifactError
from cluster.records import Record
from retrieval.chunking import embedding_text
from retrieval.records import Chunk, Document

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from retrieval.attributes import Attributes
    from retrieval.vectors import VectorPolicy

    Rows = npt.NDArray[np.int64]
    Vectors = npt.NDArray[np.float32]

INDEX_FORMAT = 2
INDEX_JSON = "index.json"
SHARDS_FOLDER = "shards"
TOMBSTONES_FOLDER = "tombstones"
LEXICAL_FOLDER = "lexical"
LEXICAL_ROWS = "rows.npy"
REJECTED_FILE = "rejected.parquet"
DOCUMENTS_FILE = "documents.parquet"
CHUNKS_FILE = "chunks.arrow"
VECTORS_FILE = "vectors.npy"
BATCH_ROWS = 8192
TEXTS_READ = 64
"""Documents read at a time with their text: 8,192 of 100 kB each would be 800 MB."""
DIGEST_BYTES = 16

Mode = Literal["dense", "lexical"]


def new_shard_id() -> str:
    """12 hexadecimal digits that no other shard has."""
    return uuid.uuid4().hex[:12]


def document_digest(document: Document) -> bytes:
    """16 bytes over all that an index keeps of a document beside its id: title, text, uri, metadata."""
    content = [document.title, document.text, document.uri, document.metadata]
    return hashlib.blake2b(
        json.dumps(content, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass"),
        digest_size=DIGEST_BYTES,
    ).digest()


def text_key(text: str) -> int:
    """64 bits of what the encoder reads for a chunk (`embedding_text`). Equal keys are checked by the text itself."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@functools.cache
def document_schema() -> pa.Schema:
    """`Document` columns and `digest` (16 bytes, see `document_digest`)."""
    import pyarrow as pa

    return Document.schema().append(pa.field("digest", pa.binary(DIGEST_BYTES)))


@functools.cache
def chunk_schema() -> pa.Schema:
    """`Chunk` columns and `text_key` (uint64, see `text_key`)."""
    import pyarrow as pa

    return Chunk.schema().append(pa.field("text_key", pa.uint64()))


@dataclasses.dataclass(frozen=True)
class ShardEntry(Record):
    """What `index.json` says of one shard."""

    shard_id: str
    rows: int
    """Chunks, deleted ones included."""
    documents: int
    """Documents, deleted ones included."""
    dimension: int
    """Of the vectors; 0 where there are none."""
    vectors: dict[str, Any]
    """What `build_vector_index` returned: kind, search parameters, measured recall; empty without vectors."""


@dataclasses.dataclass(frozen=True)
class LexicalEntry(Record):
    """One BM25 index, over live rows only; `rows.npy` in it gives the global row of each of its rows."""

    folder: str
    """Relative to the artifact's files."""
    rows: int


@dataclasses.dataclass(frozen=True)
class IndexFile:
    """The table of contents of an index."""

    mode: Mode
    """What `search.mode: auto` came to: `lexical` means that there are no vectors."""
    encoder: str
    """Name of the encoder that embedded the chunks; empty in a lexical index."""
    encoder_digest: str
    """Content digest of that encoder; empty in a lexical index."""
    precision: str
    """float32 or bfloat16; empty in a lexical index."""
    shards: tuple[ShardEntry, ...]
    lexical: tuple[LexicalEntry, ...]

    @property
    def rows(self) -> int:
        """Chunks in all shards, deleted ones included."""
        return sum(entry.rows for entry in self.shards)

    def offsets(self) -> list[int]:
        """Global row at which each shard begins."""
        found, total = [], 0
        for entry in self.shards:
            found.append(total)
            total += entry.rows
        return found

    def write(self, directory: Path) -> None:
        """Write `index.json` into `directory`."""
        value = dataclasses.asdict(self)
        (directory / INDEX_JSON).write_text(json.dumps({"format": INDEX_FORMAT, **value}, indent=1), encoding="utf-8")


def read_index_file(directory: Path) -> IndexFile:
    """Read `index.json` from the (verified) files of an index artifact.

    Raises:
        ArtifactError: it is missing, of another format, or malformed.
    """
    file = directory / INDEX_JSON
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        found = value["format"]
        if found != INDEX_FORMAT:
            raise ArtifactError(
                f"{file} is of format {found}, this rayft reads {INDEX_FORMAT}: run `rayft index build RECIPE`"
            )
        index = IndexFile(
            mode=value["mode"],
            encoder=str(value["encoder"]),
            encoder_digest=str(value["encoder_digest"]),
            precision=str(value["precision"]),
            shards=tuple(ShardEntry.from_row(row) for row in value["shards"]),
            lexical=tuple(LexicalEntry.from_row(row) for row in value["lexical"]),
        )
    except ArtifactError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file} cannot be read ({type(error).__name__}): rebuild the index") from error
    names = [entry.shard_id for entry in index.shards]
    folders = [entry.folder for entry in index.lexical]
    sane = (
        index.mode in ("dense", "lexical")
        and all(len(name) == 12 and set(name) <= set("0123456789abcdef") for name in names)
        and len(set(names)) == len(names)
        and all(folder == f"{LEXICAL_FOLDER}/{place}" for place, folder in enumerate(folders))
        and all(entry.rows >= 0 and entry.documents >= 0 and entry.dimension >= 0 for entry in index.shards)
    )
    if not sane:
        raise ArtifactError(f"{file} does not describe an index: rebuild the index")
    return index


def open_shards(directory: Path) -> tuple[IndexFile, list[ShardReader]]:
    """The table of contents of an index artifact's files, and its shards in order."""
    index = read_index_file(directory)
    return index, [ShardReader.open(directory, entry) for entry in index.shards]


def read_tombstones(directory: Path, entry: ShardEntry) -> Rows:
    """Sorted rows of the shard that this version deleted, (n,) int64; empty where there is no file.

    Raises:
        ArtifactError: the file does not hold such rows.
    """
    import numpy as np

    file = directory / TOMBSTONES_FOLDER / f"{entry.shard_id}.npy"
    if not file.is_file():
        return np.zeros(0, dtype=np.int64)
    rows = load_array(file)
    if rows.ndim != 1 or rows.dtype != np.int64 or (np.diff(rows) <= 0).any():
        raise ArtifactError(f"{file} does not hold sorted rows: rebuild the index")
    if len(rows) and (rows[0] < 0 or rows[-1] >= entry.rows):
        raise ArtifactError(f"{file} names rows outside the shard's {entry.rows}: rebuild the index")
    return np.array(rows)


def write_tombstones(directory: Path, shard_id: str, rows: Rows) -> None:
    """Write the deleted rows of a shard for one version of an index; nothing when there are none."""
    import numpy as np

    if len(rows):
        folder = directory / TOMBSTONES_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{shard_id}.npy", np.unique(rows.astype(np.int64)), allow_pickle=False)


def load_array(file: Path) -> npt.NDArray[Any]:
    """A memory-mapped `.npy` array, without pickle.

    Raises:
        ArtifactError: it is not one.
    """
    import numpy as np

    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise ArtifactError(f"{file} is not an array that can be read ({type(error).__name__}): rebuild") from error
    if not isinstance(array, np.ndarray):
        raise ArtifactError(f"{file} is not an array: rebuild the index")
    return array


class ShardReader:
    """One shard, opened: rows by number, vectors, attributes, the rows deleted in this version."""

    def __init__(self, directory: Path, entry: ShardEntry, table: pa.Table, tombstones: Rows) -> None:
        """Use `ShardReader.open`."""
        self.entry = entry
        self.rows: int = entry.rows
        self.tombstones = tombstones
        """Sorted rows deleted in this version, (n,) int64."""
        self.directory = directory / SHARDS_FOLDER / entry.shard_id
        """Where the shard's own files stand (`VectorIndex.open` reads them there)."""
        self._table = table

    @classmethod
    def open(cls, directory: Path, entry: ShardEntry) -> ShardReader:
        """Map the shard `entry` below `directory`, the (verified) files of an index artifact.

        Raises:
            ArtifactError: a file is missing or does not have the shape that `entry` says.
        """
        import pyarrow as pa

        file = directory / SHARDS_FOLDER / entry.shard_id / CHUNKS_FILE
        try:
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            table.validate(full=True)  # a file with a good checksum may still hold offsets that point outside
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{file} cannot be read ({type(error).__name__}): rebuild the index") from error
        if table.schema != chunk_schema() or len(table) != entry.rows:
            raise ArtifactError(
                f"{file} holds {len(table)} rows of {len(table.schema)} columns, index.json says {entry.rows} of "
                f"{len(chunk_schema())}: rebuild the index"
            )
        return cls(directory, entry, table, read_tombstones(directory, entry))

    @functools.cached_property
    def vectors(self) -> Vectors | None:
        """Unit vectors, (rows, dim) float32, memory-mapped; none in a lexical index."""
        import numpy as np

        if not self.entry.dimension:
            return None
        file = self.directory / VECTORS_FILE
        array = load_array(file)
        shape = (self.rows, self.entry.dimension)
        if array.shape != shape or array.dtype != np.float32 or not array.flags.c_contiguous:
            raise ArtifactError(
                f"{file} holds {array.shape} {array.dtype}, index.json says {shape} float32: rebuild the index"
            )
        return array

    @functools.cached_property
    def attributes(self) -> Attributes:
        """The inverted index of the filterable values."""
        from retrieval.attributes import Attributes

        return Attributes.open(self.directory)

    def live_rows(self) -> Rows:
        """Sorted rows that are not deleted, (n,) int64."""
        import numpy as np

        kept = np.ones(self.rows, dtype=bool)
        kept[self.tombstones] = False
        return np.flatnonzero(kept)

    def chunk(self, row: int) -> Chunk:
        """The chunk at `row`."""
        return Chunk.from_row(self._table.slice(row, 1).to_pylist()[0])

    def chunks(self) -> Iterator[Chunk]:
        """Live chunks in row order."""
        for batch in self.batches():
            yield from (Chunk.from_row(row) for row in batch.to_pylist())

    def batches(self, rows: Rows | None = None, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Chunk rows (`chunk_schema`) as record batches: `rows` in their order, or by default all live ones."""
        if rows is None and not len(self.tombstones):
            table = self._table.select(list(columns)) if columns else self._table
            yield from table.to_batches(max_chunksize=BATCH_ROWS)
            return
        yield from self._rows_of(self.live_rows() if rows is None else rows, columns)

    def _rows_of(self, rows: Rows, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        """`rows` in their order; one batch for neighbours in one stored batch.

        Not `Table.take`: that first concatenates whole columns, 600 MB for one row of 1,000,000 chunks of 600 bytes,
        and fails above 2 GiB of text.
        """
        import numpy as np
        import pyarrow as pa

        batches, ends = self._stored
        owners = np.searchsorted(ends, rows, side="right")
        borders = [0, *(np.flatnonzero(np.diff(owners)) + 1), len(rows)]
        for start, stop in itertools.pairwise(borders) if len(rows) else ():
            batch = batches[owners[start]]
            inside = pa.array(rows[start:stop] - (ends[owners[start]] - len(batch)))
            yield (batch.select(list(columns)) if columns else batch).take(inside)

    @functools.cached_property
    def _stored(self) -> tuple[list[pa.RecordBatch], Rows]:
        """The batches of the mapped file, and the row at which each ends: a list of them anew for every search would
        cost time that grows with the shard."""
        import numpy as np

        batches = self._table.to_batches()
        return batches, np.cumsum([len(batch) for batch in batches], dtype=np.int64)

    def chunk_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """Chunk ids at `rows`, in any order."""
        import numpy as np

        wanted = np.asarray(rows, dtype=np.int64)
        batches = self._rows_of(wanted, ["chunk_id"])
        return [chunk_id for batch in batches for chunk_id in batch.column(0).to_pylist()]

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of `chunk_schema`, (rows,), deleted rows included; memory-mapped."""
        return self._table[name]

    def doc_ids(self) -> list[str]:
        """Document id of each row, deleted ones included."""
        found: list[str] = self._table["doc_id"].to_pylist()
        return found

    def text_keys(self) -> npt.NDArray[np.uint64]:
        """`text_key` of each row, (rows,) uint64, deleted ones included."""
        keys: npt.NDArray[np.uint64] = self._table["text_key"].to_numpy()
        return keys

    def search_text(self, row: int) -> str:
        """What the encoder and BM25 read for a row."""
        return next(self.search_texts([row]))

    def search_texts(self, rows: Sequence[int] | Rows | None = None) -> Iterator[str]:
        """What the encoder and BM25 read for `rows` (by default the live ones), in order."""
        import numpy as np

        wanted = None if rows is None else np.asarray(rows, dtype=np.int64)
        for batch in self.batches(wanted, ("title", "heading", "text")):
            fields = (batch.column(name).to_pylist() for name in ("title", "heading", "text"))
            yield from (embedding_text(*row) for row in zip(*fields, strict=True))

    def documents(self) -> Iterator[Document]:
        """Live documents in corpus order, with their text."""
        for batch in self.document_batches():
            yield from (Document.from_row(row) for row in batch.to_pylist())

    def document_batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Live documents' rows (`document_schema`), or some `columns` of them."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        gone = {name for batch in self.batches(self.tombstones, ["doc_id"]) for name in batch.column(0).to_pylist()}
        deleted = pa.array(sorted(gone), pa.string())
        file = self.directory / DOCUMENTS_FILE
        names = list(columns) if columns else document_schema().names
        rows = TEXTS_READ if "text" in names else BATCH_ROWS
        try:
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(rows, columns=list(dict.fromkeys([*names, "doc_id"]))):
                    kept = batch.filter(pc.invert(pc.is_in(batch.column("doc_id"), deleted))) if deleted else batch
                    yield kept.select(names)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise ArtifactError(f"{file} cannot be read ({type(error).__name__}): rebuild the index") from error


def write_shard(
    directory: Path,
    documents: Iterator[pa.RecordBatch],
    chunks: Iterator[pa.RecordBatch],
    vectors: Iterator[Vectors] | None,
    policy: VectorPolicy,
) -> ShardEntry:
    """Write all files of a shard into `directory`, a new local folder whose name is the shard's id.

    Args:
        directory: `…/<shard_id>`.
        documents: Batches of `document_schema`, in corpus order.
        chunks: Batches of `chunk_schema`, in row order.
        vectors: Unit vectors of the same rows in any division, (n, dim) float32; none for a lexical index.
        policy: How to search them.
    """
    from retrieval.attributes import write_attributes
    from retrieval.vectors import build_vector_index

    directory.mkdir(parents=True)
    kept = _write_documents(directory / DOCUMENTS_FILE, documents)
    rows = _write_chunks(directory / CHUNKS_FILE, chunks)
    write_attributes(directory, _attribute_rows(directory / CHUNKS_FILE))
    dimension, measured = 0, {}
    if vectors is not None:
        array = _write_vectors(directory / VECTORS_FILE, vectors, rows)
        dimension = int(array.shape[1])
        measured = build_vector_index(array, policy, directory)
    return ShardEntry(directory.name, rows, kept, dimension, measured)


def _write_documents(file: Path, batches: Iterator[pa.RecordBatch]) -> int:
    import pyarrow.parquet as pq

    rows = 0
    with pq.ParquetWriter(file, document_schema(), compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += len(batch)
    return rows


def _write_chunks(file: Path, batches: Iterator[pa.RecordBatch]) -> int:
    import pyarrow as pa

    rows = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, chunk_schema()) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += len(batch)
    return rows


def _attribute_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        reader = pa.ipc.open_file(source)
        for place in range(reader.num_record_batches):
            yield from reader.get_batch(place).select(["doc_id", "uri", "title", "metadata"]).to_pylist()


def _write_vectors(file: Path, batches: Iterator[Vectors], rows: int) -> Vectors:
    """Stream vectors into an array file of `rows` rows; returns it memory-mapped for reading."""
    import numpy as np

    array: Any = None
    filled = 0
    for batch in batches:
        if array is None:
            array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(rows, batch.shape[1]))
        assert filled + len(batch) <= rows, f"more vectors than the {rows} chunks"
        array[filled : filled + len(batch)] = batch
        filled += len(batch)
    assert array is not None and filled == rows, f"{filled} vectors for {rows} chunks"
    array.flush()
    del array
    return load_array(file)
