import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import ArtifactError
from retrieval.config import IndexConfig
from retrieval.records import Chunk, Document
from retrieval.shards import (
    IndexFile,
    LexicalEntry,
    ShardEntry,
    ShardReader,
    chunk_schema,
    document_digest,
    document_schema,
    new_shard_id,
    open_shards,
    read_index_file,
    text_key,
    write_shard,
    write_tombstones,
)
from retrieval.vectors import VectorPolicy

DOCUMENTS = [
    Document(f"d{n}", f"Title {n}", f"text of {n}" * 3, f"https://x/{n}", {"year": 2000 + n}) for n in range(5)
]
CHUNKS = [
    Chunk(f"c{n}", f"d{n // 2}", f"Title {n // 2}", "", f"文 text {n}", 0, 8, 3, "", {"year": 2000 + n // 2})
    for n in range(10)
]


def unit_vectors(rows: int, dimension: int = 4) -> np.ndarray:
    vectors = np.random.default_rng(5).standard_normal((rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(directory: Path, vectors: np.ndarray | None = None) -> ShardEntry:
    documents = [{**document.to_row(), "digest": document_digest(document)} for document in DOCUMENTS]
    chunks = [{**chunk.to_row(), "text_key": text_key(chunk.text)} for chunk in CHUNKS]
    return write_shard(
        directory / "shards" / new_shard_id(),
        iter(pa.Table.from_pylist(documents, document_schema()).to_batches(max_chunksize=2)),
        iter(pa.Table.from_pylist(chunks, chunk_schema()).to_batches(max_chunksize=3)),
        None if vectors is None else iter([vectors[:7], vectors[7:]]),
        VectorPolicy.of(IndexConfig(), seed=1),
    )


def index_of(*entries: ShardEntry) -> IndexFile:
    return IndexFile("dense", "model", "ab", "float32", entries, (LexicalEntry("lexical/0", 10),))


def test_write_shard_gives_back_every_record_by_row(tmp_path: Path) -> None:
    vectors = unit_vectors(10)
    entry = write(tmp_path, vectors)
    assert (entry.rows, entry.documents, entry.dimension) == (10, 5, 4)
    assert entry.vectors["kind"] == "flat"
    index_of(entry).write(tmp_path)
    index, (shard,) = open_shards(tmp_path)
    assert index == index_of(entry)
    assert [shard.chunk(row) for row in range(10)] == CHUNKS == list(shard.chunks())
    assert list(shard.documents()) == DOCUMENTS
    assert shard.chunk_ids([9, 0, 3]) == ["c9", "c0", "c3"]
    np.testing.assert_array_equal(shard.vectors, vectors)
    assert isinstance(shard.vectors, np.memmap)
    assert list(shard.search_texts([4])) == ["Title 2\n文 text 4"]
    assert shard.text_keys().tolist() == [text_key(chunk.text) for chunk in CHUNKS]


def test_tombstones_hide_rows_and_documents_of_one_version_only(tmp_path: Path) -> None:
    entry = write(tmp_path)
    assert list(ShardReader.open(tmp_path, entry).chunks()) == CHUNKS
    write_tombstones(tmp_path, entry.shard_id, np.array([5, 4, 4]))
    shard = ShardReader.open(tmp_path, entry)
    assert shard.tombstones.tolist() == [4, 5]
    assert shard.live_rows().tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert list(shard.chunks()) == CHUNKS[:4] + CHUNKS[6:]
    assert list(shard.documents()) == DOCUMENTS[:2] + DOCUMENTS[3:]
    assert len(list(shard.search_texts())) == 8
    assert shard.chunk(5) == CHUNKS[5]
    assert shard.vectors is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "of format 1, this rayft reads 2"),
        ({"mode": "sparse"}, "does not describe an index"),
        ({"shards": [{"shard_id": "../../etc/pas", "rows": 1, "documents": 1, "dimension": 0, "vectors": {}}]}, "not"),
        ({"lexical": [{"folder": "/etc", "rows": 1}]}, "does not describe an index"),
        ({"shards": 7}, "cannot be read"),
    ],
)
def test_read_index_file_that_is_none_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    index_of().write(tmp_path)
    file = tmp_path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ArtifactError, match=message):
        read_index_file(tmp_path)


