"""The artifact store: files first, the manifest as commit, sha256 before parsing, an atomic `current`.

In: an `ArtifactRef` and the files of one build attempt. Out: artifacts whose every byte has been verified before a path
is handed out. Layout: `<store>/<kind>/<name>/<version>/<attempt>/files…`, `<version>/manifest.json` (first one wins),
`<kind>/<name>/current`. Local directories, `s3://` and `gs://` behave alike.
Not covered: when to build (`stage.py`), what is served together (`releases.py`), what to remove (`gc.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from cluster import locks
from cluster.cache import cache_directory
from cluster.errors import ArtifactError, UserError
from cluster.manifest import (
    PART_BYTES,
    ArtifactRef,
    FileEntry,
    Manifest,
    digest_parts,
    is_version,
    package_versions,
    parse_manifest,
    plain,
    render_manifest,
)
from cluster.storage import LocalStorage, ObjectStorage, fsync_directory, storage_at
from cluster.verification import verify
from cluster.workdir import WORK, claim_work_directory, lock_of, release_work_directory

if TYPE_CHECKING:
    from cluster.stage import Plan

__all__ = ["Artifact", "ArtifactRef", "Attempt", "FileEntry", "Manifest", "Store"]

MANIFEST = "manifest.json"
CURRENT = "current"

_COMMANDS = {
    "index": "rayft index build",
    "samples": "rayft samples build",
    "adapter": "rayft train lora",
    "encoder": "rayft train retriever",
    "router": "rayft train router",
    "predictions": "rayft evaluate",
    "report": "rayft evaluate",
    "release": "rayft release",
}


def describe_command(kind: str) -> str:
    """The command that makes artifacts of this kind."""
    return f"{_COMMANDS.get(kind, 'rayft demo')} RECIPE"


class Store:
    """Artifacts under one address; picklable, so that workers may open it too."""

    def __init__(self, uri: str, storage: LocalStorage | ObjectStorage | None = None) -> None:
        self.storage = storage or storage_at(uri)
        self.uri = self.storage.uri

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    @property
    def is_local(self) -> bool:
        """Whether artifacts are directories of this machine (or a file system mounted on it)."""
        return isinstance(self.storage, LocalStorage)

    def check_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            UserError: naming `store.uri`.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        with self.blames_uri():
            self.storage.create(probe, b"")
            self.storage.delete(probe)

    @contextlib.contextmanager
    def blames_uri(self) -> Iterator[None]:
        """Turn a failure of the medium into a `UserError` that names `store.uri`."""
        try:
            yield
        except _medium_errors(self.storage) as error:
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
            raise UserError(
                f"store.uri: cannot write to {self.uri}: {reason}; name a place you may write to, "
                "with --set store.uri=…"
            ) from error

    def exists(self, ref: ArtifactRef) -> bool:
        """Whether `ref` is published. No manifest, no artifact."""
        try:
            self.storage.read(f"{ref}/{MANIFEST}")
        except FileNotFoundError:
            return False
        return True

    def open(self, kind: str, name: str, version: str | None = None) -> Artifact:
        """The artifact of that version, or the current one; the caller holds what it opened.

        Raises:
            ArtifactError: there is none (and which command makes it), or its manifest is damaged.
        """
        if version is None:
            version = self.current(kind, name)
            if version is None:
                raise ArtifactError(f"no {kind} named `{name}` in {self.uri}; run `{describe_command(kind)}` first")
        return self.open_ref(ArtifactRef(kind, name, version))

    def open_ref(self, ref: ArtifactRef) -> Artifact:
        """The artifact that `ref` names; see `open`."""
        where = f"{self.uri}/{ref}/{MANIFEST}"
        try:
            data = self.storage.read(f"{ref}/{MANIFEST}")
        except FileNotFoundError:
            raise ArtifactError(
                f"{ref} is not in {self.uri} (no manifest, no artifact); run `{describe_command(ref.kind)}` to build it"
            ) from None
        return Artifact(self, parse_manifest(data, ref, where), hashlib.sha256(data).hexdigest())

    def current(self, kind: str, name: str) -> str | None:
        """The published version that readers open, or none."""
        key = f"{kind}/{name}/{CURRENT}"
        try:
            text = self.storage.read(key).decode("ascii", "replace").removesuffix("\n")
        except FileNotFoundError:
            return None
        if not is_version(text):
            raise ArtifactError(
                f"{self.uri}/{key}: damaged, expected a version, found {text[:40]!r}; "
                f"remove it and run `{describe_command(kind)}`"
            )
        return text

    def set_current(self, ref: ArtifactRef, *, expected: str | EllipsisType | None = ...) -> None:
        """Point `current` at a published version, atomically.

        Args:
            ref: The version.
            expected: Compare and swap: the version that must be current now (none: there is no current version). By
                default whatever is current is replaced.

        Raises:
            ArtifactError: `ref` is not published, or another version than `expected` is current.
        """
        if not self.exists(ref):
            raise ArtifactError(f"{ref} cannot become current: it is not published in {self.uri}")
        key, data = f"{ref.kind}/{ref.name}/{CURRENT}", f"{ref.version}\n".encode()
        with self.blames_uri():
            if expected is ...:
                self.storage.replace(key, data)
                return
            before = None if expected is None else f"{expected}\n".encode()
            swapped = self.storage.replace_if(key, data, before)
        if not swapped and self.current(ref.kind, ref.name) != ref.version:  # else a twin has done it
            raise ArtifactError(
                f"{ref.kind}/{ref.name}: {self.current(ref.kind, ref.name) or 'no version'} became current while "
                f"{ref.version} was built upon {expected or 'none'}, so {ref.version} did not; nothing is lost: run "
                "the same command again"
            )

    def versions(self, kind: str, name: str) -> list[str]:
        """Published versions, sorted by text (not by age)."""
        found = [v for v in self.storage.folders(f"{kind}/{name}") if is_version(v)]
        return [v for v in found if self.exists(ArtifactRef(kind, name, v))]

    @contextlib.contextmanager
    def attempt(self, ref: ArtifactRef) -> Iterator[Attempt]:
        """A fresh place to write one build's files; left without `publish`, or by an exception, it is removed."""
        attempt = Attempt(self, ref)
        try:
            yield attempt
        finally:
            attempt._discard_unpublished()

    def work_directory(self, ref: ArtifactRef) -> Path:
        """A local directory for what should survive an interruption: checkpoints, finished windows.

        Call it in the driver and pass the path on. The next run of the same version finds what this one left; a second
        process that builds the same version meanwhile gets a directory of its own. Removed at publish and by gc. With
        an object store it lies in this machine's cache.
        """
        with self.blames_uri():
            return claim_work_directory(self._work_root(ref))

    def work_uri(self, ref: ArtifactRef) -> str:
        """Like `work_directory`, but reachable from every node: what workers leave for each other and for the next run.

        With a local store it is that directory. With an object store it is `<store>/<ref>/.work`, which two builders of
        one version share: what lies there must be whole or recognisable as broken at every moment.
        """
        return str(self.work_directory(ref)) if self.is_local else f"{self.uri}/{ref}/{WORK}"

    def discard_work(self, ref: ArtifactRef) -> None:
        """Remove the work directory that this process holds for a version that will not be published after all."""
        root = self._work_root(ref)
        release_work_directory(root, remove=True)
        with contextlib.suppress(OSError):
            root.rmdir()
        self._delete_shared_work(ref)

    def _delete_shared_work(self, ref: ArtifactRef) -> None:
        if not self.is_local:
            with contextlib.suppress(*_medium_errors(self.storage)):  # gc takes what stays behind
                self.storage.delete(f"{ref}/{WORK}")

    def _work_root(self, ref: ArtifactRef) -> Path:
        if isinstance(self.storage, LocalStorage):
            return self.storage.root / str(ref)
        return cache_directory() / "work" / hashlib.sha256(self.uri.encode()).hexdigest()[:16] / str(ref)


