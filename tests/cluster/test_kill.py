"""SIGKILL in the middle of a publish leaves the old version or the new one, never a mixture."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.gc import collect
from tests.cluster.stores import build, content_of, expected_content, plan

ROOT = Path(__file__).resolve().parent.parent.parent


def start(uri: str, number: int, point: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.killed_publish", uri, str(number), point],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )


# point, whether the new version is published, whether it is current
POINTS = [
    ("writing files", False, False),
    ("before manifest", False, False),
    ("manifest not yet linked", False, False),
    ("manifest linked", True, False),
    ("after manifest", True, False),
    ("before current", True, False),
    ("current not yet renamed", True, False),
    ("after current", True, True),
]


@pytest.mark.parametrize(("point", "published", "current"), POINTS)
def test_a_publish_killed_at_any_point_leaves_old_or_new_and_the_rerun_succeeds(store, point, published, current):
    build(store, 1)
    killed = start(store.uri, 2, point)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert store.exists(plan(2).ref) is published
    assert content_of(store.open("index", "x")) == expected_content(2 if current else 1)
    build(store, 2)
    assert content_of(store.open("index", "x")) == expected_content(2)
    collect(store, min_age_s=-1)
    version = store.storage.root / str(plan(2).ref)
    attempt = store.open("index", "x").manifest.attempt
    assert sorted(path.name for path in version.iterdir()) == [attempt, "manifest.json"]
    assert not list(store.storage.root.rglob("*.tmp")) + list(store.storage.root.rglob("*.lock"))
    assert content_of(store.open("index", "x")) == expected_content(2)


def test_a_publish_killed_at_random_times_is_never_a_mixture(store):
    build(store, 0)
    chance = random.Random(17)
    for number in range(1, 5):
        process = start(store.uri, number, "never")
        while process.poll() is None and not (store.storage.root / str(plan(number).ref)).exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.012))
        process.kill()
        process.wait()
        version = store.current("index", "x")
        found = next(n for n in range(number + 1) if plan(n).ref.version == version)
        assert content_of(store.open("index", "x")) == expected_content(found)
        if store.exists(plan(number).ref):
            assert content_of(store.open_ref(plan(number).ref)) == expected_content(number)
    build(store, 4)
    assert content_of(store.open("index", "x")) == expected_content(4)