def test_open_shard_of_another_shape_is_refused(tmp_path: Path) -> None:
    entry = write(tmp_path, unit_vectors(10))
    with pytest.raises(ArtifactError, match=r"holds 10 rows .* index\.json says 11"):
        ShardReader.open(tmp_path, dataclasses.replace(entry, rows=11))
    with pytest.raises(ArtifactError, match=r"\(10, 4\) float32, index\.json says \(10, 5\)"):
        _ = ShardReader.open(tmp_path, dataclasses.replace(entry, dimension=5)).vectors
    tombstones = tmp_path / "tombstones"
    tombstones.mkdir()
    for rows in ([3, 2], [0, 10], [-1, 4]):
        np.save(tombstones / f"{entry.shard_id}.npy", np.array(rows))
        with pytest.raises(ArtifactError, match="rebuild the index"):
            ShardReader.open(tmp_path, entry)


def test_open_malformed_files_raises_artifact_errors_only(tmp_path: Path) -> None:
    entry = write(tmp_path, unit_vectors(10))
    rng = np.random.default_rng(9)
    files = [tmp_path / "shards" / entry.shard_id / name for name in ("chunks.arrow", "vectors.npy")]
    refused = 0
    for trial in range(120):
        file = files[trial % 2]
        good = file.read_bytes()
        damaged = bytearray(good)
        for place in rng.integers(0, min(len(good), 400) if trial % 3 else len(good), size=4):
            damaged[place] = rng.integers(256)
        file.write_bytes(bytes(damaged[: rng.integers(1, len(good))] if trial % 5 == 0 else damaged))
        try:
            shard = ShardReader.open(tmp_path, entry)
            assert len(list(shard.chunks())) == 10
            assert shard.vectors is not None
        except ArtifactError:
            refused += 1
        except (ValueError, TypeError) as error:  # damaged text: metadata is no longer JSON, a null is no text
            assert "chunks" in file.name, error
        file.write_bytes(good)
    assert refused > 40


def test_rows_are_read_in_any_order_without_copying_their_columns(tmp_path: Path) -> None:
    text = "long text " * 400
    chunks = [dataclasses.replace(CHUNKS[0], chunk_id=f"c{n}", text=f"{text}{n}") for n in range(400)]
    rows = [{**chunk.to_row(), "text_key": 0} for chunk in chunks]
    folder = tmp_path / "shards" / new_shard_id()
    batches = pa.Table.from_pylist(rows, chunk_schema()).to_batches(max_chunksize=50)
    documents = iter(pa.Table.from_pylist([], document_schema()).to_batches())
    entry = write_shard(folder, documents, iter(batches), None, VectorPolicy.of(IndexConfig(), seed=1))
    shard = ShardReader.open(tmp_path, entry)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.system_memory_pool())
    pa.set_memory_pool(pool)
    try:
        wanted = np.array([399, 3, 4, 120, 0])
        read = [Chunk.from_row(row) for batch in shard.batches(wanted) for row in batch.to_pylist()]
        names = shard.chunk_ids(wanted)
        assert not list(shard.batches(wanted[:0])) and shard.chunk_ids([]) == []
    finally:
        pa.set_memory_pool(before)
    assert read == [chunks[row] for row in wanted] and names == [chunks[row].chunk_id for row in wanted]
    assert pool.max_memory() < 20 * len(text) < 400 * len(text)
    everything = np.arange(400)[::-1]
    assert shard.chunk_ids(everything) == [chunks[row].chunk_id for row in everything]
    texts = shard.search_texts(everything)
    assert all(text.endswith(f" {row}") for text, row in zip(texts, everything, strict=True))


def test_documents_with_their_text_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.shards.TEXTS_READ", 2)
    shard = ShardReader.open(tmp_path, write(tmp_path))
    assert [len(batch) for batch in shard.document_batches()] == [2, 2, 1]
    assert [len(batch) for batch in shard.document_batches(("doc_id", "digest"))] == [5]
