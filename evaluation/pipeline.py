"""Windows of questions on their way through retrieval and generation: in this process, or on Ray Data.

In: tasks (a window of questions for one strategy) and factories that open a retriever and an engine where the work is
done. Out: results as they finish, one per task. One pool of engines serves the tasks of all strategies, so the model
is loaded once per actor and not once per strategy. Not covered: what is durable (evaluation/windows.py, driver side).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from evaluation.answering import AnswerSettings, Generates, Searches, answer_singly, answer_window, retrieves
from evaluation.config import EvaluateConfig
from evaluation.records import Prediction
from retrieval.records import Hit, Question
from serving.context_budget import CountsTokens
from serving.strategies import AUTO

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from evaluation.answering import Embedding

_CACHED_QUERIES = 50_000
# Ray Data's own defaults restart and retry without end, so a window that kills its worker would never be given up.
# Passed as remote arguments, which Ray deprecates from 2.64 on without having named parameters for these two yet.
_BOUNDED_RETRIES = {"max_restarts": 3, "max_task_retries": 3}


@dataclass(frozen=True)
class Task:
    """A window of questions for one strategy; `single` answers them one at a time, as lone requests."""

    strategy: str
    number: int
    questions: tuple[Question, ...]
    single: bool = False


@dataclass(frozen=True)
class Result:
    """A finished task with the wall-clock seconds that it took."""

    strategy: str
    number: int
    single: bool
    predictions: tuple[Prediction, ...]
    retrieval_s: float
    generation_s: float


@dataclass(frozen=True)
class Workers:
    """How to open what answers questions; all are called where the work is done, so they must pickle."""

    open_engine: Callable[[], Generates]
    open_retriever: Callable[[], Searches] | None
    open_tokens: Callable[[], CountsTokens] | None = None
    """The model's tokenizer, by which passages are trimmed to its context; without it nothing is trimmed."""


