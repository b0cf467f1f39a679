"""`evaluate`: answers, scores and compares the strategies of a release, and publishes the report.

In: a recipe and the release's artifacts. Out: a `report` artifact: `report.json` (see evaluation/summary.py) and
`report.html`, one self-contained page. Skipped when nothing that it depends on has changed.
Not covered: choosing a strategy from the figures (`rayft advise`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import UserError
from cluster.progress import say
from cluster.stage import Outcome, Plan, run_stage
from cluster.store import Artifact, Attempt, Store
from evaluation.batch import answer_all, load_predictions
from evaluation.config import EvaluationRecipe
from evaluation.examples import worst_examples
from evaluation.page import render_page
from evaluation.parts import BatchRun, Parts, default_run
from evaluation.records import Prediction
from evaluation.rubric import rubric_of
from evaluation.selection import questions_digest, select_questions
from evaluation.summary import REPORT_FORMAT, SPLITS, summarise
from evaluation.table import render_text
from retrieval.records import Question

JSON_FILE = "report.json"
HTML_FILE = "report.html"
_MAIN_STRATEGY = ("raft", "rag_fewshot", "rag")  # whose worst answers are shown: the first that was evaluated


def evaluate(
    recipe: EvaluationRecipe,
    store: Store,
    index: Artifact,
    samples: Artifact,
    adapters: Mapping[str, Artifact],
    *,
    base_digest: str = "",
    router: Artifact | None = None,
    run: BatchRun | None = None,
) -> Artifact:
    """Evaluates the recipe's strategies on held-out questions and publishes the report.

    Args:
        recipe: `evaluate`, `prices`, `generation` and what they build on.
        store: Where predictions and report go.
        index: The index that is searched.
        samples: Holds the test questions and the worked examples.
        adapters: `raft` and `finetuned`; strategies whose adapter is missing are left out, with a line that says so.
        base_digest: `cluster.model_source.model_digest` of the base model; computed unless given.
        router: The intent classifier that `auto` routes by.
        run: Where and with what the work is done; none takes the recipe's engine on a connected Ray.

    Raises:
        UserError: No strategy can be evaluated, or the samples hold no test question.
    """
    parts = Parts.of(recipe, index, samples, adapters, base_digest, router)
    strategies = _strategies(recipe, parts)
    questions = choose_questions(recipe, samples)
    run = run or default_run(recipe, store, parts)
    artifacts = answer_all(recipe, store, parts, strategies, questions, run, latency_rows=recipe.evaluate.latency_rows)
    plan = report_plan(recipe, parts, artifacts, questions)
    report = run_stage(store, plan, functools.partial(_write_report, recipe, parts, artifacts, questions, plan))
    say("\n" + render_text(read_report(report)) + "\n")
    say(f"report: open {report.directory() / HTML_FILE}")
    return report


def read_report(report: Artifact) -> dict[str, Any]:
    """The content of `report.json`."""
    content: dict[str, Any] = json.loads(report.path(JSON_FILE).read_text(encoding="utf-8"))
    return content


def choose_questions(recipe: EvaluationRecipe, samples: Artifact) -> list[Question]:
    """The test questions that an evaluation asks: per split a seeded selection, kinds in turn.

    Raises:
        UserError: There is none.
    """
    from training.samples import load_questions

    counts = (recipe.evaluate.new_documents, recipe.evaluate.new_questions, recipe.evaluate.new_kinds)
    chosen: list[Question] = []
    for split, count in zip(SPLITS, counts, strict=True):
        chosen += select_questions(load_questions(samples, split), count, recipe.seed) if count else []
    if not chosen:
        raise UserError(
            f"evaluate: {samples.ref} holds no test question ({' or '.join(SPLITS)}); set questions.test_path, raise "
            "questions.test_documents_fraction, or raise evaluate.new_documents above 0"
        )
    return chosen


def _strategies(recipe: EvaluationRecipe, parts: Parts) -> list[str]:
    wanted = list(dict.fromkeys(recipe.evaluate.strategies))
    possible: list[str] = [name for name in wanted if name in parts.strategies()]
    for name in wanted:
        if name not in possible:
            say(f"evaluate: `{name}` is left out: the release lacks its adapter or its worked examples")
    if not possible:
        raise UserError(
            f"evaluate.strategies: none of {', '.join(wanted) or 'an empty list'} can be evaluated; available: "
            f"{', '.join(parts.strategies())}"
        )
    return possible


def report_plan(
    recipe: EvaluationRecipe, parts: Parts, artifacts: Mapping[str, Artifact], questions: Sequence[Question]
) -> Plan:
    """Everything that the report depends on."""
    parents = {f"predictions {name}": artifact.ref for name, artifact in artifacts.items()}
    parents |= {f"adapter {name}": adapter.ref for name, adapter in parts.adapters.items()}
    parents |= {"index": parts.index.ref} | ({"samples": parts.samples.ref} if parts.samples else {})
    return Plan(
        kind="report",
        name=recipe.name,
        config={
            "evaluate": recipe.evaluate.model_dump(include={"bootstrap_resamples", "worst_examples", "task"}),
            "quotes": recipe.prompt.quotes,
            "longest_answer": recipe.samples.max_answer_chars,
            "prices": recipe.prices.model_dump(),
        },
        inputs={"questions": questions_digest(questions)},
        parents=parents,
        format=REPORT_FORMAT,
        seed=recipe.seed,
    )


def _write_report(
    recipe: EvaluationRecipe,
    parts: Parts,
    artifacts: Mapping[str, Artifact],
    questions: Sequence[Question],
    plan: Plan,
    attempt: Attempt,
) -> Outcome:
    rubric = rubric_of(recipe, parts, questions)
    content = summarise(recipe, parts, artifacts, questions, rubric)
    main = next((name for name in _MAIN_STRATEGY if name in artifacts), next(iter(artifacts)))
    examples = worst_examples(
        _headline(load_predictions(artifacts[main]), content["headline_split"]),
        rubric,
        recipe.evaluate.worst_examples,
    )
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    (attempt.directory / JSON_FILE).write_text(text, encoding="utf-8")
    (attempt.directory / HTML_FILE).write_text(render_page(content, main, examples, str(plan.ref)), encoding="utf-8")
    return Outcome(counts={"questions": len(questions), "strategies": len(artifacts)})


def _headline(predictions: Sequence[Prediction], split: str) -> list[Prediction]:
    return [prediction for prediction in predictions if prediction.question.split == split]
