"""`rayft index update` and `rayft index purge`.

In: the index sub-app and a function that loads a recipe. Out: two commands on it. Heavy imports stand inside, so that
`--help` answers at once. Not covered: what they do (`update.py`, `purge.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import UserError
from cluster.progress import say
from retrieval.config import RetrievalRecipe

if TYPE_CHECKING:
    from cluster.store import Store

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key (repeatable).")
]
CollectionOption = Annotated[
    str, typer.Option("--collection", metavar="NAME", help="Only this collection of the recipe; by default all.")
]


UPSERT_HELP = (
    "Add or change these documents; the corpus is not read. The next update or build from the corpus takes out again "
    "what the corpus does not hold."
)


def register_update(app: typer.Typer, load: Callable[[str, list[str]], RetrievalRecipe]) -> None:
    """Add both commands to `app`, over recipes that `load` (path, overrides) reads."""
    _register_update(app, load)
    _register_purge(app, load)


def _register_update(app: typer.Typer, load: Callable[[str, list[str]], RetrievalRecipe]) -> None:
    @app.command()
    def update(
        recipe: RecipeArgument,
        upsert: Annotated[
            str,
            typer.Option("--upsert", metavar="PATH", help=UPSERT_HELP),
        ] = "",
        delete: Annotated[
            list[str] | None,
            typer.Option("--delete", metavar="ID", help="Delete this document, for good (repeatable)."),
        ] = None,
        collection: CollectionOption = "",
        overrides: SetOption = None,
    ) -> None:
        """Bring the index up to date with the corpus, or change single documents; embeds only what changed."""
        from cluster.store import Store
        from retrieval.update import update_collections, update_index

        loaded = load(recipe, overrides or [])
        store = Store(loaded.store.uri)
        if loaded.collections:
            update_collections(loaded, store, collection, upsert=upsert, delete=delete or ())
        else:
            _refuse_collection(collection)
            update_index(loaded, store, upsert=upsert, delete=delete or ())


def _register_purge(app: typer.Typer, load: Callable[[str, list[str]], RetrievalRecipe]) -> None:
    @app.command()
    def purge(
        recipe: RecipeArgument,
        doc_id: Annotated[str, typer.Argument(metavar="DOC_ID", help="Id of the document.")],
        collection: CollectionOption = "",
        no_builds: Annotated[
            bool,
            typer.Option("--no-builds", help="In an object store: nobody is building, remove unfinished builds too."),
        ] = False,
        overrides: SetOption = None,
    ) -> None:
        """Remove a document's text from every version of the index, for good."""
        from cluster.store import Store
        from retrieval.collections import member_recipe

        if not doc_id:
            raise UserError("purge: the id is empty")
        loaded = load(recipe, overrides or [])
        store = Store(loaded.store.uri)
        if not loaded.collections:
            _refuse_collection(collection)
            names = [loaded.name]
        else:
            names = [member_recipe(loaded, name).name for name in ([collection] if collection else loaded.collections)]
        _purge(store, names, doc_id, no_builds, bool(loaded.collections))


def _refuse_collection(collection: str) -> None:
    if collection:
        raise UserError(f"--collection: the recipe has no collections, so none named {collection}")


def _purge(store: Store, names: list[str], doc_id: str, no_builds: bool, of_collections: bool) -> None:
    from retrieval.purge import PurgeReport, UnknownDocumentError, purge_document

    reports: list[PurgeReport] = []
    unknown: list[UnknownDocumentError] = []
    for name in names:
        try:
            reports.append(purge_document(store, name, doc_id, no_builds=no_builds))
        except UnknownDocumentError as error:  # a document is in some of the collections
            unknown.append(error)
    if not reports:
        raise unknown[0]
    for name in names:
        if store.current("index", name) is None:
            other = ", or leave the collection out of the recipe," if of_collections else ""
            say(
                f"purge: index/{name} held nothing else and has no version now: give it other documents{other} and run "
                "`rayft index build`"
            )
    rewritten = sum(len(report.rewritten) for report in reports)
    removed = sum(len(report.removed) for report in reports)
    unfinished = sum(report.unfinished for report in reports)
    say(
        f"purge: {rewritten} versions rewritten, {removed} that held nothing else removed, {unfinished} unfinished "
        "builds removed; restart servers that have the index open"
    )
    if not store.is_local:
        say("purge: other machines may keep copies in their caches ($RAYFT_CACHE/artifacts): remove them there")
    derived = {item.ref: item for report in reports for item in report.derived}
    if derived:
        say("purge: made from these versions, and may still hold the text; remove them and make them anew:")
        for item in derived.values():
            say(f"  {item.ref}  (rm -r {store.uri}/{item.ref}; {item.command})")
