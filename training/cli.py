"""`rayft samples build|show` and `rayft train lora|retriever`.

In: a function that loads a recipe. Out: Typer sub-apps. Heavy imports stand inside the commands, so that `--help`
answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from cluster.store import Artifact
    from training.config import TrainingRecipe
    from training.records import RaftSample

Load = Callable[[str, list[str]], "TrainingRecipe"]

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key (repeatable).")
]


def samples_app(load: Load) -> typer.Typer:
    """The `samples` sub-app."""
    app = typer.Typer(no_args_is_help=True, help="Build and read RAFT samples.")

    @app.command()
    def build(recipe: RecipeArgument, overrides: SetOption = None) -> None:
        """Make RAFT and closed-book rows from the questions and the index, which is built first where it is stale."""
        samples_of(load(recipe, overrides or []))

    @app.command()
    def show(
        recipe: RecipeArgument,
        rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows to print.")] = 3,
        objective: Annotated[Literal["raft", "dsf"], typer.Option(help="Which rows.")] = "raft",
        overrides: SetOption = None,
    ) -> None:
        """Print rows of the current samples, and how they are made up."""
        from cluster.store import Store
        from training.samples import load_samples

        loaded = load(recipe, overrides or [])
        artifact = Store(loaded.store.uri).open("samples", loaded.name)
        for sample in load_samples(artifact, objective)[:rows]:
            typer.echo(describe_sample(sample))
        counts = ", ".join(f"{name} {count}" for name, count in artifact.manifest.counts.items())
        typer.echo(f"{artifact.ref}: {counts}")

    return app


def samples_of(recipe: TrainingRecipe) -> Artifact:
    """The samples of a recipe, bringing the index up to date before them."""
    from cluster.store import Store
    from retrieval.index import build_index
    from training.samples import build_samples, require_questions

    require_questions(recipe)
    store = Store(recipe.store.uri)
    return build_samples(recipe, store, build_index(recipe, store))


def describe_sample(sample: RaftSample) -> str:
    """A row as a person reads it: question, passages with the golden one marked, target."""
    lines = [f"--- {sample.sample_id}", f"question: {sample.question}"]
    golden = sample.golden or (False,) * len(sample.passages)
    for passage, is_golden in zip(sample.passages, golden, strict=True):
        mark = "golden    " if is_golden else "distractor"
        lines.append(f"{mark} {passage.title} | {passage.heading}: {' '.join(passage.text.split())}")
    return "\n".join([*lines, f"target: {sample.target}", ""])


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
