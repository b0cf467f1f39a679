"""Offline answering: a list of questions, one or more strategies, one `predictions` artifact per strategy.

In: questions, and the parts of a release (index, samples, adapters). Out: `answers.parquet` (see
`evaluation.records.Prediction`) and, where single requests were timed, `latency.parquet`. Finished windows survive a
crash; a row that fails is recorded with its error and the run goes on. A change of prompt, adapter, index or
questions recomputes the strategies that depend on it, and no others.
Not covered: scoring (evaluation/metrics.py), the report.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.progress import say, track
from cluster.stage import Outcome, Plan, digest_path, run_stage
from cluster.store import Artifact, Attempt, Store
from evaluation.answering import AnswerSettings, legs_of
from evaluation.config import EvaluationRecipe
from evaluation.parts import BatchRun, Parts, default_run
from evaluation.pipeline import Task
from evaluation.records import Prediction
from evaluation.selection import questions_digest, require_distinct, select_questions
from evaluation.windows import WindowLedger, read_predictions
from retrieval.records import Question
from retrieval.retriever import require_chunks
from serving.opened_release import update_frequencies
from serving.strategies import AUTO, Strategy, require_strategy
from training.format import FORMAT_VERSION, PromptFormat, prompt_path

PREDICTIONS_FORMAT = 1
ANSWERS_FILE = "answers.parquet"
LATENCY_FILE = "latency.parquet"


def predictions_plan(
    recipe: EvaluationRecipe,
    parts: Parts,
    strategy: str,
    questions: Sequence[Question],
    *,
    latency_rows: int = 0,
    name_suffix: str = "",
) -> Plan:
    """Everything that these answers depend on, and nothing that other strategies alone depend on."""
    legs = [leg for leg in legs_of(strategy) if leg.name in parts.strategies()]
    parents = {leg.adapter: parts.adapters[leg.adapter].ref for leg in legs if leg.adapter}
    if any(leg.retrieves for leg in legs):
        parents["index"] = parts.index.ref
    if strategy == AUTO and parts.router:
        parents["router"] = parts.router.ref
    if any(leg.few_shot for leg in legs) and parts.samples:
        parents["samples"] = parts.samples.ref
    return Plan(
        kind="predictions",
        name=f"{recipe.name}-{strategy}{name_suffix}",
        config=_plan_config(recipe, strategy, legs, latency_rows),
        inputs={
            "questions": questions_digest(questions),
            "prompt": digest_path(str(prompt_path(recipe.prompt, recipe.language))),
            "base model": parts.base_digest,
        },
        parents=parents,
        format=PREDICTIONS_FORMAT,
        seed=recipe.seed,
    )


def _plan_config(
    recipe: EvaluationRecipe, strategy: str, legs: Sequence[Strategy], latency_rows: int
) -> dict[str, Any]:
    generation: dict[str, Any] = {
        "engine": recipe.generation.engine,
        "max_new_tokens": recipe.generation.max_new_tokens,
        "temperature": recipe.generation.temperature,
    }
    if recipe.generation.context_tokens is not None:
        generation["context_tokens"] = recipe.generation.context_tokens  # unset, the model's own window: its digest
    if any(leg.retrieves for leg in legs):
        generation["passages"] = recipe.generation.passages
    if any(leg.few_shot for leg in legs):
        generation["examples"] = recipe.generation.examples
    config: dict[str, Any] = {
        "strategy": {leg.name: dataclasses.asdict(leg) for leg in legs},
        "generation": generation,
        "model": {"precision": recipe.model.precision},
        "prompt": {"quotes": recipe.prompt.quotes, "reasoning": recipe.prompt.reasoning, "format": FORMAT_VERSION},
        "language": recipe.language,
        "evaluate": {"latency_rows": latency_rows},
    }
    if strategy == AUTO:
        # What was learned from `examples` is the parent `router`; its path differs from checkout to checkout.
        config["router"] = recipe.router.model_dump(exclude={"examples"})
    return config


@dataclass(frozen=True)
class _Job:
    """One strategy's answers under way."""

    strategy: str
    plan: Plan
    answers: WindowLedger
    singles: WindowLedger
    timed: tuple[Question, ...]
    questions: tuple[Question, ...]

    def pending(self, window_rows: int) -> list[Task]:
        """The windows that no earlier run finished; each is numbered by the place of its first question."""
        finished = self.answers.finished()
        rest = [
            (place, question) for place, question in enumerate(self.questions) if question.question_id not in finished
        ]
        windows = [rest[start : start + window_rows] for start in range(0, len(rest), window_rows)]
        return [Task(self.strategy, window[0][0], tuple(question for _, question in window)) for window in windows]

    def pending_singles(self) -> list[Task]:
        """The timed single requests, unless an earlier run finished them."""
        finished = self.singles.finished()
        if not self.timed or finished >= {question.question_id for question in self.timed}:
            return []
        return [Task(self.strategy, 0, self.timed, single=True)]

    def ledger(self, *, single: bool) -> WindowLedger:
        """Where a finished task is written."""
        return self.singles if single else self.answers


