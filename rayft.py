"""The `rayft` command: parse, load the recipe, call one stage. Also `python -m rayft`.

In: a recipe file and overrides. Out: what the stages print; exit status 0, 2 for input that a user can mend (one line
on standard error), 1 for a job that failed. The only module that imports all rooms: it composes the recipe and runs
the stages in order. Heavy imports stand inside the commands, so that `--help` and a bad recipe are answered at once.
Not covered: what a stage does (the rooms).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.cli import cluster_app
from cluster.config import Section
from cluster.errors import UserError
from cluster.progress import complain, describe_seconds, say
from cluster.recipe import load_recipe
from evaluation import cli as evaluation_cli
from evaluation.config import EvaluationRecipe
from retrieval.cli import index_app
from training.cli import samples_app, train_app

if TYPE_CHECKING:
    from cluster.releases import Release
    from cluster.store import Artifact, Store

PATH_KEYS = ("model.base", "encoder.model")
"""Recipe keys that may hold a local path although their name does not say so."""

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key (repeatable).")
]


class SourceConfig(Section):
    """A generator of documents and questions that rayft brings along; recipes over files of your own have none."""

    name: Literal["factbook"]
    """The CIA World Factbook package."""
    region: str = "europe"
    """Region of the Factbook, or `all`."""
    directory: str = ".rayft/data"
    """Where its files are written; a relative path is taken from the working directory."""


class Recipe(EvaluationRecipe):
    """A complete pipeline: the sections of all rooms, and where documents and questions may be generated from."""

    source: SourceConfig | None = None


def load(path: str, overrides: list[str]) -> Recipe:
    """The recipe, with the files of its `source` (where it has one) written and named as corpus and questions."""
    return with_source(load_recipe(path, overrides, Recipe))


def with_source(recipe: Recipe) -> Recipe:
    """Writes the files of `recipe.source`. Without a source, or with corpus and questions named, nothing is written.

    Raises:
        UserError: Only one of corpus and questions is named, an unknown region, a folder that cannot be written.
    """
    source, named = recipe.source, (recipe.corpus.path, recipe.questions.path)
    if source is None or all(named):
        return recipe
    if any(named):
        missing = "questions.path" if recipe.corpus.path else "corpus.path"
        raise UserError(f"{missing} is empty: with files of your own, set both corpus.path and questions.path")
    from recipes.factbook import write_factbook

    directory = Path(source.directory) / source.name / f"{source.region}-{recipe.seed}"
    try:
        corpus, questions = write_factbook(directory, source.region, recipe.seed)
    except OSError as error:
        raise UserError(f"source.directory: cannot write {directory}: {error.strerror}") from error
    return recipe.model_copy(
        update={
            "corpus": recipe.corpus.model_copy(update={"path": str(corpus)}),
            "questions": recipe.questions.model_copy(update={"path": str(questions)}),
        }
    )


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="RAG, fine-tuning and RAFT on Ray: build, train, serve, measure and choose.",
)
app.add_typer(index_app(load), name="index")
app.add_typer(samples_app(load), name="samples")
app.add_typer(train_app(load), name="train")
evaluation_cli.register(app, load)
app.add_typer(cluster_app(load, PATH_KEYS))


def main() -> None:
    """Entry point: a `UserError` becomes one line and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except UserError as error:
        complain(f"rayft: {' '.join(str(error).split())}")
        sys.exit(2)
    except KeyboardInterrupt:
        complain("rayft: interrupted; run the same command again to go on with the unfinished stage")
        sys.exit(130)


if __name__ == "__main__":
    main()