def _medium_errors(storage: LocalStorage | ObjectStorage) -> tuple[type[Exception], ...]:
    if isinstance(storage, LocalStorage):
        return (OSError,)
    from obstore.exceptions import BaseError

    return (OSError, BaseError)


class Attempt:
    """One build's files before they are published; made by `Store.attempt`."""

    def __init__(self, store: Store, ref: ArtifactRef) -> None:
        self.store = store
        self.ref = ref
        self.id = uuid.uuid4().hex[:12]
        self._published = False
        self._adopted: dict[str, FileEntry] = {}
        self._lock: int | None = None
        with store.blames_uri():
            if isinstance(store.storage, LocalStorage):
                self.directory = store.storage.root / str(ref) / self.id
                """Where the driver writes."""
                self.directory.parent.mkdir(parents=True, exist_ok=True)
                self._lock = locks.acquire(lock_of(self.directory))  # gc leaves what is being built, however old
                self.directory.mkdir()
            else:
                staging = cache_directory() / "staging"
                staging.mkdir(parents=True, exist_ok=True)
                self.directory = Path(tempfile.mkdtemp(prefix=f"{self.id}-", dir=staging))

    @property
    def uri(self) -> str:
        """Where any worker may write with pyarrow; the same place as `directory` in a local store."""
        return f"{self.store.uri}/{self.ref}/{self.id}"

    def adopt(self, artifact: Artifact, names: Mapping[str, str]) -> None:
        """Take files of a published artifact of the same store into this attempt, unread and unchanged.

        A local store links them (it copies across file systems), an object store copies them on its side. Their sizes
        and digests are those of the artifact's manifest, so a damaged file stays damaged and readers refuse it.

        Args:
            artifact: Where the files are.
            names: Name there to name here.

        Raises:
            ArtifactError: the artifact has no such file, or it is missing.
        """
        assert artifact.store.uri == self.store.uri, f"{artifact.uri} is in another store than {self.uri}"
        known = {entry.path: entry for entry in artifact.manifest.files}
        for name, here in names.items():
            if name not in known:
                raise ArtifactError(f"{artifact.ref} has no file {name!r}; run `{describe_command(artifact.ref.kind)}`")
            source = f"{artifact.ref}/{artifact.manifest.attempt}/{name}"
            with self.store.blames_uri(), _blames_missing(f"{artifact.uri}/{name}", artifact.ref):
                self.store.storage.copy(source, f"{self.ref}/{self.id}/{here}")
            if artifact.manifest.part_bytes == PART_BYTES:
                self._adopted[here] = FileEntry(path=here, size=known[name].size, sha256=known[name].sha256)

    def publish(
        self,
        plan: Plan,
        counts: Mapping[str, int | float] | None = None,
        measured: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Flush the files, write the manifest, and return the artifact: this one, or the one that got there first."""
        assert plan.ref == self.ref, f"plan of {plan.ref} published as {self.ref}"
        assert not self._published, "published twice"
        with self.store.blames_uri():
            files = tuple(self._seal())
            assert files, f"{self.ref}: nothing was written"
            manifest = Manifest(
                format=plan.format,
                kind=self.ref.kind,
                name=self.ref.name,
                version=self.ref.version,
                attempt=self.id,
                created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                parents={role: str(parent) for role, parent in plan.parents.items()},
                config=plain(plan.config),
                inputs=dict(plan.inputs),
                packages=package_versions(),
                seed=plan.seed,
                counts=plain(counts or {}),
                measured=plain(measured or {}),
                files=files,
                part_bytes=PART_BYTES,
            )
            self._published = self.store.storage.create(f"{self.ref}/{MANIFEST}", render_manifest(manifest))
        artifact = self.store.open_ref(self.ref)
        if self._published:
            release_work_directory(self.store._work_root(self.ref), remove=True)
            self.store._delete_shared_work(self.ref)
        return artifact

    def publish_purged(
        self, artifact: Artifact, purged: Sequence[str], counts: Mapping[str, Any], measured: Mapping[str, Any]
    ) -> Artifact:
        """Publish these files in place of those of `artifact`, the same version; the exception to "never rewritten".

        Readers find the old files or the new ones, never a mixture. The old files, and this machine's cached copy of
        them, are deleted; a reader that has them open must open the version again.

        Args:
            artifact: What holds text that has to go.
            purged: For the manifest, beside those it has: sha256 of the ids of the documents that these files lack.
            counts: Those of the manifest that changed.
            measured: Those of the manifest that changed.

        Raises:
            ArtifactError: somebody else replaced the files meanwhile.
        """
        assert artifact.ref == self.ref, f"{artifact.ref} cannot be replaced by files of {self.ref}"
        old = artifact.manifest
        key = f"{self.ref}/{MANIFEST}"
        with self.store.blames_uri():
            changes = {
                "attempt": self.id,
                "files": tuple(self._seal()),
                "part_bytes": PART_BYTES,
                "counts": {**old.counts, **plain(counts)},
                "measured": {**old.measured, **plain(measured)},
                "purged": tuple(sorted({*old.purged, *purged})),
            }
            data = self.store.storage.read(key)
            shutil.rmtree(artifact.cached_copy(), ignore_errors=True)  # before the swap: who dies after it leaves none
            same = hashlib.sha256(data).hexdigest() == artifact.manifest_sha256
            new = render_manifest(old.model_copy(update=changes))
            self._published = same and self.store.storage.replace_if(key, new, data)
            if not self._published:
                raise ArtifactError(f"{self.ref}: its files were replaced meanwhile; run the same command again")
            self.store.storage.delete(f"{self.ref}/{old.attempt}")
        return self.store.open_ref(self.ref)

    def _seal(self) -> Iterator[FileEntry]:
        """Make every file durable where readers will look, and describe it."""
        entries = {}
        for file in LocalStorage(self.directory).files(""):
            path = self.directory / file.path
            if path.is_symlink() or not path.is_file():
                raise AssertionError(f"{self.ref}: {file.path} is a link or no plain file")
            if file.path in self._adopted:
                entries[file.path] = self._adopted[file.path]
                continue
            entries[file.path] = FileEntry(path=file.path, size=file.size, sha256=digest_parts(path, PART_BYTES))
        storage = self.store.storage
        if isinstance(storage, LocalStorage):
            _flush_tree(self.directory)
            fsync_directory(self.directory.parent)
            yield from entries.values()
            return
        for name in entries:
            storage.upload(f"{self.ref}/{self.id}/{name}", self.directory / name)
        for file in storage.files(f"{self.ref}/{self.id}"):
            described = entries.get(file.path) or self._adopted.get(file.path)
            yield described or _describe_remote(storage, f"{self.ref}/{self.id}/{file.path}", file.path, file.size)

    def _discard_unpublished(self) -> None:
        if not self._published:
            with contextlib.suppress(*_medium_errors(self.store.storage)):  # gc takes what stays behind
                self.store.storage.delete(f"{self.ref}/{self.id}")
        if self._lock is not None:
            locks.release(lock_of(self.directory), self._lock, remove=True)
        if not self.store.is_local:
            shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def _blames_missing(shown: str, ref: ArtifactRef) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{shown}: missing; remove {ref} and build it again") from None


def _flush_tree(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        fsync_directory(path)  # works on plain files as well


def _describe_remote(storage: ObjectStorage, key: str, path: str, size: int) -> FileEntry:
    digests, digest, room = [], hashlib.sha256(), PART_BYTES
    for block in storage.stream(key):
        while block:
            digest.update(block[:room])
            taken = min(room, len(block))
            block, room = block[taken:], room - taken
            if room == 0:
                digests.append(digest.hexdigest())
                digest, room = hashlib.sha256(), PART_BYTES
    if room < PART_BYTES or not digests:
        digests.append(digest.hexdigest())
    return FileEntry(path=path, size=size, sha256=tuple(digests))


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A published artifact whose manifest has been verified; its files are verified before a path is handed out."""

    store: Store
    manifest: Manifest
    manifest_sha256: str

    @property
    def ref(self) -> ArtifactRef:
        """What this is."""
        return self.manifest.ref

    @property
    def uri(self) -> str:
        """Address of the files, for messages."""
        return f"{self.store.uri}/{self.ref}/{self.manifest.attempt}"

    def directory(self) -> Path:
        """A local directory with exactly the manifest's files, every sha256 verified (once per process).

        Raises:
            ArtifactError: a file is missing, changed, or not in the manifest.
        """
        storage = self.store.storage
        if isinstance(storage, LocalStorage):
            directory = storage.root / str(self.ref) / self.manifest.attempt
            verify(directory, self.manifest, self.uri, self.store.uri)
            return directory
        return self._local_copy(storage)

    def path(self, name: str) -> Path:
        """The local, verified path of one file."""
        if not any(entry.path == name for entry in self.manifest.files):
            raise ArtifactError(
                f"{self.ref} has no file {name!r}; it was built by another version: run the stage again"
            )
        return self.directory() / name

    def cached_copy(self) -> Path:
        """Where this machine keeps its copy of an artifact of an object store, if it has one."""
        return cache_directory() / "artifacts" / self.manifest_sha256

    def _local_copy(self, storage: ObjectStorage) -> Path:
        copy = self.cached_copy()
        if self._is_sound(copy):
            return copy
        copy.parent.mkdir(parents=True, exist_ok=True)
        damaged = copy.is_dir()
        # The workers of a node ask for it at once: one fetches, the others wait.
        with locks.hold(copy.with_name(f".{copy.name}.lock")):
            if damaged and not self._is_sound(copy):
                shutil.rmtree(copy, ignore_errors=True)
            if not copy.is_dir():
                self._fetch(storage, copy)
        verify(copy, self.manifest, self.uri, self.store.uri)
        return copy

    def _is_sound(self, copy: Path) -> bool:
        """Whether a cached copy is there and whole; a damaged or vanished one is no reason to fail."""
        if not copy.is_dir():
            return False
        try:
            verify(copy, self.manifest, str(copy), self.store.uri)
        except (ArtifactError, FileNotFoundError):
            return False
        return True

    def _fetch(self, storage: ObjectStorage, copy: Path) -> None:
        with tempfile.TemporaryDirectory(dir=copy.parent, prefix=".fetching-") as temporary:
            fetched = Path(temporary) / "files"
            for entry in self.manifest.files:
                try:
                    storage.download(f"{self.ref}/{self.manifest.attempt}/{entry.path}", fetched / entry.path)
                except FileNotFoundError:
                    raise ArtifactError(f"{self.uri}: {entry.path} is missing; remove it and build it again") from None
            verify(fetched, self.manifest, self.uri, self.store.uri)
            fetched.rename(copy)
