"""What goes on beside a purge: builds that begin while it runs, and copies of versions that are gone."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cache import cache_directory
from cluster.errors import UserError
from cluster.manifest import ArtifactRef
from cluster.store import Attempt
from retrieval import purge
from retrieval.config import RetrievalRecipe
from retrieval.index import _all_shards, base_version, build_index
from retrieval.purge import purge_document
from retrieval.rowplan import BaseChange
from tests.retrieval.stub_encoder import StubEncoder
from tests.retrieval.updates import current, documents_of, recipe_of, some_rows, store_of

OTHER = ArtifactRef("index", "tiny", "0123456789abcdef")


@pytest.fixture
def recipe(tmp_path: Path, encoder_path: Path) -> RetrievalRecipe:
    recipe = recipe_of(tmp_path, encoder_path, some_rows(4))
    build_index(recipe, store_of(recipe), make_encoder=StubEncoder(str(tmp_path / "embedded.txt")))
    return recipe


@contextlib.contextmanager
def build_begins_before(name: str, recipe: RetrievalRecipe, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Attempt]]:
    """A build of another version begins just before the purge calls its function `name`."""
    begun: list[Attempt] = []
    function = getattr(purge, name)
    with contextlib.ExitStack() as running:

        def late(*arguments: Any) -> Any:
            begun.append(running.enter_context(store_of(recipe).attempt(OTHER)))
            return function(*arguments)

        monkeypatch.setattr(purge, name, late)
        yield begun


def test_a_build_that_begins_before_the_ledger_is_written_is_waited_for(
    recipe: RetrievalRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build_begins_before("add_purged", recipe, monkeypatch) as begun:
        with pytest.raises(UserError, match="is being built"):
            purge_document(store_of(recipe), "tiny", "d1")
        assert begun[0].directory.is_dir()
    monkeypatch.undo()
    purge_document(store_of(recipe), "tiny", "d1")
    assert "d1" not in documents_of(current(recipe))


def test_a_build_that_begins_after_the_ledger_is_written_goes_on(
    recipe: RetrievalRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build_begins_before("_rewrite", recipe, monkeypatch) as begun:
        purge_document(store_of(recipe), "tiny", "d1")
        assert begun[0].directory.is_dir()
    assert "d1" not in documents_of(current(recipe))


def test_cached_copies_of_versions_that_are_gone_are_removed(
    recipe: RetrievalRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    copies = cache_directory() / "artifacts"
    shutil.copytree(current(recipe).directory(), copies / "holds it")
    shutil.copytree(current(recipe).directory(), copies / "cannot be read")
    (copies / "cannot be read" / "index.json").write_text("{}")
    (copies / "an adapter").mkdir()
    purge_document(store_of(recipe), "tiny", "d1")
    shutil.copytree(current(recipe).directory(), copies / "does not")
    purge_document(store_of(recipe), "tiny", "d1")
    assert {copy.name for copy in copies.iterdir()} == {"an adapter", "does not"}


def test_shards_of_a_version_that_was_purged_meanwhile_are_not_adopted(recipe: RetrievalRecipe) -> None:
    store = store_of(recipe)
    base = base_version(store, "tiny", "sync")
    assert base is not None
    (entry,) = base.open()[0].shards  # a build has it open
    purge_document(store, "tiny", "d1")
    built: Any = SimpleNamespace(plan=SimpleNamespace(base=BaseChange(shards=(entry,))), shards=())
    with store.attempt(OTHER) as attempt:
        job: Any = SimpleNamespace(base=base, uri=attempt.uri)
        with pytest.raises(UserError, match="a document was purged from it meanwhile; run the same command again"):
            _all_shards(attempt, job, built)
