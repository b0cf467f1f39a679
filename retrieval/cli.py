"""`rayft index build` and `rayft index search`, and the other `index` commands beside them.

In: a function that loads a recipe. Out: the Typer sub-app. Heavy imports stand inside the commands, so that `--help`
answers at once. A further command is a function `register_…(app, load)` in a module of its own, called in `index_app`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.errors import UserError
from cluster.progress import complain
from retrieval.config import RetrievalRecipe
from retrieval.filters import Exists, Filter, Kind, OneOf, conditions_of, parse_filter

if TYPE_CHECKING:
    from retrieval.records import Hit

SNIPPET_CHARS = 160
DEFAULT_K = 5
KEYS_SHOWN = 12
COLLECTION = "collection"
_KIND_NAMES: dict[Kind, str] = {"text": "text", "number": "numbers", "bool": "true or false"}

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
        k: Annotated[int | None, typer.Option("-k", min=1, help="Passages to print; else 5.")] = None,
        where: Annotated[
            str, typer.Option("--filter", metavar="JSON", help='Only such passages: {"year": {"gte": 2020}}.')
        ] = "",
        mode: Annotated[ShownMode | None, typer.Option(help="How to search; else the recipe's search.mode.")] = None,
        overrides: SetOption = None,
    ) -> None:
        """Print the passages of the current index that fit QUERY best."""
        if not query.strip():
            raise UserError("search: the query is empty")
        wanted = read_filter(where) if where else None
        from cluster.store import Store
        from retrieval.retriever import Retriever

        loaded = load(recipe, overrides or [])
        artifact = Store(loaded.store.uri).open("index", loaded.name)
        retriever = Retriever.open(artifact, loaded.encoder, loaded.search)
        hits = retriever.search([query], k or min(DEFAULT_K, len(retriever)), key="-k", filter=wanted, mode=mode)[0]
        for hit in hits:
            typer.echo(describe_hit(hit))
        if not hits and wanted is not None:
            complain(f"--filter: {explain_no_hits(wanted, retriever.kinds(), retriever.collections)}")


def read_filter(text: str, key: str = "--filter") -> Filter:
    """A filter from its JSON text.

    Raises:
        UserError: naming `key`.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f'{key}: not JSON ({error}): write it as \'{{"tenant": "acme"}}\'') from None
    return parse_filter(value, key)


def explain_no_hits(wanted: Filter, known: Mapping[str, set[Kind]], collections: Sequence[str] = ()) -> str:
    """Why a filter may match nothing: a key or collection that is not there, or values of another kind."""
    keys = sorted(known)
    for condition in conditions_of(wanted):
        key = condition.key
        if key not in known:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f", did you mean {near[0]}?" if near else ";"
            more = ", …" if len(keys) > KEYS_SHOWN else ""
            return f"no passage matches: no document has {key!r}{hint} keys are {', '.join(keys[:KEYS_SHOWN])}{more}"
        if isinstance(condition, Exists):
            continue
        if condition.kind not in known[key]:
            found = " and ".join(_KIND_NAMES[kind] for kind in sorted(known[key]))
            return f"no passage matches: {key} holds {found}, the filter asks for {_KIND_NAMES[condition.kind]}"
        if (
            collections
            and key == COLLECTION
            and isinstance(condition, OneOf)
            and not {*condition.values} & {*collections}
        ):
            return f"no passage matches: the collections are {', '.join(collections)}"
    return "no passage matches"


def describe_hit(hit: Hit) -> str:
    """Rank, score, collection, headings; the beginning of the text; its place."""
    passage = hit.passage
    header = " | ".join(part for part in (hit.collection, passage.title, passage.heading) if part)
    text = " ".join(passage.text.split())
    snippet = text if len(text) <= SNIPPET_CHARS else text[: SNIPPET_CHARS - 1] + "…"
    place = f"{passage.uri or passage.doc_id} [{passage.start}:{passage.end}]"
    return f"{hit.rank}. {hit.score:.3f}  {header or passage.doc_id}\n   {snippet}\n   {place}"
