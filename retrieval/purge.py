"""Purging a document: its text leaves every version of an index, current or not.

In: a document id. Out: each version that holds it (live or deleted) has its files replaced by files without it, which
its manifest says; the ledger keeps the sha256 of the id, so that no later version takes the document back; unfinished
work and left-over attempts of the index, which may hold its text, are removed. All other rows keep their vectors, so
searches for other documents find what they found. A purge that was interrupted goes on when it is run again.
This is the one exception to "a version is never rewritten": people have a right to be forgotten.
Not covered: the corpus itself; artifacts derived from the index, which are named so that a person can decide; copies
that other machines keep of an object store's artifacts.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import locks
from cluster.cache import cache_directory
from cluster.errors import ArtifactError, UserError
from cluster.manifest import ArtifactRef, is_attempt, is_version
from cluster.progress import say
from cluster.storage import LocalStorage
from cluster.store import CURRENT, MANIFEST, Artifact, Attempt, Store, describe_command
from cluster.workdir import is_work_directory, lock_of
from retrieval.collections import is_catalog
from retrieval.config import IndexConfig
from retrieval.documents import Rejection
from retrieval.index import describe_index
from retrieval.ledger import add_purged, purged_key, removed_ids
from retrieval.parts import Parts, copy_tree, local_or_none
from retrieval.pipeline import Alone, write_lexical
from retrieval.shard_files import LexicalShard
from retrieval.shards import (
    BATCH_ROWS,
    DOCUMENTS_FILE,
    INDEX_FORMAT,
    INDEX_JSON,
    REJECTED_FILE,
    SHARDS_FOLDER,
    TEXTS_READ,
    TOMBSTONES_FOLDER,
    ShardEntry,
    ShardReader,
    new_shard_id,
    open_shards,
    write_shard,
)
from retrieval.sources import join_path

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    Rows = npt.NDArray[np.int64]

NOT_DERIVED = ("index", "release")
"""Kinds that hold no text of an index that they were made from."""


class UnknownDocumentError(UserError):
    """No version of the index holds the document, and it was not purged before."""


@dataclasses.dataclass(frozen=True)
class Derived:
    """An artifact made from a purged version, which may still hold the document's text."""

    ref: ArtifactRef
    command: str
    """What makes it anew."""


@dataclasses.dataclass(frozen=True)
class PurgeReport:
    """What a purge did."""

    rewritten: tuple[ArtifactRef, ...]
    removed: tuple[ArtifactRef, ...]
    """Versions that held nothing else."""
    unfinished: int
    """Left-over attempts and work directories removed."""
    derived: tuple[Derived, ...]


def purge_document(store: Store, name: str, doc_id: str, *, no_builds: bool = False) -> PurgeReport:
    """Remove a document's text from every version of the index `name` (one, not a catalog of collections).

    Args:
        store: Where.
        name: Of the index.
        doc_id: Of the document.
        no_builds: The caller knows that nobody is building this index. A local store finds out by itself; in an object
            store, what an interrupted build left cannot be told from a running one.

    Raises:
        UnknownDocumentError: no version holds the document and it was not purged before.
        UserError: the index is being built right now.
        ArtifactError: a version is damaged: remove it, then run the purge again.
    """
    holding = [ref for ref in _versions(store, name) if _holds(store.open_ref(ref), doc_id)]
    if not holding and not _unfinished(store, name) and not removed_ids(store, name).has_purged(doc_id):
        raise UnknownDocumentError(f"purge: no version of index/{name} in {store.uri} holds a document {doc_id}")
    add_purged(store, name, doc_id)
    # Looked for after the ledger is written: a build that begins later leaves the document out, and may go on.
    if running := [key for key in _unfinished(store, name) if _may_run(store, key, no_builds)]:
        hint = "" if store.is_local else ", or say --no-builds where none is running"
        raise UserError(
            f"purge: index/{name} is being built ({running[0]}): no later build will hold the document, but this one "
            f"may; wait for it or end it, then run the same command again{hint}"
        )
    shards = _PurgedShards(doc_id)
    rewritten: list[ArtifactRef] = []
    removed: list[ArtifactRef] = []
    for ref in _versions(store, name):  # again: a build may have published before it could see the ledger
        artifact = store.open_ref(ref)
        if _holds(artifact, doc_id):
            (rewritten if _rewrite(store, artifact, shards) else removed).append(ref)
    unfinished = [key for key in _unfinished(store, name) if not _may_run(store, key, no_builds)]
    for key in unfinished:
        store.storage.delete(key)
    _forget_cached(doc_id)
    touched = {ref for ref in _versions(store, name) if purged_key(doc_id) in store.open_ref(ref).manifest.purged}
    return PurgeReport(tuple(rewritten), tuple(removed), len(unfinished), tuple(_derived(store, {*touched, *removed})))


