"""The phases of an index build, most of them in this process with a stand-in for the encoder; one on a real Ray."""

import dataclasses
import functools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from cluster.store import Artifact, Store
from retrieval import embedding
from retrieval import index as index_module
from retrieval.build_job import BaseVersion, BuildJob
from retrieval.chunking import Chunker, embedding_text
from retrieval.config import RetrievalRecipe
from retrieval.documents import read_block, read_documents, scan_corpus
from retrieval.encoder import encoder_tokenizer
from retrieval.index import base_version, build_index, build_into, index_plan
from retrieval.records import Chunk
from retrieval.retriever import Retriever
from retrieval.rowplan import RowPlan, _divide, plan_rows
from retrieval.shard_files import build_shard
from retrieval.shards import ShardEntry, ShardReader, open_shards
from tests.retrieval.stub_encoder import StubEncoder, stub_vector
from tests.retrieval.tiny import COUNTRIES, tiny_recipe, write_corpus


@pytest.fixture
def recipe(tmp_path: Path, encoder_path: Path) -> RetrievalRecipe:
    return tiny_recipe(tmp_path, write_corpus(tmp_path / "corpus.jsonl"), encoder_path)


@pytest.fixture
def stub(tmp_path: Path) -> StubEncoder:
    return StubEncoder(str(tmp_path / "embedded.txt"))


