"""Reads a FAISS index file that must not be trusted, although its checksum is right.

In: a file, and what it must be: kind, rows, dimension. Out: the index, or an `ArtifactError`. A checksum says that the
file is what was published, not that its publisher was honest, and FAISS's parser believes what it reads.
The first time that a machine meets a content, a child process with limits on memory and time reads it, checks every
number that a search follows (`faiss_checks.py`) and searches it; a crash or a hang there is a refusal here. Success is
remembered in the cache by the content's sha256. Only then does this process read the file, within FAISS's own limits.
Not covered: the store's checksum, which comes first; a FAISS whose second reading of the same bytes differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cache import cache_directory
from cluster.errors import ArtifactError

BASE_TIMEOUT_S = 120.0
"""For starting Python and FAISS: long, because a machine that swaps is no reason to refuse a good file."""
BYTES_PER_S = 20e6
"""Slowest reading and checking that is waited for: a guess on the safe side, not a measurement."""
BASE_BYTES = 1 << 30
"""Address space that checking may take, beside six times the file."""
CHECKS = 1
"""Number of the set of checks: what an older set has passed is checked anew."""


@dataclass(frozen=True)
class ExpectedIndex:
    """A file and what it must be."""

    file: Path
    kind: str
    rows: int
    dimension: int


def read_guarded(file: Path, kind: str, rows: int, dimension: int) -> Any:
    """The FAISS index in `file`.

    Raises:
        ArtifactError: it is not an index of `kind` over `rows` vectors of `dimension`, or would not be safe to search.
    """
    expected = ExpectedIndex(file, kind, rows, dimension)
    if not file.is_file():
        raise ArtifactError(f"{file} is missing: rebuild the index")
    mark = _mark(expected)
    if not mark.is_file():
        (reason,) = check_files([expected])
        if reason.startswith(str(file)):
            raise ArtifactError(reason)
        if reason:
            raise ArtifactError(f"{file} is not a FAISS index that can be used ({reason}): rebuild the index")
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return read_limited(expected)


def read_limited(expected: ExpectedIndex) -> Any:
    """Read within limits taken from the file's size, and check the shape; no checks of what is inside.

    Raises:
        ArtifactError: FAISS refuses the file, or its kind or shape is another.
    """
    import faiss

    from retrieval.faiss_checks import CLASSES

    size = expected.file.stat().st_size
    # FAISS checks the table that an L2 search over ivf_pq would compute against the same limit, for inner products too:
    # lists · codes · 256 floats, 196 MB for 1,000,000 × 384, three times the file.
    table = 4 * (4 * math.isqrt(expected.rows) + 4) * max(1, expected.dimension // 8) * 256
    faiss.set_deserialization_vector_byte_limit(max(size, table) if expected.kind == "ivf_pq" else size)
    faiss.set_deserialization_loop_limit(max(size, 1024))
    try:
        index = faiss.read_index(str(expected.file))
    except (RuntimeError, MemoryError) as error:
        raise ArtifactError(f"{expected.file} is not a FAISS index that can be read: rebuild the index") from error
    found = (type(index).__name__, index.ntotal, index.d)
    wanted = (CLASSES[expected.kind], expected.rows, expected.dimension)
    if found != wanted:
        raise ArtifactError(
            f"{expected.file} is an {found[0]} of {found[1]} vectors of {found[2]} dimensions, index.json says "
            f"{wanted[0]}, {wanted[1]} of {wanted[2]}: rebuild the index"
        )
    return index


def check_files(expected: Sequence[ExpectedIndex]) -> list[str]:
    """Why each file is refused, or "" where it is not. One child process checks them all; when it dies, the next
    one goes on after the file that killed it.
    """
    reasons: list[str] = []
    while len(reasons) < len(expected):
        reasons += _check_in_child(expected[len(reasons) :])
    return reasons


def _check_in_child(expected: Sequence[ExpectedIndex]) -> list[str]:
    """Reasons for the first files, at least one."""
    size = sum(one.file.stat().st_size for one in expected)
    paths = [path for path in sys.path if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    request = [[str(one.file), one.kind, one.rows, one.dimension] for one in expected]
    with tempfile.TemporaryFile() as answers:  # not a pipe: what a dying child has written stays
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "retrieval.faiss_checks"],
                input=json.dumps(request).encode(),
                stdout=answers,
                stderr=subprocess.DEVNULL,
                env=environment,
                timeout=BASE_TIMEOUT_S + size / BYTES_PER_S,
                check=False,
            )
            end = f"reading it ends the process with status {ended.returncode}"
        except subprocess.TimeoutExpired:
            end = "reading it takes too long"
        answers.seek(0)
        lines = answers.read().decode(errors="replace").splitlines()
    reasons = []
    for line in lines[: len(expected)]:
        with contextlib.suppress(ValueError):
            reasons.append(str(json.loads(line)))
    return reasons if len(reasons) == len(expected) else [*reasons, end]


def _mark(expected: ExpectedIndex) -> Path:
    """The cache entry that says that this content has passed as this kind and shape."""
    with expected.file.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    import faiss

    what = f"{content} {expected.kind} {expected.rows} {expected.dimension} {faiss.__version__} {CHECKS}"
    return cache_directory() / "faiss" / hashlib.sha256(what.encode()).hexdigest()
