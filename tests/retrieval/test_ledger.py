"""The ledger of removed documents, on a local disk and in an object store."""

import json
import multiprocessing
import pickle
from pathlib import Path

import pytest

from cluster.errors import ArtifactError, UserError
from cluster.store import Store
from retrieval.ledger import add_deleted, add_purged, lift_deleted, purged_key, removed_digest, removed_ids
from tests.cluster.stores import object_store


@pytest.fixture(params=["local", "object"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store")) if request.param == "local" else object_store()


def test_without_a_ledger_nothing_is_removed(any_store: Store) -> None:
    assert removed_digest(any_store, "x") == ""
    assert "a" not in removed_ids(any_store, "x")


def test_deleted_ids_stay_away_until_they_are_lifted(any_store: Store) -> None:
    add_deleted(any_store, "x", ["b", "a"])
    one = removed_digest(any_store, "x")
    assert one
    add_deleted(any_store, "x", ["a"])
    assert removed_digest(any_store, "x") == one
    removed = pickle.loads(pickle.dumps(removed_ids(any_store, "x")))  # our own bytes
    assert ["a" in removed, "b" in removed, "c" in removed] == [True, True, False]
    assert removed_digest(any_store, "y") == ""
    lift_deleted(any_store, "x", ["a", "never deleted"])
    assert ["a" in removed_ids(any_store, "x"), "b" in removed_ids(any_store, "x")] == [False, True]
    assert removed_digest(any_store, "x") != one
    lift_deleted(any_store, "x", ["b"])
    assert removed_digest(any_store, "x") == ""


def test_purged_ids_are_kept_as_hashes_and_never_lifted(any_store: Store) -> None:
    add_deleted(any_store, "x", ["jane@example.org"])
    add_purged(any_store, "x", "jane@example.org")
    data = any_store.storage.read("index/x/removed.json")
    assert b"jane" not in data
    assert purged_key("jane@example.org").encode() in data
    assert "jane@example.org" in removed_ids(any_store, "x")
    with pytest.raises(UserError, match=r"^--upsert: document jane@example\.org was purged from index/x"):
        lift_deleted(any_store, "x", ["other", "jane@example.org"])
    add_deleted(any_store, "x", ["jane@example.org"])
    assert b"jane" not in any_store.storage.read("index/x/removed.json")


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"format": 1, "deleted": [], "purged": []}', b"shortened"])
def test_a_damaged_ledger_is_refused(any_store: Store, damage: bytes) -> None:
    add_deleted(any_store, "x", ["a", "b"])
    if damage == b"shortened":
        value = json.loads(any_store.storage.read("index/x/removed.json"))
        damage = json.dumps({**value, "deleted": ["a"]}).encode()
    any_store.storage.replace("index/x/removed.json", damage)
    with pytest.raises(ArtifactError, match="damaged list of removed documents"):
        removed_ids(any_store, "x")


def delete_in_process(uri: str, name: str) -> None:
    for number in range(10):
        add_deleted(Store(uri), "x", [f"{name}{number}"])


def test_racing_deletions_are_all_remembered(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    fork = multiprocessing.get_context("fork")
    racers = [fork.Process(target=delete_in_process, args=(store.uri, name)) for name in "abc"]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert len(removed_ids(store, "x").deleted) == 30
