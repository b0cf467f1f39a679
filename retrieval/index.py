"""Building the index artifact: documents → chunks → embeddings → shards, with BM25 beside them.

In: the recipe's corpus, encoder, chunking and index sections. Out: an `index` artifact of format 2 (`shards.py` has its
layout). `build_index` reads the whole corpus, and takes the embeddings of texts that the current version holds from
there. `build_into` is the same for an update, whose base version keeps its rows (`pipeline.py` has the phases).
Not covered: when an update is due and what it deletes (`update.py`), several collections (`collections.py`),
searching (`retriever.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError, UserError
from cluster.manifest import ArtifactRef
from cluster.progress import say
from cluster.session import ray_session
from cluster.stage import Outcome, Plan, rebuild_reasons, run_stage
from retrieval.build_job import BaseVersion, BuildJob, MakeEncoder, Merge
from retrieval.compaction import CompactionPolicy
from retrieval.config import RetrievalRecipe
from retrieval.documents import CorpusScan, corpus_digest, scan_corpus
from retrieval.encoder import (
    BASE_INPUT,
    Encoder,
    EncoderSource,
    encoder_digest,
    encoder_max_tokens,
    encoder_source,
    encoder_tokenizer,
    unknown_share,
)
from retrieval.ledger import RemovedIds, removed_digest, removed_ids
from retrieval.parts import Parts
from retrieval.pipeline import (
    Alone,
    OnRay,
    ReadCounts,
    Workers,
    embed_corpus,
    plan_corpus,
    read_corpus,
    write_lexical,
    write_shards,
)
from retrieval.rowplan import RowPlan
from retrieval.shard_files import LexicalShard
from retrieval.shards import (
    INDEX_FORMAT,
    REJECTED_FILE,
    SHARDS_FOLDER,
    TOMBSTONES_FOLDER,
    IndexFile,
    Mode,
    ShardEntry,
)

if TYPE_CHECKING:
    from cluster.store import Artifact, Attempt, Store

SPECIAL_TOKENS = 2
SMALL_UPDATE_BYTES = 16 * 1024 * 1024
SMALL_BASE_ROWS = 200_000
"""Rows of a base version up to which a small update runs in the driver: BM25 of all rows is built there too."""
CORPUS_INPUT = "corpus.path"
DELTA_INPUT = "delta"
REMOVED_INPUT = "removed documents"


def index_plan(recipe: RetrievalRecipe, store: Store) -> Plan:
    """What the index depends on. Not: actors, batch sizes, GPUs, where a model or a corpus lies, measured precision,
    how it is searched as long as the files are the same.

    Raises:
        UserError: naming `corpus.path` or `encoder.model`, when there is nothing there.
    """
    return plan_from(recipe, store, {CORPUS_INPUT: corpus_digest(recipe.corpus)})


def plan_from(recipe: RetrievalRecipe, store: Store, documents: dict[str, str]) -> Plan:
    """The plan of an index whose documents follow from the inputs `documents`: name to digest or version."""
    source = encoder_source(recipe, store)
    inputs = {**documents, BASE_INPUT: encoder_digest(recipe.encoder)}
    if removed := removed_digest(store, recipe.name):
        inputs[REMOVED_INPUT] = removed
    return Plan(
        kind="index",
        name=recipe.name,
        config=index_config(recipe),
        inputs=inputs,
        parents={"encoder": ArtifactRef.parse(source.ref)} if source.ref else {},
        format=INDEX_FORMAT,
        seed=recipe.seed,
    )


def index_config(recipe: RetrievalRecipe) -> dict[str, Any]:
    """The part of the recipe that the files of an index depend on. Dense and hybrid search read the same files."""
    mode = "dense" if recipe.search.mode == "hybrid" else recipe.search.mode
    settings = recipe.index
    config: dict[str, Any] = {
        "chunking": recipe.chunking.model_dump(),
        "search": {"mode": mode},
        "encoder": {},
        "index": {"shard_chunks": settings.shard_chunks},
    }
    if mode != "lexical":
        names = ("kind", "recall_target", "recall_at", "recall_sample", "shard_chunks")
        config["index"] = {name: getattr(settings, name) for name in names}
        if recipe.encoder.precision != "auto":
            config["encoder"]["precision"] = recipe.encoder.precision
    if mode == "auto":
        config["encoder"]["max_unknown_share"] = recipe.encoder.max_unknown_share
    return config


def build_index(recipe: RetrievalRecipe, store: Store, *, make_encoder: MakeEncoder = Encoder) -> Artifact:
    """The index of `recipe`: the existing one when nothing that it depends on has changed, else a new one.

    With `collections` it is the catalog of theirs.

    Args:
        recipe: What to build.
        store: Where.
        make_encoder: Stands in for the encoder where only the pipeline is measured. What such a build publishes is no
            index to search: use a store of its own.

    Raises:
        UserError: for a corpus, encoder or chunk size that cannot be indexed, naming the recipe key.
    """
    if recipe.collections:
        from retrieval.collections import build_collections

        return build_collections(recipe, store)
    check_chunks_fit(recipe, encoder_source(recipe, store))
    plan = index_plan(recipe, store)
    expected = _current_or_any(store, recipe.name)
    base = base_version(store, recipe.name)
    build = functools.partial(
        build_into, recipe, store, base=base, source=planned_encoder(recipe, store, plan), make_encoder=make_encoder
    )
    guarded = with_planned_ledger(store, plan, build)
    return run_stage(store, plan, guarded, expected=expected, because=why_build(store, plan))


def why_build(store: Store, plan: Plan) -> list[str]:
    """As `rebuild_reasons`, but of a version that a delta made, whose inputs are not those of a build."""
    try:
        version = store.current("index", plan.name)
        inputs = store.open("index", plan.name, version).manifest.inputs if version else {}
    except ArtifactError:
        inputs = {}
    if DELTA_INPUT not in inputs:
        return rebuild_reasons(store, plan)
    compared = {**inputs, **{name: digest for name, digest in plan.inputs.items() if name != CORPUS_INPUT}}
    others = rebuild_reasons(store, dataclasses.replace(plan, inputs=compared))
    return ["the current version was made by --upsert or --delete", *others]


def _current_or_any(store: Store, name: str) -> str | EllipsisType | None:
    """What must still be current when a build ends: a version that deletes a document may be published meanwhile, and
    must not be replaced by one that was planned before. A damaged `current` may be replaced."""
    try:
        return store.current("index", name)
    except ArtifactError:
        return ...


def planned_encoder(recipe: RetrievalRecipe, store: Store, plan: Plan) -> EncoderSource:
    """The encoder that `plan` was made with; another may have been published since."""
    parent = plan.parents.get("encoder")
    return EncoderSource(recipe.encoder, store.uri, str(parent)) if parent else EncoderSource(recipe.encoder)


def with_planned_ledger(store: Store, plan: Plan, build: Callable[..., Outcome]) -> Callable[[Attempt], Outcome]:
    """`build`, given the ledger that `plan` was made with as `removed`, and refused where the ledger is another before
    it (its parts would lack what the plan has) or at its end (its files may hold what was deleted or purged since)."""

    def guarded(attempt: Attempt) -> Outcome:
        removed = removed_ids(store, plan.name)
        require_planned(removed.digest)
        outcome = build(attempt, removed=removed)
        require_planned(removed_digest(store, plan.name))
        return outcome

    def require_planned(digest: str) -> None:
        if digest != plan.inputs.get(REMOVED_INPUT, ""):
            raise UserError(
                f"index: documents were deleted from index/{plan.name} while it was being built; nothing is published: "
                "run the same command again"
            )

    return guarded


def base_version(store: Store, name: str, merge: Merge = "reuse", deleted: tuple[str, ...] = ()) -> BaseVersion | None:
    """The current version of an index as the base of a build (see `BaseVersion`); none where there is none, or none
    that this release reads."""
    try:
        version = store.current("index", name)
        if version is None:
            return None
        manifest = store.open("index", name, version).manifest
    except ArtifactError as error:
        say(f"index: the current version cannot be built upon: {error}")
        return None
    measured = manifest.measured
    if manifest.format != INDEX_FORMAT or measured.get("mode") not in ("dense", "lexical"):
        return None
    return BaseVersion(
        store_uri=store.uri,
        ref=str(manifest.ref),
        attempt=manifest.attempt,
        merge=merge,
        deleted=deleted,
        mode=measured["mode"],
        encoder_digest=str(measured.get("encoder_digest", "")),
        precision=str(measured.get("precision", "")),
        rows=int(measured.get("rows", 0)),
    )


def check_chunks_fit(recipe: RetrievalRecipe, source: EncoderSource) -> None:
    """Refuse chunks that the encoder would cut.

    Raises:
        UserError: naming `chunking.max_tokens`.
    """
    longest = encoder_max_tokens(source.directory())
    wanted = recipe.chunking.max_tokens + SPECIAL_TOKENS
    if recipe.search.mode != "lexical" and longest is not None and wanted > longest:
        raise UserError(
            f"chunking.max_tokens is {recipe.chunking.max_tokens}, but {recipe.encoder.model} reads at most {longest} "
            f"tokens, {SPECIAL_TOKENS} of them special: set chunking.max_tokens to {longest - SPECIAL_TOKENS} or less"
        )


def work_parts(store: Store, ref: ArtifactRef, base: BaseVersion | None) -> Parts:
    """Where the unfinished work of version `ref` stands: a directory of its own in a local store, a prefix that
    workers share in an object store. Parts over another base version stand apart, because they hold other rows."""
    root = store.work_uri(ref)
    kept = base if base is not None and base.merge != "reuse" else None
    return Parts(f"{root}/{kept.merge}-{kept.ref.rpartition('/')[2]}" if kept else f"{root}/full")


def build_into(
    recipe: RetrievalRecipe,
    store: Store,
    attempt: Attempt,
    *,
    base: BaseVersion | None = None,
    scan: CorpusScan | None = None,
    settle: Callable[[BuildJob, RowPlan], None] | None = None,
    removed: RemovedIds | None = None,
    source: EncoderSource | None = None,
    make_encoder: MakeEncoder = Encoder,
) -> Outcome:
    """Run all phases and write every file of the artifact into `attempt`.

    Args:
        recipe: What to build.
        store: Where; its ledger of removed documents is read.
        attempt: Where the files go.
        base: With `merge: reuse` a source of embeddings. With `sync` or `delta` its living shards are adopted and its
            deleted rows get tombstones; where its mode is not that of this build it is only reused.
        scan: The documents to add; by default the recipe's corpus.
        settle: Called once the rows are planned and before anything is embedded; may raise to stop.
        removed: Documents to leave out; by default those in the ledger.
        source: The encoder; by default the one that the recipe means now.
        make_encoder: See `build_index`.
    """
    removed = removed_ids(store, recipe.name) if removed is None else removed
    if scan is None:
        scan = scan_corpus(recipe.corpus, recipe.seed)
    if scan.ignored:
        say(f"index: {scan.ignored:,} files of other formats are not read: {scan.ignored_formats}")
    source = encoder_source(recipe, store) if source is None else source
    share = unknown_share(encoder_tokenizer(source.directory()), scan.sample)
    mode = _choose_mode(recipe, share, base)
    if base is not None and base.mode != mode:
        base = dataclasses.replace(base, merge="reuse")
    alone = _may_run_alone(recipe, scan, base)
    with contextlib.nullcontext() if alone else ray_session(recipe.ray):
        workers: Workers = Alone() if alone else OnRay.of(recipe)
        job = _job(recipe, store, attempt, mode, source, base, workers)
        job = dataclasses.replace(job, removed=removed, make_encoder=make_encoder)
        built = run_phases(job, scan, workers, recipe, settle)
        _remove_other_shards(store, attempt, built.shards)
        shards, placed = _all_shards(attempt, job, built)
        began = time.perf_counter()
        lexical = write_lexical(job.uri, placed, workers)
        seconds = {**built.seconds, "lexical_s": round(time.perf_counter() - began, 3)}
    index = IndexFile(
        mode=mode,
        encoder=source.name if mode == "dense" else "",
        encoder_digest=job.encoder_digest if mode == "dense" else "",
        precision=job.precision if mode == "dense" else "",
        shards=shards,
        lexical=lexical,
    )
    index.write(attempt.directory)
    _tell(attempt, built)
    counts = index_counts(built.plan, built.read.removed)
    return Outcome({**counts, "unknown_share": round(share, 4)}, {**describe_index(index), **seconds})


def _may_run_alone(recipe: RetrievalRecipe, scan: CorpusScan, base: BaseVersion | None) -> bool:
    """A corpus of one block gives workers nothing to share, and starting Ray takes longer than the work itself; so does
    reading a small corpus again for an update."""
    small_update = (
        base is not None and base.merge != "reuse" and base.rows <= SMALL_BASE_ROWS and scan.bytes <= SMALL_UPDATE_BYTES
    )
    here = recipe.ray.address is None and "RAY_ADDRESS" not in os.environ and not recipe.encoder.gpus_per_actor
    return here and recipe.encoder.actors == 1 and (len(scan.blocks) == 1 or small_update)


def _choose_mode(recipe: RetrievalRecipe, share: float, base: BaseVersion | None) -> Mode:
    if recipe.search.mode != "auto":
        return "lexical" if recipe.search.mode == "lexical" else "dense"
    if base is not None and base.merge == "delta":
        return base.mode  # a few documents do not decide the mode of all
    if share <= recipe.encoder.max_unknown_share:
        return "dense"
    name = recipe.encoder.model.removeprefix("embedded:")
    say(f"index: {share:.0%} of this corpus's tokens are unknown to {name}: searching lexically (BM25)")
    return "lexical"


def _job(
    recipe: RetrievalRecipe,
    store: Store,
    attempt: Attempt,
    mode: Mode,
    source: EncoderSource,
    base: BaseVersion | None,
    workers: Workers,
) -> BuildJob:
    from retrieval.vectors import VectorPolicy

    kept = base if base is not None and base.merge != "reuse" else None
    if mode == "lexical":
        precision = "float32"
    elif kept is not None:  # rows of one index are all of one precision
        precision = kept.precision
    else:
        precision = workers.precision(source)
    return BuildJob(
        parts=work_parts(store, attempt.ref, base),
        uri=attempt.uri,
        mode=mode,
        source=source,
        encoder_digest=source.digest(),
        precision="bfloat16" if precision == "bfloat16" else "float32",
        chunking=recipe.chunking,
        policy=VectorPolicy.of(recipe.index, recipe.seed),
        shard_chunks=recipe.index.shard_chunks,
        base=base,
        compaction=CompactionPolicy.of(recipe.index),
    )


@dataclasses.dataclass(frozen=True)
class Built:
    """What the four phases came to."""

    read: ReadCounts
    plan: RowPlan
    shards: tuple[ShardEntry, ...]
    """New ones."""
    seconds: dict[str, float]


def run_phases(
    job: BuildJob,
    scan: CorpusScan,
    workers: Workers,
    recipe: RetrievalRecipe,
    settle: Callable[[BuildJob, RowPlan], None] | None = None,
) -> Built:
    """Phases A to D without the lexical files (see `pipeline.py`); `settle` is called between B and C.

    Raises:
        UserError: the corpus holds no text; with `corpus.strict`, a document cannot be read.
    """
    clock = _Clock()
    read = read_corpus(job, scan, workers, recipe.corpus.strict)
    clock.lap("read_s")
    plan = plan_corpus(job, scan, workers)
    if settle is not None:
        settle(job, plan)
    if recipe.corpus.strict and plan.first_rejected:
        raise UserError(f"corpus.path: {plan.first_rejected} (corpus.strict)")
    if plan.rows + plan.base.kept_rows == 0:
        why = f" (first rejected: {plan.first_rejected})" if plan.first_rejected else ""
        gone = f"; {read.removed:,} documents are left out, being deleted or purged" if read.removed else ""
        raise UserError(f"corpus.path: {recipe.corpus.path} holds no text to index{why}{gone}")
    clock.lap("plan_s")
    embedded = embed_corpus(job, plan, workers)
    clock.lap("embed_s")
    if job.mode == "dense" and plan.rows:
        kind = recipe.index.kind
        say(f"index: {plan.rows:,} chunks into {len(plan.shards)} shard(s), index.kind {kind}")
    shards = write_shards(job, plan, workers)
    clock.lap("shards_s")
    return Built(read, plan, shards, {**clock.seconds, **embedded})


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


def _remove_other_shards(store: Store, attempt: Attempt, shards: Sequence[ShardEntry]) -> None:
    """Remove what a worker that died has left of a shard: Ray runs its task again, which writes another shard."""
    folder = f"{attempt.ref}/{attempt.id}/{SHARDS_FOLDER}"
    for name in set(store.storage.folders(folder)) - {entry.shard_id for entry in shards}:
        store.storage.delete(f"{folder}/{name}")


def _all_shards(attempt: Attempt, job: BuildJob, built: Built) -> tuple[tuple[ShardEntry, ...], list[LexicalShard]]:
    """Shards of the new version in order, and the same with their global rows and deleted rows.

    The files of the base version's living shards are adopted into `attempt`.
    """
    kept = built.plan.base.shards
    if kept:
        assert job.base is not None
        artifact = job.base.artifact()
        folders = {f"{SHARDS_FOLDER}/{entry.shard_id}" for entry in kept}
        names = [file.path for file in artifact.manifest.files if file.path.rpartition("/")[0] in folders]
        attempt.adopt(artifact, {name: name for name in names})
    entries = (*kept, *built.shards)
    deleted = {
        shard_id: Parts(job.uri).read_array(f"{TOMBSTONES_FOLDER}/{shard_id}.npy")
        for shard_id in built.plan.base.deleted_rows
    }
    offsets = itertools.accumulate((entry.rows for entry in entries), initial=0)
    placed = [
        LexicalShard(entry, offset, deleted.get(entry.shard_id))
        for entry, offset in zip(entries, offsets, strict=False)
    ]
    return entries, placed


def _tell(attempt: Attempt, built: Built) -> None:
    plan = built.plan
    if plan.rejected:
        more = plan.rejected - len(plan.rejections)
        lines = [*plan.rejections, *([f"and {more:,} more"] if more else [])]
        say(f"index: {plan.rejected:,} of the corpus's documents were rejected ({attempt.uri}/{REJECTED_FILE}):")
        say("\n".join(f"  {line}" for line in lines))
    if built.read.removed:
        say(f"index: {built.read.removed:,} documents were left out because they were deleted by id or purged")
    if plan.reused or plan.shared:
        say(
            f"index: {plan.embedded:,} texts embedded; {plan.reused:,} took their embedding from the current version, "
            f"{plan.shared:,} share one with an equal text"
        )


def index_counts(plan: RowPlan, removed: int) -> dict[str, int | float]:
    """Counts for the manifest: live documents, chunks and tokens, and what became of the new chunks' embeddings."""
    return {
        "documents": plan.documents + plan.base.kept_documents,
        "chunks": plan.rows + plan.base.kept_rows,
        "tokens": plan.tokens + plan.base.kept_tokens,
        "embedded": plan.embedded,
        "reused": plan.reused,
        "shared": plan.shared,
        "rejected": plan.rejected,
        "removed": removed,
    }


def describe_index(index: IndexFile) -> dict[str, Any]:
    """Figures for the manifest: mode, encoder, and of the shards: kinds, dimension, the least recall measured."""
    figures: dict[str, Any] = {
        "mode": index.mode,
        "encoder": index.encoder,
        "encoder_digest": index.encoder_digest,
        "precision": index.precision,
        "shards": len(index.shards),
        "rows": index.rows,
    }
    measured = [entry.vectors for entry in index.shards if entry.dimension]
    if measured:
        figures |= {
            "dimension": index.shards[0].dimension,
            "kind": ", ".join(sorted({str(shard["kind"]) for shard in measured})),
            "recall": min(float(shard["recall"]) for shard in measured),
            "recall_at": max(int(shard["recall_at"]) for shard in measured),
        }
    return figures
