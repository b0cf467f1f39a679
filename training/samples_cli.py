"""`rayft samples build|show|card|export`.

In: a function that loads a recipe. Out: a Typer sub-app. Heavy imports stand inside the commands, so that `--help`
answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from cluster.store import Artifact
    from training.config import TrainingRecipe

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key (repeatable).")
]
ObjectiveOption = Annotated[Literal["raft", "dsf"], typer.Option(help="raft (with passages) or dsf (closed book).")]


def samples_app(load: Callable[[str, list[str]], TrainingRecipe]) -> typer.Typer:
    """The `samples` sub-app."""
    app = typer.Typer(no_args_is_help=True, help="Build, read and export RAFT samples.")

    @app.command()
    def build(recipe: RecipeArgument, overrides: SetOption = None) -> None:
        """Make RAFT and closed-book rows from the questions and the index, which is built first where it is stale."""
        samples_of(load(recipe, overrides or []))

    @app.command()
    def show(
        recipe: RecipeArgument,
        rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows to print.")] = 3,
        objective: ObjectiveOption = "raft",
        split: Annotated[Literal["train", "validation"], typer.Option(help="Rows that train, or that validate.")] = (
            "train"
        ),
        question: Annotated[str, typer.Option(metavar="ID", help="Only the row of this question.")] = "",
        without_golden: Annotated[
            bool, typer.Option("--without-golden", help="Only rows that do not show their golden passage.")
        ] = False,
        seed: Annotated[int | None, typer.Option(help="Draws the rows; by default the recipe's seed.")] = None,
        overrides: SetOption = None,
    ) -> None:
        """Print rows of the current samples, drawn from a seed: passages, quotes where they stand, and the target."""
        from cluster.errors import UserError
        from training.samples import sample_files, validation_files
        from training.samples_view import describe_sample, pick_rows

        if without_golden and objective == "dsf":
            raise UserError("--without-golden is about passages, which closed-book rows do not have: leave one out")
        loaded = load(recipe, overrides or [])
        artifact = _current(loaded)
        files = (sample_files if split == "train" else validation_files)(artifact, objective)
        drawn_by = loaded.seed if seed is None else seed
        picked = pick_rows(files, rows, drawn_by, question=question, without_golden=without_golden)
        if not picked:
            about = f" of the question {question!r}" if question else ""
            told = f" without a golden passage{about}" if without_golden else about
            raise UserError(
                f"{artifact.ref} has no {objective} row{told} in its {split} rows; "
                "`rayft samples card` says what was left out"
            )
        for sample in picked:
            typer.echo(describe_sample(sample, bold=sys.stdout.isatty()))
        counts = ", ".join(f"{name} {count}" for name, count in artifact.manifest.counts.items())
        typer.echo(f"{artifact.ref}: {counts}")

    @app.command()
    def card(recipe: RecipeArgument, overrides: SetOption = None) -> None:
        """Print the data card of the current samples: what they hold, what was left out and why."""
        from training.samples_view import describe_card

        artifact = _current(load(recipe, overrides or []))
        typer.echo(describe_card(artifact.manifest.measured.get("card", {}), str(artifact.ref)))

    @app.command()
    def export(
        recipe: RecipeArgument,
        out: Annotated[Path, typer.Option(help="The file to write: .jsonl or .parquet.")],
        format: Annotated[
            Literal["messages", "chat-completion", "prompt-completion", "gorilla"],
            typer.Option(help="Chat messages; the same with the target apart; plain text; gorilla's RAFT columns."),
        ] = "messages",
        split: Annotated[
            str, typer.Option(help="train, validation, test_new_questions, test_new_documents or test_new_kinds.")
        ] = "train",
        objective: ObjectiveOption = "raft",
        overrides: SetOption = None,
    ) -> None:
        """Write rows for other trainers; samples are built first where they are stale."""
        from training.export import check_export, export_samples

        check_export(out, format, split, objective)  # before anything long is begun
        loaded = load(recipe, overrides or [])
        export_samples(loaded, samples_of(loaded), out, format, split, objective)

    return app


def samples_of(recipe: TrainingRecipe) -> Artifact:
    """The samples of a recipe, bringing the index up to date before them."""
    from cluster.store import Store
    from retrieval.index import build_index
    from training.samples import build_samples, require_questions

    require_questions(recipe)
    store = Store(recipe.store.uri)
    return build_samples(recipe, store, build_index(recipe, store))


def _current(recipe: TrainingRecipe) -> Artifact:
    from cluster.store import Store

    return Store(recipe.store.uri).open("samples", recipe.name)
