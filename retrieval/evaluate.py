"""`rayft index evaluate`: how well an index is searched, its modes side by side on the same questions.

In: a recipe, an index artifact, questions with golden places (ours, or BEIR queries with qrels). Out: a `report`
artifact named `<recipe>-retrieval`: `retrieval.json` (measures with 95% intervals, paired differences, slices by kind
of question, latency), `retrieval.png`, and `ranks.jsonl` (per question the rank of the first golden passage in each
mode; no text). Skipped when nothing that it depends on has changed.
Not covered: what the measures mean (`metrics.py`), answers (`rayft evaluate`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from cluster.errors import UserError
from cluster.progress import say, track
from cluster.stage import Outcome, Plan, run_stage
from retrieval.config import RetrievalRecipe
from retrieval.judged import Judged
from retrieval.metrics import Estimate, Ranking, bootstrap, measure, rank_items
from retrieval.records import Hit, Question

if TYPE_CHECKING:
    from cluster.store import Artifact, Attempt, Store
    from retrieval.metrics import Values

EvaluatedMode = Literal["dense", "lexical", "hybrid", "reranked"]
MODES: tuple[EvaluatedMode, ...] = get_args(EvaluatedMode)
DEFAULT_KS = (1, 3, 5, 10)
JSON_FILE, PLOT_FILE, RANKS_FILE = "retrieval.json", "retrieval.png", "ranks.jsonl"
REPORT_FORMAT = 2
DEPTH = 100  # passages searched per question, or the largest k: MAP and the collapse to documents need more than k
RESAMPLES = 2000
BATCH_QUERIES = 64
LATENCY_QUERIES = 40


class Search(Protocol):
    """One way of searching an opened index."""

    def __call__(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best hits of each query."""
        ...


def open_searches(
    recipe: RetrievalRecipe, index: Artifact, modes: Sequence[EvaluatedMode] = ()
) -> tuple[dict[EvaluatedMode, Search], dict[EvaluatedMode, str], int, Callable[[str], bool]]:
    """The ways in which `index` can be searched.

    Args:
        recipe: Its encoder and search sections.
        index: Of kind `index`.
        modes: Modes that must be there; none asks for all that the index can serve.

    Returns:
        Searches by mode, why each other mode is left out, the number of passages of the index, and whether it holds
        a document.

    Raises:
        UserError: a mode of `modes` cannot be served.
    """
    from retrieval.retriever import Retriever

    plain = Retriever.open(index, recipe.encoder, recipe.search.model_copy(update={"rerank": ""}))
    searches: dict[EvaluatedMode, Search] = {}
    left_out: dict[EvaluatedMode, str] = {}
    for mode in modes or MODES:
        try:
            if mode != "reranked":
                search: Search = functools.partial(plain.search, mode=mode)
            elif recipe.search.rerank:
                reranking = Retriever.open(index, recipe.encoder, recipe.search)
                search = _Reranked(reranking.search, plain.search, recipe.search.rerank_candidates)
            else:
                raise UserError("search.rerank names no cross-encoder")
            search(["probe"], 1)
        except UserError as error:
            if modes:
                raise UserError(f"--modes: {mode} cannot be evaluated: {error}") from error
            left_out[mode] = str(error)
        else:
            searches[mode] = search
    return searches, left_out, len(plain), plain.holds