def answer_all(
    recipe: EvaluationRecipe,
    store: Store,
    parts: Parts,
    strategies: Sequence[str],
    questions: Sequence[Question],
    run: BatchRun,
    *,
    latency_rows: int = 0,
    name_suffix: str = "",
) -> dict[str, Artifact]:
    """Answers `questions` with every strategy and publishes one `predictions` artifact per strategy.

    The windows of all strategies that are not yet published go through one pipeline, so that the model loads once.

    Args:
        recipe: Generation, prompt and window size are read from it.
        store: Where the artifacts go.
        parts: The release's parts.
        strategies: Names; each must be among `parts.strategies()`.
        questions: Distinct ids; accepted answers may be empty.
        run: Where and with what the work is done.
        latency_rows: Questions that are answered once more, one at a time, for `latency.parquet`.
        name_suffix: Appended to the artifacts' name, to keep evaluation and other batches apart.

    Raises:
        UserError: No questions, a repeated id, an unknown strategy, or every row of a strategy failed.
    """
    require_distinct(questions)
    for strategy in strategies:
        require_strategy(strategy, parts.strategies())
    require_chunks(parts.index, recipe.generation.passages, "generation.passages")
    plans = {
        strategy: predictions_plan(
            recipe, parts, strategy, questions, latency_rows=latency_rows, name_suffix=name_suffix
        )
        for strategy in strategies
    }
    artifacts = _already_published(store, plans)
    timed = tuple(select_questions(questions, latency_rows, recipe.seed))
    missing = {strategy: plan for strategy, plan in plans.items() if strategy not in artifacts}
    if missing:
        store.check_writable()
    jobs = [_job(store, strategy, plan, timed, tuple(questions)) for strategy, plan in missing.items()]
    _do_missing(recipe, parts, jobs, run)
    for job in jobs:
        _refuse_all_failed(job)
        artifacts[job.strategy] = run_stage(store, job.plan, functools.partial(_write_predictions, recipe, job))
    return {strategy: artifacts[strategy] for strategy in strategies}


def answer_questions(
    recipe: EvaluationRecipe,
    store: Store,
    index: Artifact,
    adapters: Mapping[str, Artifact],
    samples: Artifact | None,
    strategy: str,
    questions: Sequence[Question],
    *,
    run: BatchRun | None = None,
) -> Artifact:
    """`answer_all` for one strategy, without timed single requests; needs a connected Ray unless `run` is given."""
    parts = Parts.of(recipe, index, samples, adapters)
    run = run or default_run(recipe, store, parts)
    return answer_all(recipe, store, parts, [strategy], questions, run, name_suffix="-batch")[strategy]


def load_predictions(artifact: Artifact) -> list[Prediction]:
    """The answers of a `predictions` artifact."""
    return read_predictions(artifact.path(ANSWERS_FILE))


def load_single_requests(artifact: Artifact) -> list[Prediction]:
    """The answers that were made one at a time, whose `timings_ms` are a lone request's."""
    return read_predictions(artifact.path(LATENCY_FILE))


