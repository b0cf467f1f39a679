"""The four phases of an index build, on Ray or alone in this process.

    A  read and chunk   `read_corpus`    one task per corpus block          (Ray Data)
    B  plan rows        `plan_corpus`    one task                           (`rowplan.py`)
    C  embed            `embed_corpus`   actor pool over blocks             (Ray Data)
    D  write shards     `write_shards`   one task per shard, then `write_lexical`

In: a `BuildJob` (see `build_job.py`) and a scanned corpus. Out: files under `job.uri`, and counts: the driver sends
places of blocks and receives numbers, so its memory does not grow with the corpus. Finished parts of A and C stand in
`job.parts` and are not made again by the next run of the same job.

An update is the same four phases with a base version that keeps its rows (`BaseVersion.merge`): A passes over
unchanged documents, B writes tombstones of the base's shards under `job.uri` and says in `RowPlan.base` what stays, C
and D see new rows only. The caller then puts the base's living shards before the new ones and calls `write_lexical`
over all.

To measure the pipeline without a model, give `BuildJob.make_encoder` any picklable function that returns an object
with `encode_passages`; `build_index` takes the same argument.
Not covered: what the workers do, publishing (`index.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cluster.errors import UserError
from cluster.progress import track
from retrieval.build_job import BuildJob
from retrieval.config import RetrievalRecipe
from retrieval.documents import CorpusBlock, CorpusScan
from retrieval.embedding import (
    BASE_KEYS,
    READ,
    EmbedParts,
    read_part,
    write_base_keys,
)
from retrieval.encoder import EncoderSource, Precision, resolve_precision
from retrieval.rowplan import RowPlan, plan_rows
from retrieval.shard_files import LexicalShard, build_lexical, build_shard
from retrieval.shards import LexicalEntry, ShardEntry

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

FEW_TEXTS = 256
"""Texts up to which a local build without GPUs embeds in this process: starting an actor that loads torch and the model
takes 7 s on two cores, embedding so many 3 s."""
LEXICAL_PART_ROWS = 2_000_000
"""Live rows up to which shards share one BM25 index and its statistics. The small shard of an update never has its own:
words are rare in it that are common in the corpus, and its scores would not compare."""

T = TypeVar("T")


class Workers(Protocol):
    """Where a build's functions run."""

    @property
    def actors(self) -> int:
        """Embedding actors."""

    def read(self, job: BuildJob, blocks: Sequence[CorpusBlock]) -> Iterator[dict[str, Any]]:
        """`read_part` of each block, in any order."""

    def embed(self, job: BuildJob, blocks: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """`EmbedParts.embed` of each (block, its texts), in any order."""

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """One call, on a worker."""

    def map(self, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> list[T]:
        """A call for each tuple of arguments, in parallel; results in order."""

    def precision(self, source: EncoderSource) -> Precision:
        """The precision that `auto` comes to on a worker that embeds."""

    def threads(self, tasks: int) -> int | None:
        """Threads of each of so many tasks at once; none leaves them as they are."""


class Alone:
    """All in this process: for a corpus of one block, where starting Ray takes longer than the work."""

    actors = 1

    def read(self, job: BuildJob, blocks: Sequence[CorpusBlock]) -> Iterator[dict[str, Any]]:
        """See `Workers`."""
        return (read_part(job, block) for block in blocks)

    def embed(self, job: BuildJob, blocks: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """See `Workers`."""
        return map(EmbedParts(job, "cpu", None).embed, (ordinal for ordinal, _ in blocks))

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """See `Workers`."""
        return function(*arguments)

    def map(self, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> list[T]:
        """See `Workers`."""
        return [function(*values) for values in arguments]

    def precision(self, source: EncoderSource) -> Precision:
        """See `Workers`."""
        return resolve_precision(source, "cpu")

    def threads(self, tasks: int) -> int | None:
        """See `Workers`."""
        return None


@dataclasses.dataclass(frozen=True)
class OnRay:
    """Ray Data and tasks of the Ray that is initialised.

    Never all CPUs: Ray Data hangs when actors hold every logical CPU and the tasks that feed them find none.
    """

    total_cpus: float
    task_cpus: float
    actor_cpus: float
    actors: int
    gpus_per_actor: float
    actor_threads: int
    local: bool
    """Whether Ray runs on this machine only."""

    @classmethod
    def of(cls, recipe: RetrievalRecipe) -> OnRay:
        """What the recipe asks of this cluster. With `encoder.gpus_per_actor`, all GPUs unless `encoder.actors` is set.

        Raises:
            UserError: a local Ray has fewer GPUs than the recipe asks for.
        """
        import ray

        total = float(ray.cluster_resources().get("CPU", 1))
        actors, gpus = recipe.encoder.actors, recipe.encoder.gpus_per_actor
        found = float(ray.cluster_resources().get("GPU", 0))
        if gpus and "actors" not in recipe.encoder.model_fields_set:
            actors = max(1, int(found / gpus))
        if recipe.ray.address is None and gpus * actors > found:
            raise UserError(
                f"encoder.gpus_per_actor is {gpus:g} for {actors} actors, but this machine has {found:g} GPUs: "
                "set encoder.gpus_per_actor=0 to embed on CPU, or lower encoder.actors"
            )
        return cls(
            total_cpus=total,
            task_cpus=1.0 if total >= 4 else total / 8,
            actor_cpus=round(min(1.0, total / 2 / actors), 3),
            actors=actors,
            gpus_per_actor=gpus,
            actor_threads=max(1, len(os.sched_getaffinity(0)) // actors),
            local=recipe.ray.address is None and len(ray.nodes()) == 1,
        )

    def read(self, job: BuildJob, blocks: Sequence[CorpusBlock]) -> Iterator[dict[str, Any]]:
        """See `Workers`."""
        data = _dataset([block.to_row() for block in blocks])
        rows: Iterator[dict[str, Any]] = data.map_batches(
            _read_batch, batch_size=1, batch_format="pyarrow", num_cpus=self.task_cpus, fn_kwargs={"job": job}
        ).iter_rows()
        return rows

    def embed(self, job: BuildJob, blocks: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """See `Workers`."""
        if self.local and not self.gpus_per_actor and sum(texts for _, texts in blocks) <= FEW_TEXTS:
            return Alone().embed(job, blocks)
        import ray.data

        device = "cuda" if self.gpus_per_actor else "cpu"
        rows: Iterator[dict[str, Any]] = (
            _dataset([{"ordinal": ordinal} for ordinal, _ in blocks])
            .map_batches(
                _EmbedBatch,
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=min(self.actors, len(blocks))),
                num_cpus=self.actor_cpus,
                num_gpus=self.gpus_per_actor or None,
                fn_constructor_kwargs={"job": job, "device": device, "threads": self.actor_threads},
            )
            .iter_rows()
        )
        return rows

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """See `Workers`."""
        return self.map(function, [arguments])[0]

    def map(self, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> list[T]:
        """See `Workers`."""
        import ray

        task = ray.remote(num_cpus=self.task_cpus)(_apply)
        results: list[T] = ray.get([task.remote(function, values) for values in arguments])
        return results

    def precision(self, source: EncoderSource) -> Precision:
        """See `Workers`. Resolved once, on a worker like those that embed, so that all actors agree."""
        if source.config.precision != "auto":
            return source.config.precision
        if self.gpus_per_actor:
            return "bfloat16"
        return self.call(resolve_precision, source, "cpu")

    def threads(self, tasks: int) -> int | None:
        """See `Workers`."""
        return max(1, int(self.total_cpus / max(1, tasks)))


def _apply(function: Callable[..., T], values: tuple[Any, ...]) -> T:
    return function(*values)


def _dataset(rows: list[dict[str, Any]]) -> ray.data.Dataset:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its lines would interleave with our progress
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    return data


def _read_batch(blocks: pa.Table, job: BuildJob) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist([read_part(job, CorpusBlock.from_row(row)) for row in blocks.to_pylist()])


class _EmbedBatch:
    """Actor body."""

    def __init__(self, job: BuildJob, device: str, threads: int) -> None:
        self._parts = EmbedParts(job, device, threads)

    def __call__(self, ordinals: pa.Table) -> pa.Table:
        import pyarrow as pa

        return pa.Table.from_pylist([self._parts.embed(ordinal) for ordinal in ordinals["ordinal"].to_pylist()])


@dataclasses.dataclass(frozen=True)
class ReadCounts:
    """What phase A found in the corpus."""

    documents: int = 0
    """Unchanged ones included; documents that repeat an id of another block too."""
    unchanged: int = 0
    chunks: int = 0
    removed: int = 0
    """Documents left out because they are in the ledger of deleted ids."""


def read_corpus(job: BuildJob, scan: CorpusScan, workers: Workers, strict: bool) -> ReadCounts:
    """Phase A: read every block, cut what is not unchanged.

    Raises:
        UserError: with `strict`, for the first document found that cannot be read; or workers write where this
            process does not see it (naming `store.uri`).
    """
    if job.keeps_rows and not job.parts.exists(BASE_KEYS):
        workers.call(write_base_keys, job)
    totals = dict.fromkeys(("documents", "unchanged", "chunks", "removed"), 0)
    if not scan.blocks:  # a delta that only deletes
        return ReadCounts()
    with track("index: read and chunk", len(scan.blocks), "blocks") as bar:
        for row in workers.read(job, scan.blocks):
            if strict and row["first_rejected"]:
                raise UserError(f"corpus.path: {row['first_rejected']} (corpus.strict)")
            for name in totals:
                totals[name] += row[name]
            bar.advance(1, chunks=f"{totals['chunks']:,}")
    found = job.parts.count(READ)
    if found != len(scan.blocks):
        raise UserError(
            f"store.uri: workers wrote {len(scan.blocks)} parts but {found} are seen here: on a cluster of several "
            "machines the store must be a shared directory, s3:// or gs://"
        )
    return ReadCounts(**totals)


def plan_corpus(job: BuildJob, scan: CorpusScan, workers: Workers) -> RowPlan:
    """Phase B; see `rowplan.plan_rows`."""
    return workers.call(plan_rows, job, len(scan.blocks))


def embed_corpus(job: BuildJob, plan: RowPlan, workers: Workers) -> dict[str, float]:
    """Phase C: embed what the plan says and no earlier run has. Returns texts embedded now, and their rate."""
    if not plan.embed:
        return {"embedded_now": 0}
    texts, seconds = 0, 0.0
    sizes = dict(plan.embed)
    with track("index: embed", plan.embedded, "texts") as bar:
        for row in workers.embed(job, plan.embed):
            texts += row["texts"]
            seconds += row["seconds"]
            bar.advance(sizes[row["ordinal"]])
    rate = {"texts_per_s": round(texts * workers.actors / seconds, 1)} if seconds else {}
    return {"embedded_now": texts, **rate}


def write_shards(job: BuildJob, plan: RowPlan, workers: Workers) -> tuple[ShardEntry, ...]:
    """Phase D: write the plan's new shards under `job.uri`, in parallel."""
    threads = workers.threads(len(plan.shards))
    return tuple(workers.map(build_shard, [(job, pieces, threads) for pieces in plan.shards]))


def write_lexical(uri: str, shards: Sequence[LexicalShard], workers: Workers) -> tuple[LexicalEntry, ...]:
    """BM25 over the live rows of `shards`, whose files stand under `uri`: one index, or several of about
    `LEXICAL_PART_ROWS` live rows of neighbouring shards each."""
    live = [(shard, shard.entry.rows - (0 if shard.deleted is None else len(shard.deleted))) for shard in shards]
    groups: list[list[LexicalShard]] = []
    filled = LEXICAL_PART_ROWS
    for shard, rows in live:
        if rows and filled >= LEXICAL_PART_ROWS:
            groups.append([])
            filled = 0
        if rows:
            groups[-1].append(shard)
            filled += rows
    if len(groups) > 1 and filled < LEXICAL_PART_ROWS / 4:
        rest = groups.pop()
        groups[-1] += rest
    return tuple(workers.map(build_lexical, [(uri, place, group) for place, group in enumerate(groups)]))