@dataclasses.dataclass(frozen=True)
class _Reranked:
    """The reranked hits, and after them the first search's other hits in its own order: a cross-encoder that reads 20
    hits in serving must not read 100 when it is measured."""

    reranked: Search
    plain: Search
    candidates: int

    def __call__(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best hits of each query."""
        best = self.reranked(queries, min(k, self.candidates))
        if k <= self.candidates:
            return best
        merged = []
        for first, rest in zip(best, self.plain(queries, k), strict=True):
            taken = {hit.passage.chunk_id for hit in first}
            merged.append([*first, *(hit for hit in rest if hit.passage.chunk_id not in taken)][:k])
        return merged


def evaluate_retrieval(
    recipe: RetrievalRecipe,
    store: Store,
    index: Artifact,
    judged: Judged,
    modes: Sequence[EvaluatedMode] = (),
    ks: Sequence[int] = (),
) -> Artifact:
    """Score every mode on the same questions and publish the report.

    Args:
        recipe: Its encoder and search sections.
        store: Where the report goes.
        index: Of kind `index`.
        judged: The questions.
        modes: Modes that must be there; none asks for all that the index can serve.
        ks: Depths of recall; none takes those of 1, 3, 5 and 10 that the index can fill.

    Raises:
        UserError: a mode of `modes` cannot be served, the largest of `ks` is above the number of passages, or the
            index holds no golden document at all.
    """
    searches, left_out, rows, holds = open_searches(recipe, index, modes)
    ks = ks or [k for k in DEFAULT_KS if k <= rows]
    missing = without_golden_in(judged, holds, index)
    if max(ks) > rows:
        raise UserError(f"--k: {max(ks)} is more than the {rows} passages of {index.ref}: give at most {rows}")
    depth = min(rows, max(DEPTH, *ks))
    plan = Plan(
        kind="report",
        name=f"{recipe.name}-retrieval",
        config={
            "evaluate": {"modes": list(searches), "k": list(ks), "depth": depth, "resamples": RESAMPLES},
            "search": recipe.search.model_dump(exclude={"gpu", "mode"}),
        },
        inputs={"questions": judged.digest, **_reranker_input(recipe, searches)},
        parents={"index": index.ref},
        format=REPORT_FORMAT,
        seed=recipe.seed,
    )

    def build(attempt: Attempt) -> Outcome:
        rankings = rank_all(judged, searches, depth)
        content = {
            "format": REPORT_FORMAT,
            "index": str(index.ref),
            "encoder": index.manifest.measured.get("encoder", ""),
            "settings": {"k": list(ks), "depth": depth, "resamples": RESAMPLES, "seed": recipe.seed},
            "left_out": left_out,
            **summarise(judged, rankings, ks, depth, recipe.seed, missing),
            "latency_ms": measure_latency(judged, searches, max(ks), recipe.seed),
        }
        _write_files(attempt, content, judged, rankings)
        return Outcome(counts={"questions": len(judged.questions), "modes": len(searches)})

    return run_stage(store, plan, build)


def without_golden_in(judged: Judged, holds: Callable[[str], bool], index: Artifact) -> int:
    """The number of questions of which no golden document is in the index; says so, for each counts as a miss.

    Raises:
        UserError: none of all questions' is.
    """
    missing = [q for q in judged.questions if not any(holds(place.doc_id) for place in q.golden)]
    if not missing:
        return 0
    example = missing[0].golden[0].doc_id
    if len(missing) == len(judged.questions):
        raise UserError(
            f"questions: {index.ref} holds none of the golden documents of {len(missing)} questions (the first is "
            f"{example!r}): give questions about its corpus; `rayft index search` shows ids"
        )
    say(
        f"index: no golden document of {len(missing)} of {len(judged.questions)} questions is in {index.ref} (the "
        f"first is {example!r}): they count as misses"
    )
    return len(missing)


def _reranker_input(recipe: RetrievalRecipe, searches: Mapping[EvaluatedMode, Search]) -> dict[str, str]:
    """The cross-encoder's digest, where it is evaluated: its path alone would not tell another model."""
    if "reranked" not in searches:
        return {}
    from cluster.model_source import local_model_directory, model_digest

    return {"search.rerank": model_digest(local_model_directory(recipe.search.rerank, None, key="search.rerank"))}


def read_retrieval_report(report: Artifact) -> dict[str, Any]:
    """The content of `retrieval.json`."""
    content: dict[str, Any] = json.loads(report.path(JSON_FILE).read_text(encoding="utf-8"))
    return content


def rank_all(judged: Judged, searches: Mapping[EvaluatedMode, Search], depth: int) -> dict[str, list[Ranking]]:
    """Each mode's ranking of every question, from `depth` passages."""
    rankings: dict[str, list[Ranking]] = {mode: [] for mode in searches}
    grades = judged.grades or {}
    with track("index: search", len(judged.questions), "questions") as bar:
        for start in range(0, len(judged.questions), BATCH_QUERIES):
            batch = judged.questions[start : start + BATCH_QUERIES]
            texts = [question.text for question in batch]
            found = {mode: search(texts, depth) for mode, search in searches.items()}
            for place, question in enumerate(batch):
                hits: dict[str, list[Hit]] = {mode: lists[place] for mode, lists in found.items()}
                for mode, ranking in rank_items(question, hits, grades.get(question.question_id)).items():
                    rankings[mode].append(ranking)
            bar.advance(len(batch))
    return rankings


def summarise(
    judged: Judged, rankings: Mapping[str, Sequence[Ranking]], ks: Sequence[int], depth: int, seed: int, missing: int
) -> dict[str, Any]:
    """Measures of each mode, paired differences against the first (dense, where it is there), slices by kind.

    `missing` is the number of questions that no search of this index could get right.
    """
    values = {mode: measure(found, ks, depth) for mode, found in rankings.items()}
    reference, *others = values
    kinds: dict[str, list[int]] = {}
    for place, question in enumerate(judged.questions):
        kinds.setdefault(str(question.metadata.get("kind", "")), []).append(place)
    modes, differences = _estimates(values, reference, seed)
    sliced = {}
    for kind, places in sorted(kinds.items()) if len(kinds) > 1 else []:
        part = {mode: {name: column[places] for name, column in columns.items()} for mode, columns in values.items()}
        sliced[kind] = {"n": len(places), "modes": _estimates(part, reference, seed)[0]}
    splits: dict[str, int] = {}
    for question in judged.questions:
        splits[question.split] = splits.get(question.split, 0) + 1
    return {
        "questions": {
            "asked": len(judged.questions),
            "without_golden": judged.without_golden,
            "golden_missing": missing,
            "splits": splits,
        },
        "ranked": _ranked(judged.questions),
        "reference": reference,
        "modes": modes,
        "differences": {mode: differences[mode] for mode in others},
        "kinds": sliced,
    }


def _estimates(
    values: Mapping[str, Mapping[str, Values]], reference: str, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Per mode and measure: the mean, and the mean difference from `reference`, from one set of resamples."""
    columns: dict[str, Values] = {}
    for mode, measured in values.items():
        for name, column in measured.items():
            columns[f"{mode} {name}"] = column
            columns[f"{mode} {name} difference"] = column - values[reference][name]
    estimates = bootstrap(columns, RESAMPLES, seed)

    def rows(suffix: str) -> dict[str, dict[str, Any]]:
        return {
            mode: {name: _plain(estimates[f"{mode} {name}{suffix}"]) for name in measured}
            for mode, measured in values.items()
        }

    return rows(""), rows(" difference")


def _plain(estimate: Estimate) -> dict[str, float | int]:
    return {key: round(value, 6) for key, value in dataclasses.asdict(estimate).items()}


def _ranked(questions: Sequence[Question]) -> str:
    spans = sum(any(place.start is not None for place in question.golden) for question in questions)
    if spans == 0:
        return "documents"
    return "passages" if spans == len(questions) else "documents and passages"


def measure_latency(
    judged: Judged, searches: Mapping[EvaluatedMode, Search], k: int, seed: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of one query at a time, embedding included: median and 95th percentile; the modes take turns."""
    import numpy as np

    texts = [question.text for question in judged.questions]
    chosen = random.Random(seed).sample(texts, min(LATENCY_QUERIES, len(texts)))
    taken: dict[str, list[float]] = {mode: [] for mode in searches}
    for search in searches.values():
        search(chosen[:1], k)
    for text in chosen:
        for mode, search in searches.items():
            began = time.perf_counter()
            search([text], k)
            taken[mode].append((time.perf_counter() - began) * 1000)
    return {
        mode: {
            "p50": round(float(np.percentile(times, 50)), 3),
            "p95": round(float(np.percentile(times, 95)), 3),
            "n": len(times),
            "k": k,
        }
        for mode, times in taken.items()
    }


def _write_files(
    attempt: Attempt, content: Mapping[str, Any], judged: Judged, rankings: Mapping[str, Sequence[Ranking]]
) -> None:
    from retrieval.evaluate_view import retrieval_plot

    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    (attempt.directory / JSON_FILE).write_text(text, encoding="utf-8")
    (attempt.directory / PLOT_FILE).write_bytes(retrieval_plot(content))
    with (attempt.directory / RANKS_FILE).open("w", encoding="utf-8") as file:
        for place, question in enumerate(judged.questions):
            ranks = {mode: found[place].first_golden for mode, found in rankings.items()}
            row = {"question_id": question.question_id, "kind": question.metadata.get("kind", ""), "ranks": ranks}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def tell(report: Artifact) -> None:
    """Print the tables and where the files are."""
    from retrieval.evaluate_view import render_text

    say("\n" + render_text(read_retrieval_report(report)) + "\n")
    for file in (JSON_FILE, PLOT_FILE, RANKS_FILE):
        say(f"report: {report.path(file)}")
