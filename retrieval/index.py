"""Building the index artifact with Ray Data: documents → chunks → embeddings → FAISS, or BM25.

In: the recipe's corpus, encoder, chunking and index sections. Out: an `index` artifact with `documents/part-N.parquet`,
`chunks/part-N.parquet` (with an `embedding` column in dense mode), and `index.faiss` or `bm25/`. Workers write the
rows; the driver sees counts only. The rows and their order do not depend on the number of workers.
Not covered: updating an index, sharding, searching (`retriever.py`).
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.progress import say
from cluster.session import ray_session
from cluster.stage import Outcome, Plan, run_stage
from retrieval.config import RetrievalRecipe
from retrieval.documents import CorpusScan, corpus_digest, join_path, open_filesystem, scan_corpus
from retrieval.embedding import embedding_batches, search_texts
from retrieval.encoder import (
    encoder_digest,
    encoder_directory,
    encoder_max_tokens,
    encoder_tokenizer,
    unknown_share,
)
from retrieval.pipeline import Mode, write_rows

if TYPE_CHECKING:
    from cluster.store import Artifact, Attempt, Store

INDEX_FORMAT = 1
INDEX_FILE = "index.faiss"
LEXICAL_FOLDER = "bm25"
SPECIAL_TOKENS = 2


def index_plan(recipe: RetrievalRecipe) -> Plan:
    """What the index depends on. Not: actors, batch sizes, GPUs, where a model or a corpus lies, measured precision.

    Raises:
        UserError: naming `corpus.path` or `encoder.model`, when there is nothing there.
    """
    config: dict[str, Any] = {
        "chunking": recipe.chunking.model_dump(),
        "search": {"mode": recipe.search.mode},
        "encoder": {},
    }
    if recipe.search.mode != "lexical":
        config["index"] = {"kind": recipe.index.kind}
        if recipe.encoder.precision != "auto":
            config["encoder"]["precision"] = recipe.encoder.precision
    if recipe.search.mode == "auto":
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
    if recipe.search.mode != "lexical" and longest is not None and wanted > longest:
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
    # A corpus of one block gives workers nothing to share, and starting Ray takes longer than the work itself.
    alone = len(scan.blocks) == 1 and recipe.ray.address is None and not recipe.encoder.gpus_per_actor
    with contextlib.nullcontext() if alone else ray_session(recipe.ray):
        counts, measured = write_rows(recipe, scan, mode, attempt.uri, alone)
        if counts["chunks"] == 0:
            raise UserError(f"corpus.path: {recipe.corpus.path} holds headings only: there is no text to index")
        _check_parts_arrived(attempt, scan)
        measured |= _write_search_files(recipe, mode, int(counts["chunks"]), attempt.uri, alone)
    measured |= {"mode": mode, "encoder": recipe.encoder.model}
    return Outcome(counts={**counts, "unknown_share": round(share, 4)}, measured=measured)


def _choose_mode(recipe: RetrievalRecipe, share: float) -> Mode:
    if recipe.search.mode != "auto":
        return recipe.search.mode
    if share <= recipe.encoder.max_unknown_share:
        return "dense"
    name = recipe.encoder.model.removeprefix("embedded:")
    say(f"index: {share:.0%} of this corpus's tokens are unknown to {name}: searching lexically (BM25)")
    return "lexical"


def _check_parts_arrived(attempt: Attempt, scan: CorpusScan) -> None:
    import pyarrow.fs as pafs

    filesystem, inner = open_filesystem(join_path(attempt.uri, "chunks"))
    found = len(filesystem.get_file_info(pafs.FileSelector(inner)))
    if found != len(scan.blocks):
        raise UserError(
            f"store.uri: workers wrote {len(scan.blocks)} parts but {found} are seen here: on a cluster of several "
            "machines the store must be a shared directory, s3:// or gs://"
        )


def _write_search_files(recipe: RetrievalRecipe, mode: Mode, rows: int, uri: str, alone: bool) -> dict[str, Any]:
    """Build the index over the finished rows in one task, or `alone` in this process; returns measured figures."""
    say(f"index: {'building FAISS ' + recipe.index.kind if mode == 'dense' else 'building BM25'} over {rows:,} chunks")
    began = time.perf_counter()
    if mode == "dense":
        settings = ("flat" if recipe.index.kind == "auto" else recipe.index.kind, recipe.seed, recipe.index.recall_sample)
        build = functools.partial(build_faiss_file, uri, rows, *settings)
    else:
        build = functools.partial(build_lexical_files, uri)
    if alone:
        measured = build()
    else:
        import ray

        measured = ray.get(ray.remote(num_cpus=1)(_call).remote(build))
    measured["search_files_s"] = round(time.perf_counter() - began, 3)
    return measured


def _call(build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return build()


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
    measured = {"kind": kind, "dimension": built.dimension, "recall_at_10": round(built.recall_at_10, 4)}
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
