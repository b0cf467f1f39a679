"""The fine-tuning stage: Ray Train workers train a LoRA adapter under DeepSpeed and publish a PEFT directory.

In: a samples artifact, the base model, the recipe's `lora` and `train` sections, an objective (`raft`, into which
`train.mixture` may mix closed-book rows, or `dsf` for the closed-book adapter). Out: an `adapter` artifact that plain
PEFT loads: `adapter_model.safetensors`, `adapter_config.json`, `history.jsonl` and `curve.png` with the run's figures,
`tensorboard/`. A RAFT adapter that is significantly worse than the one that the promoted release serves is not
published (`NotBetterError`), unless forced; what was trained stays in the work place, so that forcing trains nothing
again.
Not covered: batches (training/batching.py), the work of one worker (training/worker.py), what is measured at its end
(training/final_checks.py), what is compared (training/replacement.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.errors import NotBetterError, UserError
from cluster.model_source import model_digest
from cluster.progress import complain, say
from cluster.session import ray_session
from cluster.stage import Outcome, Plan, digest_path, run_stage
from training.adapter_report import describe_run, general_warning, measured_figures
from training.base_model import base_model_directory
from training.config import TrainingRecipe
from training.curve import draw_curve
from training.format import FORMAT_VERSION, PromptFormat, prompt_path
from training.ray_train import fit
from training.records import Objective
from training.replacement import Comparison, compare, find_served
from training.samples import load_validation
from training.token_rows import write_token_rows
from training.trackers import check_tracker
from training.worker import WorkerConfig, WorkerReport, train

if TYPE_CHECKING:
    from cluster.store import Artifact, Attempt, Store

ADAPTER_FORMAT = 2
ROLES: dict[Objective, str] = {"raft": "raft", "dsf": "finetuned"}


def adapter_plan(recipe: TrainingRecipe, samples: Artifact, objective: Objective) -> Plan:
    """What an adapter depends on: not workers, threads or GPUs, ZeRO stage, offload, micro-batches, packing,
    checkpoints, the probe or the tracker."""
    settings = recipe.train
    stops = patience(recipe, objective)
    trained: dict[str, Any] = {
        "learning_rate": settings.learning_rate,
        "warmup_fraction": settings.warmup_fraction,
        "epochs": epochs(recipe, objective),
        "batch_rows": batch_rows(recipe, objective),
        "max_tokens": settings.max_tokens,
        "patience": stops,
    }
    if stops:  # without patience the last state is kept, however often it was measured
        trained["validations_per_epoch"] = settings.validations_per_epoch
    if objective == "raft" and settings.mixture.get("dsf"):
        trained["mixture"] = dict(settings.mixture)
    config: dict[str, Any] = {
        "objective": objective,
        "lora": recipe.lora.model_dump(),
        "train": trained,
        "base_digest": model_digest(base_model_directory(recipe.model)),
        "prompt_format": FORMAT_VERSION,
    }
    if recipe.model.precision != "auto":
        config["precision"] = recipe.model.precision
    name = f"{recipe.name}-{ROLES[objective]}"
    return Plan("adapter", name, config, {}, {"samples": samples.ref}, ADAPTER_FORMAT, recipe.seed)


def epochs(recipe: TrainingRecipe, objective: Objective) -> int:
    """Passes over the objective's rows."""
    return recipe.train.epochs if objective == "raft" else recipe.train.dsf_epochs


def batch_rows(recipe: TrainingRecipe, objective: Objective) -> int:
    """Rows per optimiser step, over all workers."""
    return recipe.train.batch_rows if objective == "raft" else recipe.train.dsf_batch_rows


def patience(recipe: TrainingRecipe, objective: Objective) -> int:
    """Validations without a gain that end training; 0: none do."""
    return recipe.train.patience if objective == "raft" else recipe.train.dsf_patience


def train_adapters(
    recipe: TrainingRecipe, store: Store, samples: Artifact, objectives: Sequence[Objective], *, force: bool = False
) -> dict[str, Artifact]:
    """The adapters of several objectives, by role; all are trained before one that is worse is told of.

    Raises:
        UserError: As `train_adapter`.
        NotBetterError: Of each that was not published, in one line.
    """
    adapters, refused = {}, []
    for objective in objectives:
        try:
            adapters[ROLES[objective]] = train_adapter(recipe, store, samples, objective, force=force)
        except NotBetterError as error:
            refused.append(str(error))
    if refused:
        raise NotBetterError("; ".join(refused))
    return adapters


