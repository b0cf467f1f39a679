"""Memory, shards, build time and query cost at 10⁶, 10⁸ and 10⁹ chunks, computed from measured constants.

    python -m benchmarks.scaling [--set texts_per_s=65 --set gpu_texts_per_s=8000]
    python -m benchmarks.scaling --measure 100000    # CPU time of FAISS and BM25 on this machine

In: `Constants`, whose defaults say where each figure was measured. Out: the Markdown tables of docs/scaling.md.
Nothing above the rows of `--measure` is a measurement. The laws: storage and embedding grow with the chunks. A shard
of n rows has 4 √n lists (`retrieval/vectors.py`): training costs n · dim, adding n √n · dim, and a query at the same
nprobe √n · dim, in every shard. BM25 scores every row. `--measure` uses one thread and CPU time, so that a busy
machine disturbs it little. Not covered: prices, networks, replicas for availability, recall at a size not built.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.conditions import describe_conditions

if TYPE_CHECKING:
    import numpy as np

HOUR_S = 3600
GB = 1e9
MEASURED_ROWS = 1_000_000
MEASURED_DIMENSION = 384
LISTS_PER_ROOT = 4
DIMENSIONS_PER_CODE = 8
NPROBE, CANDIDATES, K = 4, 10, 10
SAMPLE_QUERIES = 256


@dataclass(frozen=True)
class Constants:
    """Costs per unit, for 10⁶ x 384 where they depend on the size. AMD EPYC with AVX512_BF16, two shared cores."""

    chunk_bytes: float = 315
    """chunks.arrow per chunk: Factbook (Europe, 8,704 chunks of 156 characters and 48 tokens)."""
    document_bytes: float = 66
    """documents.parquet (zstd) per chunk: the same index."""
    attribute_bytes: float = 13
    """attributes per chunk: the same index (a few distinct values; an `_id`-like key in every document costs more)."""
    lexical_bytes: float = 233
    """BM25 files per chunk: the same index."""
    chunks_per_core_s: float = 3700
    """Cutting chunks, per core: the same corpus, CPU time."""
    texts_per_s: float = 65
    """Embedding with MiniLM (384 dims) in bfloat16 on both cores, 48 tokens a text, load 3 to 5."""
    gpu_texts_per_s: float = 10_000
    """ASSUMED, not measured: MiniLM on one data-centre GPU, 48 tokens a text."""
    wide_encoder_cost: float = 15
    """ASSUMED, not measured: an encoder of 1024 dims (24 layers, 300 M parameters) against MiniLM (6 layers, 22 M)."""
    train_core_s: float = 143
    """Training lists and codes of one `ivf_pq` shard, core seconds (from 60,000 rows: an upper bound, because
    training the codes does not grow with the rows)."""
    add_core_s: float = 73
    """Adding the rows, core seconds (from 60,000 rows)."""
    query_core_ms: float = 0.49
    """One query at nprobe 4, 10 candidates a place rescored, core milliseconds, batch 1, vectors
    in memory (from 60,000 rows; on 300,000 rows such a search had recall@10 0.97)."""
    batched_query_core_ms: float = 0.35
    """The same in batches of 64."""
    lexical_core_ms: float = 6.5
    """BM25 of one query, core milliseconds (from 60,000 synthetic texts)."""


@dataclass(frozen=True)
class Deployment:
    """A recipe for one size."""

    chunks: int
    dimension: int
    kind: str
    shard_chunks: int
    lexical: bool
    """Whether BM25 is held in memory for lexical and hybrid search."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.chunks // self.shard_chunks)


DEPLOYMENTS = (
    Deployment(10**6, 384, "ivf_pq", 10**6, True),
    Deployment(10**6, 1024, "ivf_pq", 10**6, True),
    Deployment(10**8, 384, "ivf_pq", 5 * 10**6, False),
    Deployment(10**8, 1024, "ivf_pq", 5 * 10**6, False),
    Deployment(10**9, 384, "ivf_pq", 2 * 10**7, False),
    Deployment(10**9, 1024, "ivf_pq", 2 * 10**7, False),
)
"""`auto` comes to `ivf_pq` for shards above 500,000 rows."""


