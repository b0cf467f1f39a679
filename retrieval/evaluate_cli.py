"""`rayft index evaluate`.

In: a Typer app, and a function that loads a recipe. Out: the command, registered. Heavy imports stand inside it, so
that `--help` answers at once. Not covered: the evaluation (`evaluate.py`), turning a `UserError` into one line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import UserError
from retrieval.config import QuestionColumns
from retrieval.evaluate import MODES, EvaluatedMode, evaluate_retrieval, tell

if TYPE_CHECKING:
    from retrieval.config import CorpusConfig, RetrievalRecipe

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key (repeatable).")
]


def register_evaluate(app: typer.Typer, load: Callable[[str, list[str]], RetrievalRecipe]) -> None:
    """Adds `evaluate` to the `index` app."""

    @app.command()
    def evaluate(
        recipe: RecipeArgument,
        questions: Annotated[
            str, typer.Option(help=".jsonl, .csv, .parquet, SQuAD .json, or a BEIR folder; else the recipe's.")
        ] = "",
        split: Annotated[
            str, typer.Option(help="Splits, such as test_new_documents; for BEIR the name of the qrels file (test).")
        ] = "",
        modes: Annotated[str, typer.Option(help=f"Some of {','.join(MODES)}; else all that the index can serve.")] = "",
        k: Annotated[
            str, typer.Option("--k", help="Depths of recall, such as 1,5; else those of 1,3,5,10 that the index fills.")
        ] = "",
        overrides: SetOption = None,
    ) -> None:
        """Score dense, lexical, hybrid and reranked search side by side: recall, MRR, nDCG, MAP, with intervals."""
        ks, named = parse_ks(k) if k else (), parse_modes(modes) if modes else ()
        splits = [part.strip() for part in split.split(",") if part.strip()]
        from cluster.store import Store
        from retrieval.judged import read_judged

        loaded = load(recipe, overrides or [])
        store = Store(loaded.store.uri)
        index = store.open("index", loaded.name)
        if questions:
            judged = read_judged(questions, splits, "--questions", *_reading(loaded))
        else:
            judged = read_judged(_questions_path(loaded), splits, "questions.path", *_reading(loaded))
        tell(evaluate_retrieval(loaded, store, index, judged, named, ks))


def _questions_path(recipe: RetrievalRecipe) -> str:
    """`questions.path` of a whole recipe: the training room owns that section, a retrieval recipe has none."""
    return str(getattr(getattr(recipe, "questions", None), "path", ""))


def _reading(recipe: RetrievalRecipe) -> tuple[QuestionColumns, tuple[CorpusConfig, ...]]:
    """The columns of a whole recipe's questions, and where SQuAD's paragraphs are looked for."""
    columns = getattr(getattr(recipe, "questions", None), "columns", None)
    return columns or QuestionColumns(), recipe.corpora()


def parse_modes(text: str) -> tuple[EvaluatedMode, ...]:
    """Modes from `dense,hybrid`, in the order in which they are shown.

    Raises:
        UserError: naming `--modes`.
    """
    named = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in named if name not in MODES]
    if unknown or not named:
        found = repr(unknown[0]) if unknown else "nothing"
        raise UserError(f"--modes: expected some of {', '.join(MODES)}, got {found}")
    return tuple(mode for mode in MODES if mode in named)


def parse_ks(text: str) -> tuple[int, ...]:
    """Depths from `1,3,5`, rising.

    Raises:
        UserError: naming `--k`.
    """
    try:
        ks = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        ks = []
    if not ks or ks[0] < 1:
        raise UserError(f"--k: expected whole numbers from 1, such as 1,3,5,10, got {text!r}")
    return tuple(ks)
