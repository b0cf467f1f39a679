"""`rayft train lora|retriever`.

In: a function that loads a recipe. Out: Typer sub-apps. Heavy imports stand inside the commands, so that `--help`
answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training.samples_cli import samples_of

if TYPE_CHECKING:
    from training.config import TrainingRecipe

Load = Callable[[str, list[str]], "TrainingRecipe"]

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key (repeatable).")
]


def train_app(load: Load) -> typer.Typer:
    """The `train` sub-app."""
    app = typer.Typer(no_args_is_help=True, help="Fine-tune on the current samples.")

    @app.callback()
    def group() -> None:
        """Fine-tune on the current samples."""

    @app.command()
    def lora(
        recipe: RecipeArgument,
        objective: Annotated[
            Literal["raft", "dsf", "both"], typer.Option(help="raft (with passages), dsf (closed book), or both.")
        ] = "both",
        overrides: SetOption = None,
    ) -> None:
        """Train LoRA adapters with Ray Train and DeepSpeed, on samples that are built first where they are stale."""
        from cluster.store import Store
        from training.lora import train_adapter

        loaded = load(recipe, overrides or [])
        store = Store(loaded.store.uri)
        samples = samples_of(loaded)
        if objective in ("raft", "both"):
            train_adapter(loaded, store, samples, "raft")
        if objective in ("dsf", "both"):
            train_adapter(loaded, store, samples, "dsf")

    @app.command()
    def retriever(
        recipe: RecipeArgument,
        force: Annotated[
            bool, typer.Option("--force", help="Publish the encoder even where it does not win on held-out questions.")
        ] = False,
        overrides: SetOption = None,
    ) -> None:
        """Fine-tune the encoder on the questions, and rebuild the index with it. Exit status 1 if it does not win."""
        from cluster.errors import NotBetterError
        from cluster.progress import complain, say
        from cluster.store import Store
        from retrieval.index import build_index
        from training.retriever import train_retriever

        loaded = load(recipe, overrides or [])
        store = Store(loaded.store.uri)
        try:
            train_retriever(loaded, store, force=force)
        except NotBetterError as error:
            complain(f"rayft: {error}")
            if store.current("encoder", loaded.name) is not None:
                build_index(loaded, store)  # mining may have built an untuned index, and made it current
            raise typer.Exit(1) from None
        if loaded.encoder.tuned == "never":
            say("retriever: encoder.tuned is never: the index keeps the encoder as configured")
        build_index(loaded, store)

    return app