@dataclass(frozen=True)
class Retrieved:
    """What was found for a task's questions."""

    hits: Sequence[Sequence[Hit]]
    seconds: float
    """That searching took, of all questions together."""
    embeddings: Sequence[Embedding] = ()
    """The questions', each (dim,) float32 or None, for the router of `auto`; empty for what is not routed."""

    @classmethod
    def nothing(cls, task: Task) -> Retrieved:
        """For what searches nothing."""
        return cls([[] for _ in task.questions], 0.0)

    def to_row(self) -> dict[str, Any]:
        """Its part of a task's row on Ray Data."""
        hits = [[hit.to_row() for hit in of_question] for of_question in self.hits]
        vectors = [None if vector is None else vector.tolist() for vector in self.embeddings]
        return {
            "hits": json.dumps(hits, ensure_ascii=False),
            "embeddings": json.dumps(vectors),
            "retrieval_s": self.seconds,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Retrieved:
        """The inverse of `to_row`."""
        import numpy as np

        hits = [[Hit.from_row(hit) for hit in of_question] for of_question in json.loads(row["hits"])]
        vectors = json.loads(row["embeddings"])
        embeddings = [None if vector is None else np.array(vector, dtype=np.float32) for vector in vectors]
        return cls(hits, float(row["retrieval_s"]), embeddings)


Runner = Callable[[Workers, AnswerSettings, Sequence[Task]], Iterator[Result]]


class RetrieveStep:
    """Finds the hits of a window in one batched search; a question that several strategies ask is searched once."""

    def __init__(self, open_retriever: Callable[[], Searches], k: int) -> None:
        self._retriever = open_retriever()
        self._k = k
        self._found: dict[tuple[str, bool], tuple[list[Hit], Embedding, float]] = {}

    def __call__(self, task: Task) -> Retrieved:
        """What was found for the task's questions; the seconds are those of when it was first done."""
        if task.single or not retrieves(task.strategy):
            return Retrieved.nothing(task)
        embed = task.strategy == AUTO
        texts = [question.text for question in task.questions]
        unknown = list(dict.fromkeys(text for text in texts if (text, embed) not in self._found))
        if unknown:
            if len(self._found) > _CACHED_QUERIES:
                self._found.clear()
                unknown = list(dict.fromkeys(texts))
            began = time.perf_counter()
            found, vectors = self._search(unknown, embed=embed)
            seconds = (time.perf_counter() - began) / len(unknown)
            for place, (text, hits) in enumerate(zip(unknown, found, strict=True)):
                self._found[text, embed] = (hits, None if vectors is None else vectors[place], seconds)
        kept = [self._found[text, embed] for text in texts]
        embeddings = [embedding for _, embedding, _ in kept] if embed else []
        return Retrieved([hits for hits, _, _ in kept], sum(seconds for _, _, seconds in kept), embeddings)

    def search_one(self, text: str, *, embed: bool) -> tuple[list[Hit], Embedding]:
        """The hits of one query, always searched anew, and its embedding where it is wanted and there is one."""
        [hits], vectors = self._search([text], embed=embed)
        return hits, None if vectors is None else vectors[0]

    def _search(self, texts: Sequence[str], *, embed: bool) -> tuple[list[list[Hit]], npt.NDArray[np.float32] | None]:
        if embed:
            return self._retriever.search_and_embed(texts, self._k)
        return self._retriever.search(texts, self._k), None


class AnswerStep:
    """Answers windows with one engine. A single-request task searches in this process too, so that what it times is
    one request from its question to its answer and nothing beside it."""

    def __init__(self, workers: Workers, settings: AnswerSettings, retrieve: RetrieveStep | None = None) -> None:
        self._workers = workers
        self._settings = settings
        if workers.open_tokens is not None:
            self._settings = dataclasses.replace(settings, tokens=workers.open_tokens())
        self._retrieve = retrieve
        self._engine = workers.open_engine()
        self._warm: set[str] = set()

    def __call__(self, task: Task, found: Retrieved) -> Result:
        """The task's predictions and times."""
        began = time.perf_counter()
        if task.single:
            predictions = self._answer_singly(task)
        else:
            predictions = answer_window(
                task.strategy,
                task.questions,
                found.hits,
                self._engine,
                self._settings,
                retrieval_ms=1000 * found.seconds / max(1, len(task.questions)),
                embeddings=found.embeddings,
            )
        self._warm.add(task.strategy)
        seconds = time.perf_counter() - began
        return Result(task.strategy, task.number, task.single, tuple(predictions), found.seconds, seconds)

    def _answer_singly(self, task: Task) -> list[Prediction]:
        search = self._open_search(task) if retrieves(task.strategy) else None
        if task.strategy not in self._warm:  # the first request pays for set-up that no later one pays
            answer_singly(task.strategy, task.questions[:1], search, self._engine, self._settings)
        return answer_singly(task.strategy, task.questions, search, self._engine, self._settings)

    def _open_search(self, task: Task) -> Callable[[str], tuple[list[Hit], Embedding]]:
        """The search of a retriever that is open and warm, as in a server."""
        if self._retrieve is None:
            assert self._workers.open_retriever is not None, "a strategy that retrieves needs a retriever"
            self._retrieve = RetrieveStep(self._workers.open_retriever, self._settings.generation.passages)
            self._retrieve.search_one(task.questions[0].text, embed=task.strategy == AUTO)
        return functools.partial(self._retrieve.search_one, embed=task.strategy == AUTO)

    def close(self) -> None:
        """Frees the engine."""
        close = getattr(self._engine, "close", None)
        if close is not None:
            close()


def run_in_process(workers: Workers, settings: AnswerSettings, tasks: Sequence[Task]) -> Iterator[Result]:
    """Does the tasks one after the other in this process, without Ray."""
    retrieve = None
    if any(retrieves(task.strategy) for task in tasks):
        assert workers.open_retriever is not None, "a strategy that retrieves needs a retriever"
        retrieve = RetrieveStep(workers.open_retriever, settings.generation.passages)
    step = AnswerStep(workers, settings, retrieve)
    try:
        for task in tasks:
            yield step(task, retrieve(task) if retrieve else Retrieved.nothing(task))
    finally:
        step.close()


class _RetrieveActor:
    """Ray Data's view of `RetrieveStep`: rows in, rows out. A `UserError` travels as data, because Ray's wrapping
    loses its type; for the same reason nothing is opened before the first row."""

    def __init__(self, workers: Workers, k: int) -> None:
        self._workers = workers
        self._k = k
        self._step: RetrieveStep | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._step is None:
                assert self._workers.open_retriever is not None, "a strategy that retrieves needs a retriever"
                self._step = RetrieveStep(self._workers.open_retriever, self._k)
            found = self._step(_task_of(row))
        except UserError as error:
            return {**row, "user_error": str(error)}
        return {**row, **found.to_row()}


class _AnswerActor:
    """Ray Data's view of `AnswerStep`: rows in, rows out."""

    def __init__(self, workers: Workers, settings: AnswerSettings) -> None:
        self._workers = workers
        self._settings = settings
        self._step: AnswerStep | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        answered = {name: row[name] for name in ("strategy", "number", "single", "retrieval_s", "user_error")}
        if row["user_error"]:
            return {**answered, "predictions": "[]", "generation_s": 0.0}
        try:
            if self._step is None:
                self._step = AnswerStep(self._workers, self._settings)
            result = self._step(_task_of(row), Retrieved.from_row(row))
        except UserError as error:
            return {**answered, "user_error": str(error), "predictions": "[]", "generation_s": 0.0}
        predictions = [prediction.to_row() for prediction in result.predictions]
        return {
            **answered,
            "predictions": json.dumps(predictions, ensure_ascii=False),
            "generation_s": result.generation_s,
        }


def run_on_ray(config: EvaluateConfig) -> Runner:
    """A runner that streams the tasks through two Ray Data actor pools; needs a connected Ray."""

    def run(workers: Workers, settings: AnswerSettings, tasks: Sequence[Task]) -> Iterator[Result]:
        import ray.data
        import ray.exceptions

        logging.getLogger("ray.data").setLevel(logging.ERROR)  # its lines would interleave with our progress
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")  # see _BOUNDED_RETRIES
        rows = [_row_of(task) for task in tasks]
        # One block per window: it is what an actor takes at once, and what the driver commits.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        if any(retrieves(task.strategy) and not task.single for task in tasks):
            dataset = dataset.map(
                _RetrieveActor,
                fn_constructor_args=(workers, settings.generation.passages),
                compute=ray.data.ActorPoolStrategy(size=config.retrievers),
                num_cpus=config.cpus_per_actor,
                num_gpus=config.gpus_per_retriever,
                **_BOUNDED_RETRIES,
            )
        answered = dataset.map(
            _AnswerActor,
            fn_constructor_args=(workers, settings),
            compute=ray.data.ActorPoolStrategy(size=config.generators),
            num_cpus=config.cpus_per_actor,
            num_gpus=config.gpus_per_generator,
            **_BOUNDED_RETRIES,
        )
        try:
            for batch in answered.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
                yield from map(_result_of, batch.to_pylist())
        except ray.exceptions.ActorDiedError as error:
            raise UserError(
                "predictions: a worker died again and again while it answered one window, mostly for lack of memory; "
                "lower generation.batch_rows or evaluate.window_rows and run the same command again: finished windows "
                "are kept"
            ) from error

    return run


def _row_of(task: Task) -> dict[str, Any]:
    # JSON text, so that empty lists and free-form metadata never shape an Arrow schema.
    questions = json.dumps([question.to_row() for question in task.questions], ensure_ascii=False)
    return {
        "strategy": task.strategy,
        "number": task.number,
        "single": task.single,
        "questions": questions,
        **Retrieved.nothing(task).to_row(),
        "user_error": "",
    }


def _task_of(row: dict[str, Any]) -> Task:
    questions = tuple(Question.from_row(question) for question in json.loads(row["questions"]))
    return Task(str(row["strategy"]), int(row["number"]), questions, bool(row["single"]))


def _result_of(row: dict[str, Any]) -> Result:
    if row["user_error"]:
        raise UserError(row["user_error"])
    predictions = tuple(Prediction.from_row(prediction) for prediction in json.loads(row["predictions"]))
    return Result(row["strategy"], row["number"], row["single"], predictions, row["retrieval_s"], row["generation_s"])
