"""Updates from the corpus and by deltas: what is embedded, what is found, what stays deleted, who wins a race."""

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import typer
from typer.testing import CliRunner

from cluster.errors import ArtifactError, UserError
from cluster.gc import collect
from cluster.store import Artifact, Attempt
from retrieval.build_job import BaseVersion
from retrieval.config import RetrievalRecipe
from retrieval.index import base_version, build_index
from retrieval.ledger import add_deleted, lift_deleted, removed_ids
from retrieval.retriever import Retriever
from retrieval.shards import open_shards
from retrieval.update import _require_known, update_collections, update_index
from retrieval.update_cli import register_update
from tests.retrieval.stub_encoder import StubEncoder
from tests.retrieval.updates import (
    QUERIES,
    assert_same_results,
    changed,
    current,
    documents_of,
    found,
    fresh_build,
    loaded_once,
    recipe_of,
    row,
    some_rows,
    store_of,
    write_rows,
)


@pytest.fixture
def recipe(tmp_path: Path, encoder_path: Path) -> RetrievalRecipe:
    return recipe_of(tmp_path, encoder_path, some_rows(8))


@pytest.fixture
def stub(tmp_path: Path) -> StubEncoder:
    return StubEncoder(str(tmp_path / "embedded.txt"))


@pytest.fixture(autouse=True)
def query_encoders_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "retrieval.retriever.load_encoder", lambda source, device: loaded_once(source, "float32", device)
    )


def build(recipe: RetrievalRecipe) -> Artifact:
    return build_index(recipe, store_of(recipe), make_encoder=loaded_once)


def sync(recipe: RetrievalRecipe) -> Artifact:
    return update_index(recipe, store_of(recipe), make_encoder=loaded_once)


def delta(recipe: RetrievalRecipe, rows: list[dict] = (), delete: tuple[str, ...] = ()) -> Artifact:  # type: ignore[assignment]
    path = Path(recipe.store.uri).parent / "delta.jsonl"
    upsert = write_rows(path, rows) if rows else ""
    return update_index(recipe, store_of(recipe), upsert=upsert, delete=delete, make_encoder=loaded_once)


