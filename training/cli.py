"""`rayft train lora|retriever|router|merge`.

In: a function that loads a recipe. Out: Typer sub-apps. Heavy imports stand inside the commands, so that `--help`
answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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
        force: Annotated[
            bool, typer.Option("--force", help="Publish an adapter even where it is worse than the one that is served.")
        ] = False,
        overrides: SetOption = None,
    ) -> None:
        """Train LoRA adapters with Ray Train and DeepSpeed, on samples that are built first where they are stale.

        A RAFT adapter that is significantly worse on validation rows than that of the promoted release is not
        published: exit status 1.
        """
        from cluster.store import Store
        from training.lora import ROLES, train_adapters

        loaded = load(recipe, overrides or [])
        chosen = [name for name in ROLES if objective in (name, "both")]
        train_adapters(loaded, Store(loaded.store.uri), samples_of(loaded), chosen, force=force)

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

    @app.command()
    def router(recipe: RecipeArgument, overrides: SetOption = None) -> None:
        """Fit the intent classifier that `auto` routes by to labelled utterances (`router.examples`)."""
        from cluster.store import Store
        from training.router import train_router

        loaded = load(recipe, overrides or [])
        train_router(loaded, Store(loaded.store.uri))

    @app.command()
    def merge(
        recipe: RecipeArgument,
        objective: Annotated[
            Literal["raft", "dsf"], typer.Option(help="Which adapter: raft (with passages) or dsf (closed book).")
        ] = "raft",
        release: Annotated[
            str | None, typer.Option(help="Version of the release that pins the adapter; default: the current adapter.")
        ] = None,
        out: Annotated[
            Path | None, typer.Option(help="New directory of the merged model; default: named after the adapter.")
        ] = None,
        overrides: SetOption = None,
    ) -> None:
        """Add an adapter into the base model's weights and write the result as a model of its own (safetensors)."""
        from cluster.store import Store
        from training.merge import chosen_adapter
        from training.merge import merge as merge_adapter

        loaded = load(recipe, overrides or [])
        adapter = chosen_adapter(loaded, Store(loaded.store.uri), objective, release)
        merge_adapter(loaded, adapter, out or Path(f"{adapter.ref.name}-{adapter.ref.version}-merged"))

    return app
