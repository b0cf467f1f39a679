"""The fine-tuning stage: Ray Train workers train a LoRA adapter under DeepSpeed and publish a PEFT directory.

In: a samples artifact, the base model, the recipe's `lora` and `train` sections, an objective (`raft`, or `dsf` for
the closed-book adapter). Out: an `adapter` artifact that plain PEFT loads: `adapter_model.safetensors`,
`adapter_config.json`, and `loss.json` with the loss of every step.
Not covered: resuming in the middle of a run, validation during training, batches (training/batching.py) and the work
of one worker (training/worker.py).
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.model_source import model_digest
from cluster.session import ray_session
from cluster.stage import Outcome, Plan, digest_path, run_stage
from training.base_model import base_model_directory
from training.config import TrainingRecipe
from training.format import FORMAT_VERSION, PromptFormat, prompt_path
from training.ray_train import fit
from training.worker import Objective, WorkerConfig, WorkerReport, run_worker

if TYPE_CHECKING:
    from cluster.store import Artifact, Attempt, Store

ADAPTER_FORMAT = 1
ROLES: dict[Objective, str] = {"raft": "raft", "dsf": "finetuned"}


def adapter_plan(recipe: TrainingRecipe, samples: Artifact, objective: Objective) -> Plan:
    """What an adapter depends on; not the number of workers, threads or GPUs, nor the ZeRO stage."""
    train = recipe.train
    config: dict[str, Any] = {
        "objective": objective,
        "lora": recipe.lora.model_dump(),
        "train": {
            "learning_rate": train.learning_rate,
            "warmup_fraction": train.warmup_fraction,
            "epochs": epochs(recipe, objective),
            "batch_rows": batch_rows(recipe, objective),
            "max_tokens": train.max_tokens,
        },
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


def train_adapter(recipe: TrainingRecipe, store: Store, samples: Artifact, objective: Objective) -> Artifact:
    """The adapter of `recipe` for an objective, trained unless the same exists.

    Raises:
        UserError: Workers that the cluster cannot hold, more workers than rows in a step, a loss that is not finite,
            or another prompt file than that of the samples.
    """
    rows = batch_rows(recipe, objective)
    if recipe.train.workers > rows:
        key = "train.batch_rows" if objective == "raft" else "train.dsf_batch_rows"
        raise UserError(
            f"train.workers is {recipe.train.workers} but {key} is {rows}: each worker needs a row of a step"
        )
    _refuse_other_prompt(recipe, samples)
    plan = adapter_plan(recipe, samples, objective)
    return run_stage(store, plan, functools.partial(_build, recipe, store, samples, objective))


def _refuse_other_prompt(recipe: TrainingRecipe, samples: Artifact) -> None:
    """Targets were written for the prompt that the samples were built with: another must not be trained in."""
    path = prompt_path(recipe.prompt, recipe.language)
    if samples.manifest.inputs.get("prompt.path") != digest_path(str(path), key="prompt.path"):
        raise UserError(
            f"prompt.path: {path} is not what {samples.ref} was built with; run `rayft samples build RECIPE` first"
        )


def _build(recipe: TrainingRecipe, store: Store, samples: Artifact, objective: Objective, attempt: Attempt) -> Outcome:
    config = WorkerConfig(
        recipe=recipe.model_dump(include=set(TrainingRecipe.model_fields)),
        prompt_format=PromptFormat.load(recipe.prompt, recipe.language),
        samples=samples,
        objective=objective,
        epochs=epochs(recipe, objective),
        batch_rows=batch_rows(recipe, objective),
        uri=attempt.uri,
    )
    with ray_session(recipe.ray):
        report = _fit(recipe, config, str(store.work_directory(attempt.ref)))
    losses = [round(loss, 5) for loss in report.losses]
    (attempt.directory / "loss.json").write_text(json.dumps({"loss_per_target_token": losses}), encoding="utf-8")
    last = losses[-max(1, len(losses) // 10) :]
    return Outcome(
        counts={
            "rows": report.rows,
            "rows_too_long": report.rows_too_long,
            "steps": len(losses),
            "tokens": report.tokens,
            "target_tokens": report.target_tokens,
            "trainable_parameters": report.trainable_parameters,
        },
        measured={
            "training_seconds": round(report.seconds, 2),
            "tokens_per_second": round(report.tokens / report.seconds, 1),
            "padding_share": round(report.padding_share, 4),
            "final_loss": round(sum(last) / len(last), 4),
            "workers": recipe.train.workers,
            "zero_stage": recipe.train.zero_stage,
            "device": report.device,
            "precision": report.precision,
        },
    )


def _fit(recipe: TrainingRecipe, config: WorkerConfig, storage: str) -> WorkerReport:
    """Runs the workers to their end and returns what the first of them reports."""
    label = f"train {ROLES[config.objective]}"
    report: WorkerReport = fit(
        run_worker, {"config": config}, recipe.train, label=label, unit="tokens", storage=storage
    )
    return report
