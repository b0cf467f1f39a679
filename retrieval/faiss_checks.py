"""The child of `faiss_guard.py`: reads index files and checks every number that a search follows.

In: a JSON list of [file, kind, rows, dimension] on standard input. Out: one line of JSON per file on standard output,
a reason to refuse it or "". A file may end this process; that is what the process is for.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

CLASSES = {"hnsw": "IndexHNSWFlat", "ivf_flat": "IndexIVFFlat", "ivf_pq": "IndexIVFPQ"}
FILE_TIMEOUT_S = 60
CPU_BYTES_PER_S = 20e6
BLOCK_ROWS = 65536


class MalformedIndexError(ValueError):
    """What is wrong with the file, for the error message."""


def check_index(index: Any, kind: str, rows: int, dimension: int) -> None:
    """Check the index and search it.

    Raises:
        MalformedIndexError: it is not of that kind and shape, or a number in it would lead a search astray.
    """
    import faiss

    _require(type(index).__name__ == CLASSES[kind], f"it is an {type(index).__name__}, not {CLASSES[kind]}")
    _require(index.ntotal == rows, f"it holds {index.ntotal} vectors, not {rows}")
    _require(index.d == dimension, f"its vectors have {index.d} dimensions, not {dimension}")
    _require(index.metric_type == faiss.METRIC_INNER_PRODUCT, "its metric is not the inner product")
    _require(bool(index.is_trained), "it is not trained")
    if kind == "hnsw":
        _check_flat(faiss.downcast_index(index.storage), rows, dimension)
        _check_graph(index, rows)
    else:
        _check_lists(index, kind, rows, dimension)
    _search(index, rows, dimension)


def _require(fact: bool, otherwise: str) -> None:
    if not fact:
        raise MalformedIndexError(otherwise)


def _check_flat(flat: Any, rows: int, dimension: int) -> None:
    import faiss
    import numpy as np

    _require(type(flat).__name__ in ("IndexFlatIP", "IndexFlat"), "its vectors are not stored flat")
    _require(flat.metric_type == faiss.METRIC_INNER_PRODUCT, "its inner metric is not the inner product")
    _require(
        (flat.ntotal, flat.d, flat.code_size) == (rows, dimension, 4 * dimension), "its vectors have another shape"
    )
    _require(flat.codes.size() == rows * dimension * 4, "its vectors are not all there")
    if rows:
        stored = faiss.rev_swig_ptr(flat.get_xb(), rows * dimension)
        _require(
            all(np.isfinite(stored[at : at + (1 << 24)]).all() for at in range(0, len(stored), 1 << 24)), "not finite"
        )


def _check_lists(index: Any, kind: str, rows: int, dimension: int) -> None:
    import faiss
    import numpy as np

    lists = index.nlist
    _require(1 <= lists <= max(rows, 1), f"it has {lists} lists")
    _require(index.quantizer is not None, "it has no quantizer")
    _check_flat(faiss.downcast_index(index.quantizer), lists, dimension)
    _require(index.direct_map.type == 0, "it has a direct map")
    size = 4 * dimension
    if kind == "ivf_pq":
        _check_quantizer(index, dimension)
        size = index.pq.code_size
    stored: Any = faiss.downcast_InvertedLists(index.invlists)
    _require(type(stored).__name__ == "ArrayInvertedLists", "its lists are not in memory")
    _require((stored.nlist, stored.code_size, index.code_size) == (lists, size, size), "its codes have another size")
    _require(stored.codes.size() == lists, "its lists are not all there")
    seen = np.zeros(rows, dtype=bool)
    total = 0
    for number in range(lists):
        count = stored.list_size(number)
        _require(stored.codes.at(number).size() == count * size, "a list's codes are not all there")
        total += count
        _require(total <= rows, f"its lists hold more than {rows} rows")
        if not count:
            continue
        ids = faiss.rev_swig_ptr(stored.get_ids(number), count)
        _require(bool((ids >= 0).all() and (ids < rows).all()), "a list names a row that does not exist")
        seen[ids] = True
        if kind == "ivf_flat":
            codes = faiss.rev_swig_ptr(stored.get_codes(number), count * size)
            _require(bool(np.isfinite(codes.view(np.float32)).all()), "a vector is not finite")
    _require(total == rows and bool(seen.all()), "its lists do not hold each row once")


def _check_quantizer(index: Any, dimension: int) -> None:
    import faiss
    import numpy as np

    pq = index.pq
    _require(1 <= pq.nbits <= 8 and pq.M >= 1 and pq.d == dimension, "its quantizer has another shape")
    _require(pq.M * pq.dsub == dimension and pq.ksub == 1 << pq.nbits, "its quantizer has another shape")
    _require(pq.code_size == (pq.M * pq.nbits + 7) // 8, "its codes have another size")
    _require(pq.centroids.size() == pq.ksub * dimension, "its centroids are not all there")
    _require(bool(np.isfinite(faiss.vector_to_array(pq.centroids)).all()), "a centroid is not finite")
    _require(index.polysemous_ht == 0, "it wants polysemous search")


def _check_graph(index: Any, rows: int) -> None:
    import faiss
    import numpy as np

    graph = index.hnsw
    levels = faiss.vector_to_array(graph.levels)
    offsets = faiss.vector_to_array(graph.offsets).astype(np.int64)
    widths = faiss.vector_to_array(graph.cum_nneighbor_per_level).astype(np.int64)
    neighbours = faiss.vector_to_array(graph.neighbors)
    _require(len(levels) == rows and len(offsets) == rows + 1, "its graph has another number of rows")
    _require(len(widths) >= 1 and widths[0] == 0 and bool((np.diff(widths) >= 0).all()), "its level widths are wrong")
    if not rows:
        return
    _require(bool((levels >= 1).all() and (levels < len(widths)).all()), "a row's level is out of range")
    _require(offsets[0] == 0 and bool((np.diff(offsets) == widths[levels]).all()), "its offsets are wrong")
    _require(offsets[-1] == len(neighbours), "its neighbours are not all there")
    _require(0 <= graph.entry_point < rows, "its entry point does not exist")
    _require(0 <= graph.max_level < levels[graph.entry_point], "its top level does not exist")
    _require(bool((neighbours >= -1).all() and (neighbours < rows).all()), "a neighbour does not exist")
    for start in range(0, rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, rows)
        part = neighbours[offsets[start] : offsets[stop]]
        counts = np.diff(offsets[start : stop + 1])
        inside = np.arange(len(part)) - np.repeat(offsets[start:stop] - offsets[start], counts)
        level = np.searchsorted(widths, inside, side="right") - 1
        # A neighbour met on a level must have one itself, or its links are read past its own.
        _require(bool(((part < 0) | (levels[part] > level)).all()), "a neighbour is not on its level")


def _search(index: Any, rows: int, dimension: int) -> None:
    import faiss
    import numpy as np

    from retrieval.vector_search import Effort, search_parameters

    queries = np.random.default_rng(0).standard_normal((4, dimension), dtype=np.float32)
    mask = np.arange((rows + 7) // 8, dtype=np.uint8) | 1
    for selector in (None, faiss.IDSelectorBitmap(len(mask), faiss.swig_ptr(mask))):
        parameters = search_parameters(index, Effort(16), 10)
        parameters.sel = selector
        _, found = index.search(queries, 10, params=parameters)
        _require(bool((found >= -1).all() and (found < rows).all()), "a search finds a row that does not exist")


def _reason(file: Path, kind: str, rows: int, dimension: int) -> str:
    """Read and check one file: "" or what is wrong."""
    from cluster.errors import ArtifactError
    from retrieval.faiss_guard import BASE_BYTES, ExpectedIndex, read_limited

    size = file.stat().st_size
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if _has_proc() else 1 << 34
    resource.setrlimit(resource.RLIMIT_AS, (held + BASE_BYTES + 6 * size, resource.RLIM_INFINITY))
    signal.alarm(int(FILE_TIMEOUT_S + size / CPU_BYTES_PER_S))  # its default action ends the process
    try:
        check_index(read_limited(ExpectedIndex(file, kind, rows, dimension)), kind, rows, dimension)
    except (ArtifactError, MalformedIndexError, MemoryError, RuntimeError) as error:
        return str(error) or type(error).__name__
    finally:
        signal.alarm(0)
    return ""


def _has_proc() -> bool:
    return Path("/proc/self/statm").exists()


def main() -> None:
    """Check the files that standard input names, in order."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for file, kind, rows, dimension in json.load(sys.stdin):
        sys.stdout.write(json.dumps(_reason(Path(file), kind, rows, dimension)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
