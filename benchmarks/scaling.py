"""Memory, shards, build time and query cost at 10⁶, 10⁸ and 10⁹ chunks, computed from measured constants.

    python -m benchmarks.scaling [--set texts_per_s=65 --set gpu_texts_per_s=8000]

In: `Constants`, whose defaults say where each figure was measured. Out: the Markdown tables of docs/scaling.md.
Nothing above 10⁶ chunks is a measurement. The laws: storage and embedding grow with the chunks. A shard of n rows has
4 √n lists (`retrieval/vectors.py`): training costs n · dim, adding n √n · dim, and a query with the same nprobe
√n · dim, over all shards. BM25 scores every row. Not covered: prices, networks, replicas for availability.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

HOUR_S = 3600
GB = 1e9
MEASURED_ROWS = 1_000_000
MEASURED_DIMENSION = 384
LISTS_PER_ROOT = 4


@dataclass(frozen=True)
class Constants:
    """Measured per-unit costs. Two shared cores (AMD EPYC with AVX512_BF16) unless said otherwise."""

    chunk_bytes: float = 275
    """chunks.arrow per chunk: Factbook (Europe), 156 characters and 48 tokens a chunk."""
    document_bytes: float = 60
    """documents.parquet (zstd) per chunk: the same corpus."""
    attribute_bytes: float = 10
    """attributes.arrow per chunk: the same corpus (few distinct values)."""
    lexical_bytes: float = 225
    """BM25 files per chunk, held in memory by a searching process: the same corpus."""
    chunks_per_core_s: float = 3700
    """Reading and cutting, per core: the same corpus."""
    texts_per_s: float = 65
    """Embedding with MiniLM (384 dims, 22 M parameters) in bfloat16 on both cores, 48 tokens a text."""
    gpu_texts_per_s: float = 10_000
    """ASSUMED, not measured: MiniLM on one data-centre GPU, 48 tokens a text."""
    wide_encoder_cost: float = 14
    """ASSUMED, not measured: an encoder of 1024 dims (about 300 M parameters) against MiniLM, by parameters."""
    train_core_s: float = 60
    """Training 4,000 lists over 10⁶ x 384, core seconds."""
    add_core_s: float = 120
    """Adding 10⁶ x 384 to them, core seconds."""
    query_core_ms: float = 2.0
    """One query at recall@10 0.95 over 10⁶ x 384 `ivf_flat`, core milliseconds, batch 1."""
    batched_query_core_ms: float = 1.0
    """The same in batches of 64."""
    code_query_ratio: float = 1.0
    """A query over `ivf_pq` with rescoring against `ivf_flat`, same rows."""
    lexical_core_ms: float = 10.0
    """BM25 of one query over 10⁶ chunks, core milliseconds."""


@dataclass(frozen=True)
class Deployment:
    """A recipe for one size."""

    chunks: int
    dimension: int
    kind: str
    shard_chunks: int
    lexical: bool
    machine: str

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.chunks // self.shard_chunks)


DEPLOYMENTS = (
    Deployment(10**6, 384, "ivf_flat", 10**6, True, "1 machine, 8 GB"),
    Deployment(10**6, 1024, "ivf_flat", 10**6, True, "1 machine, 16 GB"),
    Deployment(10**8, 384, "ivf_pq", 5 * 10**6, False, "1 machine, 32 GB, NVMe"),
    Deployment(10**8, 1024, "ivf_pq", 5 * 10**6, False, "1 machine, 64 GB, NVMe"),
    Deployment(10**9, 384, "ivf_pq", 2 * 10**7, False, "1 machine, 256 GB, NVMe"),
    Deployment(10**9, 1024, "ivf_pq", 2 * 10**7, False, "1 machine, 512 GB, NVMe"),
)
"""`auto` chooses by the rows of a shard: beyond some 20 M vectors in one process, name `ivf_pq`."""


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
    per_row = 8 + (d // 4 if deployment.kind == "ivf_pq" else 4 * d)  # FAISS keeps an int64 id beside each code
    lists = LISTS_PER_ROOT * (n / shards) ** 0.5 * shards
    index = n * per_row + lists * d * 4
    lexical = n * constants.lexical_bytes
    ratio = constants.code_query_ratio if deployment.kind == "ivf_pq" else 1.0
    search = shards * per_shard**0.5 * width * ratio
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
    return f"{ms:.2g} core ms" if ms < 1000 else f"{ms / 1000:.2g} core s"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="CONSTANT=VALUE")
    arguments = parser.parse_args()
    known = {field.name for field in dataclasses.fields(Constants)}
    values = dict(override.split("=", 1) for override in arguments.overrides)
    if unknown := values.keys() - known:
        parser.error(f"no constant {min(unknown)}; there are {', '.join(sorted(known))}")
    print(render(DEPLOYMENTS, Constants(**{name: float(value) for name, value in values.items()})))


if __name__ == "__main__":
    main()
