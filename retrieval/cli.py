"""`rayft index build` and `rayft index search`.

In: a function that loads a recipe. Out: the Typer sub-app. Heavy imports stand inside the commands, so that `--help`
answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from retrieval.config import RetrievalRecipe

SNIPPET_CHARS = 160

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key (repeatable).")
]


def index_app(load: Callable[[str, list[str]], RetrievalRecipe]) -> typer.Typer:
    """The `index` sub-app over recipes that `load` (path, overrides) reads."""
    app = typer.Typer(no_args_is_help=True, help="Build and search the index of a document collection.")

    @app.command()
    def build(recipe: RecipeArgument, overrides: SetOption = None) -> None:
        """Chunk, embed and index the documents; does nothing when the index is up to date."""
        from cluster.store import Store
        from retrieval.index import build_index

        loaded = load(recipe, overrides or [])
        build_index(loaded, Store(loaded.store.uri))

    @app.command()
    def search(
        recipe: RecipeArgument,
        query: Annotated[str, typer.Argument(help="What to look for.")],
        k: Annotated[int, typer.Option("-k", min=1, help="Passages to print.")] = 5,
        overrides: SetOption = None,
    ) -> None:
        """Print the passages of the current index that fit QUERY best."""
        from cluster.store import Store
        from retrieval.retriever import Retriever

        loaded = load(recipe, overrides or [])
        artifact = Store(loaded.store.uri).open("index", loaded.name)
        retriever = Retriever.open(artifact, loaded.encoder, loaded.search)
        for hit in retriever.search([query], k, key="-k")[0]:
            passage = hit.passage
            header = " | ".join(part for part in (passage.title, passage.heading) if part)
            text = " ".join(passage.text.split())
            snippet = text if len(text) <= SNIPPET_CHARS else text[: SNIPPET_CHARS - 1] + "…"
            typer.echo(f"{hit.rank}. {hit.score:.3f}  {header or passage.doc_id}")
            typer.echo(f"   {snippet}")
            typer.echo(f"   {passage.uri or passage.doc_id} [{passage.start}:{passage.end}]")

    return app
