"""Collections: several indexes under one name, each with its own documents, encoder, access and update frequency.

In: a recipe with `collections`. Out: an index per collection (`<recipe>-<collection>`), and a catalog: an artifact of
kind `index` named as the recipe, whose parents they are and whose `catalog.json` says who may search which. Whatever
takes an index takes a catalog; `Retriever.open` opens both.
Not covered: building one index (`index.py`), searching (`retriever.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError, UserError
from cluster.manifest import ArtifactRef
from cluster.stage import Outcome, Plan, run_stage
from retrieval.config import CollectionConfig, EncoderConfig, RetrievalRecipe
from retrieval.shards import INDEX_FORMAT

if TYPE_CHECKING:
    from cluster.store import Artifact, Attempt, Store

CATALOG_FILE = "catalog.json"
CATALOG_FORMAT = 1
ROLE = "collection."
"""A member is the parent `collection.<name>`."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclasses.dataclass(frozen=True)
class CatalogEntry:
    """One collection of a catalog."""

    name: str
    ref: ArtifactRef
    """Its index."""
    access: tuple[str, ...]
    """Groups whose members may search it; empty: everybody."""
    update_frequency: str
    encoder: EncoderConfig | None
    """Its own encoder; none: the recipe's."""


def check_collections(recipe: RetrievalRecipe) -> None:
    """Refuse collections that cannot be.

    Raises:
        UserError: naming `collections` or `corpus.path`.
    """
    if recipe.corpus.path:
        raise UserError(
            f"corpus.path is {recipe.corpus.path} and there are collections ({', '.join(recipe.collections)}): "
            "keep one; a corpus can be a collection"
        )
    for name, collection in recipe.collections.items():
        if not _NAME.fullmatch(name):
            raise UserError(f"collections: {name!r} is not a name: use up to 64 of a-z, 0-9, _ and -")
        if not collection.corpus.path:
            raise UserError(f"collections.{name}.corpus.path is empty: give its documents")
        if "" in collection.access:
            raise UserError(f"collections.{name}.access names an empty group: leave it out")


def member_recipe(recipe: RetrievalRecipe, name: str) -> RetrievalRecipe:
    """The recipe of one collection's index, `<recipe>-<collection>`.

    Raises:
        UserError: there is no such collection.
    """
    if name not in recipe.collections:
        raise UserError(f"collections: there is no {name}; the recipe has {', '.join(recipe.collections) or 'none'}")
    collection = recipe.collections[name]
    changes: dict[str, Any] = {"name": f"{recipe.name}-{name}", "corpus": collection.corpus, "collections": {}}
    if collection.encoder is not None:
        changes["encoder"] = collection.encoder
    return recipe.model_copy(update=changes)


@contextlib.contextmanager
def of_collection(recipe: RetrievalRecipe, name: str) -> Iterator[RetrievalRecipe]:
    """`member_recipe`; errors in the block name its keys where the recipe has them: `collections.NAME.corpus.path`."""
    member = member_recipe(recipe, name)
    own = ("corpus.", "encoder.") if recipe.collections[name].encoder is not None else ("corpus.",)
    try:
        yield member
    except UserError as error:
        if not str(error).startswith(own):
            raise
        raise type(error)(f"collections.{name}.{error}") from error


def build_collections(recipe: RetrievalRecipe, store: Store) -> Artifact:
    """Build the index of each collection that has changed, and publish the catalog over them.

    Raises:
        UserError: for collections, a corpus, encoder or chunk size that cannot be indexed.
    """
    from retrieval.index import build_index

    check_collections(recipe)
    members = {}
    for name in recipe.collections:
        with of_collection(recipe, name) as member:
            members[name] = build_index(member, store)
    return publish_catalog(recipe, store, members)


def publish_catalog(recipe: RetrievalRecipe, store: Store, members: Mapping[str, Artifact]) -> Artifact:
    """Publish the catalog of `recipe` over these versions of its collections' indexes, and make it current.

    Args:
        recipe: With `collections`.
        store: Where the members are.
        members: The index of every collection, by name.
    """
    check_collections(recipe)
    assert set(members) == set(recipe.collections), "a catalog is of all collections of its recipe"
    entries = [_entry(name, collection, members[name].ref) for name, collection in recipe.collections.items()]
    plan = Plan(
        kind="index",
        name=recipe.name,
        config={"collections": {entry["name"]: {**entry, "name": None, "ref": None} for entry in entries}},
        parents={ROLE + name: member.ref for name, member in members.items()},
        format=INDEX_FORMAT,
        seed=recipe.seed,
    )

    def build(attempt: Attempt) -> Outcome:
        return _write(attempt, entries, recipe, members)

    return run_stage(store, plan, build)


def _entry(name: str, collection: CollectionConfig, ref: ArtifactRef) -> dict[str, Any]:
    encoder = collection.encoder
    return {
        "name": name,
        "ref": str(ref),
        "access": sorted(set(collection.access)),
        "update_frequency": collection.update_frequency,
        "encoder": None if encoder is None else encoder.model_dump(include={"model", "revision", "precision"}),
    }


def _write(
    attempt: Attempt, entries: list[dict[str, Any]], recipe: RetrievalRecipe, members: Mapping[str, Artifact]
) -> Outcome:
    content = json.dumps({"format": CATALOG_FORMAT, "collections": entries}, indent=1, ensure_ascii=False)
    (attempt.directory / CATALOG_FILE).write_text(content, encoding="utf-8")
    counts: dict[str, int | float] = {}
    for member in members.values():
        for key in ("documents", "chunks", "rejected"):
            counts[key] = counts.get(key, 0) + member.manifest.counts.get(key, 0)
    counts["public_chunks"] = sum(
        member.manifest.counts["chunks"] for name, member in members.items() if not recipe.collections[name].access
    )
    measured = {name: member.manifest.measured for name, member in members.items()}
    modes = sorted({str(member.manifest.measured.get("mode")) for member in members.values()})
    encoders = sorted({str(member.manifest.measured.get("encoder")) for member in members.values()})
    return Outcome(
        counts={**counts, "collections": len(members)},
        measured={"mode": ", ".join(modes), "encoder": ", ".join(encoders), "collections": measured},
    )


def is_catalog(artifact: Artifact) -> bool:
    """Whether an index artifact is a catalog of collections."""
    return any(entry.path == CATALOG_FILE for entry in artifact.manifest.files)


def read_catalog(artifact: Artifact) -> list[CatalogEntry]:
    """The collections of a catalog, in the recipe's order.

    Raises:
        ArtifactError: damaged, of another format, or naming an index that is not among its parents.
    """
    file: Path = artifact.path(CATALOG_FILE)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != CATALOG_FORMAT:
            raise ValueError("of another format")
        entries = [
            CatalogEntry(
                name=str(row["name"]),
                ref=ArtifactRef.parse(row["ref"]),
                access=tuple(str(group) for group in row["access"]),
                update_frequency=str(row["update_frequency"]),
                encoder=None if row["encoder"] is None else EncoderConfig.model_validate(row["encoder"]),
            )
            for row in content["collections"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{artifact.ref}: its {CATALOG_FILE} cannot be read ({type(error).__name__}): rebuild the index"
        ) from error
    if {ROLE + entry.name: str(entry.ref) for entry in entries} != artifact.manifest.parents or not entries:
        raise ArtifactError(f"{artifact.ref}: its {CATALOG_FILE} does not name its parents: rebuild the index")
    return entries
