"""How long a changed fact takes to be found, and what the update costs beside retraining.

    python -m benchmarks.changed_fact [--rounds 3] [--region europe] [--raft-rows 24] [--set index.kind=flat]

Each round edits one fact in a copy of the Factbook's corpus and then runs what a user runs: `rayft index update`,
`rayft release` (publish and promote). The clock runs from the edit until a retriever, opened afresh from the promoted
release, has the new fact among its first passages for the fact's question, and the old fact nowhere; start of Python
and Ray included. Not measured: a running server's change to the new release.
Retraining is measured in the same run at `--raft-rows` rows (0: not at all) and stated for the recipe's own number by
rows, with the training stage's fixed part counted once.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.conditions import describe_conditions, describe_load
from cluster.releases import open_release
from cluster.store import Store
from rayft import Recipe, load
from retrieval.questions import read_questions
from retrieval.records import Question

PACKAGES = ("ray", "torch", "sentence-transformers", "faiss-cpu")
TARGET_S = 30.0
PASSAGES = 3


@dataclass(frozen=True)
class Edit:
    """One fact of the corpus and what it is changed into."""

    question: Question
    line: str
    new_line: str


def run_rayft(arguments: Sequence[str]) -> float:
    """Run one command to its end; seconds.

    Raises:
        RuntimeError: with its output, when it fails.
    """
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "rayft", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"rayft {' '.join(arguments)}:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - began


def choose_edits(corpus: Path, questions: Sequence[Question], rounds: int, seed: int) -> list[Edit]:
    """Facts whose line holds the first answer once, of different documents; the answer becomes an invented one."""
    texts = {row["_id"]: row["text"] for row in map(json.loads, corpus.read_text(encoding="utf-8").splitlines())}
    shuffled = random.Random(seed).sample(questions, len(questions))
    edits: dict[str, Edit] = {}
    for question in shuffled:
        if len(question.golden) != 1 or not question.answers or question.golden[0].doc_id in edits:
            continue
        golden, answer = question.golden[0], question.answers[0]
        line = texts[golden.doc_id][golden.start : golden.end]
        if line.count(answer) != 1 or texts[golden.doc_id].count(line) != 1:
            continue
        new_line = line.replace(answer, f"Zq{len(edits)}{answer[::-1]}")
        edits[golden.doc_id] = Edit(question, line, new_line)
        if len(edits) == rounds:
            break
    return list(edits.values())


def apply_edit(corpus: Path, edit: Edit) -> None:
    """Replace the fact's line in its document."""
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["_id"] == edit.question.golden[0].doc_id:
            assert edit.line in row["text"], "the fact has moved"
            row["text"] = row["text"].replace(edit.line, edit.new_line)
    corpus.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def find_fact(recipe: Recipe, store: Store, edit: Edit) -> tuple[int | None, bool]:
    """Rank of the new fact for its question in the promoted release, and whether the old one is still found."""
    from retrieval.retriever import Retriever

    release = open_release(store, recipe.name)
    assert release.index is not None, "the demo released an index"
    retriever = Retriever.open(store.open_ref(release.index), recipe.encoder, recipe.search)
    hits = retriever.search([edit.question.text], 20)[0]
    doc_id = edit.question.golden[0].doc_id
    same = [hit for hit in hits if hit.passage.doc_id == doc_id]
    rank = next((hit.rank for hit in same if edit.new_line in hit.passage.text), None)
    old = any(edit.line in hit.passage.text for hit in same)
    return rank, old


def measure_retraining(path: str, options: list[str], recipe: Recipe, rows: int) -> tuple[float, float]:
    """Seconds of the whole command at `rows` rows, and of its training loop."""
    whole = run_rayft(["train", "lora", path, "--objective", "raft", *options, "--set", f"samples.raft_rows={rows}"])
    manifest = Store(recipe.store.uri).open("adapter", f"{recipe.name}-raft").manifest
    return whole, float(manifest.measured["training_seconds"])


