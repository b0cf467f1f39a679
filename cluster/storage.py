"""Files of a store, on a local disk or an object store, behind the few operations that publishing needs.

In: keys (relative POSIX paths) and bytes. Out: the same semantics on both: `create` lets exactly one of two racing
writers win, `replace` swaps a small file atomically, `replace_if` only while it holds what the caller read. A local
disk does it with link-if-absent, rename and a lock, an object store with conditional puts through obstore (pyarrow has
none).
Not covered: what an artifact is (`store.py`); workers write artifact files themselves through pyarrow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from cluster import locks
from cluster.errors import UserError

OBJECT_SCHEMES = ("s3://", "gs://")
SERVER_COPY_BYTES = 5_000_000_000
"""Largest object that S3 copies in one request (5 GiB)."""


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file found under a prefix."""

    path: str
    """Relative to the prefix."""
    size: int
    """Bytes."""
    modified: float
    """Unix time, s."""


class Storage(Protocol):
    """What a store needs of its medium. `KeyError` is never raised: a missing file is `FileNotFoundError`."""

    uri: str

    def read(self, key: str) -> bytes:
        """The whole file; for small files."""

    def create(self, key: str, data: bytes) -> bool:
        """Write durably if absent; whether this call wrote it."""

    def replace(self, key: str, data: bytes) -> None:
        """Write durably and atomically over what may be there."""

    def replace_if(self, key: str, data: bytes, expected: bytes | None) -> bool:
        """Compare and swap: `replace`, but only while the file holds `expected` (none: is absent); whether it did."""

    def copy(self, source: str, target: str) -> None:
        """The same file under a second key, without passing through this process where the medium allows it.

        Raises:
            FileNotFoundError: there is no `source`.
        """

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly under `prefix`, sorted."""

    def files(self, prefix: str) -> list[StoredFile]:
        """Every file under `prefix`, at any depth, sorted by path."""

    def modified(self, prefix: str) -> float:
        """Newest time stamp of what is under `prefix`, Unix time in s; 0 when there is nothing."""

    def delete(self, prefix: str) -> None:
        """Remove a file or everything under a prefix; what is absent is no error."""


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_NO_LINK = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that has no hard links, or no more of them."""


def _swap_lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.swap.lock")


