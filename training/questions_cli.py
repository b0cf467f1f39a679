"""`rayft questions generate`.

In: a function that loads a recipe, and one that opens a local teacher model (serving's engine, which this room may not
import). Out: a Typer sub-app. Heavy imports stand inside the command, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from training.asking import LocalTeacher
    from training.config import TrainingRecipe
    from training.endpoint import Teacher

R = TypeVar("R", bound="TrainingRecipe")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key (repeatable).")
]


def questions_app(
    load: Callable[[str, list[str]], R],
    local_teacher: Callable[[R], contextlib.AbstractContextManager[LocalTeacher]],
) -> typer.Typer:
    """The `questions` sub-app.

    Args:
        load: Reads a recipe with overrides.
        local_teacher: Opens the model of a recipe whose `teacher.engine` is `local`; asked only then.
    """
    app = typer.Typer(no_args_is_help=True, help="Write questions with a teacher model.")

    @app.callback()
    def group() -> None:
        """Write questions with a teacher model."""

    @app.command()
    def generate(
        recipe: RecipeArgument,
        limit: Annotated[
            int | None,
            typer.Option(min=1, help="Most chunks to ask about, spread over documents; none asks about all."),
        ] = None,
        out: Annotated[
            Path | None, typer.Option(help="The questions; none writes <teacher.directory>/<name>/questions.jsonl.")
        ] = None,
        overrides: SetOption = None,
    ) -> None:
        """Ask a teacher for questions about the index's chunks; goes on where an earlier run was interrupted."""
        generate_for(load(recipe, overrides or []), local_teacher, limit, out)

    return app


def generate_for(
    recipe: R,
    local_teacher: Callable[[R], contextlib.AbstractContextManager[LocalTeacher]],
    limit: int | None,
    out: Path | None,
) -> Path:
    """Generates the questions of a recipe, bringing its index up to date before; returns where they are."""
    from cluster.progress import say
    from cluster.store import Store
    from retrieval.index import build_index
    from retrieval.retriever import Retriever
    from training.teacher import check_output, generate_questions
    from training.teacher_prompt import load_question_texts

    directory = Path(recipe.teacher.directory).expanduser() / recipe.name
    out = out or directory / "questions.jsonl"
    texts = load_question_texts(recipe.teacher, recipe.language)
    check_output(out)
    with _open_teacher(recipe, local_teacher) as teacher:
        index = build_index(recipe, Store(recipe.store.uri))
        retriever = Retriever.open(index, recipe.encoder, recipe.search)
        generate_questions(
            recipe.teacher,
            texts,
            recipe.seed,
            retriever.chunks,
            teacher,
            directory / "journal.jsonl",
            out,
            limit=limit,
        )
    say(f"questions: next, `rayft samples build RECIPE --set questions.path={out}`")
    return out


@contextlib.contextmanager
def _open_teacher(
    recipe: R, local_teacher: Callable[[R], contextlib.AbstractContextManager[LocalTeacher]]
) -> Iterator[Teacher]:
    if recipe.teacher.engine == "local":
        with local_teacher(recipe) as teacher:
            yield teacher
    else:
        from training.endpoint import Address, EndpointTeacher

        yield EndpointTeacher(recipe.teacher, Address.from_environment(recipe.teacher))