@dataclass(frozen=True)
class Round:
    """One edit, from the file to the search."""

    total_s: float
    update_s: float


def run_round(path: str, options: list[str], recipe: Recipe, corpus: Path, edit: Edit) -> Round:
    """Edit, update, promote, look; prints what was found."""
    began = time.perf_counter()
    apply_edit(corpus, edit)
    update_s = run_rayft(["index", "update", path, *options])
    release_s = run_rayft(["release", path, *options])
    rank, old = find_fact(recipe, Store(recipe.store.uri), edit)
    total = time.perf_counter() - began
    print(
        f"{edit.question.metadata.get('kind', '')} of {edit.question.golden[0].doc_id}: {total:.1f} s "
        f"(update {update_s:.1f}, release {release_s:.1f}), new fact {f'at rank {rank}' if rank else 'NOT FOUND'}, "
        f"old fact {'STILL FOUND' if old else 'gone'}; load {describe_load()}",
        flush=True,
    )
    return Round(total, update_s)


def print_retraining(path: str, options: list[str], recipe: Recipe, rows: int, update_s: float) -> None:
    """Retrain at `rows` rows and print its cost beside the update's."""
    whole, loop = measure_retraining(path, options, recipe, rows)
    wanted = recipe.samples.raft_rows
    scaled = whole - loop + loop * wanted / rows
    print(
        f"retraining the RAFT adapter: {whole:.1f} s at {rows} rows (loop {loop:.1f} s); by rows {scaled:.0f} s at the "
        f"recipe's {wanted} (computed); load {describe_load()}"
    )
    print(f"retraining ÷ update: {whole / update_s:.1f} at {rows} rows, {scaled / update_s:.1f} at {wanted} (computed)")


def main() -> None:
    """Edits, updates, promotes and looks; prints seconds and the ratio to retraining."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="factbook")
    parser.add_argument("--region", default="europe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", default="", help="a store to work in, whose index lends its embeddings to the build")
    parser.add_argument("--raft-rows", type=int, default=24)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    source = load(arguments.recipe, [f"source.region={arguments.region}", *arguments.overrides])
    print(describe_conditions(PACKAGES, source.seed), flush=True)
    with tempfile.TemporaryDirectory(prefix="changed-fact-") as folder:
        corpus, questions = Path(folder) / "corpus.jsonl", Path(folder) / "questions.jsonl"
        corpus.write_bytes(Path(source.corpus.path).read_bytes())
        questions.write_bytes(Path(source.questions.path).read_bytes())
        files = [
            f"store.uri={arguments.store or folder + '/store'}",
            f"corpus.path={corpus}",
            f"questions.path={questions}",
        ]
        overrides = [*arguments.overrides, *files]
        options = [part for override in overrides for part in ("--set", override)]
        recipe = load(arguments.recipe, overrides)
        build_s = run_rayft(["index", "build", arguments.recipe, *options])
        chunks = Store(recipe.store.uri).open("index", recipe.name).manifest.counts["chunks"]
        how = "with the store's embeddings" if arguments.store else "from nothing"
        print(f"build {how}: {build_s:.1f} s for {chunks} chunks; load {describe_load()}", flush=True)
        edits = choose_edits(corpus, read_questions(questions), arguments.rounds, recipe.seed)
        rounds = [run_round(arguments.recipe, options, recipe, corpus, edit) for edit in edits]
        totals = [one.total_s for one in rounds]
        update_s = statistics.median(one.update_s for one in rounds)
        print(
            f"until a changed fact is found: median {statistics.median(totals):.1f} s ({min(totals):.1f} to "
            f"{max(totals):.1f}), target {TARGET_S:.0f} s"
        )
        if not arguments.store:
            print(f"update ÷ build from nothing: {update_s / build_s:.3f}")
        if arguments.raft_rows:
            print_retraining(arguments.recipe, options, recipe, arguments.raft_rows, update_s)


if __name__ == "__main__":
    main()