def _versions(store: Store, name: str) -> list[ArtifactRef]:
    return [ArtifactRef("index", name, version) for version in store.versions("index", name)]


def _unfinished(store: Store, name: str) -> list[str]:
    """Keys of attempts that no manifest names, and of work directories: any may hold text of the document."""
    found = []
    for version in filter(is_version, store.storage.folders(f"index/{name}")):
        ref = ArtifactRef("index", name, version)
        published = store.open_ref(ref).manifest.attempt if store.exists(ref) else ""
        found += [
            f"{ref}/{part}"
            for part in store.storage.folders(str(ref))
            if is_work_directory(part) or (is_attempt(part) and part != published)
        ]
    return found


def _may_run(store: Store, key: str, no_builds: bool) -> bool:
    if isinstance(store.storage, LocalStorage):
        return locks.is_held(lock_of(store.storage.root / key))
    return not no_builds


def _rejections(directory: Path) -> list[Rejection]:
    import pyarrow.parquet as pq

    return [Rejection.from_row(row) for row in pq.read_table(directory / REJECTED_FILE).to_pylist()]


def _holds(artifact: Artifact, doc_id: str) -> bool:
    """Whether any file of an index names the document: rows that its version deleted count."""
    if artifact.manifest.format != INDEX_FORMAT or is_catalog(artifact):
        return False
    directory = artifact.directory()
    _, shards = open_shards(directory)
    if any(_shard_holds(shard, doc_id) for shard in shards):
        return True
    return any(rejection.is_about({doc_id}) for rejection in _rejections(directory))


def _shard_holds(shard: ShardReader, doc_id: str) -> bool:
    import pyarrow.compute as pc

    return bool(pc.any(pc.equal(shard.column("doc_id"), doc_id)).as_py())


def _forget_cached(doc_id: str) -> None:
    """Remove this machine's cached copies of indexes that hold the document: of versions too that gc has removed from
    an object store, which no manifest names any more. A copy that is needed is fetched again."""
    copies = cache_directory() / "artifacts"
    for copy in copies.iterdir() if copies.is_dir() else ():
        if not (copy / INDEX_JSON).is_file():
            continue
        try:
            held = any(_shard_holds(shard, doc_id) for shard in open_shards(copy)[1])
            held = held or any(rejection.is_about({doc_id}) for rejection in _rejections(copy))
        except (ArtifactError, OSError):  # damaged, or of another format: what it holds is unknown
            held = True
        if held:
            shutil.rmtree(copy, ignore_errors=True)


# --- rewriting one version


class _PurgedShards:
    """Shards without the document. One that several versions share is written once and adopted by the others."""

    def __init__(self, doc_id: str) -> None:
        self.doc_id = doc_id
        self.written: dict[str, tuple[Artifact, ShardEntry]] = {}
        """Old shard id to the purged version that holds the new shard, and the new shard."""

    def kept_rows(self, shard: ShardReader) -> Rows:
        """Rows of a shard that are not the document's; rows that were deleted stay, for versions that have them."""
        import numpy as np
        import pyarrow.compute as pc

        return np.flatnonzero(pc.not_equal(shard.column("doc_id"), self.doc_id).to_numpy())

    def put(self, attempt: Attempt, artifact: Artifact, shard: ShardReader, kept: Rows) -> ShardEntry:
        """Put the shard's files without the document into `attempt`: as they are, as another version has them, or
        written anew."""
        old = shard.entry
        if len(kept) == old.rows:
            _adopt_shard(attempt, artifact, old.shard_id)
            return old
        if old.shard_id in self.written:
            source, entry = self.written[old.shard_id]
            _adopt_shard(attempt, source, entry.shard_id)
            return entry
        target = join_path(attempt.uri, f"{SHARDS_FOLDER}/{new_shard_id()}")
        local = local_or_none(target)
        if local is not None:
            return self._write(artifact, shard, kept, local)
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / target.rpartition("/")[2]
            entry = self._write(artifact, shard, kept, directory)
            copy_tree(directory, target)
        return entry

    def _write(self, artifact: Artifact, shard: ShardReader, kept: Rows, directory: Path) -> ShardEntry:
        from retrieval.vectors import VectorPolicy

        config = artifact.manifest.config["index"]
        settings = IndexConfig.model_validate({k: v for k, v in config.items() if k in IndexConfig.model_fields})
        vectors = shard.vectors
        starts = range(0, len(kept), BATCH_ROWS)
        return write_shard(
            directory,
            _other_documents(shard, self.doc_id),
            shard.batches(kept),
            None if vectors is None else (vectors[kept[start : start + BATCH_ROWS]] for start in starts),
            VectorPolicy.of(settings, artifact.manifest.seed),
        )


def _adopt_shard(attempt: Attempt, artifact: Artifact, shard_id: str) -> None:
    folder = f"{SHARDS_FOLDER}/{shard_id}/"
    attempt.adopt(artifact, {f.path: f.path for f in artifact.manifest.files if f.path.startswith(folder)})


