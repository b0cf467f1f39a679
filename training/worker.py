"""One Ray Train worker: the loop over optimiser steps, validation, checkpoints, the adapter at the end.

In: a `WorkerConfig`, the same for every worker. Out: the PEFT directory and `history.jsonl`, written by the first
worker, and its `WorkerReport`. Every worker follows the same plan of steps and takes its share of each; a step's loss
is the mean over the target tokens of all workers and micro-batches, so that the result depends on neither of them.
What an interrupted run left in its work place is taken up, by any number of workers under any ZeRO stage.
Not covered: starting workers (training/ray_train.py), publishing (training/lora.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import UserError
from cluster.storage import OBJECT_SCHEMES
from training.adapter_checkpoint import Checkpoint, Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from training.adapter_files import copy_directory, save_adapter
from training.adapter_report import tokens_per_second
from training.adapter_state import (
    adapter_weights,
    all_finite,
    optimizer_state,
    set_adapter_weights,
    set_optimizer_state,
    trainable_parameters,
)
from training.base_model import base_model_directory, load_tokenizer, model_dtype
from training.batching import make_batch, micro_batches, plan_steps, summed_loss
from training.config import TrainingRecipe
from training.final_checks import FinalFigures, final_checks
from training.flops import lora_shape, mfu
from training.format import PromptFormat
from training.lora_engine import learning_rate_at, load_engine, one_reduction, set_learning_rate
from training.records import Objective
from training.token_rows import TokenRows
from training.trackers import Tracker, open_tracker
from training.validation import EarlyStop, Measured, Validator, validation_steps

if TYPE_CHECKING:
    import torch

    from cluster.store import Artifact

HISTORY = "history.jsonl"
TRACKER = "tensorboard"


class Tell(Protocol):
    """What the loop tells the user; see `training.ray_train.Teller`."""

    def __call__(self, done: int, total: int, figures: dict[str, Any]) -> None:
        """Tokens done so far, tokens in all, figures to show."""

    def begin(self, done: int, total: int) -> None:
        """Tokens that an earlier run did, tokens in all."""

    def say(self, line: str) -> None:
        """A line for the user."""


@dataclass(frozen=True)
class WorkerConfig:
    """What every worker is told."""

    recipe: dict[str, Any]
    prompt_format: PromptFormat
    samples: Artifact
    objective: Objective
    epochs: int
    batch_rows: int
    patience: int
    """Validations without a gain that end training; 0: none do, and the last state is kept."""
    tokens: str
    """Where `training.token_rows.write_token_rows` wrote."""
    work: str
    """Where checkpoints lie; any worker can write there."""
    plan: str
    """The artifact that is built: checkpoints of another are never used."""
    uri: str
    """Where the adapter is written; any worker can write there."""
    replaces: Artifact | None = None
    """An adapter to measure on the same validation rows."""


@dataclass(frozen=True)
class WorkerReport:
    """What the first worker says of the run; figures include what interrupted runs did before."""

    steps: int
    """Planned; fewer are taken when training stops early."""
    losses: tuple[float, ...]
    """Mean cross-entropy per target token of every step taken."""
    history: tuple[dict[str, Any], ...]
    """Rows of `history.jsonl`."""
    best_step: int
    """Steps taken when the state that is kept was measured."""
    stopped_early: bool
    resumed_at: int
    """Step that an earlier run had reached, 0 for a fresh one."""
    tokens: int
    target_tokens: int
    seconds: float
    """Of steps and validations."""
    padding_share: float
    trainable_parameters: int
    device: str
    precision: str
    mfu: float | None
    """Model FLOPs utilisation over the steps; none where the device has no known peak."""
    checks: FinalFigures
    """What was measured of the adapter that is left."""


def train(config: WorkerConfig, rank: int, world_size: int, tell: Tell) -> WorkerReport:
    """Trains; torch.distributed must be initialised.

    Args:
        config: The same on every worker.
        rank: This worker's number, from 0.
        world_size: Number of workers.
        tell: Called after every step with tokens done, tokens in all, and figures.

    Raises:
        UserError: The loss is not finite, or a checkpoint cannot be written.
    """
    import torch

    recipe = TrainingRecipe.model_validate(config.recipe)
    if recipe.train.gpus_per_worker == 0:
        torch.set_num_threads(recipe.train.threads_per_worker)
    run = _Run(config, recipe, rank, world_size, tell)
    try:
        run.train()
        return run.finish()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "train.micro_batch_tokens: the GPU's memory is too small for "
            f"{recipe.train.micro_batch_tokens} tokens at once; lower it, or set train.gradient_checkpointing"
        ) from error
    finally:
        run.close()


class _Run:
    """The state of one worker."""

    def __init__(self, config: WorkerConfig, recipe: TrainingRecipe, rank: int, world_size: int, tell: Tell) -> None:
        self.config, self.recipe, self.rank, self.world_size, self.tell = config, recipe, rank, world_size, tell
        self.rows = TokenRows.open(config.tokens)
        self.steps = plan_steps(self.rows.lengths, config.batch_rows, config.epochs, recipe.seed)
        self.validate_after = set(validation_steps(len(self.steps), config.epochs, recipe.train.validations_per_epoch))
        self.validator = Validator.open(recipe, config.samples, config.objective, config.prompt_format)
        self.pad = load_tokenizer(base_model_directory(recipe.model)).pad_token_id
        self.dtype = model_dtype(recipe.model.precision)
        self.engine = load_engine(recipe, self.dtype)
        self.early = EarlyStop(config.patience)
        self.progress = Progress(plan=f"{config.plan}/{_digest(self.steps)}")
        self.best: dict[str, torch.Tensor] = {}
        """Adapter weights of the state that is kept."""
        self.measured: Measured | None = None
        """Its validation, where this process made it."""
        self.saved_at = time.monotonic()
        self.saved_step = 0
        self.resumed_at = self._resume()
        self.tracker = self._open_tracker()
        shape = lora_shape(self.engine.module)
        target_share = float(self.rows.target_tokens.sum() / self.rows.lengths.sum())
        mean_tokens = float(self.rows.lengths.mean())
        self.flops = None if shape is None else shape.flops_per_token(mean_tokens, target_share)

    @property
    def device_name(self) -> str:
        """A GPU's name, or `cpu`."""
        import torch

        return torch.cuda.get_device_name() if self.recipe.train.gpus_per_worker else "cpu"

    def train(self) -> None:
        """The steps that are left."""
        total = sum(int(self.rows.lengths[step].sum()) for step in self.steps)
        self.tell.begin(self.progress.tokens, total)
        for number in range(self.progress.step, len(self.steps)):
            if self.early.stopped:
                break
            figures = self._step(number)
            validating = number + 1 in self.validate_after and self.validator is not None
            if validating:
                figures |= self._validate()
            if figures.pop("checkpoint") or validating:
                self._checkpoint()
            self.tell(self.progress.tokens, total, figures)
        if self.saved_step < self.progress.step:
            self._checkpoint()  # what follows, and a build that is refused at its end, need not train again

    def finish(self) -> WorkerReport:
        """Goes back to the state that is kept, writes it, and measures it."""
        if self.best:
            set_adapter_weights(self.engine, self.best)
        weights = self.best or adapter_weights(self.engine)
        progress = self.progress
        if self.rank == 0:
            save_adapter(self.engine.module, weights, self.recipe.model.base, self.config.uri)
            self._write_history()
        trainable = sum(int(getattr(p, "ds_numel", p.numel())) for p in trainable_parameters(self.engine).values())
        checks = final_checks(
            self.engine,
            self.validator,
            self.recipe,
            self.config.replaces,
            self.rank,
            self.world_size,
            self.measured if self.early.best_step else None,
        )
        return WorkerReport(
            steps=len(self.steps),
            losses=progress.losses,
            history=progress.history,
            best_step=self.early.best_step or progress.step,
            stopped_early=progress.step < len(self.steps),
            resumed_at=self.resumed_at,
            tokens=progress.tokens,
            target_tokens=progress.target_tokens,
            seconds=progress.seconds,
            padding_share=1 - progress.tokens / progress.computed_tokens,
            trainable_parameters=trainable,
            device=self.device_name,
            precision=str(self.dtype).removeprefix("torch."),
            mfu=self._mfu(tokens_per_second(progress.history)),
            checks=checks,
        )

    def close(self) -> None:
        """Ends the tracker; what it wrote here for a store elsewhere has been copied there."""
        self.tracker.close()
        if self.config.work.startswith(OBJECT_SCHEMES):
            shutil.rmtree(self.curves, ignore_errors=True)

    def _step(self, number: int) -> dict[str, Any]:
        """One optimiser step; returns figures to show, and under `checkpoint` whether one is due."""
        began = time.monotonic()
        step, train = self.steps[number], self.recipe.train
        rate = learning_rate_at(number, len(self.steps), train.learning_rate, train.warmup_fraction)
        set_learning_rate(self.engine, rate)
        target_tokens = int(self.rows.target_tokens[step].sum())
        due = time.monotonic() - self.saved_at >= 60 * train.checkpoint_minutes
        loss, computed, checkpoint = self._summed(*self._accumulate(number, target_tokens), float(due))
        if not math.isfinite(loss):
            raise UserError(self._diverged(f"the loss became {loss}", number + 1, rate))
        self.engine.step()
        if not self.engine.was_step_applied():
            raise UserError(self._diverged("the gradient is not finite", number + 1, rate))
        seconds = time.monotonic() - began
        tokens = int(self.rows.lengths[step].sum())
        epoch, done = number * self.config.epochs // len(self.steps) + 1, self.progress.tokens + tokens
        row: dict[str, Any] = {
            "step": number + 1,
            "epoch": epoch,
            "tokens": done,
            "loss": round(loss, 6),
            "learning_rate": rate,
            "tokens_per_second": round(tokens / seconds, 1),
        }
        utilisation = self._mfu(tokens / seconds)
        if utilisation is not None:
            row["mfu"] = round(utilisation, 4)
        self._record(row)
        self.progress = dataclasses.replace(
            self.progress,
            step=number + 1,
            epoch=epoch,
            tokens=done,
            seconds=self.progress.seconds + seconds,
            computed_tokens=self.progress.computed_tokens + int(computed),
            target_tokens=self.progress.target_tokens + target_tokens,
        )
        return {name: row[name] for name in ("loss", "mfu") if name in row} | {"checkpoint": checkpoint > 0}

    def _accumulate(self, number: int, target_tokens: int) -> tuple[float, float]:
        """Gradients of this worker's share of a step; returns its part of the loss, and the tokens that it computed."""
        import torch

        train = self.recipe.train
        # Dropout follows from the step, not from how the run came to it.
        torch.manual_seed(_seed(self.recipe.seed, number, self.rank))
        mine = micro_batches(
            self.steps[number], self.rows.lengths, self.rank, self.world_size, train.micro_batch_tokens, train.packing
        )
        loss = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        computed = 0
        with one_reduction(self.engine, len(mine)) as announce:
            for place, micro in enumerate(mine):
                announce(place)
                batch = make_batch([self.rows[row] for row in micro], self.pad, train.packing)
                summed = summed_loss(self.engine, batch.to(self.engine.device))
                # DeepSpeed averages gradients over workers: `world_size` turns that mean into a sum.
                self.engine.backward(summed * (self.world_size / target_tokens))
                loss += summed.detach().double() / target_tokens
                computed += batch.tokens
        return float(loss), float(computed)

    def _summed(self, *mine: float) -> tuple[float, ...]:
        """Sums over workers."""
        import torch

        if self.world_size == 1:
            return mine
        values = torch.tensor(mine, dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(values)
        return tuple(values.tolist())

    def _validate(self) -> dict[str, Any]:
        """Measures on the validation rows, and keeps the state if it is the best."""
        assert self.validator is not None, "validated without rows"
        began = time.monotonic()
        measured = self.validator.measure(self.engine, self.rank, self.world_size)
        step = self.progress.step
        self.early = self.early.after(step, measured.loss)
        if self.early.best_step == step:
            self.best = adapter_weights(self.engine)
            self.measured = measured
        self._record({"step": step, **measured.figures()})
        seconds = self.progress.seconds + time.monotonic() - began
        self.progress = dataclasses.replace(self.progress, early=dataclasses.asdict(self.early), seconds=seconds)
        return {"validation": measured.loss}

    def _record(self, row: dict[str, Any]) -> None:
        self.progress = dataclasses.replace(self.progress, history=(*self.progress.history, row))
        if self.rank == 0:
            self.tracker.log(row["step"], {name: value for name, value in row.items() if name != "step"})

    def _checkpoint(self) -> None:
        """All workers gather; the first one writes."""
        state = optimizer_state(self.engine)
        if not all_finite(state):  # the same on all workers
            rate = self.progress.history[-1].get("learning_rate", self.recipe.train.learning_rate)
            raise UserError(self._diverged("weights are not finite", self.progress.step, rate))
        if self.rank == 0:
            save_checkpoint(self.config.work, Checkpoint(self.progress, state, self.best))
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step

    def _resume(self) -> int:
        """Continues from the newest checkpoint, if there is one; returns its step."""
        number = 0
        if self.rank == 0:
            number = latest_checkpoint(self.config.work, self.progress.plan, self.tell.say)
        number = int(self._summed(float(number))[0])
        if not number:
            return 0
        found = load_checkpoint(self.config.work, number)
        set_optimizer_state(self.engine, found.state, found.progress.step)
        self.progress, self.best = found.progress, dict(found.best)
        if self.progress.early:
            self.early = EarlyStop(**{**self.progress.early, "patience": self.config.patience})
        self.saved_step = self.progress.step
        self.tell.say(f"train: going on from step {self.progress.step} of {len(self.steps)}")
        return self.progress.step

    def _diverged(self, what: str, step: int, rate: float) -> str:
        kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "there is no checkpoint yet"
        return (
            f"train.learning_rate: {what} at step {step}, at a rate of {rate:.3g}; lower it, which begins a new run "
            f"({kept} in {self.config.work})"
        )

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self.flops is None:
            return None
        precision = str(self.dtype).removeprefix("torch.")
        return mfu(tokens_per_second, self.flops, self.device_name, precision, self.world_size)

    def _open_tracker(self) -> Tracker:
        """In the work directory, where TensorBoard can watch it and a later run goes on; with an object store in a
        directory of this machine."""
        elsewhere = self.config.work.startswith(OBJECT_SCHEMES)
        self.curves = Path(tempfile.mkdtemp(prefix="rayft-")) if elsewhere else Path(self.config.work) / TRACKER
        recipe = self.recipe
        if self.rank != 0:
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tracker": "none"})})
        fresh = not self.curves.is_dir() or not any(self.curves.iterdir())
        name = self.config.plan.replace("/", "-")
        first = 0 if fresh else self.resumed_at
        tracker = open_tracker(recipe, self.curves, name, first_step=first, warn=self.tell.say)
        if self.rank == 0 and fresh:
            for row in self.progress.history:
                tracker.log(row["step"], {key: value for key, value in row.items() if key != "step"})
        return tracker

    def _write_history(self) -> None:
        """`history.jsonl` and the event files, beside the adapter."""
        self.tracker.close()
        with tempfile.TemporaryDirectory() as folder:
            lines = "".join(json.dumps(row) + "\n" for row in self.progress.history)
            (Path(folder) / HISTORY).write_text(lines, encoding="utf-8")
            copy_directory(folder, self.config.uri)
        if self.recipe.train.tracker == "tensorboard" and self.curves.is_dir():
            copy_directory(str(self.curves), f"{self.config.uri}/{TRACKER}")


def _digest(steps: Sequence[Sequence[int]]) -> str:
    """Of a plan of steps."""
    return hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:16]


def _seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:7], "big")