@pytest.fixture
def blocks_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document is a block, and all run in this process."""
    monkeypatch.setattr(index_module, "scan_corpus", functools.partial(scan_corpus, block_bytes=1))
    monkeypatch.setattr(index_module, "_may_run_alone", lambda *_: True)


def build(recipe: RetrievalRecipe, stub: StubEncoder) -> Artifact:
    return build_index(recipe, Store(recipe.store.uri), make_encoder=stub)


def change(recipe: RetrievalRecipe, **sections: dict) -> RetrievalRecipe:
    data = recipe.model_dump()
    for name, values in sections.items():
        data[name] |= values
    return RetrievalRecipe.model_validate(data)


def write_rows(recipe: RetrievalRecipe, rows: list[dict]) -> None:
    Path(recipe.corpus.path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def corpus_rows(recipe: RetrievalRecipe) -> list[dict]:
    return [json.loads(line) for line in Path(recipe.corpus.path).read_text(encoding="utf-8").splitlines()]


def expected_chunks(recipe: RetrievalRecipe) -> list[Chunk]:
    chunker = Chunker(encoder_tokenizer(Path(recipe.encoder.model)), recipe.chunking)
    return [chunk for document in read_documents(recipe.corpus) for chunk in chunker.chunk(document)]


def live_rows(artifact: Artifact) -> list[tuple[Chunk, tuple[float, ...]]]:
    """Live chunks with their vectors; the order within shards."""
    found = []
    for shard in open_shards(artifact.directory())[1]:
        assert shard.vectors is not None
        vectors = shard.vectors[shard.live_rows()]
        found += [(chunk, tuple(vector.tolist())) for chunk, vector in zip(shard.chunks(), vectors, strict=True)]
    return found


def text_of(chunk: Chunk) -> str:
    return embedding_text(chunk.title, chunk.heading, chunk.text)


@pytest.mark.parametrize(("block_bytes", "shard_chunks"), [(10**9, 10**6), (10**9, 13), (1, 20), (2500, 5), (1, 1)])
def test_build_any_blocks_and_shards_hold_the_same_rows_and_vectors(
    recipe: RetrievalRecipe, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch, block_bytes: int, shard_chunks: int
) -> None:
    monkeypatch.setattr(index_module, "scan_corpus", functools.partial(scan_corpus, block_bytes=block_bytes))
    monkeypatch.setattr(index_module, "_may_run_alone", lambda *_: True)
    recipe = change(recipe, index={"shard_chunks": shard_chunks})
    artifact = build(recipe, stub)
    chunks = expected_chunks(recipe)
    rows = live_rows(artifact)
    assert [chunk for chunk, _ in rows] == chunks
    np.testing.assert_array_equal([vector for _, vector in rows], [stub_vector(text_of(chunk)) for chunk in chunks])
    index, shards = open_shards(artifact.directory())
    largest = max(sum(chunk.doc_id == name.lower() for chunk in chunks) for name in COUNTRIES)
    assert all(entry.rows <= max(shard_chunks, largest) for entry in index.shards)
    assert [document.doc_id for shard in shards for document in shard.documents()] == [n.lower() for n in COUNTRIES]
    assert artifact.manifest.counts["chunks"] == artifact.manifest.counts["embedded"] == len(chunks)
    (lexical,) = index.lexical
    np.testing.assert_array_equal(np.load(artifact.path(f"{lexical.folder}/rows.npy")), np.arange(len(chunks)))


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=8), st.integers(1, 12))
def test_divide_covers_all_rows_in_order_and_never_divides_a_document(blocks: list[list[int]], most: int) -> None:
    shards = _divide([np.array(block, dtype=np.int64) for block in blocks], most)
    seen = [(piece.ordinal, row) for shard in shards for piece in shard for row in range(piece.start, piece.stop)]
    assert seen == [(ordinal, row) for ordinal, block in enumerate(blocks) for row in range(sum(block))]
    for shard in shards:
        rows = sum(piece.stop - piece.start for piece in shard)
        assert rows <= most or (len(shard) == 1 and rows in blocks[shard[0].ordinal])
        for piece in shard:
            borders = {0, *np.cumsum(blocks[piece.ordinal]).tolist()}
            assert {piece.start, piece.stop} <= borders


def test_equal_texts_share_an_embedding_and_keep_their_rows(
    recipe: RetrievalRecipe, stub: StubEncoder, blocks_of_one: None
) -> None:
    text = "# One\n\nThe same words for two tenants.\n"
    rows = [{"_id": f"d{n}", "title": "T", "text": text, "metadata": {"tenant": n}} for n in range(3)]
    write_rows(recipe, [{"_id": "e", "title": "Other", "text": text}, *rows])
    artifact = build(recipe, stub)
    assert len(stub.embedded()) == 2  # another title is another text
    counts = artifact.manifest.counts
    assert (counts["chunks"], counts["embedded"], counts["shared"], counts["reused"]) == (4, 2, 2, 0)
    found = live_rows(artifact)
    assert [chunk.metadata for chunk, _ in found] == [{}, {"tenant": 0}, {"tenant": 1}, {"tenant": 2}]
    assert found[0][1] != found[1][1] == found[2][1] == found[3][1]


def test_rebuild_embeds_changed_chunks_only(
    recipe: RetrievalRecipe, stub: StubEncoder, blocks_of_one: None, capsys: pytest.CaptureFixture[str]
) -> None:
    build(recipe, stub)
    before = set(stub.embedded())
    rows = corpus_rows(recipe)
    rows[3]["text"] = rows[3]["text"].replace("temperate", "tropical")
    write_rows(recipe, rows[::-1])
    artifact = build(recipe, stub)
    changed = stub.embedded()
    assert len(changed) == 1 and "tropical" in changed[0] and not set(changed) & before
    assert f"1 texts embedded; {len(before) - 1} took their embedding" in capsys.readouterr().out
    chunks = expected_chunks(recipe)
    assert [chunk for chunk, _ in live_rows(artifact)] == chunks
    assert [vector for _, vector in live_rows(artifact)] == [tuple(stub_vector(text_of(c)).tolist()) for c in chunks]
    other = change(recipe, chunking={"max_tokens": 47}, encoder={"precision": "bfloat16"})
    build(other, stub)
    assert len(stub.embedded()) >= len(before)  # of another precision: nothing is taken over


def test_ids_repeated_across_blocks_keep_the_first_and_list_the_others(
    recipe: RetrievalRecipe, stub: StubEncoder, blocks_of_one: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"_id": name, "text": f"words of {name} in row {n}"} for n, name in enumerate(["a", "b", "a", "c", "a"])]
    write_rows(recipe, [*rows, {"_id": "h", "text": "# only\n## headings\n"}])
    artifact = build(recipe, stub)
    assert [chunk.text for chunk, _ in live_rows(artifact)] == [rows[n]["text"] for n in (0, 1, 3)]
    assert artifact.manifest.counts["rejected"] == 3
    listed = pq.read_table(artifact.path("rejected.parquet")).to_pylist()
    assert [row["place"] for row in listed] == ["id a", "id a", "id h"]
    assert listed[0]["bytes"] == len(rows[2]["text"])
    assert "earlier document" in listed[0]["reason"] and "headings" in listed[2]["reason"]
    out = capsys.readouterr().out
    assert "3 of the corpus's documents were rejected" in out
    assert "rejected.parquet" in out
    with pytest.raises(UserError, match=r"^corpus\.path: .*id [ah].*\(corpus\.strict\)"):
        build(change(recipe, corpus={"strict": True}, chunking={"max_tokens": 40}), stub)


def update(recipe: RetrievalRecipe, stub: StubEncoder, base: BaseVersion | None) -> Artifact:
    store = Store(recipe.store.uri)
    plan = index_plan(recipe, store)
    with store.attempt(plan.ref) as attempt:
        outcome = build_into(recipe, store, attempt, base=base, make_encoder=stub)
        return attempt.publish(plan, outcome.counts, outcome.measured)


def test_sync_adopts_what_is_unchanged_and_equals_a_fresh_build(
    recipe: RetrievalRecipe, stub: StubEncoder, blocks_of_one: None, tmp_path: Path
) -> None:
    first = build(change(recipe, index={"shard_chunks": 20}), stub)
    recipe = change(recipe, index={"shard_chunks": 20, "compact_above": 1.0})
    stub.embedded()
    rows = corpus_rows(recipe)
    rows[2]["text"] = rows[2]["text"].replace("temperate", "tropical")
    rows[7]["metadata"] = {"place": 70}
    del rows[5]
    write_rows(recipe, [*rows, {"_id": "new", "title": "New", "text": "A new land of roses."}])
    artifact = update(recipe, stub, base_version(Store(recipe.store.uri), recipe.name, "sync"))
    assert len(stub.embedded()) == 2
    fresh = build(change(recipe, store={"uri": str(tmp_path / "fresh")}), stub)
    assert fresh.ref == artifact.ref
    assert sorted(live_rows(artifact), key=lambda row: row[0].chunk_id) == sorted(
        live_rows(fresh), key=lambda row: row[0].chunk_id
    )
    same = ("documents", "chunks", "tokens", "rejected")
    assert [artifact.manifest.counts[name] for name in same] == [fresh.manifest.counts[name] for name in same]
    old = [entry.shard_id for entry in open_shards(first.directory())[0].shards]
    index, shards = open_shards(artifact.directory())
    assert [entry.shard_id for entry in index.shards][: len(old)] == old
    assert len(live_rows(first)) == open_shards(first.directory())[0].rows
    live = np.concatenate([shard.live_rows() + offset for shard, offset in zip(shards, index.offsets(), strict=True)])
    np.testing.assert_array_equal(np.load(artifact.path("lexical/0/rows.npy")), live)


def test_delta_keeps_all_but_what_it_names(
    recipe: RetrievalRecipe, stub: StubEncoder, blocks_of_one: None, tmp_path: Path
) -> None:
    first = build(recipe, stub)
    before = live_rows(first)
    delta = change(recipe, corpus={"path": str(tmp_path / "delta.jsonl")})
    write_rows(delta, [{"_id": "chile", "title": "Chile", "text": "Chile is another now."}])
    base = base_version(Store(recipe.store.uri), recipe.name, "delta", ("ghana",))
    stub.embedded()
    artifact = update(delta, stub, base)
    assert stub.embedded() == ["Chile\nChile is another now."]
    after = live_rows(artifact)
    kept = [row for row in before if row[0].doc_id not in ("chile", "ghana")]
    assert after[:-1] == kept
    assert after[-1][0].text == "Chile is another now."
    assert artifact.manifest.counts["documents"] == len(COUNTRIES) - 1
    assert artifact.manifest.counts["tokens"] == sum(chunk.tokens for chunk, _ in after)


KILLED = """
import functools, os, signal, sys
from pathlib import Path
from typing import Any
from cluster.store import Store
from retrieval import embedding, index, pipeline
from retrieval.config import RetrievalRecipe
from retrieval.documents import scan_corpus
from tests.retrieval.stub_encoder import StubEncoder

