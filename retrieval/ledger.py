"""The ledger of removed documents: ids that no later version of an index may hold.

In: a store and the name of an index. Out: which document ids to leave out, and their digest for the plans of builds.
It stands beside the versions (`index/<name>/removed.json`), is changed by compare-and-swap before a version without the
documents is published, and outlives every version: a document that was deleted stays away, though the corpus still
holds it. Purged ids are kept as sha256 only, because an id may itself be personal.
Not covered: removing anything (`update.py`, `purge.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from cluster.errors import ArtifactError, UserError
from cluster.manifest import fingerprint

if TYPE_CHECKING:
    from cluster.store import Store

FORMAT = 1
ATTEMPTS = 20


def purged_key(doc_id: str) -> str:
    """sha256 of a document id."""
    return hashlib.sha256(doc_id.encode("utf-8", "surrogatepass")).hexdigest()


@dataclasses.dataclass(frozen=True)
class RemovedIds:
    """Document ids to leave out of an index; picklable."""

    deleted: frozenset[str] = frozenset()
    purged: frozenset[str] = frozenset()
    """sha256 of ids."""

    def __contains__(self, doc_id: object) -> bool:
        return doc_id in self.deleted or self.has_purged(str(doc_id))

    def has_purged(self, doc_id: str) -> bool:
        """Whether the document was purged, which nothing lifts."""
        return bool(self.purged) and purged_key(doc_id) in self.purged

    @property
    def digest(self) -> str:
        """sha256 of all; empty when there are none."""
        if not self.deleted and not self.purged:
            return ""
        return fingerprint([sorted(self.deleted), sorted(self.purged)])


def removed_ids(store: Store, name: str) -> RemovedIds:
    """Ids that were removed from the index `name` and not lifted again.

    Raises:
        ArtifactError: the ledger is damaged.
    """
    return _read(store, name)[0]


def removed_digest(store: Store, name: str) -> str:
    """Digest of the removed ids: an input of every plan of the index `name`; empty when there are none."""
    return removed_ids(store, name).digest


def add_deleted(store: Store, name: str, doc_ids: Iterable[str]) -> RemovedIds:
    """Remember deleted documents; returns the ledger after it."""
    ids = frozenset(doc_ids)

    def add(found: RemovedIds) -> RemovedIds:
        new = frozenset(doc_id for doc_id in ids if not found.has_purged(doc_id))
        return dataclasses.replace(found, deleted=found.deleted | new)

    return _change(store, name, add)


def add_purged(store: Store, name: str, doc_id: str) -> RemovedIds:
    """Remember a purged document, by its hash alone; returns the ledger after it."""

    def add(found: RemovedIds) -> RemovedIds:
        return RemovedIds(found.deleted - {doc_id}, found.purged | {purged_key(doc_id)})

    return _change(store, name, add)


def lift_deleted(store: Store, name: str, doc_ids: Iterable[str]) -> RemovedIds:
    """Let deleted documents come back, because somebody brings them anew; returns the ledger after it.

    Raises:
        UserError: one of them was purged.
    """
    ids = frozenset(doc_ids)

    def lift(found: RemovedIds) -> RemovedIds:
        for doc_id in sorted(ids):
            if found.has_purged(doc_id):
                raise UserError(f"--upsert: document {doc_id} was purged from index/{name} and cannot come back")
        return dataclasses.replace(found, deleted=found.deleted - ids)

    return _change(store, name, lift)


def _key(name: str) -> str:
    return f"index/{name}/removed.json"


def _read(store: Store, name: str) -> tuple[RemovedIds, bytes | None]:
    try:
        data = store.storage.read(_key(name))
    except FileNotFoundError:
        return RemovedIds(), None
    try:
        value = json.loads(data)
        deleted, purged = value["deleted"], value["purged"]
        whole = value["format"] == FORMAT and all(isinstance(text, str) for text in (*deleted, *purged))
        found = RemovedIds(frozenset(deleted), frozenset(purged))
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole or value.get("digest") != found.digest:
        raise ArtifactError(
            f"{store.uri}/{_key(name)}: damaged list of removed documents; restore it from a backup: without it, "
            "deleted documents could come back"
        )
    return found, data


def _change(store: Store, name: str, change: Callable[[RemovedIds], RemovedIds]) -> RemovedIds:
    for _ in range(ATTEMPTS):
        before, data = _read(store, name)
        after = change(before)
        if after == before:
            return after
        value = {
            "format": FORMAT,
            "digest": after.digest,
            "deleted": sorted(after.deleted),
            "purged": sorted(after.purged),
        }
        with store.blames_uri():
            if store.storage.replace_if(_key(name), json.dumps(value, indent=1).encode(), data):
                return after
    raise UserError(f"{store.uri}/{_key(name)}: {ATTEMPTS} others changed it meanwhile; run the same command again")