def _other_documents(shard: ShardReader, doc_id: str) -> Iterator[pa.RecordBatch]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard.directory / DOCUMENTS_FILE) as parquet:
        for batch in parquet.iter_batches(TEXTS_READ):
            yield batch.filter(pc.not_equal(batch.column("doc_id"), doc_id))


def _rewrite(store: Store, artifact: Artifact, shards: _PurgedShards) -> bool:
    """Replace a version's files by files without the document; false where nothing else was in it: it is removed."""
    import numpy as np

    directory = artifact.directory()
    index, readers = open_shards(directory)
    staying: list[tuple[ShardReader, Rows, Rows]] = []  # shard, rows that stay, which of them are deleted
    for reader in readers:
        kept = shards.kept_rows(reader)
        deleted = np.flatnonzero(np.isin(kept, reader.tombstones))
        if len(deleted) < len(kept):
            staying.append((reader, kept, deleted))
    if not staying:
        _remove_version(store, artifact.ref)
        say(f"purge: {artifact.ref} held nothing else and is removed")
        return False
    with store.attempt(artifact.ref) as attempt:
        entries = tuple(shards.put(attempt, artifact, reader, kept) for reader, kept, _ in staying)
        for entry, (_, _, deleted) in zip(entries, staying, strict=True):
            if len(deleted):
                Parts(attempt.uri).write_array(f"{TOMBSTONES_FOLDER}/{entry.shard_id}.npy", deleted)
        offsets = itertools.accumulate((entry.rows for entry in entries), initial=0)
        placed = [
            LexicalShard(entry, offset, deleted if len(deleted) else None)
            for entry, offset, (_, _, deleted) in zip(entries, offsets, staying, strict=False)
        ]
        table = dataclasses.replace(index, shards=entries, lexical=write_lexical(attempt.uri, placed, Alone()))
        table.write(attempt.directory)
        rejected = _rewrite_rejected(directory, attempt, shards.doc_id)
        counts = _counts_without(artifact, readers, shards.doc_id, rejected)
        new = attempt.publish_purged(artifact, [purged_key(shards.doc_id)], counts, describe_index(table))
    for entry, (reader, kept, _) in zip(entries, staying, strict=True):
        if len(kept) < reader.rows:
            shards.written[reader.entry.shard_id] = (new, entry)
    say(f"purge: {artifact.ref} rewritten without the document")
    return True


def _rewrite_rejected(directory: Path, attempt: Attempt, doc_id: str) -> int:
    """Write `rejected.parquet` without rows about the document; returns their number."""
    import pyarrow as pa

    kept = [rejection.to_row() for rejection in _rejections(directory) if not rejection.is_about({doc_id})]
    Parts(attempt.uri).write_table(REJECTED_FILE, pa.Table.from_pylist(kept, schema=Rejection.schema()))
    return len(kept)


def _counts_without(
    artifact: Artifact, readers: list[ShardReader], doc_id: str, rejected: int
) -> dict[str, int | float]:
    """The counts of the manifest that change with the document."""
    import numpy as np
    import pyarrow.compute as pc

    counts = dict(artifact.manifest.counts)
    for reader in readers:
        own = pc.equal(reader.column("doc_id"), doc_id).to_numpy()
        own[reader.tombstones] = False
        counts["documents"] -= int(own.any())
        counts["chunks"] -= int(own.sum())
        counts["tokens"] -= int(np.asarray(reader.column("tokens").to_numpy())[own].sum())
    return {**counts, "rejected": rejected}


def _remove_version(store: Store, ref: ArtifactRef) -> None:
    """First it is current no more, then no artifact, then gone."""
    if store.current(ref.kind, ref.name) == ref.version:
        store.storage.delete(f"{ref.kind}/{ref.name}/{CURRENT}")
    store.storage.delete(f"{ref}/{MANIFEST}")
    store.storage.delete(str(ref))


# --- what may still hold the text


def _derived(store: Store, versions: set[ArtifactRef]) -> Iterator[Derived]:
    """Artifacts made from these versions of an index, directly or through others."""
    parents: dict[ArtifactRef, set[ArtifactRef]] = {}
    for kind in store.storage.folders(""):
        for name in store.storage.folders(kind):
            for version in store.versions(kind, name):
                ref = ArtifactRef(kind, name, version)
                try:
                    manifest = store.open_ref(ref).manifest
                except ArtifactError as error:
                    say(f"purge: left out of the list of derived artifacts: {error}")
                    continue
                parents[ref] = {ArtifactRef.parse(parent) for parent in manifest.parents.values()}
    tainted = set(versions)
    while more := {ref for ref, above in parents.items() if above & tainted} - tainted:
        tainted |= more
    for ref in sorted(tainted - versions, key=str):
        if ref.kind not in NOT_DERIVED:
            yield Derived(ref, describe_command(ref.kind))
