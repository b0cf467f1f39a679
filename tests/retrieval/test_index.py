"""Building an index by its recipe, and searching what was published. The phases: `test_pipeline.py`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import ArtifactError, UserError
from cluster.store import Artifact, Store
from retrieval import index
from retrieval.build_job import BaseVersion
from retrieval.config import ChunkingConfig, IndexConfig, RetrievalRecipe
from retrieval.documents import scan_corpus
from retrieval.encoder import BASE_INPUT, EncoderSource, encoder_digest, encoder_source
from retrieval.index import base_version, build_index, index_plan
from retrieval.ledger import add_deleted
from retrieval.metrics import recall_at_k
from retrieval.records import Golden, Question
from retrieval.retriever import Retriever
from retrieval.shards import open_shards
from tests.retrieval.tiny import COUNTRIES, GOODS, country_text, tiny_encoder, tiny_recipe, write_corpus


def build(recipe: RetrievalRecipe) -> Artifact:
    return build_index(recipe, Store(recipe.store.uri))


@pytest.mark.parametrize("kind", ["hnsw", "ivf_flat"])
def test_search_every_kind_agrees_with_exact_search(
    tmp_path: Path, corpus_path: Path, encoder_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.vectors.SMALLEST_INDEXED", 1)
    recipe = tiny_recipe(
        tmp_path, corpus_path, encoder_path, index=IndexConfig.model_validate({"kind": kind, "recall_sample": 500})
    )
    artifact = build(recipe)
    assert artifact.manifest.measured["kind"] == kind
    assert artifact.manifest.measured["recall"] >= 0.95
    assert artifact.manifest.measured["recall_at"] == 10


def test_search_dense_equals_sorting_all_cosines_with_ties_by_chunk_id(tmp_path: Path, encoder_path: Path) -> None:
    rows = [
        {"_id": f"d{n:02d}", "text": f"{GOODS[n % 3]} in summer"} for n in range(90)
    ]  # 30 equal scores: deeper than k + SPARE_HITS
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tiny_recipe(tmp_path, corpus, encoder_path)
    artifact = build(recipe)
    retriever = Retriever.open(artifact, recipe.encoder)
    (shard,) = open_shards(artifact.directory())[1]
    stored = [{"chunk_id": chunk.chunk_id} for chunk in shard.chunks()]
    queries = ["roses in summer", "cold winters", "copper"]
    assert shard.vectors is not None
    cosines = retriever.encode_queries(queries) @ shard.vectors.T
    for hits, scores in zip(retriever.search(queries, 5), cosines, strict=True):
        order = sorted(range(90), key=lambda row: (-round(float(scores[row]), 5), stored[row]["chunk_id"]))[:5]
        assert [hit.passage.chunk_id for hit in hits] == [stored[row]["chunk_id"] for row in order]
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
        np.testing.assert_allclose([hit.score for hit in hits], scores[order], atol=1e-5)


def test_search_finds_the_passage_and_shows_its_place(tmp_path: Path, corpus_path: Path, encoder_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, corpus_path, encoder_path, index=None)
    retriever = Retriever.open(build(recipe), recipe.encoder)
    chunks = retriever.chunks()
    questions = [
        Question(
            chunk.chunk_id,
            f"{chunk.title} | {chunk.heading}\n{chunk.text}",
            (),
            (Golden(chunk.doc_id, chunk.start, chunk.end),),
        )
        for chunk in chunks
    ]
    hits = retriever.search([question.text for question in questions], 3)
    assert recall_at_k(questions, hits, 1) == 1.0
    passage = hits[0][0].passage
    assert country_text(0)[passage.start : passage.end] == passage.text
    assert passage.metadata == {"place": 0}


def test_search_more_than_the_index_holds_names_the_key(tmp_path: Path, corpus_path: Path, encoder_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, corpus_path, encoder_path)
    retriever = Retriever.open(build(recipe), recipe.encoder)
    size = len(retriever)
    assert len(retriever.search(["copper"], size)[0]) == size
    with pytest.raises(UserError, match=rf"^generation\.passages is {size + 1} but the index has {size} chunks"):
        retriever.search(["copper"], size + 1, key="generation.passages")
    assert retriever.search([], 1) == []


def test_build_index_again_is_up_to_date_and_an_edit_builds_another(
    tmp_path: Path, encoder_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    recipe = tiny_recipe(tmp_path, corpus, encoder_path)
    first = build(recipe)
    capsys.readouterr()
    assert build(recipe).ref == first.ref
    assert "up to date" in capsys.readouterr().out
    corpus.write_text(corpus.read_text(encoding="utf-8").replace("temperate", "tropical"), encoding="utf-8")
    second = build(recipe)
    assert second.ref != first.ref
    assert "content of corpus.path changed" in capsys.readouterr().out
    assert any("tropical" in chunk.text for chunk in Retriever.open(second, recipe.encoder).chunks())


def test_index_plan_ignores_resources_and_follows_results(
    tmp_path: Path, corpus_path: Path, encoder_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, corpus_path, encoder_path, precision="auto")

    def version(**sections: dict) -> str:
        data = recipe.model_dump()
        for section, changes in sections.items():
            data[section] |= changes
        return index_plan(RetrievalRecipe.model_validate(data), Store(recipe.store.uri)).ref.version

    same = version()
    assert version(encoder={"actors": 4, "batch_tokens": 512, "gpus_per_actor": 1}, search={"gpu": True}) == same
    assert version(index={"compact_above": 0.5, "max_small_shards": 3}, search={"candidates": 7}) == same
    assert version(search={"mode": "dense"}) == version(search={"mode": "hybrid"}) != same
    moved = write_corpus(tmp_path / "elsewhere" / "corpus.jsonl")
    assert version(corpus={"path": str(moved)}) == same
    changes = [
        {"chunking": {"max_tokens": 50}},
        {"chunking": {"merge": False}},
        {"index": {"kind": "hnsw"}},
        {"index": {"shard_chunks": 7}},
        {"index": {"recall_target": 0.5}},
        {"search": {"mode": "lexical"}},
        {"encoder": {"precision": "bfloat16"}},
    ]
    assert len({same, *(version(**change) for change in changes)}) == len(changes) + 1


def test_open_index_of_another_encoder_names_both(tmp_path: Path, corpus_path: Path, encoder_path: Path) -> None:
    artifact = build(tiny_recipe(tmp_path, corpus_path, encoder_path))
    other = tiny_encoder(tmp_path / "other", seed=4)
    recipe = tiny_recipe(tmp_path, corpus_path, other)
    with pytest.raises(ArtifactError) as error:
        Retriever.open(artifact, recipe.encoder)
    assert str(encoder_path) in str(error.value)
    assert str(other) in str(error.value)


@pytest.mark.parametrize("name", ["vectors.npy", "chunks.arrow", "documents.parquet", "attributes.arrow"])
def test_open_damaged_file_is_refused(tmp_path: Path, corpus_path: Path, encoder_path: Path, name: str) -> None:
    recipe = tiny_recipe(tmp_path, corpus_path, encoder_path)
    artifact = build(recipe)
    (entry,) = open_shards(artifact.directory())[0].shards
    file = artifact.directory() / "shards" / entry.shard_id / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=name):
        Retriever.open(artifact, recipe.encoder)


def test_build_index_unknown_language_goes_lexical_and_needs_no_encoder_to_search(
    tmp_path: Path, encoder_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "维也纳.md").write_text("# 奥地利\n\n## 地理\n\n首都是维也纳。\n", encoding="utf-8")
    (folder / "索非亚.txt").write_text("保加利亚的首都是索非亚。", encoding="utf-8")
    recipe = tiny_recipe(tmp_path, folder, encoder_path)
    artifact = build(recipe)
    assert "of this corpus's tokens are unknown to" in capsys.readouterr().out
    assert artifact.manifest.counts["unknown_share"] > 0.5
    nowhere = recipe.encoder.model_copy(update={"model": str(tmp_path / "no-such-encoder")})
    retriever = Retriever.open(artifact, nowhere)
    assert retriever.mode == "lexical"
    (hits,) = retriever.search(["奥地利的首都是哪里？"], 2)
    assert [hit.passage.uri for hit in hits] == ["维也纳.md", "索非亚.txt"]
    assert hits[0].score > hits[1].score
    assert hits[0].passage.heading == "地理"


@pytest.mark.parametrize(
    ("text", "chunking", "options", "message"),
    [
        ("# only\n## headings\n", None, {}, r"^corpus\.path: .* holds no text to index .first rejected: .*headings"),
        ("text", ChunkingConfig(max_tokens=127), {}, r"^chunking\.max_tokens is 127, but .* set .* to 126 or less"),
    ],
)
def test_build_index_what_cannot_be_indexed_leaves_nothing(
    tmp_path: Path, encoder_path: Path, text: str, chunking: ChunkingConfig | None, options: dict, message: str
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"_id": "d", "text": text}), encoding="utf-8")
    recipe = tiny_recipe(tmp_path, corpus, encoder_path, chunking=chunking, **options)
    with pytest.raises(UserError, match=message):
        build(recipe)
    store = Store(recipe.store.uri)
    assert store.current("index", "tiny") is None
    assert store.versions("index", "tiny") == []


def test_index_format_of_another_release_is_refused(
    tmp_path: Path, corpus_path: Path, encoder_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, corpus_path, encoder_path)
    with monkeypatch.context() as patch:
        patch.setattr(index, "INDEX_FORMAT", 99)
        artifact = build(recipe)
    with pytest.raises(ArtifactError, match="of format 99, this rayft searches an index of format 2"):
        Retriever.open(artifact, recipe.encoder)


def test_index_plan_follows_the_ledger_and_a_build_leaves_its_documents_out(
    tmp_path: Path, corpus_path: Path, encoder_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, corpus_path, encoder_path)
    store = Store(recipe.store.uri)
    before = index_plan(recipe, store).ref
    add_deleted(store, recipe.name, ["ghana"])
    assert index_plan(recipe, store).ref != before
    artifact = build(recipe)
    documents = [document.doc_id for shard in open_shards(artifact.directory())[1] for document in shard.documents()]
    assert documents == [name.lower() for name in COUNTRIES if name != "Ghana"]
    assert artifact.manifest.counts["removed"] == 1
    assert "1 documents were left out because they were deleted by id or purged" in capsys.readouterr().out


def publish_encoder(store: Store, name: str, tuned: Path, base_digest: str) -> Artifact:
    import shutil

    from cluster.stage import Plan

    plan = Plan(kind="encoder", name=name, inputs={BASE_INPUT: base_digest})
    with store.attempt(plan.ref) as attempt:
        shutil.copytree(tuned, attempt.directory, dirs_exist_ok=True)
        artifact = attempt.publish(plan)
    store.set_current(plan.ref)
    return artifact


def test_tuned_encoder_of_the_recipe_is_taken_as_parent_and_another_is_not(
    tmp_path: Path, corpus_path: Path, encoder_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, corpus_path, encoder_path)
    store = Store(recipe.store.uri)
    base = build(recipe)
    tuned = tiny_encoder(tmp_path / "tuned", seed=8)
    publish_encoder(store, recipe.name, tuned, "of another model")
    assert encoder_source(recipe, store) == EncoderSource(recipe.encoder)
    artifact = publish_encoder(store, recipe.name, tuned, encoder_digest(recipe.encoder))
    source = encoder_source(recipe, store)
    assert source.ref == source.name == str(artifact.ref)
    assert (
        encoder_source(
            recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"tuned": "never"})}), store
        ).ref
        == ""
    )
    index = build(recipe)
    assert index.ref != base.ref
    assert index.manifest.parents == {"encoder": str(artifact.ref)}
    assert index.manifest.counts["reused"] == 0
    assert index.manifest.measured["encoder_digest"] == source.digest() != EncoderSource(recipe.encoder).digest()


def test_an_encoder_published_while_an_index_is_built_waits_for_the_next_build(
    tmp_path: Path, corpus_path: Path, encoder_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, corpus_path, encoder_path)
    store = Store(recipe.store.uri)
    tuned = tiny_encoder(tmp_path / "tuned", seed=8)

    def after_planning(*arguments: Any) -> BaseVersion | None:
        publish_encoder(store, recipe.name, tuned, encoder_digest(recipe.encoder))
        return base_version(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(index, "base_version", after_planning)
        plain = build(recipe)
    assert plain.manifest.parents == {}
    assert Retriever.open(plain, recipe.encoder, device="cpu").search(["ports"], 1)
    assert build(recipe).manifest.parents == {"encoder": str(store.open("encoder", recipe.name).ref)}


def test_a_small_update_of_a_large_index_does_not_run_in_the_driver(
    tmp_path: Path, corpus_path: Path, encoder_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, corpus_path, encoder_path)
    artifact = build(recipe)
    base = base_version(Store(recipe.store.uri), recipe.name, "sync")
    assert base is not None and base.rows == artifact.manifest.measured["rows"] > 0
    scan = scan_corpus(recipe.corpus, recipe.seed, block_bytes=1)
    assert index._may_run_alone(recipe, scan, base)
    monkeypatch.setattr(index, "SMALL_BASE_ROWS", base.rows - 1)
    assert not index._may_run_alone(recipe, scan, base)
