"""What the report shows and compares for each task.

In: the name of a task. Out: names of metrics (evaluation/metrics.py). Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.config import Task


@dataclass(frozen=True)
class Shown:
    """Names of metrics, by what they are used for."""

    main: str
    """The task's score: the one figure where there is room for one."""
    right: str
    """Whether an answer is right: chooses the examples, and is shown per kind of question."""
    alarm: str
    """The metric that alarms compare."""
    columns: tuple[str, ...]
    """Columns of the terminal's table, at most five."""
    compared: tuple[str, ...]
    """Paired differences that are computed."""
    told: tuple[str, ...]
    """Paired differences that the terminal prints of `raft`."""
    plotted: tuple[str, ...]
    """Shares (0 to 1) in the plot of quality."""
    against_latency: str
    """The metric of the plot of quality against latency."""
    hallucination: str
    """The metric of the report's dimension of that name."""


SHOWN: dict[Task, Shown] = {
    "answers": Shown(
        main="exact_match",
        right="contained",
        alarm="f1",
        columns=("exact_match", "f1", "contained", "recall_at_k", "verified_answers"),
        compared=("exact_match", "f1", "contained", "hallucination"),
        told=("exact_match", "f1"),
        plotted=("exact_match", "f1", "contained"),
        against_latency="f1",
        hallucination="hallucination",
    ),
    "labels": Shown(
        main="accuracy",
        right="accuracy",
        alarm="accuracy",
        columns=("accuracy", "macro_f1", "unparsed", "recall_at_k", "in_form"),
        compared=("accuracy", "macro_f1"),
        told=("accuracy", "macro_f1"),
        plotted=("accuracy", "macro_f1"),
        against_latency="accuracy",
        hallucination="hallucination",
    ),
    "api_calls": Shown(
        main="functional_accuracy",
        right="functional_accuracy",
        alarm="functional_accuracy",
        columns=("functional_accuracy", "golden_call", "hallucinated_call", "recall_at_k", "in_form"),
        compared=("functional_accuracy", "golden_call", "hallucinated_call"),
        told=("functional_accuracy", "hallucinated_call"),
        plotted=("functional_accuracy", "golden_call", "hallucinated_call"),
        against_latency="functional_accuracy",
        hallucination="hallucinated_call",
    ),
}
