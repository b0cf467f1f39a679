"""Verifying an artifact's files against its manifest before anything parses them.

In: a local directory and a manifest. Out: nothing, or an `ArtifactError` that names the file. A directory that was
verified in this process is not read again while no file's size, time stamps or inode change.
Not covered: origin. A checksum proves integrity only; parsers still set their own limits.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from cluster.errors import ArtifactError
from cluster.manifest import FileEntry, Manifest, digest_part
from cluster.storage import LocalStorage

_verified: dict[tuple[str, str], tuple[tuple[int, int, int, int], ...]] = {}
_lock = threading.Lock()


def verify(directory: Path, manifest: Manifest, shown: str, store_uri: str) -> None:
    """Check that `directory` holds exactly the manifest's files, bit for bit.

    Raises:
        ArtifactError: a file is missing, extra, a link, or differs; the message says how to mend it.
    """
    remedy = f"remove {store_uri}/{manifest.ref} and run the stage again"
    _check_names(directory, manifest, shown, remedy)
    stamps = _stamps(directory, manifest)
    key = (str(directory), manifest.attempt)
    with _lock:
        if _verified.get(key) == stamps:
            return
    for entry in manifest.files:
        size = (directory / entry.path).stat().st_size
        if size != entry.size:
            raise ArtifactError(f"{shown}/{entry.path}: damaged: {size} bytes, expected {entry.size}; {remedy}")
    parts = [(entry, number) for entry in manifest.files for number in range(len(entry.sha256))]

    def matches(part: tuple[FileEntry, int]) -> bool:
        entry, number = part
        start = number * manifest.part_bytes
        return digest_part(directory / entry.path, start, manifest.part_bytes) == entry.sha256[number]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (entry, _), good in zip(parts, pool.map(matches, parts), strict=True):
            if not good:
                raise ArtifactError(f"{shown}/{entry.path}: damaged: its sha256 does not match; {remedy}")
    with _lock:
        _verified[key] = stamps


def _check_names(directory: Path, manifest: Manifest, shown: str, remedy: str) -> None:
    expected = {entry.path for entry in manifest.files}
    found = {file.path for file in LocalStorage(directory).files("")}
    if missing := sorted(expected - found):
        raise ArtifactError(f"{shown}/{missing[0]}: missing; {remedy}")
    # A reader that takes a folder as a whole would mix in what another builder left.
    if extra := sorted(found - expected):
        raise ArtifactError(f"{shown}/{extra[0]}: not in the manifest; {remedy}")
    folders = {str(parent) for path in expected for parent in PurePosixPath(path).parents}
    for name in expected | folders:
        if (directory / name).is_symlink():
            raise ArtifactError(f"{shown}/{name}: is a link; {remedy}")


def _stamps(directory: Path, manifest: Manifest) -> tuple[tuple[int, int, int, int], ...]:
    statuses = [(directory / entry.path).stat() for entry in manifest.files]
    return tuple((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in statuses)
