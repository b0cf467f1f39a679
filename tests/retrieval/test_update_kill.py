"""SIGKILL at each step of an update: the old version or the new one, never a mixture; running it again finishes."""

import os
from pathlib import Path

import numpy as np
import pytest

from cluster.gc import collect
from cluster.storage import LocalStorage
from cluster.store import Artifact, Attempt, Store
from retrieval import embedding, index, parts, pipeline, shard_files, shards
from retrieval.chunking import embedding_text
from retrieval.config import RetrievalRecipe
from retrieval.index import build_index
from retrieval.ledger import removed_ids
from retrieval.shards import open_shards
from retrieval.update import update_index
from tests.retrieval.killed import Point, run_killed
from tests.retrieval.stub_encoder import StubEncoder, stub_vector
from tests.retrieval.updates import changed, current, documents_of, recipe_of, row, some_rows, store_of, write_rows


def manifest(_: object, key: str, *__: object) -> bool:
    return key.endswith("/manifest.json")


def pointer(_: object, key: str, *__: object) -> bool:
    return key.endswith("/current")


def of_ledger(_: object, key: str, *__: object) -> bool:
    return key.endswith("/removed.json")


STEPS = {
    "reading": Point(parts.Parts, "write_json"),
    "read": Point(index, "read_corpus", before=False),
    "planning": Point(parts.Parts, "write_array", when=lambda _, name, __: name.startswith("tombstones")),
    "planned": Point(index, "plan_corpus", before=False),
    "embedded": Point(embedding.EmbedParts, "embed", before=False),
    "writing a shard": Point(shards, "_write_vectors"),
    "a shard written": Point(pipeline, "build_shard", before=False),
    "adopting": Point(LocalStorage, "copy", before=False, call=3),
    "adopted": Point(Attempt, "adopt", before=False),
    "writing words": Point(shard_files, "copy_tree"),
    "words written": Point(index, "write_lexical", before=False),
    "table written": Point(index.IndexFile, "write", before=False),
    "sealing": Point(Attempt, "_seal"),
    "manifest not yet linked": Point(LocalStorage, "create", when=manifest),
    "manifest linked": Point(
        os, "link", before=False, when=lambda _, target, **__: str(target).endswith("manifest.json")
    ),
    "published": Point(LocalStorage, "create", before=False, when=manifest),
    "work removed": Point(Attempt, "publish", before=False),
    "current not yet swapped": Point(LocalStorage, "replace_if", when=pointer),
    "current not yet renamed": Point(Path, "replace", when=lambda _, target: str(target).endswith("/current")),
    "current swapped": Point(LocalStorage, "replace_if", before=False, when=pointer),
}
DELTA_STEPS = {
    **STEPS,
    "ledger not yet written": Point(LocalStorage, "replace_if", when=of_ledger),
    "ledger not yet renamed": Point(Path, "replace", when=lambda _, target: str(target).endswith("removed.json")),
    "ledger written": Point(LocalStorage, "replace_if", before=False, when=of_ledger),
}
PUBLISHED = {"manifest linked", "published", "work removed", "current not yet swapped", "current not yet renamed"}
EMBEDDED = [*STEPS][[*STEPS].index("embedded") : [*STEPS].index("manifest linked")]
OLD = {one["_id"]: one["text"] for one in some_rows(6)}


@pytest.fixture
def recipe(tmp_path: Path, encoder_path: Path) -> RetrievalRecipe:
    return recipe_of(tmp_path, encoder_path, some_rows(6))


@pytest.fixture
def stub(tmp_path: Path) -> StubEncoder:
    return StubEncoder(str(tmp_path / "embedded.txt"))


