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
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.model_source import model_digest
from cluster.progress import track
from cluster.session import ray_session
from cluster.stage import Outcome, Plan, digest_path, run_stage
from training.base_model import base_model_directory
from training.config import TrainingRecipe
from training.format import FORMAT_VERSION, PromptFormat, prompt_path
from training.worker import Objective, WorkerConfig, WorkerReport, run_worker

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from cluster.store import Artifact, Attempt, Store

ADAPTER_FORMAT = 1
ROLES: dict[Objective, str] = {"raft": "raft", "dsf": "finetuned"}
POLL_S = 0.5


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
        _refuse_impossible(recipe)
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


def _refuse_impossible(recipe: TrainingRecipe) -> None:
    """Ray Train would wait for ever for workers that no node can hold."""
    import ray

    train, has = recipe.train, ray.cluster_resources()
    needs = {"CPU": train.workers * train.cpus_per_worker, "GPU": train.workers * train.gpus_per_worker}
    for resource, needed in needs.items():
        if needed > has.get(resource, 0):
            raise UserError(
                f"train.workers: {train.workers} workers need {needed:g} {resource}s, the cluster has "
                f"{has.get(resource, 0):g}; lower train.workers or train.{resource.lower()}s_per_worker"
            )


def _fit(recipe: TrainingRecipe, config: WorkerConfig, storage: str) -> WorkerReport:
    """Runs the workers to their end and returns what the first of them reports."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    train = recipe.train
    label = f"train {ROLES[config.objective]}"
    with _board() as board, _shown_progress(board, label):
        trainer = TorchTrainer(
            run_worker,
            train_loop_config={"config": config, "board": board},
            scaling_config=ScalingConfig(
                num_workers=train.workers,
                use_gpu=train.gpus_per_worker > 0,
                resources_per_worker={"CPU": train.cpus_per_worker}
                | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {}),
            ),
            torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
            run_config=RunConfig(name=label.replace(" ", "-"), storage_path=storage, failure_config=FailureConfig(0)),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise _blame(error) from error
        import ray

        report: WorkerReport = ray.get(board.report.remote())
        return report


def _blame(error: Exception) -> Exception:
    """The `UserError` that a worker raised, inside what Ray Train makes of it; any other error as it is."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    failures.append(getattr(error, "controller_failure", None) or error)
    for failure in failures:
        seen: BaseException | None = failure
        while seen is not None:
            # Ray's own wrapper is a `UserError` as well, but its text is the traceback.
            original = getattr(seen, "cause", None) or seen
            if isinstance(original, UserError):
                return original
            seen = seen.__cause__
    return error


class _Board:
    """Where workers leave their progress, and the first worker its report; a Ray actor."""

    def __init__(self) -> None:
        self._done: tuple[int, int, dict[str, Any]] = (0, 0, {})
        self._report: WorkerReport | None = None

    def set(self, done: int, total: int, figures: dict[str, Any]) -> None:
        """Tokens trained on so far, tokens in all, figures to show."""
        self._done = (done, total, figures)

    def done(self) -> tuple[int, int, dict[str, Any]]:
        """What `set` was last told."""
        return self._done

    def finish(self, report: WorkerReport) -> None:
        """The first worker's report."""
        self._report = report

    def report(self) -> WorkerReport | None:
        """What `finish` was told."""
        return self._report


@contextmanager
def _board() -> Iterator[ActorHandle]:
    import ray

    board = ray.remote(_Board).options(num_cpus=0).remote()
    try:
        yield board
    finally:
        ray.kill(board)


@contextmanager
def _shown_progress(board: ActorHandle, label: str) -> Iterator[None]:
    """Shows tokens, rate, ETA and loss while the block runs; the trainer itself blocks until the end."""
    import ray

    ended = threading.Event()

    def show() -> None:
        done, total = 0, 0
        while not total and not ended.is_set():
            time.sleep(POLL_S)
            _, total, _ = ray.get(board.done.remote())
        if not total:
            return
        with track(label, total, "tokens") as bar:
            while done < total:
                stop = ended.is_set()
                now, _, figures = ray.get(board.done.remote())
                if now > done:
                    bar.advance(now - done, **figures)
                    done = now
                if stop:
                    break
                time.sleep(POLL_S)

    watcher = threading.Thread(target=show, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=10)
