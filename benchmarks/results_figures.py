"""The figures of docs/results.md: what the runs' reports say, side by side, against the bars and against the paper.

In: the runs, their records and reports. Out: plain values with intervals, verdicts and orders. Nothing is made up: a
run without a report gives None everywhere. Not covered: how it is written (benchmarks/results_page.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.results_cells import Part, Run
from benchmarks.results_runs import Record, Workplace, load_report
from cluster.manifest import ArtifactRef
from cluster.store import Artifact, Store
from evaluation.batch import load_predictions
from evaluation.intervals import Estimate, difference
from evaluation.metrics import METRICS, scores
from evaluation.rubric import Rubric, labels_of
from evaluation.tasks import SHOWN

ROWS = {
    "base": "base",
    "rag": "base + RAG, zero-shot",
    "rag_fewshot": "base + RAG, few-shot",
    "finetuned": "DSF",
    "finetuned_rag": "DSF + RAG",
    "raft": "RAFT",
}
"""Strategy to the paper's name for it."""
PAPER_SETS = ("PubMedQA", "HotpotQA", "HuggingFace", "Torch Hub", "TensorFlow Hub")
PAPER: dict[str, tuple[float, ...]] = {
    "base": (56.5, 0.54, 0.22, 0, 0),
    "rag": (58.8, 0.03, 26.43, 8.60, 43.06),
    "finetuned": (59.7, 6.38, 61.06, 84.94, 86.56),
    "finetuned_rag": (71.6, 4.41, 42.59, 82.80, 60.29),
    "raft": (73.30, 35.28, 74.00, 84.95, 86.86),
}
"""Zhang et al. 2024, arXiv 2403.10131, Table 1 (LLaMA2-7B, per cent)."""
COUNTERPART = {"Factbook": "HotpotQA", "xquad-en": "HotpotQA", "Torch Hub": "Torch Hub", "PubMedQA": "PubMedQA"}
"""Our set to the paper's own, or (for the first two) to its nearest: questions answered from Wikipedia."""


@dataclass(frozen=True)
class Cell:
    """One run and what it measured."""

    run: Run
    record: Record | None = None
    report: Mapping[str, Any] | None = None
    trained: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Adapter role to its manifest's counts and measures."""

    @property
    def main(self) -> str:
        """The task's score."""
        assert self.report is not None, self.run.name
        return SHOWN[self.report["task"]].main

    @property
    def seed(self) -> int | None:
        """The recipe's seed, where the run is measured."""
        return None if self.report is None else int(self.report["seed"])

    def value(self, strategy: str, metric: str = "", split: str = "") -> Mapping[str, float] | None:
        """`{value, low, high, n}`; by default the task's score on the headline split (with latencies)."""
        if self.report is None:
            return None
        found = self.report["splits"].get(split, {}) if split else self.report["strategies"]
        estimate: Mapping[str, float] | None = found.get(strategy, {}).get(metric or self.main)
        return estimate

    def difference(self, first: str, second: str) -> Mapping[str, Any] | None:
        """The paired difference of the task's score on the headline split."""
        if self.report is None:
            return None
        wanted = (self.report["headline_split"], first, second, self.main)
        rows = self.report["comparisons"]
        return next((r for r in rows if (r["split"], r["first"], r["second"], r["metric"]) == wanted), None)


def collect(place: Workplace, runs: Sequence[Run]) -> list[Cell]:
    """Every run with its record and report, in order."""
    cells = []
    for run in runs:
        record = place.record(run)
        report = load_report(place.store, record) if record else None
        cells.append(Cell(run, record, report, _trained(place.store, report) if report else {}))
    return cells


