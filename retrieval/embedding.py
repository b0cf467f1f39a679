"""Phases A and C of an index build, for one corpus block: read and chunk it, embed its chunks.

In: a `BuildJob`, and a block or its number. Out: parts, and counts for the
driver; texts stay with the workers. What a block gives depends on the block alone, never on the number of workers, and
a finished part is not made again.
Plain Python over Arrow tables: no Ray in here. Not covered: which rows need an embedding and where their shards end
(`rowplan.py`), who calls these functions (`pipeline.py`).
"""

from __future__ import annotations

import functools
import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrieval.build_job import BuildJob, PassageEncoder
from retrieval.chunking import Chunker, embedding_text
from retrieval.config import ChunkingConfig
from retrieval.documents import BlockContent, CorpusBlock, Rejection, read_block
from retrieval.encoder import EncoderSource, encoder_tokenizer
from retrieval.parts import part_name
from retrieval.records import Chunk
from retrieval.shards import (
    chunk_schema,
    document_digest,
    document_schema,
    text_key,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]
    Keys = npt.NDArray[np.uint64]

READ, CHUNKS, DOCUMENTS, IDS, REJECTED = "read", "chunks", "documents", "ids", "rejected"
PLAN, VECTORS = "plan", "vectors"
BASE_KEYS = "base_keys.npy"
NO_TEXT = "has no text but headings"


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
    rejected = [rejection for rejection in content.rejected if not rejection.is_about(job.removed)]
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


def plan_part(job: BuildJob, ordinal: int) -> str:
    """Name of the part with the plan of a block's rows. It names rows of the base version, so that a second builder of
    the same version, over another base and with the same parts (in an object store), has its own."""
    base = f"-{job.base.ref.rpartition('/')[2]}-{job.base.attempt}" if job.base is not None else ""
    return part_name(f"{PLAN}{base}", ordinal, ".npz")


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
        rows = self._job.parts.read_arrays(plan_part(self._job, ordinal))["embed"]
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


def text_check(text: str) -> int:
    """64 bits that are independent of `text_key`."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"check").digest(), "little"
    )
