"""The commands of the evaluation room: `rayft evaluate` and `rayft batch`.

In: `load`, which turns a recipe's name and overrides into a recipe. Out: two functions to register on a Typer app.
Heavy imports stand inside the commands, so that `--help` answers at once. Not covered: composing the recipe, and
turning a `UserError` into one line (rayft.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import ArtifactError, UserError

if TYPE_CHECKING:
    from cluster.store import Store
    from evaluation.config import EvaluationRecipe
    from evaluation.parts import Parts
    from evaluation.records import Prediction

Load = Callable[[str, list[str]], "EvaluationRecipe"]

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable.")
]
ReleaseOption = Annotated[str, typer.Option("--release", help="Version of the release; none takes the current one.")]


def register(app: typer.Typer, load: Load) -> None:
    """Adds `evaluate` and `batch` to `app`."""
    app.command("evaluate")(evaluate_command(load))
    app.command("batch")(batch_command(load))


def evaluate_command(load: Load) -> Callable[..., None]:
    """The function behind `rayft evaluate`."""

    def evaluate(recipe: RecipeArgument, overrides: SetOption = None, release: ReleaseOption = "") -> None:
        """Compare the strategies of a release on held-out questions: a table, report.json and report.html."""
        from cluster.session import ray_session
        from cluster.store import Store
        from evaluation.report import evaluate as run_evaluation

        config = load(recipe, overrides or [])
        store = Store(config.store.uri)
        parts, _ = _open_parts(config, store, release)
        if parts.samples is None:
            raise UserError(
                f"evaluate: the release of `{config.name}` pins no samples; run `rayft demo {recipe}` first"
            )
        with ray_session(config.ray):
            run_evaluation(
                config,
                store,
                parts.index,
                parts.samples,
                parts.adapters,
                base_digest=parts.base_digest,
                router=parts.router,
            )

    return evaluate


def batch_command(load: Load) -> Callable[..., None]:
    """The function behind `rayft batch`."""

    def batch(
        recipe: RecipeArgument,
        questions: Annotated[
            Path, typer.Option(help=".jsonl, .csv, .parquet or SQuAD .json; answers may be left out.")
        ],
        strategy: Annotated[str, typer.Option(help="Strategy that answers.")] = "auto",
        output: Annotated[
            Path | None, typer.Option(help="Also write the answers here: .parquet, or JSON lines for .jsonl.")
        ] = None,
        overrides: SetOption = None,
        release: ReleaseOption = "",
    ) -> None:
        """Answer a file of questions offline with a release; interrupted, it continues where it stopped."""
        from cluster.session import ray_session
        from cluster.store import Store

        config = load(recipe, overrides or [])
        _check_output(output)
        store = Store(config.store.uri)
        parts, version = _open_parts(config, store, release)
        with ray_session(config.ray):
            answer_file(config, store, parts, questions, strategy, output, version)

    return batch


def answer_file(
    recipe: EvaluationRecipe,
    store: Store,
    parts: Parts,
    questions: Path,
    strategy: str,
    output: Path | None,
    release: str,
) -> None:
    """Answers a questions file and says where the answers are and how they look as a whole."""
    import dataclasses

    from cluster.progress import say
    from evaluation.batch import ANSWERS_FILE, answer_all, load_predictions
    from evaluation.parts import default_run
    from evaluation.windows import write_predictions
    from retrieval.questions import read_questions

    asked = read_questions(questions, "--questions", recipe.questions.columns)
    run = default_run(recipe, store, parts)
    artifact = answer_all(recipe, store, parts, [strategy], asked, run, name_suffix="-batch")[strategy]
    predictions = load_predictions(artifact)
    say(describe_batch(recipe, parts, predictions))
    say(f"batch: answers are in {artifact.path(ANSWERS_FILE)}")
    if output:
        released = (
            dataclasses.replace(prediction, answer=dataclasses.replace(prediction.answer, release=release))
            for prediction in predictions
        )
        write_predictions(output, released)
        say(f"batch: wrote {len(predictions)} answers to {output}")


def describe_batch(recipe: EvaluationRecipe, parts: Parts, predictions: Sequence[Prediction]) -> str:
    """One line: how many were answered, cited, abstained, failed; and quality where answers are known."""
    from evaluation.metrics import METRICS, measure
    from evaluation.rubric import rubric_of
    from evaluation.table import describe_share
    from evaluation.tasks import SHOWN

    rubric = rubric_of(recipe, parts, [prediction.question for prediction in predictions])
    measured = measure(predictions, rubric, resamples=recipe.evaluate.bootstrap_resamples, seed=recipe.seed)
    shown = (*SHOWN[recipe.evaluate.task].plotted, "verified_answers", "abstained", "failed")
    figures = (
        f"{METRICS[name].label} {describe_share(measured[name].to_json())}" for name in shown if name in measured
    )
    return f"batch: {len(predictions)} answers: {', '.join(figures)} (95% intervals)"


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"--output: {output} must end in .parquet or .jsonl")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}; create it first")


def _open_parts(recipe: EvaluationRecipe, store: Store, version: str) -> tuple[Parts, str]:
    """The parts that a release pins, and the release's version."""
    from cluster.releases import open_release
    from evaluation.parts import Parts

    release = open_release(store, recipe.name, version or None)
    if release.index is None:
        raise ArtifactError(
            f"{release.ref} has no index: `rayft evaluate` and `rayft batch` take a release that has one; name it with "
            "--release"
        )
    parts = Parts.of(
        recipe,
        store.open_ref(release.index),
        store.open_ref(release.samples) if release.samples else None,
        {name: store.open_ref(ref) for name, ref in release.adapters.items()},
        router=store.open_ref(release.router) if release.router else None,
    )
    if release.base_digest and release.base_digest != parts.base_digest:
        raise ArtifactError(
            f"model.base: {recipe.model.base} (sha256 {parts.base_digest[:16]}) is not the base model of {release.ref} "
            f"(sha256 {release.base_digest[:16]}); set model.base to the released model, or train and release again"
        )
    return parts, release.version