@dataclass(frozen=True)
class Sizing:
    """What a deployment takes."""

    vectors_gb: float
    index_gb: float
    rows_gb: float
    lexical_gb: float
    memory_gb: float
    read_core_h: float
    embed_h: float
    gpu_embed_h: float
    index_core_h: float
    query_core_ms: float
    batched_query_core_ms: float
    rescored_rows: int
    lexical_core_ms: float

    @property
    def disk_gb(self) -> float:
        """All files of the artifact."""
        return self.vectors_gb + self.index_gb + self.rows_gb + self.lexical_gb


def size(deployment: Deployment, constants: Constants) -> Sizing:
    """Apply the laws of the module's text."""
    n, d, shards = deployment.chunks, deployment.dimension, deployment.shards
    per_shard = n / shards / MEASURED_ROWS
    width = d / MEASURED_DIMENSION
    wide = constants.wide_encoder_cost if d > MEASURED_DIMENSION else 1.0
    vectors = n * d * 4
    code = d // DIMENSIONS_PER_CODE if deployment.kind == "ivf_pq" else 4 * d
    per_row = 8 + code  # FAISS keeps an int64 id beside each vector or code
    lists = LISTS_PER_ROOT * (n / shards) ** 0.5 * shards
    index = n * per_row + lists * d * 4
    lexical = n * constants.lexical_bytes
    search = shards * per_shard**0.5 * width
    return Sizing(
        vectors_gb=vectors / GB,
        index_gb=index / GB,
        rows_gb=n * (constants.chunk_bytes + constants.document_bytes + constants.attribute_bytes) / GB,
        lexical_gb=lexical / GB,
        memory_gb=(index + (lexical if deployment.lexical else 0)) / GB,
        read_core_h=n / constants.chunks_per_core_s / HOUR_S,
        embed_h=n / constants.texts_per_s * wide / HOUR_S,
        gpu_embed_h=n / constants.gpu_texts_per_s * wide / HOUR_S,
        index_core_h=shards
        * width
        * (constants.train_core_s * per_shard + constants.add_core_s * per_shard**1.5)
        / HOUR_S,
        query_core_ms=search * constants.query_core_ms,
        batched_query_core_ms=search * constants.batched_query_core_ms,
        rescored_rows=shards * K * CANDIDATES,
        lexical_core_ms=constants.lexical_core_ms * n / MEASURED_ROWS,
    )


def render(deployments: Sequence[Deployment], constants: Constants) -> str:
    """The tables, in Markdown."""
    storage = [
        (
            "chunks",
            "dims",
            "`index.kind`",
            "`shard_chunks`",
            "shards",
            "vectors.npy",
            "index.faiss",
            "rows",
            "BM25",
            "disk",
            "memory",
        )
    ]
    cost = [
        (
            "chunks",
            "dims",
            "read + chunk",
            "embed, 2 cores",
            "embed, 1 GPU (assumed)",
            "FAISS",
            "query, batch 1",
            "query, batch 64",
            "rows read to rescore",
            "BM25 query",
        )
    ]
    for one in deployments:
        sizing = size(one, constants)
        name = (_power(one.chunks), str(one.dimension))
        storage.append(
            (
                *name,
                one.kind,
                f"{one.shard_chunks:,}",
                str(one.shards),
                *map(_gb, (sizing.vectors_gb, sizing.index_gb, sizing.rows_gb, sizing.lexical_gb, sizing.disk_gb)),
                f"**{_gb(sizing.memory_gb)}**",
            )
        )
        cost.append(
            (
                *name,
                _hours(sizing.read_core_h, "core "),
                _hours(sizing.embed_h),
                _hours(sizing.gpu_embed_h),
                _hours(sizing.index_core_h, "core "),
                _ms(sizing.query_core_ms),
                _ms(sizing.batched_query_core_ms),
                f"{sizing.rescored_rows:,}",
                _ms(sizing.lexical_core_ms),
            )
        )
    return "\n\n".join("\n".join(_rows(table)) for table in (storage, cost))


def _rows(table: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]]