def _trained(store: Store, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for role, ref in report["lineage"].items():
        if role.startswith("adapter ") and store.exists(parsed := ArtifactRef.parse(ref)):
            manifest = store.open_ref(parsed).manifest
            found[role.removeprefix("adapter ")] = {**manifest.counts, **manifest.measured}
    return found


def of_part(cells: Sequence[Cell], part: Part) -> list[Cell]:
    """The cells of a part of the page."""
    return [cell for cell in cells if cell.run.part == part]


def by_column(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The table's columns: each data set with its runs, one per seed."""
    columns: dict[str, list[Cell]] = {}
    for cell in of_part(cells, "table"):
        columns.setdefault(cell.run.column, []).append(cell)
    return columns


def mean(cells: Sequence[Cell], strategy: str, metric: str = "") -> float | None:
    """Mean over the seeds that are measured."""
    values = [estimate["value"] for cell in cells if (estimate := cell.value(strategy, metric)) is not None]
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Bar:
    """Something that had to be shown."""

    what: str
    found: str
    met: bool | None
    """None where it is not measured."""


def bars(columns: Mapping[str, Sequence[Cell]]) -> list[Bar]:
    """The bars set for SmolLM2-135M, each with what was found."""
    found = [
        _at_least("RAFT's exact match on new documents", columns, "Factbook", ("raft",), "exact_match", 0.75),
        *(
            _above_zero(f"RAFT − {ROWS[rival]}: lower bound", columns, column, rival)
            for column in ("Factbook", "xquad-en")
            for rival in ("rag", "rag_fewshot", "finetuned_rag")
        ),
        _at_least(
            "right function, best tuned strategy",
            columns,
            "Torch Hub",
            ("finetuned", "finetuned_rag", "raft"),
            "functional_accuracy",
            0.85,
        ),
    ]
    for column in ("Factbook", "xquad-en"):
        what = "answerable questions that RAFT answers with a verified quote that holds the answer"
        found.append(_at_least(what, columns, column, ("raft",), "quoted_answer", 0.85))
    return found


def _at_least(
    what: str,
    columns: Mapping[str, Sequence[Cell]],
    column: str,
    strategies: Sequence[str],
    metric: str,
    bar: float,
) -> Bar:
    cells = columns.get(column, ())
    means = {name: mean(cells, name, metric) for name in strategies}
    measured = {name: value for name, value in means.items() if value is not None}
    shown = f"{column}: {what} ≥ {bar:.2f}"
    if not measured:
        return Bar(shown, "not measured", None)
    best = max(measured, key=lambda name: measured[name])
    values = [(cell.seed, cell.value(best, metric)) for cell in cells]
    seeds = [f"{estimate['value']:.3f} (seed {seed})" for seed, estimate in values if estimate is not None]
    found = f"{measured[best]:.3f} on average: {', '.join(seeds)}" if len(seeds) > 1 else seeds[0]
    return Bar(shown, f"{ROWS[best]} {found}", measured[best] >= bar)


def _above_zero(what: str, columns: Mapping[str, Sequence[Cell]], column: str, rival: str) -> Bar:
    """Met when the lower bound is above 0 for every seed that is measured."""
    rows = [(cell.seed, cell.difference("raft", rival)) for cell in columns.get(column, ())]
    lows = [(seed, row["low"]) for seed, row in rows if row is not None]
    shown = f"{column}: {what} > 0"
    if not lows:
        return Bar(shown, "not measured", None)
    return Bar(shown, ", ".join(f"{low:+.3f} (seed {seed})" for seed, low in lows), all(low > 0 for _, low in lows))


@dataclass(frozen=True)
class Order:
    """How our order of strategies on a set compares with the paper's."""

    column: str
    paper_set: str
    agree: int
    pairs: int
    reversed: tuple[tuple[str, str], ...]
    """Pairs (ours better, ours worse) that the paper has the other way round."""


def order_against_paper(column: str, cells: Sequence[Cell]) -> Order | None:
    """Pair by pair of the paper's five rows, by the mean over seeds; equal values agree with nothing.

    None where a row is not measured, or the paper has no such set.
    """
    paper_set = COUNTERPART.get(column)
    ours = {name: mean(cells, name) for name in PAPER}
    measured = {name: value for name, value in ours.items() if value is not None}
    if paper_set is None or len(measured) < len(PAPER):
        return None
    place = PAPER_SETS.index(paper_set)
    agree, turned = 0, []
    for first, second in itertools.combinations(PAPER, 2):
        better, worse = (first, second) if measured[first] >= measured[second] else (second, first)
        theirs = PAPER[better][place] - PAPER[worse][place]
        if measured[better] > measured[worse] and theirs > 0:
            agree += 1
        elif measured[better] > measured[worse] and theirs < 0:
            turned.append((better, worse))
    return Order(column, paper_set, agree, len(list(itertools.combinations(PAPER, 2))), tuple(turned))


def ranks(values: Mapping[str, float]) -> dict[str, int]:
    """1 for the highest; equal values share the better rank."""
    return {name: 1 + sum(other > value for other in values.values()) for name, value in values.items()}


def paired(store: Store, first: Cell, second: Cell, strategy: str, metric: str) -> Estimate | None:
    """`first` minus `second` for one strategy, over the questions of the headline split that both answered."""
    if first.report is None or second.report is None:
        return None
    left, right = (_predictions(store, cell, strategy) for cell in (first, second))
    if left is None or right is None:
        return None
    both = [name for name in left if name in right]
    questions = [left[name].question for name in both]
    rubric = Rubric(first.report["language"], first.report["task"], labels_of(questions))
    ours, others = (scores(metric, [side[name] for name in both], rubric) for side in (left, right))
    resamples = first.report["settings"]["bootstrap_resamples"]
    return difference(ours, others, METRICS[metric].combine, resamples=resamples, seed=int(first.report["seed"]))


def _predictions(store: Store, cell: Cell, strategy: str) -> dict[str, Any] | None:
    assert cell.report is not None
    ref = cell.report["lineage"].get(f"predictions {strategy}")
    if ref is None or not store.exists(ArtifactRef.parse(ref)):
        return None
    artifact: Artifact = store.open_ref(ArtifactRef.parse(ref))
    split = cell.report["headline_split"]
    return {p.question.question_id: p for p in load_predictions(artifact) if p.question.split == split}


def grid(cells: Sequence[Cell], rows: str, columns: str) -> dict[tuple[float, float], Cell]:
    """The cells of a grid by the values of two recipe keys."""
    found = {}
    for cell in cells:
        axes = dict(cell.run.axes)
        found[axes[rows], axes[columns]] = cell
    return found


def matrix(cells: Mapping[tuple[float, float], Cell], strategy: str = "raft") -> tuple[list[float], list[float], Any]:
    """Row values, column values and the task's score of each, (rows, columns) float64 with NaN for not measured."""
    rows = sorted({row for row, _ in cells})
    columns = sorted({column for _, column in cells})
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), cell in cells.items():
        estimate = cell.value(strategy)
        if estimate is not None:
            values[rows.index(row), columns.index(column)] = estimate["value"]
    return rows, columns, values
