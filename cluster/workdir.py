"""Work directories: what a build leaves for its own next run, held by one process at a time.

In: the root of one version. Out: `<root>/.work`, locked while this process lives (the kernel drops the lock even after
SIGKILL), or `<root>/.work-<pid>-…` when another live process holds it. Never part of an artifact.
Not covered: what is written there; several machines on one file system without locks.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import uuid
from pathlib import Path

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
        handle = os.open(_lock_file(directory), os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            directory = root / f"{WORK}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            directory.mkdir()
            handle = os.open(_lock_file(directory), os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX)
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
            _lock_file(directory).unlink(missing_ok=True)
        os.close(handle)


def is_work_directory(name: str) -> bool:
    """Whether a folder of this name holds interrupted work."""
    return name == WORK or name.startswith(f"{WORK}-")


def is_held(directory: Path) -> bool:
    """Whether a live process is working in `directory`."""
    try:
        handle = os.open(_lock_file(directory), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _lock_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")
