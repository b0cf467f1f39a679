"""Run by `test_kill.py` in a process of its own: build one artifact and die by SIGKILL at a chosen point.

Usage: killed_publish.py STORE NUMBER POINT
"""

import os
import pathlib
import signal
import sys

from cluster.stage import Outcome, run_stage
from cluster.storage import LocalStorage
from cluster.store import Attempt, Store
from tests.cluster.stores import plan, write_files


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_around(owner, name: str, before: bool, when) -> None:
    """Replace a function by one that dies before or after the original does its work."""
    original = getattr(owner, name)

    def deadly(*args, **kwargs):
        if before and when(*args):
            die()
        result = original(*args, **kwargs)
        if when(*args):
            die()
        return result

    setattr(owner, name, deadly)


def arm(point: str) -> None:
    def manifest(_storage, key, _data):
        return key.endswith("manifest.json")

    def current(_storage, key, _data):
        return key.endswith("current")

    def always(*_args):
        return True

    points = {
        "before manifest": (LocalStorage, "create", True, manifest),
        "manifest not yet linked": (os, "link", True, always),
        "manifest linked": (os, "link", False, always),
        "after manifest": (LocalStorage, "create", False, manifest),
        "before current": (LocalStorage, "replace", True, current),
        "current not yet renamed": (pathlib.Path, "replace", True, always),
        "after current": (LocalStorage, "replace", False, current),
    }
    if point in points:
        die_around(*points[point])


def main() -> None:
    uri, number, point = sys.argv[1], int(sys.argv[2]), sys.argv[3]

    def write(attempt: Attempt) -> Outcome:
        write_files(attempt, number)
        if point == "writing files":
            (attempt.directory / "data.bin").write_bytes(b"half")
            die()
        return Outcome()

    store = Store(uri)
    store.check_writable()
    if point != "writing files":
        # The probe of check_writable must not be what dies.
        store.check_writable = lambda: None  # type: ignore[method-assign]
    arm(point)
    run_stage(store, plan(number), write)


if __name__ == "__main__":
    main()
