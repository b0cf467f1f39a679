"""Removing from a store what nobody can need.

In: a store. Out: what was (or with `dry_run` would be) removed, and why. Kept: what is current, what a release pins
that is current or among the last promoted, and the parents of all these. Removed: other versions, attempts without a
manifest, work of published versions, left-over temporary files. Whatever is younger than `min_age_s` stays, and so does
what a live process is building on a local disk; an object store has no locks, so there the default age is a day.
Not covered: this machine's cache; a purge of one document's text.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterator
from pathlib import PurePosixPath

from cluster import locks
from cluster.errors import ArtifactError
from cluster.manifest import ArtifactRef, Manifest, is_attempt, is_version
from cluster.progress import say
from cluster.releases import KIND as RELEASE
from cluster.releases import history, read_release
from cluster.storage import LocalStorage
from cluster.store import MANIFEST, Store
from cluster.workdir import is_work_directory, lock_of

LOCAL_MIN_AGE_S = 3600.0
OBJECT_MIN_AGE_S = 86400.0
UNPUBLISHED_WORK_AGE_S = 7 * 86400.0


@dataclasses.dataclass(frozen=True)
class Removal:
    """Something to remove, as a key of the store."""

    key: str
    size: int
    """Bytes."""
    reason: str


def collect(store: Store, *, keep: int = 3, min_age_s: float | None = None, dry_run: bool = False) -> list[Removal]:
    """Remove what nobody can need; see the module's docstring.

    Args:
        store: Where to look; all kinds and names.
        keep: Releases in the history, counted from the last promoted, whose pins stay.
        min_age_s: Seconds since the last change below which nothing is removed.
        dry_run: Only tell.

    Raises:
        ArtifactError: a kept artifact's manifest is damaged, so that its parents are unknown; nothing is removed.
    """
    age = min_age_s if min_age_s is not None else LOCAL_MIN_AGE_S if store.is_local else OBJECT_MIN_AGE_S
    kept = _kept(store, keep)
    removals = [*_removals(store, kept, age)]
    if not dry_run:
        for removal in removals:
            if is_version(PurePosixPath(removal.key).name):  # first it stops being an artifact, then it goes
                store.storage.delete(f"{removal.key}/{MANIFEST}")
            store.storage.delete(removal.key)
            if isinstance(store.storage, LocalStorage) and not _is_held(store, removal.key):
                lock_of(store.storage.root / removal.key).unlink(missing_ok=True)
    return removals


def _names(store: Store) -> Iterator[tuple[str, str]]:
    for kind in store.storage.folders(""):
        for name in store.storage.folders(kind):
            yield kind, name


def _kept(store: Store, keep: int) -> set[ArtifactRef]:
    roots: set[ArtifactRef] = set()
    for kind, name in _names(store):
        current = store.current(kind, name)
        if current is not None:
            roots.add(ArtifactRef(kind, name, current))
        if kind == RELEASE:
            recent = history(store, name)[-keep:] if keep > 0 else []
            roots.update(ArtifactRef(kind, name, version) for version in recent)
    for ref in [ref for ref in roots if ref.kind == RELEASE and store.exists(ref)]:
        roots.update(read_release(store, ref.name, ref.version).pins().values())
    kept: set[ArtifactRef] = set()
    open_ends = [*roots]
    while open_ends:
        ref = open_ends.pop()
        if ref in kept:
            continue
        kept.add(ref)
        if store.exists(ref):
            open_ends.extend(ArtifactRef.parse(parent) for parent in store.open_ref(ref).manifest.parents.values())
    return kept


def _removals(store: Store, kept: set[ArtifactRef], age_s: float) -> Iterator[Removal]:
    for kind, name in _names(store):
        for version in store.storage.folders(f"{kind}/{name}"):
            if is_version(version):
                yield from _of_version(store, ArtifactRef(kind, name, version), kept, age_s)
    for file in _loose_files(store):
        if time.time() - store.storage.modified(file) > age_s:
            yield Removal(file, _size(store, file), "left-over temporary file")


def _of_version(store: Store, ref: ArtifactRef, kept: set[ArtifactRef], age_s: float) -> Iterator[Removal]:
    try:
        manifest = store.open_ref(ref).manifest if store.exists(ref) else None
    except ArtifactError as error:  # not needed by anything kept, but a person should look at it
        say(f"gc: left alone: {error}")
        return
    parts = [part for part in store.storage.folders(str(ref)) if is_attempt(part) or is_work_directory(part)]
    if any(_is_held(store, f"{ref}/{part}") for part in parts):
        return
    if manifest is not None and ref not in kept and _age_s(store, ref, manifest) > age_s:
        yield Removal(str(ref), _size(store, str(ref)), "neither current, nor in a release, nor a parent of such")
        return
    for part in parts:
        if manifest is not None and part == manifest.attempt:
            continue
        key = f"{ref}/{part}"
        working = is_work_directory(part)
        patience = UNPUBLISHED_WORK_AGE_S if working and manifest is None else age_s
        if time.time() - store.storage.modified(key) > patience:
            reason = "work of a finished or forgotten build" if working else "attempt without a manifest"
            yield Removal(key, _size(store, key), reason)


def _age_s(store: Store, ref: ArtifactRef, manifest: Manifest) -> float:
    created = datetime.datetime.fromisoformat(manifest.created_at).timestamp()
    return time.time() - max(created, store.storage.modified(f"{ref}/{MANIFEST}"))


def _is_held(store: Store, key: str) -> bool:
    return isinstance(store.storage, LocalStorage) and locks.is_held(lock_of(store.storage.root / key))


def _size(store: Store, key: str) -> int:
    if isinstance(store.storage, LocalStorage) and (store.storage.root / key).is_file():
        return (store.storage.root / key).stat().st_size
    return sum(file.size for file in store.storage.files(key))


def _loose_files(store: Store) -> Iterator[str]:
    """Temporary and lock files outside attempts that a killed process left; only a local disk has them."""
    if not isinstance(store.storage, LocalStorage):
        return
    root = store.storage.root
    for pattern in (".*", "*/*/.*", "*/*/*/.*"):
        for path in sorted(root.glob(pattern)):
            if not path.is_file():
                continue
            abandoned = path.name.endswith(".lock") and not locks.is_held(path)
            work = path.with_name(path.name.removesuffix(".lock"))
            if path.name.endswith(".tmp") or path.name.startswith(".probe-") or (abandoned and not work.is_dir()):
                yield path.relative_to(root).as_posix()