def _already_published(store: Store, plans: Mapping[str, Plan]) -> dict[str, Artifact]:
    found = {strategy: store.open_ref(plan.ref) for strategy, plan in plans.items() if store.exists(plan.ref)}
    for artifact in found.values():
        if store.current(artifact.ref.kind, artifact.ref.name) != artifact.ref.version:
            store.set_current(artifact.ref)
    if found:
        say(
            f"predictions: up to date for {', '.join(found)}: same questions, prompt, model, adapter, index, generation"
        )
    return found


def _job(store: Store, strategy: str, plan: Plan, timed: tuple[Question, ...], questions: tuple[Question, ...]) -> _Job:
    directory: Path = store.work_directory(plan.ref)
    return _Job(strategy, plan, WindowLedger(directory), WindowLedger(directory, "single"), timed, questions)


def _do_missing(recipe: EvaluationRecipe, parts: Parts, jobs: Sequence[_Job], run: BatchRun) -> None:
    """Answers what no earlier run finished, writing each window down as it comes back."""
    tasks = [task for job in jobs for task in job.pending(recipe.evaluate.window_rows)]
    # Lone requests last, when retrieval for the windows is over; an engine never runs them beside a window.
    tasks += [task for job in jobs for task in job.pending_singles()]
    if not tasks:
        return
    settings = AnswerSettings(
        prompt_format=PromptFormat.load(recipe.prompt, recipe.language),
        generation=recipe.generation,
        examples=parts.examples,
        router=run.router,
        seed=recipe.seed,
        release=run.release,
        update_frequencies=update_frequencies(parts.index),
    )
    by_strategy = {job.strategy: job for job in jobs}
    total = sum(len(job.questions) + len(job.timed) for job in jobs)
    label = next(iter(by_strategy)) if len(by_strategy) == 1 else f"{len(by_strategy)} strategies"
    with track(f"predictions: {label}", total, "answers") as bar:
        bar.skip(total - sum(len(task.questions) for task in tasks))
        for result in run.runner(run.workers, settings, tasks):
            ledger = by_strategy[result.strategy].ledger(single=result.single)
            ledger.write(result.number, result.predictions, result.retrieval_s, result.generation_s)
            bar.advance(len(result.predictions))


def _refuse_all_failed(job: _Job) -> None:
    """Publishes no artifact that is nothing but errors; its windows are dropped, so that a rerun tries again."""
    errors = job.answers.errors()
    if len(errors) == len(job.questions):
        job.answers.clear()
        raise UserError(
            f"predictions: all {len(errors)} rows of `{job.strategy}` failed, the first with: {errors[0]}; "
            "mend that and run the same command again"
        )


def _write_predictions(recipe: EvaluationRecipe, job: _Job, attempt: Attempt) -> Outcome:
    """Assembles the finished windows into the artifact's files."""
    job.answers.assemble(attempt.directory / ANSWERS_FILE)
    job.singles.assemble(attempt.directory / LATENCY_FILE)
    windows = job.answers.measures()
    retrieval_s = sum(window.retrieval_s for window in windows)
    generation_s = sum(window.generation_s for window in windows)
    rows = sum(window.rows for window in windows)
    assert rows == len(job.questions), f"{rows} answers for {len(job.questions)} questions"
    errors = job.answers.errors()
    if errors:
        say(f"predictions: {len(errors)} of {rows} rows of `{job.strategy}` failed, the first with: {errors[0]}")
    return Outcome(
        counts={"rows": rows, "failed": len(errors), "windows": len(windows), "timed_singly": len(job.timed)},
        measured={
            "retrieval_s": round(retrieval_s, 4),
            "generation_s": round(generation_s, 4),
            "rows_per_s": round(rows / (retrieval_s + generation_s), 4) if retrieval_s + generation_s else None,
            "hardware": {
                "cpu_cores": os.cpu_count(),
                "threads": recipe.generation.threads,
                "gpus_per_generator": recipe.evaluate.gpus_per_generator,
                "batch_rows": recipe.generation.batch_rows,
            },
        },
    )
