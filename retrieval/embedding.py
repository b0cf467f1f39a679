"""The work of the index build on Ray workers: corpus block → chunks → embeddings → Parquet parts.

In: one-row tables that name a `CorpusBlock`. Out: `documents/part-N.parquet` and `chunks/part-N.parquet` written under
a URI by the worker that made them, and one row of counts per block for the driver. Part N holds block N, so the rows
and their order do not depend on the number of workers or on which of them was faster.
Plain Python over Arrow tables: no Ray in here. Not covered: the index over the embeddings (`index.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from retrieval.chunking import Chunker, embedding_text
from retrieval.config import ChunkingConfig, EncoderConfig
from retrieval.documents import CorpusBlock, join_path, open_filesystem, read_block
from retrieval.encoder import Encoder, Precision, encoder_directory, encoder_tokenizer
from retrieval.records import Chunk, Document

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

ROW_GROUP_ROWS = 8192


def part_path(uri: str, folder: str, ordinal: int) -> str:
    """Where block `ordinal`'s rows stand; the names sort in row order."""
    return join_path(uri, f"{folder}/part-{ordinal:06d}.parquet")


def chunk_blocks(blocks: pa.Table, encoder: EncoderConfig, chunking: ChunkingConfig, uri: str) -> pa.Table:
    """Read and cut each block; writes its documents part.

    Returns one row per block: ordinal, documents, and all its chunks in one list, so that a block stays whole.
    """
    import pyarrow as pa

    chunker = _chunker(encoder, chunking)
    rows = []
    for row in blocks.to_pylist():
        block = CorpusBlock.from_row(row)
        documents = read_block(block)
        document_rows = [document.to_row() for document in documents]
        _write_part(uri, "documents", block.ordinal, pa.Table.from_pylist(document_rows, schema=Document.schema()))
        chunks = [chunk.to_row() for document in documents for chunk in chunker.chunk(document)]
        rows.append({"ordinal": block.ordinal, "documents": len(documents), "chunks": chunks})
    chunk_struct = pa.struct(list(Chunk.schema()))
    schema = pa.schema([("ordinal", pa.int64()), ("documents", pa.int64()), ("chunks", pa.large_list(chunk_struct))])
    return pa.Table.from_pylist(rows, schema=schema)


class EmbedBlocks:
    """Actor body: embeds each block's chunks and writes its chunks part with an `embedding` column."""

    def __init__(
        self, encoder: EncoderConfig, precision: Precision, device: str, threads: int | None, uri: str
    ) -> None:
        """Load the encoder once per actor."""
        self._encoder = Encoder(encoder, precision, device, threads)
        self._uri = uri

    def __call__(self, chunked: pa.Table) -> pa.Table:
        """Embed and write; returns counts (see `_counts`)."""
        import pyarrow as pa

        counts = []
        for ordinal, documents, chunks in _whole_blocks(chunked):
            began = time.perf_counter()
            fields = (chunks[name].to_pylist() for name in ("title", "heading", "text"))
            vectors = self._encoder.encode_passages([embedding_text(*row) for row in zip(*fields, strict=True)])
            seconds = time.perf_counter() - began
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self._encoder.dimension)
            _write_part(self._uri, "chunks", ordinal, chunks.append_column("embedding", column))
            counts.append(_counts(ordinal, documents, chunks, seconds))
        return pa.Table.from_pylist(counts)


def write_blocks(chunked: pa.Table, uri: str) -> pa.Table:
    """Write each block's chunks part without embeddings (lexical search); returns counts (see `_counts`)."""
    import pyarrow as pa

    counts = []
    for ordinal, documents, chunks in _whole_blocks(chunked):
        _write_part(uri, "chunks", ordinal, chunks)
        counts.append(_counts(ordinal, documents, chunks, 0.0))
    return pa.Table.from_pylist(counts)


def embedding_batches(uri: str) -> Iterator[npt.NDArray[np.float32]]:
    """All embeddings under `uri`, in row order, one row group at a time: (n, dim) float32."""
    for batch in _part_batches(uri, ["embedding"]):
        column = batch.column(0)
        yield column.flatten().to_numpy().reshape(len(column), -1)


def search_texts(uri: str) -> Iterator[str]:
    """What a lexical index reads for each chunk under `uri`, in row order."""
    for batch in _part_batches(uri, ["title", "heading", "text"]):
        for row in batch.to_pylist():
            yield embedding_text(row["title"], row["heading"], row["text"])


def _part_batches(uri: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.fs as pafs
    import pyarrow.parquet as pq

    filesystem, inner = open_filesystem(join_path(uri, "chunks"))
    infos = filesystem.get_file_info(pafs.FileSelector(inner))
    for path in sorted(info.path for info in infos if info.path.endswith(".parquet")):
        with filesystem.open_input_file(path) as file:
            yield from pq.ParquetFile(file).iter_batches(batch_size=ROW_GROUP_ROWS, columns=columns)


def _write_part(uri: str, folder: str, ordinal: int, table: pa.Table) -> None:
    """Write one part under its final name: a retried task overwrites it, and no manifest names it before the end."""
    import pyarrow.parquet as pq

    filesystem, inner = open_filesystem(part_path(uri, folder, ordinal))
    pq.write_table(table, inner, filesystem=filesystem, row_group_size=ROW_GROUP_ROWS, compression="zstd")


def _whole_blocks(chunked: pa.Table) -> Iterator[tuple[int, int, pa.Table]]:
    """(ordinal, documents, chunks as a table) of each row that `chunk_blocks` made."""
    import pyarrow as pa

    schema = Chunk.schema()
    for position in range(len(chunked)):
        ordinal, documents = (chunked[name][position].as_py() for name in ("ordinal", "documents"))
        chunks = pa.Table.from_pylist(chunked["chunks"][position].as_py(), schema=schema)
        yield ordinal, documents, chunks


def _counts(ordinal: int, documents: int, chunks: pa.Table, seconds: float) -> dict[str, Any]:
    """What the driver learns of a block: its ordinal, documents, chunks, tokens, seconds spent embedding."""
    tokens = sum(chunks["tokens"].to_pylist())
    return {"ordinal": ordinal, "documents": documents, "chunks": len(chunks), "tokens": tokens, "seconds": seconds}


@functools.lru_cache(maxsize=4)
def _chunker(encoder: EncoderConfig, chunking: ChunkingConfig) -> Chunker:
    """One per worker process: reading the tokenizer takes longer than cutting a small block."""
    return Chunker(encoder_tokenizer(encoder_directory(encoder)), chunking)
