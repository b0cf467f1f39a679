"""A deterministic engine and retriever, and questions about a small invented world, shared by the evaluation tests."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster.stage import Outcome, Plan, run_stage
from cluster.store import Artifact, Store
from evaluation.config import EvaluationRecipe
from evaluation.parts import BatchRun, Parts
from evaluation.pipeline import Runner, Workers, run_in_process
from evaluation.selection import questions_digest
from retrieval.records import Golden, Hit, Passage, Question
from serving.engine import Completion, GenerationRequest
from training.records import RaftSample
from training.samples import load_examples, write_table

KINDS = ("capital", "river", "altitude")


def make_questions(count: int, split: str = "test_new_documents", start: int = 0) -> list[Question]:
    return [
        Question(
            question_id=f"q{number:03d}",
            text=f"What is the {KINDS[number % 3]} of Land{number}?",
            answers=(f"Town{number}",),
            golden=(Golden(f"land{number}"),),
            split=split,
            metadata={"kind": KINDS[number % 3]},
        )
        for number in range(start, start + count)
    ]


def passage(number: int) -> Passage:
    text = f"The seat of Land{number} is Town{number}, founded in {1800 + number}."
    return Passage(f"c{number}", f"land{number}", f"Land{number}", "Government", "", text, 0, len(text))


def number_of(text: str) -> int:
    return int(re.findall(r"Land(\d+)", text)[-1])


class FakeRetriever:
    """The golden passage first, then its neighbours."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [
            [Hit(passage(number_of(query) + step), 1.0 - step / 10, step + 1) for step in range(k)] for query in queries
        ]

    def search_and_embed(self, queries: Sequence[str], k: int) -> tuple[list[list[Hit]], np.ndarray]:
        """Embeddings tell the kinds of question apart: (n, 3) float32, one-hot."""
        kinds = [next(place for place, kind in enumerate(KINDS) if kind in query) for query in queries]
        return self.search(queries, k), np.eye(3, dtype=np.float32)[kinds]


@dataclass
class FakeEngine:
    """Answers well with the raft adapter, makes things up without passages; logs each request that it is asked."""

    log: Path | None = None
    broken: tuple[str, ...] = ()
    seconds: float = 0.0
    closed: bool = field(default=False)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        asked = [request.messages[-1]["content"] for request in requests]
        if any(f"{name}?" in prompt for prompt in asked for name in self.broken):
            raise RuntimeError("out of memory")
        time.sleep(self.seconds)
        if self.log:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps([request.request_id for request in requests]) + "\n")
        return [self._complete(request) for request in requests]

    def _complete(self, request: GenerationRequest) -> Completion:
        prompt = request.messages[-1]["content"]
        number = number_of(prompt)
        shown = "<document" in prompt
        if request.adapter == "raft" and number % 5:
            text = f"##begin_quote##The seat of Land{number} is Town{number}##end_quote##\n<ANSWER>: Town{number}"
        elif request.adapter == "raft":
            wrong = f"<script>alert({number})</script>"
            text = f"##begin_quote##Land{number} has <b>no</b> seat##end_quote##\n<ANSWER>: {wrong}"
        elif request.adapter == "finetuned" and not shown:
            text = f"<ANSWER>: Town{number if number % 2 else 0}"
        else:
            text = f"I think that it is Town{number if shown and number % 3 == 0 else 7}."
        return Completion(request.request_id, text, "stop", len(prompt) // 4, len(text) // 4, 0.0, 5.0)

    def close(self) -> None:
        self.closed = True


def make_recipe(store: Store | str, **evaluate: object) -> EvaluationRecipe:
    settings = {"new_documents": 30, "new_questions": 10, "bootstrap_resamples": 200, "window_rows": 4, **evaluate}
    return EvaluationRecipe.model_validate({"name": "invented", "store": {"uri": str(store)}, "evaluate": settings})


def stub_artifact(store: Store, kind: str, name: str) -> Artifact:
    def build(attempt):
        (attempt.directory / "content.txt").write_text(f"{kind} {name}\n", encoding="utf-8")
        return Outcome(counts={"chunks": 100})

    return run_stage(store, Plan(kind=kind, name=name), build)


def samples_artifact(store: Store, questions: Sequence[Question]) -> Artifact:
    """A `samples` artifact with the two files that evaluation reads."""
    target = "##begin_quote##Town90##end_quote##\n<ANSWER>: Town90"
    example = RaftSample(
        "s", "e", "raft", "Where?", (passage(90),), (True,), True, "", ("Town90",), "Town90", target, "train"
    )

    def build(attempt):
        write_table(attempt.directory / "questions.parquet", [q.to_row() for q in questions], Question.schema())
        write_table(attempt.directory / "examples.parquet", [example.to_row()], RaftSample.schema())
        return Outcome()

    inputs = {"questions": questions_digest(questions)}
    return run_stage(store, Plan(kind="samples", name="invented", inputs=inputs), build)


def make_parts(
    store: Store, adapters: Sequence[str] = ("raft", "finetuned"), questions: Sequence[Question] = ()
) -> Parts:
    return Parts(
        index=stub_artifact(store, "index", "invented"),
        samples=(samples := samples_artifact(store, questions)),
        adapters={name: stub_artifact(store, "adapter", f"invented-{name}") for name in adapters},
        base_digest="b" * 64,
        examples=load_examples(samples),
    )


def make_run(engine: FakeEngine | None = None, runner: Runner = run_in_process) -> BatchRun:
    chosen = engine or FakeEngine()
    return BatchRun(Workers(lambda: chosen, FakeRetriever), runner)