def assert_whole(artifact: Artifact) -> None:
    """Vectors are those of the texts, and the words are indexed of exactly the live rows."""
    table, readers = open_shards(artifact.directory())
    live = []
    for offset, reader in zip(table.offsets(), readers, strict=True):
        rows = reader.live_rows()
        live += [row + offset for row in rows]
        assert reader.vectors is not None
        for chunk, vector in zip(reader.chunks(), reader.vectors[rows], strict=True):
            np.testing.assert_array_equal(vector, stub_vector(embedding_text(chunk.title, chunk.heading, chunk.text)))
    words = [np.load(artifact.path(f"{part.folder}/rows.npy")) for part in table.lexical]
    assert sorted(np.concatenate(words).tolist()) == live
    assert artifact.manifest.counts["chunks"] == len(live)


def check_killed(recipe: RetrievalRecipe, stub: StubEncoder, step: str, new: dict[str, str], **options: object) -> None:
    store = store_of(recipe)
    first = build_index(recipe, store, make_encoder=stub)
    prepared = options.pop("prepare", None)
    if callable(prepared):
        prepared()
    stub.embedded()

    def update() -> Artifact:
        return update_index(recipe, store, make_encoder=stub, **options)  # type: ignore[arg-type]

    run_killed(update, DELTA_STEPS[step])
    found = Store(store.uri).open("index", recipe.name)
    assert documents_of(found) == (new if step == "current swapped" else OLD)
    assert_whole(found)
    assert len(store.versions("index", recipe.name)) == 1 + (step in PUBLISHED or step == "current swapped")
    assert documents_of(store.open_ref(first.ref)) == OLD
    embedded = stub.embedded()
    artifact = update()
    assert documents_of(artifact) == documents_of(current(recipe)) == new
    assert_whole(artifact)
    if step in EMBEDDED:
        assert embedded and stub.embedded() == []  # what was embedded is not embedded again
    collect(store, min_age_s=-1)
    left = [path.name for path in Path(store.uri).rglob("*") if path.name.endswith((".tmp", ".lock", ".work"))]
    assert left == []
    assert store.versions("index", recipe.name) == [artifact.ref.version]
    assert_whole(current(recipe))


@pytest.mark.parametrize("step", STEPS)
def test_a_sync_killed_at_any_step_leaves_old_or_new_and_goes_on(
    recipe: RetrievalRecipe, stub: StubEncoder, step: str
) -> None:
    rows = [*some_rows(4), row("new", "roses and cheese"), row("d5", "changed words")]
    check_killed(
        recipe,
        stub,
        step,
        {one["_id"]: one["text"] for one in rows},
        prepare=lambda: write_rows(recipe.corpus.path, rows),
    )


@pytest.mark.parametrize("step", DELTA_STEPS)
def test_a_delta_killed_at_any_step_leaves_old_or_new_and_goes_on(
    recipe: RetrievalRecipe, stub: StubEncoder, tmp_path: Path, step: str
) -> None:
    rows = [row("new", "roses and cheese"), row("d5", "changed words")]
    new = {**OLD, **{one["_id"]: one["text"] for one in rows}}
    del new["d1"]
    check_killed(recipe, stub, step, new, upsert=write_rows(tmp_path / "delta.jsonl", rows), delete=("d1",))
    assert removed_ids(store_of(recipe), recipe.name).deleted == {"d1"}


@pytest.mark.parametrize("step", ["planned", "a shard written", "adopted", "words written", "published"])
def test_a_compaction_killed_at_any_step_leaves_old_or_new_and_goes_on(
    recipe: RetrievalRecipe, stub: StubEncoder, tmp_path: Path, step: str
) -> None:
    recipe = changed(recipe, index={"compact_above": 0.2, "shard_chunks": 14})
    rows = [row("new", "roses and cheese"), row("d2", "changed words")]
    new = {**OLD, **{one["_id"]: one["text"] for one in rows}}
    del new["d1"]
    check_killed(recipe, stub, step, new, upsert=write_rows(tmp_path / "delta.jsonl", rows), delete=("d1",))
    assert current(recipe).manifest.measured["update"]["compacted"] == 2
