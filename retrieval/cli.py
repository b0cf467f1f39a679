"""`rayft index build` and `rayft index search`, and the other `index` commands beside them.

In: a function that loads a recipe. Out: the Typer sub-app. Heavy imports stand inside the commands, so that `--help`
answers at once. A further command is a function `register_…(app, load)` in a module of its own, called in `index_app`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.errors import UserError
from retrieval.config import RetrievalRecipe

if TYPE_CHECKING:
    from retrieval.filters import Filter
    from retrieval.records import Hit

SNIPPET_CHARS = 160

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key (repeatable).")
]
ShownMode = Literal["dense", "lexical", "hybrid"]


def index_app(load: Callable[[str, list[str]], RetrievalRecipe]) -> typer.Typer:
    """The `index` sub-app over recipes that `load` (path, overrides) reads."""
    from retrieval.evaluate_cli import register_evaluate
    from retrieval.update_cli import register_update

    app = typer.Typer(no_args_is_help=True, help="Build, search and measure the index of a document collection.")
    _register_build(app, load)
    _register_search(app, load)
    register_update(app, load)
    register_evaluate(app, load)
    return app


def _register_build(app: typer.Typer, load: Callable[[str, list[str]], RetrievalRecipe]) -> None:
    @app.command()
    def build(
        recipe: RecipeArgument,
        strict: Annotated[
            bool, typer.Option("--strict", help="Stop at the first document that cannot be read (corpus.strict).")
        ] = False,
        overrides: SetOption = None,
    ) -> None:
        """Chunk, embed and index the documents; does nothing when the index is up to date."""
        from cluster.store import Store
        from retrieval.index import build_index

        loaded = load(recipe, [*(overrides or []), *(["corpus.strict=true"] if strict else [])])
        build_index(loaded, Store(loaded.store.uri))


def _register_search(app: typer.Typer, load: Callable[[str, list[str]], RetrievalRecipe]) -> None:
    @app.command()
    def search(
        recipe: RecipeArgument,
        query: Annotated[str, typer.Argument(help="What to look for.")],
        k: Annotated[int, typer.Option("-k", min=1, help="Passages to print.")] = 5,
        where: Annotated[
            str, typer.Option("--filter", metavar="JSON", help='Only such passages: {"year": {"gte": 2020}}.')
        ] = "",
        mode: Annotated[ShownMode | None, typer.Option(help="How to search; else the recipe's search.mode.")] = None,
        overrides: SetOption = None,
    ) -> None:
        """Print the passages of the current index that fit QUERY best."""
        wanted: dict[str, Any] = {"filter": read_filter(where)} if where else {}
        wanted |= {"mode": mode} if mode else {}
        from cluster.store import Store
        from retrieval.retriever import Retriever

        loaded = load(recipe, overrides or [])
        artifact = Store(loaded.store.uri).open("index", loaded.name)
        retriever = Retriever.open(artifact, loaded.encoder, loaded.search)
        for hit in retriever.search([query], k, key="-k", **wanted)[0]:
            typer.echo(describe_hit(hit))


def read_filter(text: str, key: str = "--filter") -> Filter:
    """A filter from its JSON text.

    Raises:
        UserError: naming `key`.
    """
    from retrieval.filters import parse_filter

    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f'{key}: not JSON ({error}): write it as \'{{"tenant": "acme"}}\'') from None
    return parse_filter(value, key)


def describe_hit(hit: Hit) -> str:
    """Rank, score, collection, headings; the beginning of the text; its place."""
    passage = hit.passage
    header = " | ".join(part for part in (hit.collection, passage.title, passage.heading) if part)
    text = " ".join(passage.text.split())
    snippet = text if len(text) <= SNIPPET_CHARS else text[: SNIPPET_CHARS - 1] + "…"
    place = f"{passage.uri or passage.doc_id} [{passage.start}:{passage.end}]"
    return f"{hit.rank}. {hit.score:.3f}  {header or passage.doc_id}\n   {snippet}\n   {place}"
