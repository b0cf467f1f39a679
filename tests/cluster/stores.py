"""Stores and artifacts for the tests of this room."""

from pathlib import Path

import obstore.store

from cluster.stage import Outcome, Plan, run_stage
from cluster.storage import ObjectStorage
from cluster.store import Artifact, Attempt, Store

FILES = {"data.bin": bytes(range(64)), "deep/inner.txt": b"inner", "empty": b""}


def object_store(root: Path | None = None) -> Store:
    """A store over obstore: in memory, or in a directory so that other processes see it."""
    objects = obstore.store.MemoryStore() if root is None else obstore.store.LocalStore(root, mkdir=True)
    return Store("s3://bucket/prefix", ObjectStorage("s3://bucket/prefix", objects))


def plan(number: int = 0, kind: str = "index", name: str = "x", **fields) -> Plan:
    return Plan(kind=kind, name=name, config={"number": number}, seed=1, **fields)


def write_files(attempt: Attempt, number: int = 0) -> None:
    for path, content in FILES.items():
        target = attempt.directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content + str(number).encode() * bool(content))


def build(store: Store, number: int = 0, kind: str = "index", name: str = "x", **fields) -> Artifact:
    """Build the artifact of `plan(number)` through `run_stage`."""

    def write(attempt: Attempt) -> Outcome:
        write_files(attempt, number)
        return Outcome({"files": len(FILES)}, {"number": number})

    return run_stage(store, plan(number, kind, name, **fields), write)


def content_of(artifact: Artifact) -> dict[str, bytes]:
    directory = artifact.directory()
    return {entry.path: (directory / entry.path).read_bytes() for entry in artifact.manifest.files}


def expected_content(number: int) -> dict[str, bytes]:
    return {path: content + str(number).encode() * bool(content) for path, content in FILES.items()}
