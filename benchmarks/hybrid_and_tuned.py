"""What hybrid search and the tuned retriever gain over dense search with the encoder as it comes.

    python -m benchmarks.hybrid_and_tuned [--region europe] [--xquad DIR] [--store DIR] [--seed 17] [--set …]

For the Factbook (questions of recipes/factbook.py) and, with `--xquad`, a folder with corpus.jsonl and questions.jsonl:
1. an index with the encoder as it comes; dense and hybrid search answer the same questions;
2. `rayft train retriever` and the index rebuilt with its encoder; dense and hybrid again.
Prints misses at 5 (no golden place in the first five passages) and recall@1 with 95% bootstrap intervals over
questions, on all questions and on those about documents that training never sees. Hybrid needs no training, so all
questions are new to it; the tuned encoder is judged on new documents alone. Targets: hybrid's misses at 5 at most half
of dense's; tuned recall@1 on new documents at least +10 points.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.conditions import describe_conditions, describe_load
from cluster.session import ray_session
from cluster.store import Artifact, Store
from rayft import Recipe, load
from retrieval.evaluate import open_searches, rank_all
from retrieval.judged import choose_questions
from retrieval.metrics import bootstrap, measure
from retrieval.records import Question
from training.splits import NEW_DOCUMENTS

if TYPE_CHECKING:
    from retrieval.metrics import Values

PACKAGES = ("ray", "torch", "sentence-transformers", "transformers", "faiss-cpu", "bm25s", "ir-measures")
RESAMPLES = 4000
DEPTH = 20
MISS_AT = 5


def split_questions(recipe: Recipe) -> list[Question]:
    """The recipe's questions with the splits that training uses."""
    from training.splits import prepare_questions

    return prepare_questions(recipe).questions


def score(recipe: Recipe, index: Artifact, questions: Sequence[Question]) -> dict[str, dict[str, Values]]:
    """Dense and hybrid on the same questions: measures per question."""
    judged = choose_questions(questions, list({question.split for question in questions}))
    assert len(judged.questions) == len(questions), "every question must name a golden place"
    searches, _, rows, _ = open_searches(recipe, index, ("dense", "hybrid"))
    rankings = rank_all(judged, searches, min(DEPTH, rows))
    return {mode: measure(found, (1, 3, MISS_AT), DEPTH) for mode, found in rankings.items()}


def describe_misses(dense: Values, hybrid: Values, seed: int) -> str:
    """Misses of both, and their ratio with its paired interval. Both are (n_questions,) success@5."""
    missed = np.column_stack([1 - dense, 1 - hybrid])  # (n_questions, 2) float64
    n = len(missed)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) @ missed
    ratios = drawn[drawn[:, 0] > 0]
    low, high = np.percentile(ratios[:, 1] / ratios[:, 0], [2.5, 97.5]) if len(ratios) else (np.nan, np.nan)
    first, second = int(missed[:, 0].sum()), int(missed[:, 1].sum())
    ratio = f"{second / first:.2f} [{low:.2f}, {high:.2f}]" if first else "undefined: dense misses none"
    return f"misses at {MISS_AT} of {n}: dense {first}, hybrid {second}; hybrid ÷ dense {ratio}"


def describe_modes(values: Mapping[str, Mapping[str, Values]], seed: int) -> list[str]:
    """One line per side: recall@1, @3, @5 and nDCG@10 with intervals."""
    lines = []
    for side, measured in values.items():
        columns = {name: measured[name] for name in ("recall@1", "recall@3", "recall@5", "nDCG@10")}
        shown = ", ".join(
            f"{name} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"
            for name, e in bootstrap(columns, RESAMPLES, seed).items()
        )
        lines.append(f"  {side:14} {shown}")
    return lines


def describe_gain(before: Values, after: Values, what: str, seed: int) -> str:
    """Paired difference in points."""
    gain = bootstrap({"gain": after - before}, RESAMPLES, seed)["gain"]
    return f"{what}: {gain.value * 100:+.1f} points [{gain.low * 100:+.1f}, {gain.high * 100:+.1f}], n={gain.n}"


def picked(values: Mapping[str, Values], places: Sequence[int]) -> dict[str, Values]:
    """The measures of some questions."""
    return {name: column[list(places)] for name, column in values.items()}


def measure_corpus(name: str, recipe: Recipe, store: Store) -> None:
    """Both comparisons on one corpus; prints as it goes."""
    from retrieval.index import build_index
    from training.retriever import train_retriever

    questions = [question for question in split_questions(recipe) if question.golden]
    new = [place for place, question in enumerate(questions) if question.split == NEW_DOCUMENTS]
    untuned = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"tuned": "never"})})
    index = build_index(untuned, store)
    before = score(untuned, index, questions)
    print(
        f"\n{name}: {index.manifest.counts['chunks']} chunks, {len(questions)} questions, {len(new)} on new documents"
    )
    print("\n".join(["all questions:", *describe_modes(before, recipe.seed)]))
    print(describe_misses(before["dense"]["success@5"], before["hybrid"]["success@5"], recipe.seed))
    print(
        describe_gain(
            before["dense"]["recall@1"], before["hybrid"]["recall@1"], "hybrid − dense recall@1", recipe.seed
        ),
        flush=True,
    )
    began = time.perf_counter()
    train_retriever(recipe, store, force=True)  # what it came to is printed, whichever way it went
    trained_s = time.perf_counter() - began
    tuned_index = build_index(recipe, store)
    after = score(recipe, tuned_index, questions)
    sides = {f"{mode}": picked(before[mode], new) for mode in before}
    sides |= {f"tuned {mode}": picked(after[mode], new) for mode in after}
    print(
        "\n".join(
            [
                f"new documents (training took {trained_s:.0f} s, load {describe_load()}):",
                *describe_modes(sides, recipe.seed),
            ]
        )
    )
    print(describe_misses(sides["dense"]["success@5"], sides["hybrid"]["success@5"], recipe.seed))
    for mode in ("dense", "hybrid"):
        what = f"tuned {mode} − {mode} recall@1"
        print(describe_gain(sides[mode]["recall@1"], sides[f"tuned {mode}"]["recall@1"], what, recipe.seed))


def main() -> None:
    """Measures the Factbook and, where a path is given, xquad-en."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--region", default="europe")
    parser.add_argument("--xquad", type=Path, help="folder with corpus.jsonl and questions.jsonl; skipped when absent")
    parser.add_argument("--store", default="", help="where artifacts go; a temporary folder unless given")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = arguments.store or stack.enter_context(tempfile.TemporaryDirectory(prefix="hybrid-and-tuned-"))
        shared = [f"seed={arguments.seed}", f"store.uri={folder}", *arguments.overrides]
        corpora = {"factbook": load("factbook", [f"source.region={arguments.region}", *shared])}
        if arguments.xquad and (arguments.xquad / "corpus.jsonl").is_file():
            files = [f"corpus.path={arguments.xquad}/corpus.jsonl", f"questions.path={arguments.xquad}/questions.jsonl"]
            corpora["xquad-en"] = load("own_documents", [*shared, "name=xquad-en", *files])
        elif arguments.xquad:
            print(f"xquad-en is skipped: no corpus.jsonl in {arguments.xquad}")
        print(describe_conditions(PACKAGES, arguments.seed), flush=True)
        stack.enter_context(ray_session(corpora["factbook"].ray))
        for name, recipe in corpora.items():
            measure_corpus(name, recipe, Store(folder))


if __name__ == "__main__":
    main()
