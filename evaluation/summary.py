"""From predictions to the content of `report.json`.

In: the predictions of each strategy on the same questions, and the release's parts. Out: one plain dict:
`strategies → name → metric → {value, low, high, n}` over the headline split, the same per split, the four dimensions,
paired comparisons, alarms, lineage, definitions. Not covered: how it is shown (evaluation/table.py, report.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.store import Artifact
from evaluation.batch import load_predictions
from evaluation.config import EvaluationRecipe
from evaluation.dimensions import dimensions_of, latency_metrics
from evaluation.intervals import Estimate, difference
from evaluation.metrics import METRICS, measure, metrics_of, scores
from evaluation.parts import Parts
from evaluation.records import Prediction
from evaluation.rubric import Rubric, commonest_share
from evaluation.selection import kind_of
from evaluation.tasks import SHOWN
from retrieval.records import Question

REPORT_FORMAT = 2
SPLITS = ("test_new_documents", "test_new_questions", "test_new_kinds")
COMPARED = (
    ("raft", "rag"),
    ("raft", "rag_fewshot"),
    ("raft", "finetuned_rag"),
    ("raft", "finetuned"),
    ("rag", "base"),
    ("rag_fewshot", "rag"),
    ("finetuned", "base"),
    ("finetuned_rag", "finetuned"),
    ("hybrid", "raft"),
    ("auto", "raft"),
)
CUT_SHORT_ALARM = 0.05

ByStrategy = Mapping[str, Sequence[Prediction]]


def summarise(
    recipe: EvaluationRecipe,
    parts: Parts,
    artifacts: Mapping[str, Artifact],
    questions: Sequence[Question],
    rubric: Rubric,
) -> dict[str, Any]:
    """The content of `report.json`; `artifacts` are predictions on exactly `questions`."""
    predictions = {name: _in_order(artifact, questions) for name, artifact in artifacts.items()}
    splits = [split for split in SPLITS if any(question.split == split for question in questions)]
    headline = splits[0]
    how = {"resamples": recipe.evaluate.bootstrap_resamples, "seed": recipe.seed}
    measured = {split: _measure_split(predictions, split, rubric, **how) for split in splits}
    latencies = {name: latency_metrics(artifact, **how) for name, artifact in artifacts.items()}
    headline_metrics = {name: {**metrics, **latencies[name]} for name, metrics in measured[headline].items()}
    comparisons = [row for split in splits for row in _compare(_of_split(predictions, split), split, rubric, **how)]
    return {
        "format": REPORT_FORMAT,
        "name": recipe.name,
        "language": recipe.language,
        "task": rubric.task,
        "seed": recipe.seed,
        "headline_split": headline,
        "questions": {split: sum(question.split == split for question in questions) for split in splits},
        "commonest": {
            split: commonest_share([question for question in questions if question.split == split], rubric)
            for split in splits
        },
        "strategies": _to_json(headline_metrics),
        "splits": {split: _to_json(metrics) for split, metrics in measured.items()},
        "dimensions": {
            name: dimensions_of(recipe, parts, name, artifact, headline_metrics[name])
            for name, artifact in artifacts.items()
        },
        "comparisons": comparisons,
        "kinds": _by_kind(_of_split(predictions, headline), rubric),
        "alarms": alarms(comparisons, measured, SHOWN[rubric.task].alarm),
        "lineage": _lineage(recipe, parts, artifacts),
        "definitions": {m.name: {"label": m.label, "definition": m.definition} for m in metrics_of(rubric.task)},
        "settings": {
            "passages": recipe.generation.passages,
            "max_new_tokens": recipe.generation.max_new_tokens,
            "batch_rows": recipe.generation.batch_rows,
            "latency_rows": recipe.evaluate.latency_rows,
            "bootstrap_resamples": recipe.evaluate.bootstrap_resamples,
            "prices": recipe.prices.model_dump(),
        },
    }


def _in_order(artifact: Artifact, questions: Sequence[Question]) -> list[Prediction]:
    """Predictions in the order of the questions, whatever order the windows came back in."""
    by_id = {prediction.question.question_id: prediction for prediction in load_predictions(artifact)}
    return [by_id[question.question_id] for question in questions]


def _of_split(predictions: ByStrategy, split: str) -> dict[str, list[Prediction]]:
    return {name: [p for p in rows if p.question.split == split] for name, rows in predictions.items()}


def _measure_split(
    predictions: ByStrategy, split: str, rubric: Rubric, *, resamples: int, seed: int
) -> dict[str, dict[str, Estimate]]:
    return {
        name: measure(rows, rubric, resamples=resamples, seed=seed)
        for name, rows in _of_split(predictions, split).items()
    }


def _to_json(measured: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, dict[str, float | int]]]:
    return {
        name: {metric: estimate.to_json() for metric, estimate in metrics.items()} for name, metrics in measured.items()
    }


def _compare(predictions: ByStrategy, split: str, rubric: Rubric, *, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Paired differences of the pairs in `COMPARED` that were both answered, on the questions that both scored."""
    rows = []
    for first, second in COMPARED:
        if first not in predictions or second not in predictions:
            continue
        for metric in SHOWN[rubric.task].compared:
            left, right = (scores(metric, predictions[name], rubric) for name in (first, second))
            found = difference(left, right, METRICS[metric].combine, resamples=resamples, seed=seed)
            if found is not None:
                row = {"split": split, "first": first, "second": second, "metric": metric}
                rows.append({**row, **found.to_json(), "significant": found.excludes_zero})
    return rows


