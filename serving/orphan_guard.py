"""Ends processes whose parent has died: `python orphan_guard.py PARENT PID…`, started by that parent.

A killed replica cannot end what it started, and vLLM's core would keep its GPU. The guard looks twice a second whether
it has been orphaned itself, and ends with the processes that it guards. Linux only, as vLLM is. Imports no rayft.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

INTERVAL_S = 0.5
GRACE_S = 5.0


def birth(pid: int) -> str:
    """When a process began, in clock ticks since boot, as /proc tells it (field 22 of proc(5)'s `stat`); empty when it
    has ended. A number that was given to another process meanwhile has another birth."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def guard(pids: dict[int, str], parent: int) -> None:
    """Returns when the processes (and their births) have ended, or when the parent had died and they were ended."""
    while os.getppid() == parent:
        if not _living(pids):
            return
        time.sleep(INTERVAL_S)
    deadline = time.monotonic() + GRACE_S
    while living := _living(pids):
        for pid in living:
            os.kill(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
        time.sleep(INTERVAL_S)


def _living(pids: dict[int, str]) -> list[int]:
    return [pid for pid, born in pids.items() if born and birth(pid) == born]


if __name__ == "__main__":
    guarded = {int(pid): birth(int(pid)) for pid in sys.argv[2:]}
    guard(guarded, int(sys.argv[1]))
