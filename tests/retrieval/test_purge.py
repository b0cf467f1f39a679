"""Purging a document: nothing of its text is left in the store, and all else is found as before."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from cluster import locks
from cluster.errors import UserError
from cluster.stage import Outcome, Plan, run_stage
from cluster.storage import LocalStorage
from cluster.store import Artifact, Attempt, Store
from cluster.workdir import lock_of
from retrieval import embedding, purge, shards
from retrieval.config import RetrievalRecipe
from retrieval.index import build_index
from retrieval.ledger import purged_key, removed_ids
from retrieval.purge import UnknownDocumentError, purge_document
from retrieval.shards import open_shards
from retrieval.update import update_index
from retrieval.update_cli import register_update
from tests.retrieval.killed import Point, run_killed
from tests.retrieval.stub_encoder import StubEncoder
from tests.retrieval.updates import (
    assert_same_results,
    changed,
    current,
    documents_of,
    fresh_build,
    loaded_once,
    recipe_of,
    row,
    some_rows,
    store_of,
    write_rows,
)

SECRET = "xylophonequartz"


@pytest.fixture(autouse=True)
def query_encoders_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "retrieval.retriever.load_encoder", lambda source, device: loaded_once(source, "float32", device)
    )


@pytest.fixture
def recipe(tmp_path: Path, encoder_path: Path) -> RetrievalRecipe:
    return recipe_of(tmp_path, encoder_path, rows_with_secret())


@pytest.fixture
def stub(tmp_path: Path) -> StubEncoder:
    return StubEncoder(str(tmp_path / "embedded.txt"))


def secret_row() -> dict:
    return row(f"{SECRET}-id", f"{SECRET} words", kind=f"{SECRET} kind")


def rows_with_secret() -> list[dict]:
    """The document in the middle, and a later one with its id, which is rejected."""
    rows = some_rows(6)
    return [*rows[:3], secret_row(), *rows[3:], secret_row()]


def build(recipe: RetrievalRecipe, **options: object) -> Artifact:
    return build_index(recipe, store_of(recipe), **{"make_encoder": loaded_once, **options})  # type: ignore[arg-type]


def traces(folder: Path, word: str = SECRET) -> list[str]:
    """Files below a folder that hold the word, in their name, their bytes or their decoded columns."""
    found = []
    for path in folder.rglob("*"):
        if word in path.name:
            found.append(str(path))
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += str(pq.read_table(path).to_pylist()).encode()
        if path.suffix == ".arrow":
            data += str(pa.ipc.open_file(path).read_all().to_pylist()).encode()
        if word.encode() in data:
            found.append(str(path))
    return found


def several_versions(recipe: RetrievalRecipe, **options: object) -> list[Artifact]:
    """The document is live in the first two versions, deleted in the third; the fourth holds it in a second shard."""
    store = store_of(recipe)
    make = {"make_encoder": loaded_once, **options}
    path = Path(recipe.store.uri).parent / "delta.jsonl"
    versions = [build(recipe, **options)]
    versions.append(update_index(recipe, store, upsert=write_rows(path, [row("e", "more")]), **make))  # type: ignore[arg-type]
    versions.append(update_index(recipe, store, delete=(f"{SECRET}-id",), **make))  # type: ignore[arg-type]
    changed_row = {**secret_row(), "title": f"{SECRET} again"}
    versions.append(update_index(recipe, store, upsert=write_rows(path, [changed_row]), **make))  # type: ignore[arg-type]
    return versions


def test_purge_leaves_no_trace_in_any_version_and_other_results_as_they_were(
    recipe: RetrievalRecipe, tmp_path: Path
) -> None:
    store = store_of(recipe)
    versions = several_versions(recipe)
    others = [{doc: text for doc, text in documents_of(one).items() if SECRET not in doc} for one in versions]
    folder = Path(store.uri)
    assert len(traces(folder)) >= 8
    report = purge_document(store, recipe.name, f"{SECRET}-id")
    assert traces(folder) == []
    assert traces(folder, SECRET.upper()) == []
    assert set(report.rewritten) == {version.ref for version in versions}
    for version, expected in zip(versions, others, strict=True):
        purged = store.open_ref(version.ref)
        assert documents_of(purged) == expected
        assert purged.manifest.purged == (purged_key(f"{SECRET}-id"),)
        index, readers = open_shards(purged.directory())
        assert purged.manifest.counts["chunks"] == sum(len(reader.live_rows()) for reader in readers)
        assert purged.manifest.counts["documents"] == len(expected)
        assert purged.manifest.counts["tokens"] == sum(chunk.tokens for reader in readers for chunk in reader.chunks())
        assert purged.manifest.measured["rows"] == index.rows
        assert purged.manifest.counts["rejected"] == pq.read_table(purged.path("rejected.parquet")).num_rows == 0
    rest = [*some_rows(6), row("e", "more")]
    fresh = fresh_build(recipe, rest, tmp_path / "fresh")
    for version in versions[1:]:
        assert_same_results(recipe, store.open_ref(version.ref), fresh)
        assert_same_results(recipe, store.open_ref(version.ref), fresh, mode="lexical")
    parts = [path for version in versions for path in (folder / str(version.ref)).iterdir()]
    assert len(parts) == 2 * len(versions)  # an attempt and a manifest each


def test_a_purged_document_never_comes_back(recipe: RetrievalRecipe, tmp_path: Path) -> None:
    store = store_of(recipe)
    several_versions(recipe)
    purge_document(store, recipe.name, f"{SECRET}-id")
    for act in (build_index, update_index):
        assert documents_of(act(recipe, store, make_encoder=loaded_once)).keys() == {f"d{n}" for n in range(6)}  # type: ignore[operator]
    delta = write_rows(tmp_path / "delta.jsonl", [secret_row()])
    with pytest.raises(UserError, match=rf"^--upsert: document {SECRET}-id was purged from index/tiny"):
        update_index(recipe, store, upsert=delta, make_encoder=loaded_once)
    assert traces(Path(store.uri)) == []
    assert purge_document(store, recipe.name, f"{SECRET}-id").rewritten == ()


def test_an_unknown_document_is_refused_and_nothing_is_remembered(recipe: RetrievalRecipe, stub: StubEncoder) -> None:
    first = build(recipe, make_encoder=stub)
    with pytest.raises(UnknownDocumentError, match=r"^purge: no version of index/tiny in .* holds a document nobody"):
        purge_document(store_of(recipe), recipe.name, "nobody")
    assert removed_ids(store_of(recipe), recipe.name).digest == ""
    assert current(recipe).manifest == first.manifest


def test_a_shard_of_several_versions_is_rewritten_once(
    recipe: RetrievalRecipe, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = several_versions(recipe, make_encoder=stub)
    written: list[Path] = []
    original = purge.write_shard
    monkeypatch.setattr(purge, "write_shard", lambda place, *rest: written.append(place) or original(place, *rest))
    purge_document(store_of(recipe), recipe.name, f"{SECRET}-id")
    assert len(versions) == 4 and len(written) == 1  # the second shard with the document held nothing else
    first, second = (open_shards(store_of(recipe).open_ref(one.ref).directory())[1] for one in versions[:2])
    assert first[0].entry == second[0].entry
    assert (first[0].directory / "chunks.arrow").stat().st_ino == (second[0].directory / "chunks.arrow").stat().st_ino


@pytest.mark.parametrize("kind", ["hnsw", "lexical"])
def test_purge_of_other_kinds_of_index(recipe: RetrievalRecipe, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.vectors.SMALLEST_INDEXED", 8)
    section = {"search": {"mode": "lexical"}} if kind == "lexical" else {"index": {"kind": kind}}
    recipe = changed(recipe, **section)
    build(recipe)
    purge_document(store_of(recipe), recipe.name, f"{SECRET}-id")
    purged = current(recipe)
    assert traces(Path(recipe.store.uri)) == []
    assert purged.manifest.measured.get("kind") == (None if kind == "lexical" else kind)
    assert documents_of(purged).keys() == {f"d{n}" for n in range(6)}


def test_a_version_of_nothing_else_is_removed(recipe: RetrievalRecipe, stub: StubEncoder) -> None:
    store = store_of(recipe)
    write_rows(recipe.corpus.path, [secret_row()])
    only = build(recipe, make_encoder=stub)
    report = purge_document(store, recipe.name, f"{SECRET}-id")
    assert report.removed == (only.ref,) and not store.exists(only.ref)
    assert store.current("index", recipe.name) is None
    assert traces(Path(store.uri)) == []
    write_rows(recipe.corpus.path, [secret_row(), *some_rows(2)])
    assert documents_of(build(recipe, make_encoder=stub)).keys() == {"d0", "d1"}


def test_purge_removes_interrupted_builds_and_waits_for_running_ones(
    recipe: RetrievalRecipe, stub: StubEncoder
) -> None:
    store = store_of(recipe)
    with pytest.raises(UnknownDocumentError):
        purge_document(store, recipe.name, f"{SECRET}-id")
    run_killed(lambda: build(recipe, make_encoder=stub), Point(embedding.EmbedParts, "embed"))
    work = next(Path(store.uri).rglob(".work"))
    assert traces(work)
    lock = locks.acquire(lock_of(work))
    assert lock is not None
    with pytest.raises(UserError, match=r"^purge: index/tiny is being built .*\.work\): .*run the same command again$"):
        purge_document(store, recipe.name, f"{SECRET}-id")
    locks.release(lock_of(work), lock, remove=False)
    assert purge_document(store, recipe.name, f"{SECRET}-id").unfinished == 2
    assert traces(Path(store.uri)) == []
    assert documents_of(build(recipe, make_encoder=stub)).keys() == {f"d{n}" for n in range(6)}


def test_derived_artifacts_are_named_with_what_makes_them_anew(recipe: RetrievalRecipe, stub: StubEncoder) -> None:
    store = store_of(recipe)
    index = build(recipe, make_encoder=stub)

    def derive(kind: str, *parents: Artifact) -> Artifact:
        def write(attempt: Attempt) -> Outcome:
            (attempt.directory / "rows").write_text("text")
            return Outcome()

        plan = Plan(kind=kind, name="tiny", parents={f"p{n}": one.ref for n, one in enumerate(parents)})
        return run_stage(store, plan, write)

    samples = derive("samples", index)
    adapter = derive("adapter", samples)
    derive("release", index, adapter)
    derive("router")
    app = typer.Typer()
    register_update(app, lambda _path, _overrides: recipe)
    done = CliRunner().invoke(app, ["purge", "tiny", f"{SECRET}-id"])
    assert "purge: 1 versions rewritten" in done.output and done.exception is None
    for _ in range(2):
        report = purge_document(store, recipe.name, f"{SECRET}-id")
        assert [(item.ref, item.command) for item in report.derived] == [
            (adapter.ref, "rayft train lora RECIPE"),
            (samples.ref, "rayft samples build RECIPE"),
        ]
    assert f"{samples.ref}" in done.output and "rayft train lora" in done.output and "router" not in done.output


def test_purge_of_a_collection_and_of_all(tmp_path: Path, encoder_path: Path) -> None:
    words = {"a": [secret_row(), row("a1", "one")], "b": [row("b1", "two")]}
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in words.items()}
    plain = recipe_of(tmp_path, encoder_path, [])
    recipe = changed(plain, corpus={"path": ""}, collections={n: {"corpus": {"path": p}} for n, p in paths.items()})
    build_index(recipe, store_of(recipe))
    app = typer.Typer()
    register_update(app, lambda _path, _overrides: recipe)
    wrong = CliRunner().invoke(app, ["purge", "tiny", f"{SECRET}-id", "--collection", "b"])
    assert isinstance(wrong.exception, UnknownDocumentError) and traces(Path(recipe.store.uri))
    assert CliRunner().invoke(app, ["purge", "tiny", f"{SECRET}-id"]).exception is None
    assert traces(Path(recipe.store.uri)) == []


def manifest(_: object, key: str, *__: object) -> bool:
    return key.endswith("/manifest.json")


def an_attempt(_: object, key: str) -> bool:
    return key.count("/") == 3


KILLS: dict[str, Callable[[], Point]] = {
    "ledger written": lambda: Point(purge, "add_purged", before=False),
    "writing a shard": lambda: Point(shards, "_write_vectors"),
    "words written": lambda: Point(purge, "write_lexical", before=False),
    "manifest not yet swapped": lambda: Point(LocalStorage, "replace_if", when=manifest),
    "manifest not yet renamed": lambda: Point(Path, "replace", when=lambda _, to: str(to).endswith("manifest.json")),
    "manifest swapped": lambda: Point(LocalStorage, "replace_if", before=False, when=manifest),
    "old files deleted": lambda: Point(LocalStorage, "delete", before=False, when=an_attempt),
    "second version": lambda: Point(LocalStorage, "replace_if", when=manifest, call=2),
    "last version": lambda: Point(LocalStorage, "replace_if", before=False, when=manifest, call=4),
}


@pytest.mark.parametrize("step", KILLS)
def test_a_purge_killed_at_any_step_goes_on_and_every_version_is_whole(
    recipe: RetrievalRecipe, stub: StubEncoder, step: str
) -> None:
    store = store_of(recipe)
    versions = several_versions(recipe, make_encoder=stub)
    whole = [documents_of(one) for one in versions]
    rest = [{doc: text for doc, text in one.items() if SECRET not in doc} for one in whole]
    run_killed(lambda: purge_document(store, recipe.name, f"{SECRET}-id"), KILLS[step]())
    assert store.current("index", recipe.name) == versions[-1].ref.version
    for version, before, after in zip(versions, whole, rest, strict=True):
        found = documents_of(Store(store.uri).open_ref(version.ref))
        assert found in (before, after)
    assert f"{SECRET}-id" in removed_ids(store, recipe.name)
    purge_document(store, recipe.name, f"{SECRET}-id")
    assert traces(Path(store.uri)) == []
    for version, after in zip(versions, rest, strict=True):
        purged = store.open_ref(version.ref)
        assert documents_of(purged) == after
        assert purged.manifest.purged == (purged_key(f"{SECRET}-id"),)
        table, readers = open_shards(purged.directory())
        live = [r + offset for offset, reader in zip(table.offsets(), readers, strict=True) for r in reader.live_rows()]
        assert (
            np.concatenate([np.load(purged.path(f"{one.folder}/rows.npy")) for one in table.lexical]).tolist() == live
        )


def test_an_update_over_a_version_that_is_purged_meanwhile_is_refused(
    recipe: RetrievalRecipe, stub: StubEncoder
) -> None:
    first = build(recipe, make_encoder=stub)
    store = store_of(recipe)
    base = dataclasses.replace(_base(recipe), merge="delta")
    purge_document(store, recipe.name, f"{SECRET}-id")
    with pytest.raises(UserError, match=r"a document was purged from it meanwhile; run the same command again"):
        base.open()
    assert _base(recipe).ref == str(first.ref)
    assert all(SECRET not in doc for reader in _base(recipe).open()[1] for doc in reader.doc_ids())


def _base(recipe: RetrievalRecipe):  # type: ignore[no-untyped-def]
    from retrieval.index import base_version

    found = base_version(store_of(recipe), recipe.name)
    assert found is not None
    return found
