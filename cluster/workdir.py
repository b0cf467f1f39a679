"""Work directories: what a build leaves for its own next run, held by one process at a time.

In: the root of one version. Out: `<root>/.work`, locked while this process lives, or `<root>/.work-<pid>-…` when
another live process holds it. Never part of an artifact. Not covered: what is written there.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from pathlib import Path

from cluster import locks

WORK = ".work"

_held: dict[Path, tuple[Path, int]] = {}
_lock = threading.Lock()


def claim_work_directory(root: Path) -> Path:
    """The work directory under `root` that this process holds; created if absent."""
    with _lock:
        held = _held.get(root)
        if held is not None and held[0].is_dir():
            return held[0]
        directory = root / WORK
        directory.mkdir(parents=True, exist_ok=True)
        handle = held[1] if held is not None and held[0] == directory else locks.acquire(lock_of(directory))
        if handle is None:
            directory = root / f"{WORK}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            directory.mkdir()
            handle = locks.acquire(lock_of(directory))
            assert handle is not None, f"{directory} is new, yet locked"
        _held[root] = (directory, handle)
        return directory


def release_work_directory(root: Path, *, remove: bool) -> None:
    """Let go of the work directory under `root`; with `remove`, delete it when this process holds it."""
    with _lock:
        held = _held.pop(root, None)
        if held is None:
            return
        directory, handle = held
        if remove:
            shutil.rmtree(directory, ignore_errors=True)
        locks.release(lock_of(directory), handle, remove=remove)


def is_work_directory(name: str) -> bool:
    """Whether a folder of this name holds interrupted work."""
    return name == WORK or name.startswith(f"{WORK}-")


def lock_of(directory: Path) -> Path:
    """The lock file of a work directory or an attempt, beside it."""
    return directory.with_name(f".{directory.name.lstrip('.')}.lock")