def _power(n: int) -> str:
    return "10" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(len(str(n)) - 1))


def _gb(value: float) -> str:
    return f"{value / 1000:.2g} TB" if value >= 1000 else f"{value:.3g} GB"


def _hours(hours: float, unit: str = "") -> str:
    if hours < 1:
        return f"{hours * 60:.2g} {unit}min"
    return f"{hours:,.3g} {unit}h" if hours < 1000 else f"{hours / 24:,.0f} {unit}days"


def _ms(ms: float) -> str:
    return f"{float(f'{ms:.2g}'):g} core ms" if ms < 1000 else f"{ms / 1000:.2g} core s"


def measure(rows: int, seed: int) -> dict[str, float]:
    """Core seconds and milliseconds at `rows` x 384 with one thread, converted to 10⁶ rows by the laws above.

    Vectors are unit vectors around 2,000 centres; the recall of such data is not looked at here (vector_search.py).
    """
    import faiss
    import numpy as np

    from retrieval.exhaustive import rescore

    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((2000, MEASURED_DIMENSION), dtype=np.float32)
    drawn = centres[rng.integers(0, 2000, rows + SAMPLE_QUERIES)]
    drawn += 0.7 * rng.standard_normal(drawn.shape, dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    vectors, queries = drawn[:rows], drawn[rows:]
    lists = int(LISTS_PER_ROOT * rows**0.5)
    quantizer = faiss.IndexFlatIP(MEASURED_DIMENSION)
    codes = MEASURED_DIMENSION // DIMENSIONS_PER_CODE
    index = faiss.IndexIVFPQ(quantizer, MEASURED_DIMENSION, lists, codes, 8, faiss.METRIC_INNER_PRODUCT)
    share = rows / MEASURED_ROWS
    train = _core_seconds(lambda: index.train(vectors[: lists * 40]))
    add = _core_seconds(lambda: index.add(vectors))
    index.nprobe = NPROBE

    def search(batch: int) -> None:
        for start in range(0, SAMPLE_QUERIES, batch):
            part = queries[start : start + batch]
            rescore(part, vectors, index.search(part, K * CANDIDATES)[1], K)

    search(64)
    query_ms = {batch: _core_seconds(lambda: search(batch)) * 1000 / SAMPLE_QUERIES for batch in (1, 64)}  # noqa: B023
    return {
        "train_core_s": train / share,
        "add_core_s": add / share**1.5,
        "query_core_ms": query_ms[1] / share**0.5,
        "batched_query_core_ms": query_ms[64] / share**0.5,
        "lexical_core_ms": _lexical_core_ms(rows, rng) / share,
    }


def _lexical_core_ms(rows: int, rng: np.random.Generator) -> float:
    """BM25 of eight words out of 50,000 (Zipf) over `rows` texts of 40 words, core milliseconds a query."""
    from retrieval.lexical import LexicalIndex

    texts = (" ".join(f"w{word % 50_000}" for word in rng.zipf(1.2, 40)) for _ in range(rows))
    lexical = LexicalIndex.build(texts)
    queries = [" ".join(f"w{word % 50_000}" for word in rng.zipf(1.2, 8)) for _ in range(20)]
    return _core_seconds(lambda: [lexical.scores(query) for query in queries]) * 1000 / len(queries)


def _core_seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def main() -> None:
    """Prints the tables, or measured constants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, default=0, metavar="ROWS", help="measure constants instead")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="CONSTANT=VALUE")
    arguments = parser.parse_args()
    if arguments.measure:
        print(describe_conditions(("faiss-cpu", "numpy", "bm25s"), arguments.seed), flush=True)
        for name, value in measure(arguments.measure, arguments.seed).items():
            print(f"{name}={value:.3g}")
        return
    known = {field.name for field in dataclasses.fields(Constants)}
    values = dict(override.split("=", 1) for override in arguments.overrides)
    if unknown := values.keys() - known:
        parser.error(f"no constant {min(unknown)}; there are {', '.join(sorted(known))}")
    print(render(DEPLOYMENTS, Constants(**{name: float(value) for name, value in values.items()})))


if __name__ == "__main__":
    main()