recipe = RetrievalRecipe.model_validate_json(Path(sys.argv[1]).read_text())
phase, log = sys.argv[2], sys.argv[3]
index.scan_corpus = functools.partial(scan_corpus, block_bytes=1)
index._may_run_alone = lambda *_: True
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if phase == "read":
    read = pipeline.read_part
    pipeline.read_part = lambda job, block: die() if block.ordinal == 4 else read(job, block)
elif phase == "plan":
    pipeline.plan_rows = die
elif phase == "shards":
    pipeline.build_lexical = die
index.build_index(recipe, Store(recipe.store.uri), make_encoder=StubEncoder(log, 3 if phase == "embed" else -1))
"""


@pytest.mark.parametrize(("phase", "blocks"), [("read", 0), ("plan", 0), ("embed", 3), ("shards", 8)])
def test_build_killed_in_any_phase_goes_on_and_embeds_no_finished_block_again(
    recipe: RetrievalRecipe,
    stub: StubEncoder,
    blocks_of_one: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    blocks: int,
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", KILLED, str(file), phase, stub.log]
    ended = subprocess.run(command, check=False, capture_output=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    store = Store(recipe.store.uri)
    assert store.current("index", "tiny") is None and store.versions("index", "tiny") == []
    chunks = expected_chunks(recipe)
    finished = stub.embedded()
    assert finished == [text_of(chunk) for chunk in chunks if chunk.doc_id in [n.lower() for n in COUNTRIES[:blocks]]]
    work = store.storage.root / str(index_plan(recipe, store).ref) / ".work" / "full"
    read = []
    monkeypatch.setattr(embedding, "read_block", lambda block: read.append(block.ordinal) or read_block(block))
    artifact = build(recipe, stub)
    assert read == ([4, 5, 6, 7] if phase == "read" else [])
    assert sorted(finished + stub.embedded()) == sorted(text_of(chunk) for chunk in chunks)
    assert [chunk for chunk, _ in live_rows(artifact)] == chunks
    assert not work.exists()


def test_build_on_ray_equals_alone(
    ray_module: None, recipe: RetrievalRecipe, encoder_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "scan_corpus", functools.partial(scan_corpus, block_bytes=1))
    monkeypatch.setattr("retrieval.pipeline.FEW_TEXTS", 0)
    recipe = change(recipe, index={"shard_chunks": 20}, encoder={"actors": 2})
    on_ray = build_index(recipe, Store(recipe.store.uri))
    monkeypatch.setattr(index_module, "_may_run_alone", lambda *_: True)
    alone = build_index(recipe, Store(str(tmp_path / "alone")))
    assert on_ray.ref == alone.ref
    rows, others = live_rows(on_ray), live_rows(alone)
    assert [chunk for chunk, _ in rows] == [chunk for chunk, _ in others] == expected_chunks(recipe)
    np.testing.assert_allclose([vector for _, vector in rows], [vector for _, vector in others], atol=1e-5)
    assert [entry.rows for entry in open_shards(on_ray.directory())[0].shards] == [
        entry.rows for entry in open_shards(alone.directory())[0].shards
    ]


def test_lexical_build_embeds_nothing_and_has_no_vectors(
    recipe: RetrievalRecipe, stub: StubEncoder, blocks_of_one: None
) -> None:
    artifact = build(change(recipe, search={"mode": "lexical"}), stub)
    assert stub.embedded() == []
    index, shards = open_shards(artifact.directory())
    assert (index.mode, index.encoder, index.encoder_digest, index.precision) == ("lexical", "", "", "")
    assert [chunk for shard in shards for chunk in shard.chunks()] == expected_chunks(recipe)
    assert all(isinstance(shard, ShardReader) and shard.vectors is None for shard in shards)
    assert not any(file.path.endswith("vectors.npy") for file in artifact.manifest.files)


def test_a_second_builder_over_another_base_does_not_disturb_the_first(
    recipe: RetrievalRecipe, stub: StubEncoder, blocks_of_one: None
) -> None:
    """In an object store both have the same parts."""
    store, rows = Store(recipe.store.uri), corpus_rows(recipe)
    write_rows(recipe, rows[:3])
    build(recipe, stub)
    base = base_version(store, recipe.name)
    write_rows(recipe, rows[::-1])
    build(recipe, stub)
    other = base_version(store, recipe.name)
    assert base is not None and other is not None and base.ref != other.ref
    write_rows(recipe, [*rows, {"_id": "new", "title": "New", "text": "A new land of roses."}])
    plan = index_plan(recipe, store)
    blocks = len(rows) + 1

    def settle(job: BuildJob, _: RowPlan) -> None:
        plan_rows(dataclasses.replace(job, base=other), blocks)

    with store.attempt(plan.ref) as attempt:
        outcome = build_into(recipe, store, attempt, base=base, settle=settle, make_encoder=stub)
        artifact = attempt.publish(plan, outcome.counts, outcome.measured)
    chunks = expected_chunks(recipe)
    assert [chunk for chunk, _ in live_rows(artifact)] == chunks
    assert [vector for _, vector in live_rows(artifact)] == [tuple(stub_vector(text_of(c)).tolist()) for c in chunks]


def test_what_a_dead_worker_left_of_a_shard_is_not_published(
    recipe: RetrievalRecipe, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*arguments: Any) -> ShardEntry:
        build_shard(*arguments)  # Ray runs a task again when its worker dies
        return build_shard(*arguments)

    monkeypatch.setattr("retrieval.pipeline.build_shard", twice)
    artifact = build(recipe, stub)
    (entry,) = open_shards(artifact.directory())[0].shards
    folders = {file.path.split("/")[1] for file in artifact.manifest.files if file.path.startswith("shards/")}
    assert folders == {entry.shard_id}


def test_bm25_of_many_shards_is_divided_but_never_for_a_few_rows(
    recipe: RetrievalRecipe, stub: StubEncoder, blocks_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = build(change(recipe, index={"shard_chunks": 1}), stub)
    rows = [entry.rows for entry in open_shards(artifact.directory())[0].shards]
    assert len(rows) == len(COUNTRIES) and max(rows) - min(rows) < max(rows) / 2
    monkeypatch.setattr("retrieval.pipeline.LEXICAL_PART_ROWS", 3 * max(rows))
    write_rows(recipe, [*corpus_rows(recipe), {"_id": "new", "title": "New", "text": "A new land of roses."}])
    artifact = build(change(recipe, index={"shard_chunks": 1}), stub)
    index, shards = open_shards(artifact.directory())
    places = [np.load(artifact.path(f"{entry.folder}/rows.npy")) for entry in index.lexical]
    np.testing.assert_array_equal(np.concatenate(places), np.arange(index.rows))
    assert shards[-1].rows == 1 and len(places) >= 2 and min(map(len, places)) > 1
    retriever = Retriever.open(artifact, recipe.encoder, change(recipe, search={"mode": "lexical"}).search)
    assert retriever.search(["roses new land"], 1)[0][0].passage.doc_id == "new"
