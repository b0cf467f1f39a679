"""The four dimensions on which the strategies are chosen: knowledge change, latency, cost, hallucination.

In: the manifests of index, samples, adapters and predictions (their measured seconds), timed single requests, prices.
Out: plain dicts for `report.json`. Money is US dollars: seconds times the cores or GPUs that the stage could use times
the recipe's prices; nothing is assumed that was not measured. Not covered: network, storage, idle time, staff.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.store import Artifact
from evaluation.answering import legs_of
from evaluation.batch import load_single_requests
from evaluation.config import EvaluationRecipe, PricesConfig
from evaluation.intervals import Estimate, percentile, share
from evaluation.parts import Parts
from evaluation.tasks import SHOWN

LATENCY_HOPS = ("retrieval", "generation", "total")


def latency_metrics(artifact: Artifact, *, resamples: int, seed: int) -> dict[str, Estimate]:
    """Mean and P95 of requests timed one at a time, in ms: `retrieval_ms`, `retrieval_p95_ms`, `generation_ms`, …"""
    timed = [prediction.answer.timings_ms for prediction in load_single_requests(artifact)]
    metrics: dict[str, Estimate] = {}
    for hop in LATENCY_HOPS:
        values = [float(getattr(timings, hop)) for timings in timed]
        mean = share(values, [1.0] * len(values), resamples=resamples, seed=seed)
        p95 = percentile(values, 95, resamples=resamples, seed=seed)
        if mean is not None and p95 is not None:
            metrics |= {f"{hop}_ms": mean, f"{hop}_p95_ms": p95}
    return metrics


def dimensions_of(
    recipe: EvaluationRecipe,
    parts: Parts,
    strategy: str,
    predictions: Artifact,
    metrics: Mapping[str, Estimate],
) -> dict[str, Any]:
    """The four dimensions of one strategy; `metrics` are its quality and latency metrics."""
    legs = legs_of(strategy)
    adapters = sorted({leg.adapter for leg in legs if leg.adapter and leg.adapter in parts.adapters})
    searched = any(leg.retrieves for leg in legs)
    per_second = predictions.manifest.measured.get("rows_per_s")
    rate = _hourly(recipe.prices, recipe.generation.threads, recipe.evaluate.gpus_per_generator)
    latency = {name: metrics[name].to_json() for name in metrics if name.endswith("_ms")}
    hallucination = metrics.get(SHOWN[recipe.evaluate.task].hallucination)
    return {
        "knowledge_change": _knowledge_change(recipe, parts, adapters, searched=searched),
        "latency": latency,
        "cost": {
            "per_1000_answers_usd": 1000 / per_second * rate / 3600 if per_second else None,
            "answers_per_s": per_second,
            "indexing_once_usd": _index_cost(recipe, parts) if searched else 0.0,
            "training_once_usd": sum(_training_cost(recipe, parts.adapters[name]) for name in adapters),
        },
        "hallucination": hallucination.to_json() if hallucination else None,
    }


def _knowledge_change(
    recipe: EvaluationRecipe, parts: Parts, adapters: Sequence[str], *, searched: bool
) -> dict[str, Any]:
    """What it takes to make the strategy answer from a changed fact."""
    if searched:  # the stage that made this version of the index: an update, or a build of all of it
        how = "update index" if "update" in parts.index.manifest.measured else "re-index"
        return {"how": how, "seconds": _seconds(parts.index), "cost_usd": _index_cost(recipe, parts)}
    if adapters:
        stages = [parts.adapters[name] for name in adapters] + ([parts.samples] if parts.samples else [])
        cost = sum(_training_cost(recipe, parts.adapters[name]) for name in adapters)
        return {"how": "retrain", "seconds": sum(_seconds(stage) for stage in stages), "cost_usd": cost}
    return {"how": "not possible", "seconds": None, "cost_usd": None}


def _seconds(artifact: Artifact) -> float:
    """Wall-clock seconds that building took."""
    return float(artifact.manifest.measured.get("stage_seconds", 0.0))


def _hourly(prices: PricesConfig, cores: float, gpus: float) -> float:
    return prices.gpu_hour * gpus + prices.cpu_core_hour * cores


def _index_cost(recipe: EvaluationRecipe, parts: Parts) -> float:
    cores = recipe.ray.num_cpus or os.cpu_count() or 1
    gpus = recipe.encoder.actors * recipe.encoder.gpus_per_actor
    return _seconds(parts.index) / 3600 * _hourly(recipe.prices, cores, gpus)


def _training_cost(recipe: EvaluationRecipe, adapter: Artifact) -> float:
    train = recipe.train
    rate = _hourly(recipe.prices, train.workers * train.threads_per_worker, train.workers * train.gpus_per_worker)
    return _seconds(adapter) / 3600 * rate
