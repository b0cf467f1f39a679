"""Building the index artifact with Ray Data: documents → chunks → embeddings → FAISS, or BM25.

In: the recipe's corpus, encoder, chunking and index sections. Out: an `index` artifact with `documents/part-N.parquet`,
`chunks/part-N.parquet` (with an `embedding` column in dense mode), and `index.faiss` or `bm25/`. Workers write the
rows; the driver sees counts only. The rows and their order do not depend on the number of workers.
Not covered: updating an index, sharding, searching (`retriever.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import UserError
from cluster.progress import say, track
from cluster.session import ray_session
from cluster.stage import Outcome, Plan, run_stage
from retrieval.config import RetrievalRecipe
from retrieval.documents import CorpusScan, corpus_digest, join_path, open_filesystem, scan_corpus
from retrieval.embedding import EmbedBlocks, chunk_blocks, embedding_batches, search_texts, write_blocks
from retrieval.encoder import (
    encoder_digest,
    encoder_directory,
    encoder_max_tokens,
    encoder_tokenizer,
    resolve_precision,
    unknown_share,
)

if TYPE_CHECKING:
    import ray.data

    from cluster.store import Artifact, Attempt, Store
    from retrieval.encoder import Precision

INDEX_FORMAT = 1
INDEX_FILE = "index.faiss"
LEXICAL_FOLDER = "bm25"
SPECIAL_TOKENS = 2

Mode = Literal["dense", "lexical"]


def index_plan(recipe: RetrievalRecipe) -> Plan:
    """What the index depends on. Not: actors, batch sizes, GPUs, where a model or a corpus lies, measured precision.

    Raises:
        UserError: naming `corpus.path` or `encoder.model`, when there is nothing there.
    """
    config: dict[str, Any] = {
        "chunking": recipe.chunking.model_dump(),
        "index": {"search": recipe.index.search},
        "encoder": {},
    }
    if recipe.index.search != "lexical":
        config["index"]["kind"] = recipe.index.kind
        if recipe.encoder.precision != "auto":
            config["encoder"]["precision"] = recipe.encoder.precision
    if recipe.index.search == "auto":
        config["encoder"]["max_unknown_share"] = recipe.encoder.max_unknown_share
    return Plan(
        kind="index",
        name=recipe.name,
        config=config,
        inputs={"corpus.path": corpus_digest(recipe.corpus.path), "encoder.model": encoder_digest(recipe.encoder)},
        format=INDEX_FORMAT,
        seed=recipe.seed,
    )


def build_index(recipe: RetrievalRecipe, store: Store) -> Artifact:
    """The index of `recipe`: the existing one when nothing that it depends on has changed, else a new one.

    Raises:
        UserError: for a corpus, encoder or chunk size that cannot be indexed, naming the recipe key.
    """
    _check_chunks_fit_encoder(recipe)
    return run_stage(store, index_plan(recipe), functools.partial(_build, recipe))


def _check_chunks_fit_encoder(recipe: RetrievalRecipe) -> None:
    longest = encoder_max_tokens(encoder_directory(recipe.encoder))
    wanted = recipe.chunking.max_tokens + SPECIAL_TOKENS
    if recipe.index.search != "lexical" and longest is not None and wanted > longest:
        raise UserError(
            f"chunking.max_tokens is {recipe.chunking.max_tokens}, but {recipe.encoder.model} reads at most {longest} "
            f"tokens, {SPECIAL_TOKENS} of them special: set chunking.max_tokens to {longest - SPECIAL_TOKENS} or less"
        )


def _build(recipe: RetrievalRecipe, attempt: Attempt) -> Outcome:
    scan = scan_corpus(recipe.corpus.path, recipe.seed)
    share = unknown_share(encoder_tokenizer(encoder_directory(recipe.encoder)), scan.sample)
    mode = _choose_mode(recipe, share)
    for folder in ("documents", "chunks"):
        filesystem, inner = open_filesystem(join_path(attempt.uri, folder))
        filesystem.create_dir(inner, recursive=True)
    with ray_session(recipe.ray):
        counts, measured = _write_rows(recipe, scan, mode, attempt.uri)
        if counts["chunks"] == 0:
            raise UserError(f"corpus.path: {recipe.corpus.path} holds headings only: there is no text to index")
        _check_parts_arrived(attempt, scan)
        measured |= _write_search_files(recipe, mode, int(counts["chunks"]), attempt.uri)
    measured |= {"mode": mode, "encoder": recipe.encoder.model}
    return Outcome(counts={**counts, "unknown_share": round(share, 4)}, measured=measured)


def _choose_mode(recipe: RetrievalRecipe, share: float) -> Mode:
    if recipe.index.search != "auto":
        return recipe.index.search
    if share <= recipe.encoder.max_unknown_share:
        return "dense"
    name = recipe.encoder.model.removeprefix("embedded:")
    say(f"index: {share:.0%} of this corpus's tokens are unknown to {name}: searching lexically (BM25)")
    return "lexical"


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


def _write_rows(
    recipe: RetrievalRecipe, scan: CorpusScan, mode: Mode, uri: str
) -> tuple[dict[str, int | float], dict[str, Any]]:
    """Run the Ray Data pipeline; returns counts and measured figures."""
    resources = _Resources.of(recipe)
    measured: dict[str, Any] = {}
    if mode == "dense":
        measured["precision"] = _worker_precision(recipe, resources)
    dataset = _pipeline(recipe, scan, mode, uri, resources, measured.get("precision", "float32"))
    counts: dict[str, int | float] = {"documents": 0, "chunks": 0, "tokens": 0}
    done: set[int] = set()
    seconds = 0.0
    began = time.perf_counter()
    label = "index: chunk and embed" if mode == "dense" else "index: chunk"
    with track(label, scan.documents, "documents") as bar:
        for row in dataset.iter_rows():
            done.add(row["ordinal"])
            for name in counts:
                counts[name] += row[name]
            seconds += row["seconds"]
            bar.advance(row["documents"], chunks=f"{counts['chunks']:,}")
    assert len(done) == len(scan.blocks), f"{len(done)} of {len(scan.blocks)} corpus blocks reported back"
    measured["rows_s"] = round(time.perf_counter() - began, 3)
    if seconds:
        measured["texts_per_s"] = round(counts["chunks"] * resources.actors / seconds, 1)
    return counts, measured


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


def _check_parts_arrived(attempt: Attempt, scan: CorpusScan) -> None:
    import pyarrow.fs as pafs

    filesystem, inner = open_filesystem(join_path(attempt.uri, "chunks"))
    found = len(filesystem.get_file_info(pafs.FileSelector(inner)))
    if found != len(scan.blocks):
        raise UserError(
            f"store.uri: workers wrote {len(scan.blocks)} parts but {found} are seen here: on a cluster of several "
            "machines the store must be a shared directory, s3:// or gs://"
        )


def _write_search_files(recipe: RetrievalRecipe, mode: Mode, rows: int, uri: str) -> dict[str, Any]:
    """Build the index over the finished rows in one task; returns measured figures."""
    import ray

    say(f"index: {'building FAISS ' + recipe.index.kind if mode == 'dense' else 'building BM25'} over {rows:,} chunks")
    began = time.perf_counter()
    remote = ray.remote(num_cpus=1)
    measured: dict[str, Any]
    if mode == "dense":
        task = remote(build_faiss_file)
        measured = ray.get(task.remote(uri, rows, recipe.index.kind, recipe.seed, recipe.index.recall_sample))
        measured["kind"] = recipe.index.kind
    else:
        measured = ray.get(remote(build_lexical_files).remote(uri))
    measured["search_files_s"] = round(time.perf_counter() - began, 3)
    return measured


def build_faiss_file(uri: str, rows: int, kind: str, seed: int, recall_sample: int) -> dict[str, Any]:
    """Stream the embeddings under `uri` into `index.faiss` beside them.

    Returns the dimension, recall@10 and, for IVF, nprobe.
    """
    import faiss

    from retrieval.vectors import build_vectors

    built = build_vectors(functools.partial(embedding_batches, uri), rows, kind, seed, recall_sample)
    with tempfile.TemporaryDirectory() as folder:
        faiss.write_index(built.index, str(Path(folder) / INDEX_FILE))
        _copy_files(Path(folder), uri)
    measured = {"dimension": built.dimension, "recall_at_10": round(built.recall_at_10, 4)}
    return measured | ({"nprobe": int(built.index.nprobe)} if kind == "ivf_flat" else {})


def build_lexical_files(uri: str) -> dict[str, Any]:
    """Build BM25 over the chunks under `uri` into `bm25/` beside them; returns nothing measured."""
    from retrieval.lexical import LexicalIndex

    lexical = LexicalIndex.build(search_texts(uri))
    with tempfile.TemporaryDirectory() as folder:
        lexical.save(Path(folder) / LEXICAL_FOLDER)
        _copy_files(Path(folder), uri)
    return {}


def _copy_files(folder: Path, uri: str) -> None:
    """Copy every file below `folder` to the same name below `uri`, block by block."""
    filesystem, inner = open_filesystem(uri)
    for file in _plain_files(folder):
        target = join_path(inner, file.relative_to(folder).as_posix())
        filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        with file.open("rb") as source, filesystem.open_output_stream(target) as sink:
            while block := source.read(1 << 20):
                sink.write(block)


def _plain_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
