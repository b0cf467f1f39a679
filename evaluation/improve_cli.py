"""`rayft feedback improve`.

In: a loader of recipes. Out: a function to register on the `feedback` app (rayft.py): serving, which owns the other
commands, knows nothing of evaluation. Heavy imports stand inside, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli import RecipeArgument, SetOption

if TYPE_CHECKING:
    from evaluation.config import EvaluationRecipe

Load = Callable[[str, list[str]], "EvaluationRecipe"]


def improve_command(load: Load) -> Callable[..., None]:
    """The function behind `rayft feedback improve`."""

    def improve(
        recipe: RecipeArgument,
        out: Annotated[
            Path | None,
            typer.Option(help="Questions file to write; none takes questions.train_path, or one beside the feedback."),
        ] = None,
        margin: Annotated[
            float, typer.Option(min=0, help="Difference in F1 (or the task's metric) that refuses by itself.")
        ] = 0.02,
        tenant: Annotated[str | None, typer.Option("--tenant", help="Only feedback of this tenant.")] = None,
        overrides: SetOption = None,
    ) -> None:
        """Train on accepted feedback, compare with the release that is served, and promote what is not worse.

        Export, samples, training and the evaluation of both releases on the same held-out questions. Exit status 1
        where the candidate is worse; the release stays as it is.
        """
        from cluster.session import ray_session
        from cluster.store import Store
        from evaluation.improvement import improve as run_improvement

        config = load(recipe, overrides or [])
        place = out or Path(config.questions.train_path or f".rayft/feedback/{config.name}.jsonl")
        with ray_session(config.ray):
            run_improvement(config, Store(config.store.uri), place, margin=margin, tenant=tenant)

    return improve
