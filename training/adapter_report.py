"""What a training run is told of in: the figures of an adapter's manifest, and lines for a person.

In: the first worker's report. Out: plain numbers and sentences. Not covered: the comparison with the adapter that is
served (training/replacement.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from training.config import TrainingRecipe
from training.row_losses import Difference

if TYPE_CHECKING:
    from training.worker import WorkerReport

GENERAL_TOLERANCE = 0.5
"""Nats per token that general prompts may surely lose (the interval's lower end) before the user is warned. The default
Factbook RAFT adapter loses 0.38 [0.21, 0.60], the same with its updates made 1.7 times as large 1.25 [0.95, 1.59]; at
0.5 each word of an ordinary answer has lost 40% of its probability.
"""


def measured_figures(recipe: TrainingRecipe, report: WorkerReport) -> dict[str, Any]:
    """The manifest's `measured`, without the comparison with another adapter."""
    general = report.checks.general
    change = general.difference(recipe.seed)
    return {
        "training_seconds": round(report.seconds, 2),
        "tokens_per_second": round(tokens_per_second(report.history), 1),
        "padding_share": round(report.padding_share, 4),
        "final_loss": round(training_loss(report), 4),
        **_validation_figures(report),
        "best_step": report.best_step,
        "planned_steps": report.steps,
        "stopped_early": report.stopped_early,
        "resumed_at_step": report.resumed_at,
        "general": {
            "base_loss": round(general.base.mean, 4),
            "tuned_loss": round(general.tuned.mean, 4),
            "difference": change.figures(),
            "tolerance": GENERAL_TOLERANCE,
            "seconds": round(report.checks.general_seconds, 2),
        },
        "workers": recipe.train.workers,
        "zero_stage": recipe.train.zero_stage,
        "device": report.device,
        "precision": report.precision,
        "mfu": None if report.mfu is None else round(report.mfu, 4),
    }


def _validation_figures(report: WorkerReport) -> dict[str, Any]:
    validation = report.checks.validation
    if validation is None:
        return {"validation_rows": 0}
    return {
        "validation_rows": len(validation.rows.sums),
        "validation_loss": round(validation.loss, 4),
        "train_validation_gap": round(validation.loss - training_loss(report), 4),
        "probe_exact_match": validation.exact_match,
        "probe_f1": None if validation.f1 is None else round(validation.f1, 4),
        "validation_seconds": round(validation.seconds, 2),
        "probe_seconds": round(validation.probe_seconds, 2),
    }


def training_loss(report: WorkerReport) -> float:
    """Mean loss per target token over the tenth of the steps that led to the state that is kept."""
    taken = report.losses[: report.best_step]
    last = taken[-max(1, len(taken) // 10) :]
    return sum(last) / len(last)


def tokens_per_second(history: Sequence[Mapping[str, Any]]) -> float:
    """Over the optimiser steps alone: validations and checkpoints between them do not count."""
    tokens = seconds = 0.0
    before = 0
    for row in history:
        if "loss" in row:
            tokens += row["tokens"] - before
            seconds += (row["tokens"] - before) / row["tokens_per_second"]
            before = row["tokens"]
    return tokens / seconds


def describe_run(role: str, report: WorkerReport) -> list[str]:
    """Which state is kept, and what it is worth."""
    validation = report.checks.validation
    early = "; stopped early, the validation loss no longer fell" if report.stopped_early else ""
    if validation is None:
        return [
            f"train {role}: kept step {report.best_step} of {report.steps}, training loss {training_loss(report):.3f}"
        ]
    gap = validation.loss - training_loss(report)
    probe = (
        ""
        if validation.exact_match is None or validation.f1 is None
        else f", probe EM {validation.exact_match:.2f} F1 {validation.f1:.2f}"
    )
    return [
        f"train {role}: kept step {report.best_step} of {report.steps}{early}: validation loss {validation.loss:.3f} "
        f"({gap:+.3f} over training){probe}"
    ]


def general_warning(role: str, change: Difference) -> str | None:
    """The line to show where general ability has suffered more than fine-tuning on a narrow task usually costs."""
    if change.low <= GENERAL_TOLERANCE:
        return None
    return (
        f"train {role}: general ability has suffered: reference answers to {change.n} everyday prompts lost "
        f"{change.value:.2f} nats per token [{change.low:.2f}, {change.high:.2f}], more than {GENERAL_TOLERANCE}; "
        "lower train.learning_rate if the adapter shall do more than answer from the documents"
    )