class LocalStorage:
    """A directory. Durable: data and names are flushed to disk before a call returns."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def _path(self, key: str) -> Path:
        return self.root / key

    def read(self, key: str) -> bytes:
        """The whole file."""
        try:
            return self._path(key).read_bytes()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(key) from error

    def _write_beside(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return beside

    def create(self, key: str, data: bytes) -> bool:
        """Link-if-absent of a finished temporary file."""
        path = self._path(key)
        beside = self._write_beside(path, data)
        try:
            os.link(beside, path)
            created = True
        except FileExistsError:
            created = False
        finally:
            beside.unlink()
        fsync_directory(path.parent)
        return created

    def replace(self, key: str, data: bytes) -> None:
        """Rename of a finished temporary file."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.hold(_swap_lock(path)):
            self._swap(path, data)

    def replace_if(self, key: str, data: bytes, expected: bytes | None) -> bool:
        """Compare and rename under a lock that every other replacement takes too."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.hold(_swap_lock(path)):
            try:
                found = path.read_bytes()
            except FileNotFoundError:
                found = None
            if found != expected:
                return False
            self._swap(path, data)
            return True

    def _swap(self, path: Path, data: bytes) -> None:
        beside = self._write_beside(path, data)
        try:
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)

    def copy(self, source: str, target: str) -> None:
        """A hard link: files of a store never change. Where the file system refuses one (too many links, another
        disk mounted below), a copy."""
        origin, path = self._path(source), self._path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(origin, path, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            shutil.copyfile(origin, path)

    def folders(self, prefix: str) -> list[str]:
        """Names of real directories; links are not followed."""
        path = self._path(prefix)
        if not path.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))

    def files(self, prefix: str) -> list[StoredFile]:
        """Every file, links included as what they are."""
        root = self._path(prefix)
        found = []
        for directory, _, names in os.walk(root):
            for name in names:
                path = Path(directory) / name
                with contextlib.suppress(FileNotFoundError):  # a temporary file may vanish meanwhile
                    status = path.lstat()
                    found.append(StoredFile(path.relative_to(root).as_posix(), status.st_size, status.st_mtime))
        return sorted(found, key=lambda file: file.path)

    def modified(self, prefix: str) -> float:
        """Newest time stamp, of empty folders too."""
        root = self._path(prefix)
        newest = 0.0
        for path in (root, *root.rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, path.lstat().st_mtime)
        return newest

    def delete(self, prefix: str) -> None:
        """Remove a file or a tree."""
        path = self._path(prefix)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=False)
        else:
            path.unlink(missing_ok=True)


class ObjectStorage:
    """An object store through obstore; `objects` is one of its stores, already at the store's prefix."""

    def __init__(self, uri: str, objects: Any) -> None:
        self.uri = uri.rstrip("/")
        self.objects = objects

    def read(self, key: str) -> bytes:
        """The whole object."""
        import obstore

        return bytes(obstore.get(self.objects, key).bytes())

    def create(self, key: str, data: bytes) -> bool:
        """A put that the service refuses when the key exists."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            obstore.put(self.objects, key, data, mode="create")
        except (AlreadyExistsError, PreconditionError):
            return False
        return True

    def replace(self, key: str, data: bytes) -> None:
        """A plain put, which is atomic."""
        import obstore

        obstore.put(self.objects, key, data)

    def replace_if(self, key: str, data: bytes, expected: bytes | None) -> bool:
        """A put that the service refuses unless the object is still the one that was compared."""
        import obstore
        from obstore.exceptions import NotFoundError, PreconditionError

        if expected is None:
            return self.create(key, data)
        try:
            found = obstore.get(self.objects, key)
            seen = {name: found.meta[name] for name in ("e_tag", "version") if found.meta.get(name)}
            if bytes(found.bytes()) != expected:
                return False
            obstore.put(self.objects, key, data, mode=seen)
        except (FileNotFoundError, NotFoundError, PreconditionError):
            return False
        return True

    def copy(self, source: str, target: str) -> None:
        """A copy by the service; an object too large for one such request passes through this machine in blocks."""
        import obstore

        if obstore.head(self.objects, source)["size"] <= SERVER_COPY_BYTES:
            obstore.copy(self.objects, source, target)
        else:
            obstore.put(self.objects, target, self.stream(source))

    def folders(self, prefix: str) -> list[str]:
        """Common prefixes one level below."""
        import obstore

        listed = obstore.list_with_delimiter(self.objects, prefix or None)
        return sorted(PurePosixPath(found).name for found in listed["common_prefixes"])

    def files(self, prefix: str) -> list[StoredFile]:
        """Every object under the prefix, but not the empty ones that pyarrow writes to stand for a folder."""
        found = []
        folders = {"."}
        for meta in self._list(prefix):
            path = PurePosixPath(meta["path"]).relative_to(prefix)
            folders.update(map(str, path.parents))
            found.append(StoredFile(path.as_posix(), meta["size"], meta["last_modified"].timestamp()))
        files = (file for file in found if file.size or file.path not in folders)
        return sorted(files, key=lambda file: file.path)

    def _list(self, prefix: str) -> Iterator[Any]:
        import obstore

        for batch in obstore.list(self.objects, prefix=prefix or None):
            yield from batch

    def modified(self, prefix: str) -> float:
        """Newest time stamp of an object under the prefix."""
        return max((file.modified for file in self.files(prefix)), default=0.0)

    def delete(self, prefix: str) -> None:
        """Remove the object of this key and all objects under it."""
        import obstore

        paths = [meta["path"] for meta in self._list(prefix)]
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self.objects, [*paths, prefix] if prefix not in paths else paths)

    def upload(self, key: str, path: Path) -> None:
        """Put a local file, in parts when it is large."""
        import obstore

        obstore.put(self.objects, key, path)

    def download(self, key: str, path: Path) -> None:
        """Write an object to a local file, streaming."""
        import obstore

        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for block in obstore.get(self.objects, key).stream(min_chunk_size=8 << 20):
                file.write(block)

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in blocks."""
        import obstore

        for block in obstore.get(self.objects, key).stream(min_chunk_size=8 << 20):
            yield bytes(block)


def storage_at(uri: str) -> LocalStorage | ObjectStorage:
    """The storage that a `store.uri` means: `s3://`, `gs://`, `file://` or a directory."""
    if uri.startswith(OBJECT_SCHEMES):
        import obstore.store

        return ObjectStorage(uri, obstore.store.from_url(uri.rstrip("/")))
    if "://" in uri and not uri.startswith("file://"):
        raise UserError(f"store.uri: {uri!r} is neither a directory nor an s3:// or gs:// address")
    if not uri:
        raise UserError("store.uri: empty; name a directory or an s3:// or gs:// address")
    return LocalStorage(Path(uri.removeprefix("file://")).expanduser().absolute())