def train_adapter(
    recipe: TrainingRecipe, store: Store, samples: Artifact, objective: Objective, *, force: bool = False
) -> Artifact:
    """The adapter of `recipe` for an objective, trained unless the same exists.

    Args:
        recipe: With the model and how to train it.
        store: Where adapters and releases are.
        samples: What to learn from.
        objective: Of which rows.
        force: Publish it even where it is worse than the one that is served.

    Raises:
        UserError: Workers that the cluster cannot hold, more workers than rows in a step, a loss that is not finite,
            another prompt file than that of the samples, or a tracker that cannot be used.
        NotBetterError: The RAFT adapter is significantly worse than that of the promoted release, and `force` is not
            set.
    """
    rows = batch_rows(recipe, objective)
    if recipe.train.workers > rows:
        key = "train.batch_rows" if objective == "raft" else "train.dsf_batch_rows"
        raise UserError(
            f"train.workers is {recipe.train.workers} but {key} is {rows}: each worker needs a row of a step"
        )
    _refuse_other_prompt(recipe, samples)
    check_tracker(recipe)
    plan = adapter_plan(recipe, samples, objective)
    return run_stage(store, plan, functools.partial(_build, recipe, store, samples, objective, plan, force))


def _refuse_other_prompt(recipe: TrainingRecipe, samples: Artifact) -> None:
    """Targets were written for the prompt that the samples were built with: another must not be trained in."""
    path = prompt_path(recipe.prompt, recipe.language)
    if samples.manifest.inputs.get("prompt.path") != digest_path(str(path), key="prompt.path"):
        raise UserError(
            f"prompt.path: {path} is not what {samples.ref} was built with; run `rayft samples build RECIPE` first"
        )


def _build(
    recipe: TrainingRecipe,
    store: Store,
    samples: Artifact,
    objective: Objective,
    plan: Plan,
    force: bool,
    attempt: Attempt,
) -> Outcome:
    role = ROLES[objective]
    served = find_served(store, recipe.name, role, plan)
    if not load_validation(samples, objective):
        say(f"train {role}: there are no validation rows (samples.validation_rows): trains to the end unmeasured")
    work = store.work_uri(attempt.ref)
    config = WorkerConfig(
        recipe=recipe.training_values(),
        prompt_format=PromptFormat.load(recipe.prompt, recipe.language),
        samples=samples,
        objective=objective,
        epochs=epochs(recipe, objective),
        batch_rows=batch_rows(recipe, objective),
        patience=patience(recipe, objective),
        tokens=f"{work}/tokens",
        work=work,
        plan=str(attempt.ref),
        uri=attempt.uri,
        replaces=None if isinstance(served, str) else served,
    )
    with ray_session(recipe.ray):
        counts = write_token_rows(recipe, samples, objective, config.prompt_format, config.tokens)
        report = _fit(recipe, config, f"{work}/ray-train")
    measured = measured_figures(recipe, report)
    for line in describe_run(role, report):
        say(line)
    if warning := general_warning(role, report.checks.general.difference(recipe.seed)):
        complain(warning)
    validated = report.checks.validation
    new = None if validated is None else validated.rows
    compared = compare(served, new, report.checks.replaced, samples, objective, recipe.seed)
    worse = _refuse_worse(objective, compared, force=force)
    with store.blames_uri():
        draw_curve(report.history, attempt.directory / "curve.png", title=f"{attempt.ref.name} {attempt.ref.version}")
    return Outcome(
        counts={
            "rows": counts.rows,
            "rows_too_long": counts.too_long,
            "steps": len(report.losses),
            "tokens": report.tokens,
            "target_tokens": report.target_tokens,
            "trainable_parameters": report.trainable_parameters,
        },
        measured={
            **measured,
            "replaces": compared.figures() if isinstance(compared, Comparison) else compared,
            "worse_than_served": worse,
        },
    )


def _fit(recipe: TrainingRecipe, config: WorkerConfig, storage: str) -> WorkerReport:
    """Runs the workers to their end and returns what the first of them reports."""
    label = f"train {ROLES[config.objective]}"
    report: WorkerReport = fit(train, config, recipe.train, label=label, unit="tokens", storage=storage)
    return report


def _refuse_worse(objective: Objective, compared: Comparison | str | None, *, force: bool) -> bool:
    """Says how the adapter compares with the served one; returns whether it is worse, and published all the same.

    Raises:
        NotBetterError: It is a RAFT adapter, worse, and not forced.
    """
    role = ROLES[objective]
    if isinstance(compared, str):
        say(f"train {role}: not compared with the promoted release's adapter: {compared}")
    if not isinstance(compared, Comparison):
        return False
    if not compared.worse:
        say(f"train {role}: {compared.describe()}")
    elif objective == "dsf":
        # Its validation questions ask for facts that neither was told: the better it knows what it was told, the
        # surer and the more wrong it is there.
        told = "worse at facts that it was never told, which alone is no reason to refuse it"
        complain(f"train {role}: {told}: {compared.describe()}")
    elif force:
        say(f"train {role}: worse, and published by force: {compared.describe()}")
    else:
        raise NotBetterError(
            f"train {role}: not published, it is worse: {compared.describe()}; the release stays as it is, "
            "`rayft train lora RECIPE --force` publishes it all the same, without training again"
        )
    return compared.worse
