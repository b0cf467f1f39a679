"""Writing an index's rows: the Ray Data pipeline from corpus blocks to Parquet parts.

In: the recipe, a scanned corpus, the mode. Out: parts under a URI, and counts and measured figures for the manifest.
The driver sends block places and receives counts; texts stay with the workers.
Not covered: what the workers do (`embedding.py`), the search files over the rows (`index.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import UserError
from cluster.progress import track
from retrieval.config import RetrievalRecipe
from retrieval.documents import CorpusBlock, CorpusScan
from retrieval.embedding import EmbedBlocks, chunk_blocks, write_blocks
from retrieval.encoder import resolve_precision

if TYPE_CHECKING:
    import ray.data

    from retrieval.encoder import Precision

Mode = Literal["dense", "lexical"]


def write_rows(
    recipe: RetrievalRecipe, scan: CorpusScan, mode: Mode, uri: str, alone: bool
) -> tuple[dict[str, int | float], dict[str, Any]]:
    """Write documents and chunks, with Ray Data or `alone` in this process; returns counts and measured figures."""
    measured: dict[str, Any] = {}
    if alone:
        actors = 1
        if mode == "dense":
            measured["precision"] = resolve_precision(recipe.encoder, "cpu")
        rows = _rows_alone(recipe, scan, mode, uri, measured.get("precision", "float32"))
    else:
        resources = _Resources.of(recipe)
        actors = resources.actors
        if mode == "dense":
            measured["precision"] = _worker_precision(recipe, resources)
        rows = _pipeline(recipe, scan, mode, uri, resources, measured.get("precision", "float32")).iter_rows()
    counts: dict[str, int | float] = {"documents": 0, "chunks": 0, "tokens": 0}
    done: set[int] = set()
    seconds = 0.0
    began = time.perf_counter()
    label = "index: chunk and embed" if mode == "dense" else "index: chunk"
    with track(label, scan.documents, "documents") as bar:
        for row in rows:
            done.add(row["ordinal"])
            for name in counts:
                counts[name] += row[name]
            seconds += row["seconds"]
            bar.advance(row["documents"], chunks=f"{counts['chunks']:,}")
    assert len(done) == len(scan.blocks), f"{len(done)} of {len(scan.blocks)} corpus blocks reported back"
    measured["rows_s"] = round(time.perf_counter() - began, 3)
    if seconds:
        measured["texts_per_s"] = round(counts["chunks"] * actors / seconds, 1)
    return counts, measured


@dataclasses.dataclass(frozen=True)
class _Resources:
    """What the build's tasks and actors claim.

    Never all CPUs: Ray Data hangs when actors hold every logical CPU and the tasks that feed them find none.
    """

    task_cpus: float
    actor_cpus: float
    actors: int
    gpus_per_actor: float
    threads: int

    @classmethod
    def of(cls, recipe: RetrievalRecipe) -> _Resources:
        import ray

        total = float(ray.cluster_resources().get("CPU", 1))
        actors, gpus = recipe.encoder.actors, recipe.encoder.gpus_per_actor
        found = float(ray.cluster_resources().get("GPU", 0))
        if recipe.ray.address is None and gpus * actors > found:
            raise UserError(
                f"encoder.gpus_per_actor is {gpus:g} for {actors} actors, but this machine has {found:g} GPUs: "
                "set encoder.gpus_per_actor=0 to embed on CPU, or lower encoder.actors"
            )
        threads = max(1, len(os.sched_getaffinity(0)) // actors)
        return cls(
            task_cpus=1.0 if total >= 4 else total / 8,
            actor_cpus=round(min(1.0, total / 2 / actors), 3),
            actors=actors,
            gpus_per_actor=gpus,
            threads=threads,
        )


def _rows_alone(
    recipe: RetrievalRecipe, scan: CorpusScan, mode: Mode, uri: str, precision: Precision
) -> Iterator[dict[str, Any]]:
    """The same work as `_pipeline`, block by block in this process."""
    import pyarrow as pa

    embed = EmbedBlocks(recipe.encoder, precision, "cpu", None, uri) if mode == "dense" else None
    for block in scan.blocks:
        table = pa.Table.from_pylist([block.to_row()], schema=CorpusBlock.schema())
        chunked = chunk_blocks(table, recipe.encoder, recipe.chunking, uri)
        yield from (embed(chunked) if embed else write_blocks(chunked, uri)).to_pylist()


def _pipeline(
    recipe: RetrievalRecipe, scan: CorpusScan, mode: Mode, uri: str, resources: _Resources, precision: Precision
) -> ray.data.Dataset:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its lines would interleave with our progress
    blocks = ray.data.from_items([block.to_row() for block in scan.blocks], override_num_blocks=len(scan.blocks))
    blocks.context.enable_progress_bars = False
    blocks.context.print_on_execution_start = False
    chunked = blocks.map_batches(
        chunk_blocks,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=resources.task_cpus,
        fn_kwargs={"encoder": recipe.encoder, "chunking": recipe.chunking, "uri": uri},
    )
    if mode == "lexical":
        return chunked.map_batches(
            write_blocks, batch_size=1, batch_format="pyarrow", num_cpus=resources.task_cpus, fn_kwargs={"uri": uri}
        )
    return chunked.map_batches(
        EmbedBlocks,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=resources.actors),
        num_cpus=resources.actor_cpus,
        num_gpus=resources.gpus_per_actor or None,
        fn_constructor_kwargs={
            "encoder": recipe.encoder,
            "precision": precision,
            "device": "cuda" if resources.gpus_per_actor else "cpu",
            "threads": resources.threads,
            "uri": uri,
        },
    )


def _worker_precision(recipe: RetrievalRecipe, resources: _Resources) -> Precision:
    """Resolve `auto` once, on a worker like those that embed, so that all actors agree."""
    import ray

    if recipe.encoder.precision != "auto":
        return recipe.encoder.precision
    if resources.gpus_per_actor:
        return "bfloat16"
    resolve = ray.remote(num_cpus=resources.actor_cpus)(resolve_precision)
    precision: Precision = ray.get(resolve.remote(recipe.encoder, "cpu"))
    return precision