def _by_kind(predictions: ByStrategy, rubric: Rubric) -> dict[str, dict[str, Any]]:
    """Kind of question → {n, strategy → share of right answers (`Shown.right`)}; empty without kinds."""
    kinds: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, rows in predictions.items():
        grouped: dict[str, list[Prediction]] = defaultdict(list)
        for prediction in rows:
            grouped[kind_of(prediction.question)].append(prediction)
        for kind, group in sorted(grouped.items()):
            table = scores(SHOWN[rubric.task].right, group, rubric)
            if kind and table[:, 1].sum():
                kinds[kind] |= {"n": len(group), name: float(table[:, 0].sum() / table[:, 1].sum())}
    return dict(kinds)


def alarms(
    comparisons: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    metric: str = "f1",
) -> list[dict[str, Any]]:
    """What a reader must not miss: {text, significant}, the most serious first; `metric` is what is compared."""
    lower = [row for row in comparisons if row["metric"] == metric and row["value"] < 0]
    found = [_worse_with_passages(row) for row in lower if _is_worse_with_passages(row)]
    found += [_loses(row) for row in lower if _tuning_loses(row)]
    for split, by_strategy in measured.items():
        for name, metrics in by_strategy.items():
            failed = metrics["failed"]
            if failed.value > 0:
                rows = round(failed.value * failed.n)
                found.append(_alarm(f"{rows} of {failed.n} questions failed for {name} ({_words(split)})", None))
        cut = {name: metrics["cut_short"].value for name, metrics in by_strategy.items()}
        shares = [f"{share:.0%} of {name}" for name, share in cut.items() if share > CUT_SHORT_ALARM]
        if shares:
            text = f"answers cut short at generation.max_new_tokens on {_words(split)}: {', '.join(shares)}"
            found.append(_alarm(text, None))
    return found


def _is_worse_with_passages(row: Mapping[str, Any]) -> bool:
    return (row["first"], row["second"]) == ("finetuned_rag", "finetuned")


def _worse_with_passages(row: Mapping[str, Any]) -> dict[str, Any]:
    return _alarm(
        f"the tuned model scores lower with passages (finetuned_rag) than without (finetuned) on "
        f"{_words(row['split'])}: {describe_difference(row)}",
        row["significant"],
    )


def _tuning_loses(row: Mapping[str, Any]) -> bool:
    rivals = [second for first, second in COMPARED if first == "raft"]
    return row["first"] == "raft" and row["second"] in rivals


def _loses(row: Mapping[str, Any]) -> dict[str, Any]:
    return _alarm(
        f"raft scores lower than {row['second']} on {_words(row['split'])}: {describe_difference(row)}",
        row["significant"],
    )


def _alarm(text: str, significant: bool | None) -> dict[str, Any]:
    return {"text": text, "significant": significant}


def describe_difference(row: Mapping[str, Any]) -> str:
    """`F1 −0.12 [−0.20, −0.05], n=30, significant`, or `no significant difference`."""
    label = METRICS[row["metric"]].label
    interval = f"[{signed(row['low'])}, {signed(row['high'])}]"
    verdict = "significant" if row["significant"] else "no significant difference"
    return f"{label} {signed(row['value'])} {interval}, n={row['n']}, {verdict}"


def signed(value: float) -> str:
    """Two decimals with a plus or a true minus sign."""
    return f"{value:+.2f}".replace("-", "−")


def _words(split: str) -> str:
    return split.removeprefix("test_").replace("_", " ")


def _lineage(recipe: EvaluationRecipe, parts: Parts, artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    lineage = {"base model": f"{recipe.model.base} (sha256 {parts.base_digest[:16]})", "index": str(parts.index.ref)}
    if parts.samples:
        lineage["samples"] = str(parts.samples.ref)
    lineage |= {f"adapter {name}": str(adapter.ref) for name, adapter in sorted(parts.adapters.items())}
    lineage |= {f"predictions {name}": str(artifact.ref) for name, artifact in artifacts.items()}
    return lineage
