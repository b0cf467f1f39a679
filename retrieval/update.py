"""Updating an index: only what changed is chunked and embedded; all else is adopted from the current version.

In: a recipe whose index was built. `sync` makes the index equal to the corpus: documents are compared by id and
content. A delta adds, changes and deletes single documents upon the current version without reading the corpus. Out: a
new current version, published atomically by compare-and-swap; the old one stays readable. A deleted id is written into
the ledger first (`ledger.py`), so that it stays away though the corpus still holds it; bringing it with a delta lets it
back in.
A sync has the fingerprint of a build of the same corpus, so a build afterwards has nothing to do. What a delta brought
and the corpus does not hold, the next sync removes.
Not covered: the phases (`index.py`, `pipeline.py`), which shards are written anew (`compaction.py`), a purge of a
document's text (`purge.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.manifest import fingerprint
from cluster.progress import describe_seconds, say
from cluster.stage import Outcome, Plan, rebuild_reasons, run_stage
from retrieval.build_job import BaseVersion, BuildJob, MakeEncoder
from retrieval.config import RetrievalRecipe
from retrieval.documents import CorpusScan, corpus_digest, read_block, scan_corpus
from retrieval.encoder import BASE_INPUT, Encoder, encoder_source
from retrieval.index import (
    DELTA_INPUT,
    base_version,
    build_index,
    build_into,
    check_chunks_fit,
    index_plan,
    plan_from,
    planned_encoder,
    why_build,
    with_planned_ledger,
)
from retrieval.ledger import RemovedIds, add_deleted, lift_deleted, removed_digest, removed_ids
from retrieval.sources import corpus_root

if TYPE_CHECKING:
    from cluster.store import Artifact, Attempt, Store
    from retrieval.rowplan import RowPlan

NEAREST_IDS = 3
IDS_COMPARED = 100_000
"""Ids that are looked through for those like an unknown one."""


@dataclasses.dataclass(frozen=True)
class UpdateReport:
    """What an update did."""

    added: int = 0
    changed: int = 0
    deleted: int = 0
    unchanged: int = 0
    embedded: int = 0
    """Chunks."""
    reused: int = 0
    """Chunks of added and changed documents whose embedding was there already."""
    deleted_share: float = 0
    """Of all rows of the new version."""
    compacted: int = 0
    """Shards that were written anew."""
    seconds: float = 0

    def describe(self) -> str:
        """One line."""
        compaction = f"compacted {self.compacted} shards" if self.compacted else "not compacted"
        return (
            f"{self.added:,} documents added, {self.changed:,} changed, {self.deleted:,} deleted, "
            f"{self.unchanged:,} unchanged; {self.embedded:,} chunks embedded, {self.reused:,} reused; "
            f"{self.deleted_share:.1%} of rows deleted, {compaction}; {describe_seconds(self.seconds)}"
        )


class _NothingToDoError(Exception):
    """A delta whose documents are all in the index already."""


class _NothingLeftError(UserError):
    """A delta that deletes every document."""


def update_index(
    recipe: RetrievalRecipe,
    store: Store,
    *,
    upsert: str = "",
    delete: Sequence[str] = (),
    make_encoder: MakeEncoder = Encoder,
) -> Artifact:
    """Bring the index of `recipe` (without `collections`) up to date, and make the new version current.

    Args:
        recipe: What to index.
        store: Where.
        upsert: File, folder or glob of documents to add or change; with it (or `delete`) the corpus is not read.
        delete: Ids of documents to delete. An id that `upsert` brings as well is kept.
        make_encoder: See `build_index`.

    Raises:
        UserError: for what cannot be indexed, an unknown id, a purged one; naming the option or the recipe key.
        ArtifactError: somebody else published meanwhile; nothing is lost.
    """
    if "" in delete:
        raise UserError("--delete: the id is empty")
    assert not recipe.collections, "one collection at a time: see `update_collections`"
    check_chunks_fit(recipe, encoder_source(recipe, store))
    if upsert or delete:
        return _update_by_delta(recipe, store, upsert, tuple(dict.fromkeys(delete)), make_encoder)
    return _update_from_corpus(recipe, store, make_encoder)


def update_collections(
    recipe: RetrievalRecipe,
    store: Store,
    collection: str = "",
    *,
    upsert: str = "",
    delete: Sequence[str] = (),
    make_encoder: MakeEncoder = Encoder,
) -> Artifact:
    """Update the index of one collection (by default of each), and publish the catalog over them.

    Raises:
        UserError: a delta without naming its collection; otherwise as `update_index`.
        ArtifactError: another collection was never built; somebody else published meanwhile.
    """
    from retrieval.collections import check_collections, of_collection, publish_catalog

    check_collections(recipe)
    if (upsert or delete) and not collection:
        raise UserError(
            f"--collection: say which collection --upsert and --delete mean: {', '.join(recipe.collections)}"
        )
    for name in [collection] if collection else recipe.collections:
        with of_collection(recipe, name) as member:
            update_index(member, store, upsert=upsert, delete=delete, make_encoder=make_encoder)
    while True:
        members = {name: store.open("index", f"{recipe.name}-{name}") for name in recipe.collections}
        catalog = publish_catalog(recipe, store, members)
        # Two updates of different collections publish a catalog each: the later one must not name an older member.
        if all(store.current("index", f"{recipe.name}-{name}") == a.ref.version for name, a in members.items()):
            return catalog


# --- from the corpus


def _update_from_corpus(recipe: RetrievalRecipe, store: Store, make_encoder: MakeEncoder) -> Artifact:
    base = base_version(store, recipe.name, "sync")
    plan = index_plan(recipe, store)
    if base is None:
        say("index: there is no version to update: building the first")
        return build_index(recipe, store, make_encoder=make_encoder)
    if reasons := _other_build(store, base, plan):
        say(f"index: not only documents changed ({reasons}): building anew")
        return build_index(recipe, store, make_encoder=make_encoder)
    return _publish(recipe, store, plan, base, None, make_encoder)


def _other_build(store: Store, base: BaseVersion, plan: Plan) -> str:
    """What else than documents changed since the base version, so that it must be built anew; empty: nothing."""
    manifest = store.open("index", plan.name, _version(base)).manifest
    inputs = {**manifest.inputs, BASE_INPUT: plan.inputs[BASE_INPUT]}
    return "; ".join(rebuild_reasons(store, dataclasses.replace(plan, inputs=inputs)))


def _version(base: BaseVersion) -> str:
    return base.ref.rpartition("/")[2]


# --- by a delta


def _update_by_delta(
    recipe: RetrievalRecipe, store: Store, upsert: str, delete: tuple[str, ...], make_encoder: MakeEncoder
) -> Artifact:
    option = "--upsert" if upsert else "--delete"
    base = base_version(store, recipe.name, "delta")
    if base is None:
        raise UserError(f"{option}: index/{recipe.name} has no version to change: run `rayft index build` first")
    if reasons := _other_build(store, base, _delta_plan(recipe, store, base, "")):
        raise UserError(
            f"{option}: the current version of index/{recipe.name} was built otherwise ({reasons}): run `rayft index "
            "update` without this option first"
        )
    source = recipe.corpus.model_copy(update={"path": upsert})
    scan = _scan_delta(recipe, upsert)
    digest = corpus_digest(source, key="--upsert") if upsert else ""
    _require_known(store, recipe.name, base, delete)
    brought = _ids_of(scan) if delete or removed_digest(store, recipe.name) else set()
    before = lift_deleted(store, recipe.name, brought)
    gone = [doc_id for doc_id in delete if doc_id not in brought]
    add_deleted(store, recipe.name, gone)
    plan = _delta_plan(recipe, store, base, fingerprint([digest, sorted(delete)]))
    try:
        return _publish(recipe, store, plan, base, scan, make_encoder, upsert, delete)
    except _NothingLeftError:  # refused as a whole: the next build must not do it after all
        lift_deleted(store, recipe.name, [doc_id for doc_id in gone if doc_id not in before])
        raise
    except _NothingToDoError:
        store.discard_work(plan.ref)
        say(f"index: up to date ({base.ref}): its documents are as asked for")
        return store.open("index", recipe.name, _version(base))


def _delta_plan(recipe: RetrievalRecipe, store: Store, base: BaseVersion, delta: str) -> Plan:
    """The base version is an input, not a parent: no version needs an earlier one, and gc may take it."""
    return plan_from(recipe, store, {"base version": base.ref, DELTA_INPUT: delta})


def _scan_delta(recipe: RetrievalRecipe, upsert: str) -> CorpusScan:
    """The documents at `upsert`; a file below the corpus keeps the name, and so the id, that it has there."""
    if not upsert:
        return CorpusScan((), (), 0, 0, 0)
    scan = scan_corpus(recipe.corpus.model_copy(update={"path": upsert}), recipe.seed, key="--upsert")
    root = corpus_root(recipe.corpus.path) if recipe.corpus.path else ""

    def below(place: str) -> str:
        return (
            place.removeprefix(root.rstrip("/") + "/") + "/"
            if root and place.startswith(root.rstrip("/") + "/")
            else ""
        )

    blocks = tuple(
        dataclasses.replace(block, root=root, files=tuple(inner + name for name in block.files))
        if (inner := below(block.root))
        else block
        for block in scan.blocks
    )
    return dataclasses.replace(scan, blocks=blocks)


def _ids_of(scan: CorpusScan) -> set[str]:
    """Ids of a delta's documents: they are read twice, where some were deleted and may come back."""
    return {document.doc_id for block in scan.blocks for document in read_block(block).documents}


