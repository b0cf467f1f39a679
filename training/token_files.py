"""Token files on disk or in an object store: written whole or not at all, checked and memory-mapped when read.

In: token rows and an address. Out: Arrow IPC files of one record batch, and the batches that they hold.
Not covered: which rows stand in which file, and in which order they are trained on (training/token_rows.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cache import cache_directory
from cluster.errors import UserError
from retrieval.documents import join_path, open_filesystem
from training.batching import TokenRow

if TYPE_CHECKING:
    import pyarrow as pa

COMMIT = "tokens.json"
COPY_BYTES = 1 << 20


def render(rows: Sequence[TokenRow]) -> memoryview:
    """An Arrow IPC file of one record batch."""
    import pyarrow as pa

    batch = pa.record_batch(
        [
            pa.array([row.sample_id for row in rows], pa.string()),
            pa.array([row.input_ids for row in rows], pa.list_(pa.int32())),
            pa.array([row.target_tokens for row in rows], pa.int32()),
        ],
        names=["sample_id", "input_ids", "target_tokens"],
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def write_file(uri: str, name: str, data: bytes | memoryview) -> None:
    """Writes a file whole or not at all. In an object store a folder needs no object of its own.

    Raises:
        UserError: It cannot be written, naming `store.uri`.
    """
    where = join_path(uri, name)
    filesystem, path = open_filesystem(where)
    try:
        if "://" in uri:
            with filesystem.open_output_stream(path) as sink:
                sink.write(data)
        else:
            _replace_local(Path(path), data)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"store.uri: cannot write {where}: {reason}; make room, or name another place") from error


def _replace_local(target: Path, data: bytes | memoryview) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read_commit(uri: str) -> dict[str, Any] | None:
    """What the finished files below `uri` are; none where there are none, or not all of them yet."""
    filesystem, path = open_filesystem(join_path(uri, COMMIT))
    try:
        with filesystem.open_input_stream(path) as file:
            committed = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return committed if isinstance(committed, dict) and "files" in committed else None


def open_batch(uri: str, name: str, sha256: str) -> pa.RecordBatch:
    """The file's record batch, memory-mapped. From an object store it is copied to this machine first.

    Raises:
        UserError: It is missing, or not what was written.
    """
    import pyarrow as pa

    with _local_file(uri, name) as path:
        try:
            source = pa.memory_map(str(path))
            digest = hashlib.sha256(source.read_buffer()).hexdigest()
        except FileNotFoundError:
            digest = ""
        if digest != sha256:
            raise UserError(
                f"{join_path(uri, name)}: missing, or not what was written (sha256); "
                "run `rayft train lora RECIPE` again, which writes it anew"
            )
        return pa.ipc.open_file(source).get_batch(0)


@contextlib.contextmanager
def _local_file(uri: str, name: str) -> Iterator[Path]:
    """A file of this machine; a copy is unlinked at the end of the block and lives on in its mapping alone, so that
    no text stays behind on a machine that was only lent to the run."""
    filesystem, inner = open_filesystem(join_path(uri, name))
    if "://" not in uri:
        yield Path(inner)
        return
    folder = cache_directory() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as copy:
        with contextlib.suppress(FileNotFoundError), filesystem.open_input_stream(inner) as source:
            while block := source.read(COPY_BYTES):
                copy.write(block)
        copy.flush()
        yield Path(copy.name)
