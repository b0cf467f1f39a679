"""Reports as `rayft evaluate` writes them, with figures chosen by hand, and a command that publishes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.manifest import ArtifactRef
from cluster.releases import promote, publish_release
from cluster.stage import Outcome, Plan, run_stage
from cluster.store import Store
from evaluation.records import Prediction
from evaluation.summary import REPORT_FORMAT
from evaluation.windows import write_predictions
from retrieval.records import Golden, Question
from serving.answering import finish
from serving.engine import Completion
from serving.strategies import STRATEGIES
from tests.evaluation.fakes import stub_artifact
from training.config import PromptConfig
from training.format import PromptFormat


def estimate(value: float, n: int = 150) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": n}


def make_report(
    values: Mapping[str, float],
    *,
    task: str = "answers",
    seed: int = 17,
    differences: Mapping[str, float] | None = None,
    lineage: Mapping[str, str] | None = None,
    **metrics: float,
) -> dict[str, Any]:
    """A report in which strategy S scores values[S], and `first-second` in `differences` gives paired differences."""
    main = {"answers": "exact_match", "labels": "accuracy", "api_calls": "functional_accuracy"}[task]
    split = "test_new_documents"
    strategies = {
        name: {main: estimate(value), **{metric: estimate(other) for metric, other in metrics.items()}}
        for name, value in values.items()
    }
    rows = [
        {"split": split, "first": pair.split("-")[0], "second": pair.split("-")[1], "metric": main, **estimate(value)}
        for pair, value in (differences or {}).items()
    ]
    return {
        "format": REPORT_FORMAT,
        "name": "fake",
        "language": "en",
        "task": task,
        "seed": seed,
        "headline_split": split,
        "questions": {split: 150},
        "commonest": {split: None if task == "answers" else 0.82},
        "strategies": strategies,
        "splits": {split: strategies},
        "comparisons": rows,
        "lineage": {"base model": "embedded:SmolLM2-135M-Instruct (sha256 0123)", **(lineage or {})},
        "settings": {"bootstrap_resamples": 200},
    }


def publish_report(store: Store, name: str, content: Mapping[str, Any], report_format: int = REPORT_FORMAT) -> str:
    """Publishes and makes current a report and, if there is none yet, a release of that name."""

    def build(attempt):
        (attempt.directory / "report.json").write_text(json.dumps(content), encoding="utf-8")
        return Outcome()

    plan = Plan("report", name, {"content": dict(content)}, format=report_format)
    report = run_stage(store, plan, build)
    index = stub_artifact(store, "index", name)
    ref = publish_release(store, name, index=index.ref, adapters={}, base_digest="b" * 64)
    promote(store, name, ref.version)
    return str(report.ref)


def publish_answers(store: Store, name: str, right: Mapping[str, bool]) -> str:
    """Predictions of RAFT: question id to whether the answer is right."""
    prompt_format = PromptFormat.load(PromptConfig(), "en")
    predictions = [
        Prediction(
            Question(key, f"Where is {key}?", ("here",), (Golden("d"),), "test_new_documents"),
            finish(
                Completion(key, f"<ANSWER>: {'here' if is_right else 'there'}", "stop"),
                STRATEGIES["finetuned"],
                [],
                prompt_format,
                question_id=key,
            ),
        )
        for key, is_right in right.items()
    ]

    def build(attempt):
        write_predictions(attempt.directory / "answers.parquet", predictions)
        return Outcome()

    return str(run_stage(store, Plan("predictions", name, {"right": dict(right)}), build).ref)


def publish_adapter(store: Store, name: str, **counts: int) -> str:
    measured = {"training_seconds": 90.0, "tokens_per_second": 200.0, "device": "cpu"}
    plan = Plan("adapter", name, {"rows": counts})
    return str(
        run_stage(
            store, plan, lambda attempt: (attempt.directory / "a").write_text("a") and Outcome(counts, measured)
        ).ref
    )


def parse(ref: str) -> ArtifactRef:
    return ArtifactRef.parse(ref)