def _require_known(store: Store, name: str, base: BaseVersion, delete: tuple[str, ...]) -> None:
    """Refuse the deletion of a document that neither is in the base version nor was deleted before."""
    removed = removed_ids(store, name)
    wanted = [doc_id for doc_id in delete if doc_id not in removed]
    if not wanted:
        return
    missing = dict.fromkeys(wanted)
    some: list[str] = []
    for doc_id in _live_ids(base):
        missing.pop(doc_id, None)
        if len(some) < IDS_COMPARED:
            some.append(doc_id)
    for doc_id in missing:
        like = difflib.get_close_matches(doc_id, some, NEAREST_IDS)
        hint = f"; the nearest are {', '.join(like)}" if like else ""
        raise UserError(f"--delete: {base.ref} holds no document {doc_id}{hint}")


def _live_ids(base: BaseVersion) -> Iterator[str]:
    for shard in base.open()[1]:
        for batch in shard.document_batches(("doc_id",)):
            yield from batch.column("doc_id").to_pylist()


# --- both


def _publish(
    recipe: RetrievalRecipe,
    store: Store,
    plan: Plan,
    base: BaseVersion,
    scan: CorpusScan | None,
    make_encoder: MakeEncoder,
    upsert: str = "",
    delete: Sequence[str] = (),
) -> Artifact:
    began = time.monotonic()
    plans: list[RowPlan] = []

    def settle(_: BuildJob, rows: RowPlan) -> None:
        plans.append(rows)
        if base.merge != "delta":
            return
        if not rows.documents and not rows.base.deleted_documents:
            if rows.rejected:
                raise UserError(
                    f"--upsert: nothing in {upsert} is new, and {rows.rejected:,} of its documents were rejected, the "
                    f"first {rows.first_rejected}"
                )
            raise _NothingToDoError
        if not rows.rows and not rows.base.kept_rows:
            left = f"nothing would be left in index/{recipe.name}; an index needs a document"
            raise _NothingLeftError(f"--delete: {left}")

    def build(attempt: Attempt, removed: RemovedIds) -> Outcome:
        outcome = build_into(
            recipe,
            store,
            attempt,
            base=base,
            scan=scan,
            settle=settle,
            removed=removed,
            source=planned_encoder(recipe, store, plan),
            make_encoder=make_encoder,
        )
        report = _report(plans[0], outcome, time.monotonic() - began)
        return dataclasses.replace(outcome, measured={**outcome.measured, "update": dataclasses.asdict(report)})

    because = [f"--upsert {upsert}"] * bool(upsert) + [f"--delete of {len(delete):,} documents"] * bool(delete)
    artifact = run_stage(
        store,
        plan,
        with_planned_ledger(store, plan, build),
        expected=_version(base),
        because=because or why_build(store, plan),
    )
    if plans:
        say(f"index: {UpdateReport(**artifact.manifest.measured['update']).describe()}")
    return artifact


def _report(rows: RowPlan, outcome: Outcome, seconds: float) -> UpdateReport:
    change = rows.base
    return UpdateReport(
        added=rows.documents - change.changed_documents,
        changed=change.changed_documents,
        deleted=change.deleted_documents - change.changed_documents,
        unchanged=change.kept_documents,
        embedded=rows.embedded,
        reused=rows.reused + rows.shared,
        deleted_share=round(1 - outcome.counts["chunks"] / outcome.measured["rows"], 4),
        compacted=len(change.merged),
        seconds=round(seconds, 3),
    )
