"""Ends what a process had started when that process has died: `python orphan_guard.py PARENT`, started by it.

A killed replica cannot end what it started, and vLLM's core would keep its GPU. The guard follows its parent's
descendants from before vLLM starts, looks once a second whether it has been orphaned itself, and then ends them.
Linux only, as vLLM is. Imports no rayft.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

INTERVAL_S = 1.0
GRACE_S = 5.0


def processes() -> dict[int, tuple[int, str]]:
    """Every living process: its parent and when it began, in clock ticks since boot (fields 4 and 22 of proc(5)'s
    `stat`). A number that was given to another process meanwhile has another birth."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    found[int(entry.name)] = (int(fields[1]), fields[19])
    return found


def descendants(roots: set[int]) -> dict[int, str]:
    """What the processes `roots` have started, and what that has started, with births; this process left out."""
    alive = processes()
    found: dict[int, str] = {}
    grown = True
    while grown:
        added = {
            pid: born
            for pid, (parent, born) in alive.items()
            if (parent in roots or parent in found) and pid not in found and pid != os.getpid()
        }
        found.update(added)
        grown = bool(added)
    return found


def guard(parent: int) -> None:
    """Returns when the parent has died and its descendants have been ended."""
    followed: dict[int, str] = {}
    while os.getppid() == parent:
        followed = descendants({parent})
        time.sleep(INTERVAL_S)
    deadline = time.monotonic() + GRACE_S
    while living := _living(followed):
        followed = {**living, **descendants(set(living))}
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
        time.sleep(INTERVAL_S)


def _living(followed: dict[int, str]) -> dict[int, str]:
    alive = processes()
    return {pid: born for pid, born in followed.items() if pid in alive and alive[pid][1] == born}


if __name__ == "__main__":
    guard(int(sys.argv[1]))
