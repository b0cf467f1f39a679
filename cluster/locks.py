"""Locks that a process holds while it lives: the kernel drops them even after SIGKILL.

In: a path for the lock file. Out: a handle, or none while another open file holds it. Not covered: file systems
without `flock`, and object stores (there, age decides: see `gc.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def acquire(path: Path) -> int | None:
    """Lock `path` (created if absent) without waiting; a handle for `release`, or none when it is held."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def release(path: Path, handle: int, *, remove: bool) -> None:
    """Unlock; with `remove`, delete the lock file as well."""
    if remove:
        path.unlink(missing_ok=True)
    os.close(handle)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Wait for the lock at `path`, hold it, and remove the lock file at the end."""
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                break
        os.close(handle)  # who held it before has removed the file: this lock guards nothing any more
    try:
        yield
    finally:
        release(path, handle, remove=True)


def is_held(path: Path) -> bool:
    """Whether some open file holds the lock at `path`."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
