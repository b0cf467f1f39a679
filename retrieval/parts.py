"""Parts: the unfinished work of an index build, which outlives an interruption.

In: a URI that every worker can reach, and tables, arrays and small JSON by name. Out: the same back. A local part
appears under its name whole (written beside, then renamed), and an object store shows an object when it is complete;
so what exists is finished, and a build that was killed goes on from there.
Not covered: which parts a build has (`embedding.py`, `rowplan.py`).
"""

from __future__ import annotations

import contextlib
import io
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.sources import join_path, open_filesystem

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa


def part_name(folder: str, ordinal: int, suffix: str) -> str:
    """Name of the part of one corpus block; names sort in block order."""
    return f"{folder}/{ordinal:06d}{suffix}"


@dataclass(frozen=True)
class Parts:
    """A folder of parts; small, and picklable."""

    uri: str

    def exists(self, name: str) -> bool:
        """Whether a part is finished."""
        import pyarrow.fs as pafs

        filesystem, path = open_filesystem(join_path(self.uri, name))
        return bool(filesystem.get_file_info(path).type == pafs.FileType.File)

    def count(self, folder: str) -> int:
        """Number of finished parts in a folder."""
        import pyarrow.fs as pafs

        filesystem, path = open_filesystem(join_path(self.uri, folder))
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return sum(".unfinished-" not in info.base_name for info in infos)

    def write_bytes(self, name: str, data: Any) -> None:
        """Write a part from a bytes-like object."""
        with self._sink(name) as sink:
            sink.write(data)

    def read_bytes(self, name: str) -> bytes:
        """A part's bytes."""
        filesystem, path = open_filesystem(join_path(self.uri, name))
        with filesystem.open_input_stream(path) as file:
            return bytes(file.read())

    def write_json(self, name: str, value: Any) -> None:
        """Write a part as JSON."""
        self.write_bytes(name, json.dumps(value).encode())

    def read_json(self, name: str) -> Any:
        """The value of a JSON part."""
        return json.loads(self.read_bytes(name))

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a part as Parquet."""
        import pyarrow.parquet as pq

        with self._sink(name) as sink:
            pq.write_table(table, sink, compression="zstd", row_group_size=8192)

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet part, or some columns of it."""
        import pyarrow.parquet as pq

        filesystem, path = open_filesystem(join_path(self.uri, name))
        with filesystem.open_input_file(path) as file, pq.ParquetFile(file) as parquet:
            return parquet.read(columns=list(columns) if columns is not None else None)

    def write_array(self, name: str, array: npt.NDArray[Any]) -> None:
        """Write a part as `.npy`."""
        import numpy as np

        with self._sink(name) as sink:
            np.lib.format.write_array(sink, np.ascontiguousarray(array), allow_pickle=False)

    def read_array(self, name: str) -> npt.NDArray[Any]:
        """A `.npy` part; memory-mapped where parts are local files."""
        import numpy as np

        if "://" not in self.uri:
            mapped: npt.NDArray[Any] = np.load(Path(self.uri) / name, mmap_mode="r", allow_pickle=False)
            return mapped
        array: npt.NDArray[Any] = np.load(io.BytesIO(self.read_bytes(name)), allow_pickle=False)
        return array

    def write_arrays(self, name: str, **arrays: npt.NDArray[Any]) -> None:
        """Write a part of several arrays (`.npz`)."""
        import numpy as np

        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for an array
        self.write_bytes(name, buffer.getvalue())

    def read_arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a `.npz` part."""
        import numpy as np

        with np.load(io.BytesIO(self.read_bytes(name)), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    @contextlib.contextmanager
    def _sink(self, name: str) -> Iterator[Any]:
        filesystem, path = open_filesystem(join_path(self.uri, name))
        if "://" in self.uri:
            with filesystem.open_output_stream(path) as sink:
                yield sink
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        beside = Path(f"{path}.unfinished-{uuid.uuid4().hex}")
        try:
            with beside.open("wb") as file:
                yield file
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def copy_tree(folder: Path, uri: str) -> None:
    """Copy every file below `folder` to the same name below `uri`, in blocks."""
    filesystem, inner = open_filesystem(uri)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = join_path(inner, file.relative_to(folder).as_posix())
        if "://" not in uri:  # in an object store it would write an empty object that stands for the folder
            filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        with file.open("rb") as source, filesystem.open_output_stream(target) as sink:
            while block := source.read(1 << 20):
                sink.write(block)


def local_or_none(uri: str) -> Path | None:
    """The directory that a local address means; none for an object store."""
    return None if "://" in uri else Path(uri)