def test_sync_embeds_changed_chunks_only_and_equals_a_fresh_build(
    recipe: RetrievalRecipe, stub: StubEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of(recipe)
    first = build_index(recipe, store, make_encoder=stub)
    chunks = len(stub.embedded())
    rows = some_rows(8)
    rows[3]["text"] = rows[3]["text"].replace("part 1", "part one")
    del rows[5]
    rows.append(row("new", "roses and cheese"))
    write_rows(recipe.corpus.path, rows)
    capsys.readouterr()
    second = update_index(recipe, store, make_encoder=stub)
    embedded = stub.embedded()
    assert 2 < len(embedded) < 8 < chunks
    assert any("part one" in text for text in embedded)
    assert all(text.startswith(("d3\n", "new\n", "d3 ", "new ")) for text in embedded), embedded
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("index: 1 documents added, 1 changed, 1 deleted, 6 unchanged; ")
    assert f"{len(embedded)} chunks embedded" in line and "not compacted" in line
    assert second.manifest.measured["update"]["embedded"] == len(embedded)
    assert documents_of(second) == {one["_id"]: one["text"] for one in rows}
    assert documents_of(store.open_ref(first.ref)) == {one["_id"]: one["text"] for one in some_rows(8)}
    old = {entry.shard_id for entry in open_shards(first.directory())[0].shards}
    assert old < {entry.shard_id for entry in open_shards(second.directory())[0].shards}
    assert build_index(recipe, store, make_encoder=stub).ref == second.ref
    assert update_index(recipe, store, make_encoder=stub).ref == second.ref
    assert capsys.readouterr().out.count("up to date") == 2
    assert stub.embedded() == []


def test_an_open_retriever_keeps_answering_from_its_version(recipe: RetrievalRecipe) -> None:
    first = build(recipe)
    before = found(recipe, first)
    retriever = Retriever.open(first, recipe.encoder, recipe.search, device="cpu")
    write_rows(recipe.corpus.path, some_rows(3, year=2000))
    second = sync(recipe)
    assert current(recipe).ref == second.ref != first.ref
    hits = retriever.search(QUERIES, 5)
    assert [[hit.passage.chunk_id for hit in ranked] for ranked in hits] == [[h[0] for h in r] for r in before]
    assert found(recipe, store_of(recipe).open_ref(first.ref)) == before


def test_delta_adds_changes_and_deletes_without_the_corpus(
    recipe: RetrievalRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(recipe)
    Path(recipe.corpus.path).unlink()
    rows = {one["_id"]: one for one in some_rows(8)}
    for one in (row("d2", "paprika again"), row("e", "a new one")):
        rows[one["_id"]] = one
    del rows["d6"]
    capsys.readouterr()
    artifact = delta(recipe, [rows["d2"], rows["e"], rows["d1"]], ("d6",))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("index: 1 documents added, 1 changed, 1 deleted, 6 unchanged; ")
    assert documents_of(artifact) == {doc_id: one["text"] for doc_id, one in rows.items()}
    assert_same_results(recipe, artifact, fresh_build(recipe, list(rows.values()), tmp_path / "fresh"))
    assert "d6" in removed_ids(store_of(recipe), recipe.name)
    assert delta(recipe, [rows["d2"], rows["e"]], ("d6",)).ref == artifact.ref
    assert "up to date" in capsys.readouterr().out
    assert not list((Path(recipe.store.uri) / "index").rglob(".work"))


def test_deletions_never_come_back_unless_they_are_brought(
    recipe: RetrievalRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    build(recipe)
    delta(recipe, delete=("d3",))
    write_rows(recipe.corpus.path, [*some_rows(8), row("e", "new")])  # the corpus still holds d3
    for act in (sync, build):
        artifact = act(recipe)
        assert "d3" not in documents_of(artifact) and "e" in documents_of(artifact)
    assert "1 documents were left out because they were deleted by id" in capsys.readouterr().out
    compacting = changed(recipe, index={"compact_above": 0.01})
    delta(compacting, delete=("d4",))
    assert documents_of(current(recipe)).keys() == {"d0", "d1", "d2", "d5", "d6", "d7", "e"}
    write_rows(recipe.corpus.path, [*some_rows(8)[::-1], row("e", "newer")])
    assert documents_of(sync(recipe)).keys() == {"d0", "d1", "d2", "d5", "d6", "d7", "e"}
    assert "d3" in documents_of(delta(recipe, [some_rows(8)[3]]))
    assert removed_ids(store_of(recipe), recipe.name).deleted == {"d4"}
    assert "d3" in documents_of(sync(recipe)) and "d4" not in documents_of(build(recipe))


def test_an_id_both_deleted_and_brought_is_kept(recipe: RetrievalRecipe) -> None:
    build(recipe)
    same = delta(recipe, [some_rows(8)[2]], ("d2",))
    assert documents_of(same)["d2"] == some_rows(8)[2]["text"]
    other = delta(recipe, [row("d2", "other words")], ("d2", "d1"))
    assert documents_of(other)["d2"] == row("d2", "other words")["text"]
    assert removed_ids(store_of(recipe), recipe.name).deleted == {"d1"}


def test_what_cannot_be_updated_is_refused_in_one_line(recipe: RetrievalRecipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--delete: index/tiny has no version to change"):
        delta(recipe, delete=("d1",))
    first = build(recipe)
    with pytest.raises(UserError, match=r"^--delete: index/tiny/\w+ holds no document d11; the nearest are .*d1"):
        delta(recipe, delete=("d0", "d11"))
    assert removed_ids(store_of(recipe), recipe.name).digest == ""
    with pytest.raises(UserError, match=r"^--upsert: .* does not exist"):
        update_index(recipe, store_of(recipe), upsert=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(
        UserError, match=r"^--upsert: .*chunking\.max_tokens changed from 48 to 40.*without this option"
    ):
        delta(changed(recipe, chunking={"max_tokens": 40}), [row("e", "new")])
    with pytest.raises(UserError, match=r"^--delete: nothing would be left"):
        delta(recipe, delete=tuple(f"d{n}" for n in range(8)))
    assert removed_ids(store_of(recipe), recipe.name).digest == ""  # or the next build would delete them after all
    (tmp_path / "empty.md").write_text("")
    with pytest.raises(UserError, match=r"^--upsert: nothing in .*empty\.md is new.* 1 .* rejected, .*: is empty"):
        update_index(recipe, store_of(recipe), upsert=str(tmp_path / "empty.md"), make_encoder=loaded_once)
    assert current(recipe).ref == first.ref


def test_a_delta_and_the_build_after_it_say_why_in_the_users_words(
    recipe: RetrievalRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    build(recipe)
    capsys.readouterr()
    delta(recipe, delete=("d1", "d2"))
    assert ": --delete of 2 documents\n" in capsys.readouterr().out
    delta(recipe, [row("e", "new")])
    assert ": --upsert " in capsys.readouterr().out
    build(changed(recipe, chunking={"max_tokens": 40}))
    told = next(line for line in capsys.readouterr().out.splitlines() if "building" in line)
    made = "the current version was made by --upsert or --delete"
    assert told.endswith(f": {made}; chunking.max_tokens changed from 48 to 40")


def test_sync_of_another_recipe_builds_anew_and_says_so(
    recipe: RetrievalRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    build(recipe)
    other = changed(recipe, chunking={"max_tokens": 40})
    artifact = sync(other)
    assert "not only documents changed (chunking.max_tokens changed from 48 to 40)" in capsys.readouterr().out
    assert artifact.manifest.config["chunking"]["max_tokens"] == 40
    assert build(other).ref == artifact.ref


def test_an_upserted_file_below_the_corpus_keeps_its_id(tmp_path: Path, encoder_path: Path) -> None:
    docs = tmp_path / "docs"
    for name in ("a.md", "sub/a.md", "sub/b.md"):
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).write_text(f"# {name}\n\nWords of {name}.\n", encoding="utf-8")
    recipe = changed(recipe_of(tmp_path, encoder_path, []), corpus={"path": str(docs)})
    build(recipe)
    (docs / "sub/a.md").write_text("# Another\n\nOther words.\n", encoding="utf-8")
    artifact = update_index(recipe, store_of(recipe), upsert=str(docs / "sub/a.md"))
    texts = documents_of(artifact)
    assert texts.keys() == {"a.md", "sub/a.md", "sub/b.md"}
    assert "Other words." in texts["sub/a.md"]
    (docs / "sub/c.md").write_text("# C\n\nMore.\n", encoding="utf-8")
    assert documents_of(update_index(recipe, store_of(recipe), upsert=str(docs / "sub"))).keys() == {*texts, "sub/c.md"}
    assert documents_of(sync(recipe)) == documents_of(current(recipe))


def test_of_two_racing_updates_one_wins_and_the_other_loses_nothing(recipe: RetrievalRecipe, stub: StubEncoder) -> None:
    store = store_of(recipe)
    build_index(recipe, store, make_encoder=stub)
    corpus = write_rows(Path(recipe.store.uri).parent / "mine.jsonl", [row("mine", "my words")])
    other = write_rows(Path(recipe.store.uri).parent / "theirs.jsonl", [row("theirs", "their words")])

    def meanwhile(*arguments: object) -> object:
        update_index(recipe, store, upsert=other, make_encoder=stub)
        return stub(*arguments)

    with pytest.raises(ArtifactError, match=r"became current while .* nothing is lost: run the same command again"):
        update_index(recipe, store, upsert=corpus, make_encoder=meanwhile)  # type: ignore[arg-type]
    assert documents_of(current(recipe)).keys() == {*(f"d{n}" for n in range(8)), "theirs"}
    update_index(recipe, store, upsert=corpus, make_encoder=stub)
    assert documents_of(current(recipe)).keys() == {*(f"d{n}" for n in range(8)), "theirs", "mine"}


def test_an_update_or_build_that_missed_a_deletion_is_not_published(recipe: RetrievalRecipe, stub: StubEncoder) -> None:
    store = store_of(recipe)
    first = build_index(recipe, store, make_encoder=stub)
    write_rows(recipe.corpus.path, [*some_rows(8), row("e", "new")])

    def meanwhile(*arguments: object) -> object:
        update_index(recipe, store, delete=("d1",), make_encoder=stub)
        return stub(*arguments)

    for act in (update_index, build_index):
        store.storage.delete("index/tiny/removed.json")
        store.set_current(first.ref)
        with pytest.raises(UserError, match="documents were deleted from index/tiny while it was being built"):
            act(recipe, store, make_encoder=meanwhile)  # type: ignore[operator]
        assert "d1" not in documents_of(current(recipe))
        assert "d1" not in documents_of(act(recipe, store, make_encoder=stub))  # type: ignore[operator]


def test_a_build_does_not_replace_a_version_that_deleted_a_document_at_the_last_moment(
    recipe: RetrievalRecipe, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(recipe)
    build_index(recipe, store, make_encoder=stub)
    write_rows(recipe.corpus.path, [*some_rows(8), row("e", "new")])
    publish = Attempt.publish

    def late(attempt: Attempt, *arguments: Any) -> Artifact:
        monkeypatch.setattr(Attempt, "publish", publish)
        update_index(recipe, store, delete=("d1",), make_encoder=stub)
        return publish(attempt, *arguments)

    monkeypatch.setattr(Attempt, "publish", late)
    with pytest.raises(ArtifactError, match=r"became current while .* run the same command again"):
        build_index(recipe, store, make_encoder=stub)
    assert "d1" not in documents_of(current(recipe))
    documents = documents_of(build_index(recipe, store, make_encoder=stub))
    assert "e" in documents and "d1" not in documents


def test_a_refused_build_leaves_no_work_that_lacks_what_is_lifted_again(
    recipe: RetrievalRecipe, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(recipe)

    def after_planning(*arguments: Any) -> BaseVersion | None:
        monkeypatch.setattr("retrieval.index.base_version", base_version)
        add_deleted(store, recipe.name, ["d1"])
        return base_version(*arguments)

    monkeypatch.setattr("retrieval.index.base_version", after_planning)
    with pytest.raises(UserError, match="documents were deleted from index/tiny while it was being built"):
        build_index(recipe, store, make_encoder=stub)
    lift_deleted(store, recipe.name, ["d1"])
    assert documents_of(build_index(recipe, store, make_encoder=stub)).keys() == {f"d{n}" for n in range(8)}


def test_ids_to_delete_are_looked_for_without_all_ids_in_memory(
    recipe: RetrievalRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shard:
        def document_batches(self, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
            for part in range(50):
                yield pa.record_batch({"doc_id": [f"d{part * 1000 + n}" for n in range(1000)]})

    monkeypatch.setattr("retrieval.update.IDS_COMPARED", 3)
    base: Any = SimpleNamespace(ref="index/tiny/0", open=lambda: (None, [Shard()]))
    tracemalloc.start()
    _require_known(store_of(recipe), recipe.name, base, ("d49999", "d0"))
    for doc_id, hint in (("dd1", "; the nearest are d1"), ("dd7", "")):  # d7 is not among the first 3
        with pytest.raises(UserError, match=rf"holds no document {doc_id}{hint}$"):
            _require_known(store_of(recipe), recipe.name, base, (doc_id,))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_compaction_writes_few_shards_anew_and_embeds_nothing(
    recipe: RetrievalRecipe, stub: StubEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of(recipe)
    build_index(recipe, store, make_encoder=stub)
    stub.embedded()
    crowded = changed(recipe, index={"max_small_shards": 3})
    for number in range(4):
        path = write_rows(Path(recipe.store.uri).parent / "delta.jsonl", [row(f"e{number}", f"word{number}")])
        update_index(crowded, store, upsert=path, make_encoder=stub)
        shards = open_shards(current(recipe).directory())[0].shards
        assert len(shards) == (2, 3, 1, 2)[number]
        assert all(f"word{number}" in text for text in stub.embedded())
    assert "compacted 3 shards" in capsys.readouterr().out
    artifact = update_index(changed(recipe, index={"compact_above": 0.05}), store, delete=("d2",), make_encoder=stub)
    assert stub.embedded() == []
    index, readers = open_shards(artifact.directory())
    assert index.rows == artifact.manifest.counts["chunks"] == sum(len(shard.live_rows()) for shard in readers)
    assert documents_of(artifact).keys() == {*(f"d{n}" for n in range(8) if n != 2), *(f"e{n}" for n in range(4))}


def test_gc_keeps_the_ledger_and_files_that_versions_share(recipe: RetrievalRecipe) -> None:
    build(recipe)
    delta(recipe, delete=("d1",))
    artifact = delta(recipe, [row("e", "new")])
    expected = found(recipe, artifact)
    removals = collect(store_of(recipe), min_age_s=-1)
    assert len([removal for removal in removals if "neither current" in removal.reason]) == 2
    assert found(recipe, current(recipe)) == expected
    assert removed_ids(store_of(recipe), recipe.name).deleted == {"d1"}
    assert "d1" not in documents_of(sync(recipe))


def test_update_of_collections_publishes_a_catalog(tmp_path: Path, encoder_path: Path) -> None:
    paths = {
        name: write_rows(tmp_path / f"{name}.jsonl", [row(f"{name}{n}", f"{name} {n}") for n in range(3)])
        for name in "ab"
    }
    plain = recipe_of(tmp_path, encoder_path, [])
    collections = {name: {"corpus": {"path": path}} for name, path in paths.items()}
    recipe = changed(plain, corpus={"path": ""}, collections=collections)
    first = build(recipe)
    with pytest.raises(UserError, match=r"^--collection: say which collection"):
        update_collections(recipe, store_of(recipe), delete=("a1",))
    update_collections(recipe, store_of(recipe), "a", delete=("a1",))
    second = update_collections(
        recipe, store_of(recipe), "b", upsert=write_rows(tmp_path / "delta.jsonl", [row("b9", "b 9")])
    )
    ids = {document.doc_id for document in Retriever.open(second, recipe.encoder, recipe.search).documents()}
    assert ids == {"a0", "a2", "b0", "b1", "b2", "b9"}
    assert current(recipe).ref == second.ref != first.ref
    third = update_collections(recipe, store_of(recipe))
    ids = {document.doc_id for document in Retriever.open(third, recipe.encoder, recipe.search).documents()}
    assert ids == {"a0", "a2", "b0", "b1", "b2"}


def test_the_command_prints_one_line_of_what_changed(recipe: RetrievalRecipe) -> None:
    app = typer.Typer()
    register_update(app, lambda _path, _overrides: recipe)
    run = CliRunner().invoke
    build(recipe)
    assert "up to date" in run(app, ["update", "tiny"]).output
    output = run(app, ["update", "tiny", "--delete", "d1", "--delete", "d2"]).output
    assert output.splitlines()[-1].startswith("index: 0 documents added, 0 changed, 2 deleted, 6 unchanged; 0 chunks")
    refused = run(app, ["update", "tiny", "--collection", "a"])
    assert isinstance(refused.exception, UserError) and "no collections" in str(refused.exception)


KINDS = ["flat", "lexical", "hnsw", "ivf_flat", "ivf_pq"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_updates_finds_what_a_fresh_build_finds(
    tmp_path: Path, encoder_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.vectors.SMALLEST_INDEXED", 8)
    chance = random.Random(KINDS.index(kind))
    rows = {one["_id"]: one for one in some_rows(16)}
    sections = {"search": {"mode": "lexical"}} if kind == "lexical" else {}
    settings = {"kind": "flat" if kind == "lexical" else kind, "shard_chunks": 30, "recall_target": 1.0}
    recipe = recipe_of(
        tmp_path, encoder_path, list(rows.values()), index={**settings, "compact_above": 1.0}, **sections
    )
    build(recipe)
    deleted: set[str] = set()
    for step in range(5):
        compaction = chance.choice([0.02, 0.3, 1.0])
        recipe = changed(recipe, index={"compact_above": compaction, "max_small_shards": chance.choice([2, 99])})
        brought = [row(f"d{chance.randrange(24)}", f"step {step} of {chance.choice(QUERIES)}") for _ in range(3)]
        brought = list({one["_id"]: one for one in brought}.values())
        gone = tuple(chance.sample(sorted(rows.keys() - {one["_id"] for one in brought}), 2))
        if chance.random() < 0.5:
            delta(recipe, brought, gone)
            deleted = (deleted | set(gone)) - {one["_id"] for one in brought}
        else:
            brought = [one for one in brought if one["_id"] not in deleted]
        rows |= {one["_id"]: one for one in brought}
        for doc_id in gone:
            del rows[doc_id]
        write_rows(recipe.corpus.path, chance.sample(list(rows.values()), len(rows)))
        if chance.random() < 0.7 or documents_of(current(recipe)).keys() != rows.keys():
            sync(recipe)
        artifact = current(recipe)
        assert documents_of(artifact) == {doc_id: one["text"] for doc_id, one in rows.items()}
        fresh = fresh_build(recipe, list(rows.values()), tmp_path / f"fresh{step}")
        assert artifact.manifest.counts["chunks"] == fresh.manifest.counts["chunks"]
        assert_same_results(recipe, artifact, fresh, mode="lexical")
        if kind in ("flat", "lexical"):
            assert_same_results(recipe, artifact, fresh)
            assert_same_results(recipe, artifact, fresh, k=10**6)
        else:
            assert kind in str(artifact.manifest.measured["kind"])
            exact = fresh_build(changed(recipe, index={"kind": "flat"}), list(rows.values()), tmp_path / f"exact{step}")
            assert recall(recipe, artifact, exact) >= recall(recipe, fresh, exact) - 0.01


def recall(recipe: RetrievalRecipe, artifact: Artifact, exact: Artifact) -> float:
    ours, theirs = found(recipe, artifact, 10), found(recipe, exact, 10)
    same = [len({hit[0] for hit in a} & {hit[0] for hit in b}) / len(b) for a, b in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)
