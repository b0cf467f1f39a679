"""Batch answering over a deterministic engine: durability, failures, and what a change recomputes."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.errors import ArtifactError, UserError
from cluster.stage import Outcome, Plan, run_stage
from cluster.store import Store
from evaluation.answering import AnswerSettings, answer_window
from evaluation.batch import answer_all, load_predictions, load_single_requests, predictions_plan
from evaluation.config import EvaluationRecipe
from evaluation.parts import default_run, open_router
from evaluation.pipeline import AnswerStep, Retrieved, Task, Workers
from evaluation.windows import WindowLedger
from retrieval.records import Hit, Passage, Question
from serving.config import GenerationConfig
from serving.engine import Completion
from serving.records import Route
from serving.router import RouteQuery
from tests.evaluation.fakes import KINDS, FakeEngine, FakeRetriever, make_parts, make_questions, make_recipe, make_run
from training.format import PromptFormat
from training.intent_model import IntentModel

REPOSITORY = Path(__file__).resolve().parents[2]


def asked_ids(log: Path) -> list[str]:
    return [name for line in log.read_text(encoding="utf-8").splitlines() for name in json.loads(line)]


def contents(artifact):
    """Everything in the predictions but times."""
    rows = [prediction.to_row() for prediction in load_predictions(artifact)]
    return sorted(
        (json.dumps({k: v for k, v in row.items() if k != "timings_ms"}, sort_keys=True) for row in rows),
    )


def test_every_strategy_answers_every_question_in_order(store):
    recipe, parts, questions = make_recipe(store.uri), make_parts(store), make_questions(9)
    artifacts = answer_all(recipe, store, parts, recipe.evaluate.strategies, questions, make_run(), latency_rows=2)
    for strategy, artifact in artifacts.items():
        predictions = load_predictions(artifact)
        assert [prediction.question for prediction in predictions] == questions
        assert {prediction.answer.strategy for prediction in predictions} == {strategy}
        assert artifact.manifest.counts == {"rows": 9, "failed": 0, "windows": 3, "timed_singly": 2}
        assert artifact.manifest.measured["rows_per_s"] > 0
    by_id = {prediction.question.question_id: prediction.answer for prediction in load_predictions(artifacts["raft"])}
    assert by_id["q001"].answer == "Town1"
    assert by_id["q001"].citations[0].verified
    assert [hit.passage.doc_id for hit in by_id["q001"].hits] == ["land1", "land2", "land3"]
    assert not load_predictions(artifacts["base"])[0].answer.hits


def test_one_engine_serves_all_strategies_and_is_closed(store):
    recipe, engine = make_recipe(store.uri), FakeEngine()
    opened = []
    run = make_run(engine)
    workers = dataclasses.replace(run.workers, open_engine=lambda: opened.append(1) or engine)
    run = dataclasses.replace(run, workers=workers)
    answer_all(recipe, store, make_parts(store), ["rag", "raft", "finetuned"], make_questions(5), run)
    assert len(opened) == 1
    assert engine.closed


def test_single_requests_are_timed_alone_and_warmed_up(store, tmp_path):
    recipe = make_recipe(store.uri)
    engine = FakeEngine(log=tmp_path / "log", seconds=0.02)
    artifacts = answer_all(
        recipe, store, make_parts(store), ["raft", "finetuned"], make_questions(8), make_run(engine), latency_rows=3
    )
    for strategy, artifact in artifacts.items():
        timings = [prediction.answer.timings_ms for prediction in load_single_requests(artifact)]
        assert len(timings) == 3
        assert all(20 <= timing.generation < 200 and timing.queue == 0 for timing in timings)
        assert all((timing.retrieval > 0) == (strategy == "raft") for timing in timings)
        assert all(timing.total >= timing.retrieval + timing.generation - 0.01 for timing in timings)
    sizes = [len(json.loads(line)) for line in (tmp_path / "log").read_text().splitlines()]
    assert sizes == [4, 4, 4, 4, *[1] * 6]


def test_published_predictions_are_not_answered_again(store, tmp_path):
    recipe, parts, questions = make_recipe(store.uri), make_parts(store), make_questions(6)
    first = answer_all(recipe, store, parts, ["rag", "raft"], questions, make_run())
    engine = FakeEngine(log=tmp_path / "log")
    again = answer_all(recipe, store, parts, ["rag", "raft"], questions, make_run(engine))
    assert not (tmp_path / "log").exists()
    assert {name: artifact.ref for name, artifact in first.items()} == {
        name: artifact.ref for name, artifact in again.items()
    }


def test_opening_the_retriever_is_not_part_of_a_lone_requests_time(store):
    """On Ray an engine's process opens its own retriever for lone requests, after the windows."""

    class SlowToOpen(FakeRetriever):
        def __init__(self):
            time.sleep(0.3)

    engine, recipe = FakeEngine(), make_recipe(store.uri)
    settings = AnswerSettings(PromptFormat.load(recipe.prompt, "en"), recipe.generation)
    step = AnswerStep(Workers(lambda: engine, SlowToOpen), settings)
    questions = tuple(make_questions(3))
    step(Task("rag", 0, questions), Retrieved(FakeRetriever().search([q.text for q in questions], 3), 0.0))
    result = step(Task("rag", 0, questions, single=True), Retrieved([[]] * 3, 0.0))
    assert max(prediction.answer.timings_ms.retrieval for prediction in result.predictions) < 100


KILLED = """
import sys
from pathlib import Path
from cluster.store import Store
from evaluation.batch import answer_all
from tests.evaluation.fakes import *
store = Store(sys.argv[1])
recipe = make_recipe(store.uri)
engine = FakeEngine(log=Path(sys.argv[2]), seconds=0.15)
answer_all(recipe, store, make_parts(store), ["raft", "finetuned"], make_questions(22), make_run(engine))
"""


def test_killed_run_resumes_without_repeating_a_finished_window(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    log = tmp_path / "log"
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(log)], env=environment, stdout=subprocess.DEVNULL
    )
    work = tmp_path / "store" / "predictions"
    deadline = time.monotonic() + 60
    while len(list(work.rglob("window-*.parquet"))) < 3:
        assert killed.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    durable = {name for ledger in work.rglob(".work") for name in WindowLedger(ledger).finished()}
    assert len(durable) >= 12
    assert not list(work.rglob("manifest.json"))

    store = Store(str(tmp_path / "store"))
    recipe, questions = make_recipe(store.uri, window_rows=5), make_questions(22)  # another window size may resume
    resumed = answer_all(
        recipe, store, make_parts(store), ["raft", "finetuned"], questions, make_run(FakeEngine(log=tmp_path / "log2"))
    )
    repeated = Counter(asked_ids(tmp_path / "log2")) & Counter(
        f"{name}/raft" for name in durable
    )  # the windows of raft came first
    assert not repeated
    assert set(asked_ids(log)) | set(asked_ids(tmp_path / "log2")) == {
        f"{question.question_id}/{strategy}" for question in questions for strategy in ("raft", "finetuned")
    }
    other = Store(str(tmp_path / "other"))
    undisturbed = answer_all(
        make_recipe(other.uri), other, make_parts(other), ["raft", "finetuned"], questions, make_run()
    )
    for strategy in ("raft", "finetuned"):
        assert contents(resumed[strategy]) == contents(undisturbed[strategy])


def test_a_window_that_a_failing_disk_cut_short_is_answered_again(tmp_path, store):
    from evaluation.records import Prediction

    prediction = load_predictions(
        answer_all(make_recipe(store.uri), store, make_parts(store), ["raft"], make_questions(1), make_run())["raft"]
    )[0]
    assert isinstance(prediction, Prediction)
    ledger = WindowLedger(tmp_path / "work")
    ledger.write(0, [prediction], 0.1, 0.2)
    assert ledger.finished() == {"q000"}
    [path] = (tmp_path / "work").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    assert ledger.finished() == set()
    assert not path.exists()


def test_a_failing_row_is_recorded_and_the_rest_answered(store, capsys):
    recipe, questions = make_recipe(store.uri), make_questions(10)
    run = make_run(FakeEngine(broken=("Land6",)))
    artifact = answer_all(recipe, store, make_parts(store), ["raft"], questions, run)["raft"]
    answers = {prediction.question.question_id: prediction.answer for prediction in load_predictions(artifact)}
    assert {name for name, answer in answers.items() if answer.error} == {"q006"}
    assert answers["q006"].error == "RuntimeError: out of memory"
    assert answers["q006"].finish_reason == "error"
    assert answers["q007"].answer == "Town7"
    assert artifact.manifest.counts["failed"] == 1
    assert "1 of 10 rows of `raft` failed, the first with: RuntimeError: out of memory" in " ".join(
        capsys.readouterr().out.split()
    )


def test_an_engine_that_fails_every_row_publishes_nothing(store):
    recipe, parts = make_recipe(store.uri), make_parts(store)
    broken = make_run(FakeEngine(broken=tuple(f"Land{number}" for number in range(9))))
    with pytest.raises(RuntimeError, match="out of memory"):
        answer_all(recipe, store, parts, ["raft"], make_questions(9), broken)
    one = make_run(FakeEngine(broken=("Land0",)))
    with pytest.raises(UserError, match="all 1 rows of `raft` failed"):
        answer_all(recipe, store, parts, ["raft"], make_questions(1), one)
    mended = answer_all(recipe, store, parts, ["raft"], make_questions(1), make_run())["raft"]
    assert not load_predictions(mended)[0].answer.error


def test_hybrid_falls_back_to_the_closed_book_answer_when_no_quote_verifies(store):
    recipe, questions = make_recipe(store.uri), make_questions(6)
    artifact = answer_all(recipe, store, make_parts(store), ["hybrid"], questions, make_run())["hybrid"]
    answers = {prediction.question.question_id: prediction.answer for prediction in load_predictions(artifact)}
    assert answers["q001"].citations[0].verified and answers["q001"].answer == "Town1"
    assert not answers["q005"].citations and answers["q005"].answer == "Town5"  # what the finetuned adapter knows
    assert {answer.strategy for answer in answers.values()} == {"hybrid"}


def test_auto_follows_the_router_question_by_question(store):
    class EvenToRaft:
        def route(self, query):
            even = int(query.question.split("Land")[1].strip("?")) % 2 == 0
            return Route("raft" if even else "finetuned", reason=f"kind {query.metadata['kind']}")

    recipe, questions = make_recipe(store.uri), make_questions(6)
    run = dataclasses.replace(make_run(), router=EvenToRaft())
    artifact = answer_all(recipe, store, make_parts(store), ["auto"], questions, run)["auto"]
    routes = {
        p.question.question_id: (p.answer.route.strategy, p.answer.route.reason) for p in load_predictions(artifact)
    }
    assert routes["q002"] == ("raft", "kind altitude")
    assert routes["q003"] == ("finetuned", "kind capital")


def trained(store, index):
    """A router that tells the kinds of question apart by their embeddings, and by nothing else."""
    model = IntentModel(KINDS, "", "embedding", 20 * np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
    model = dataclasses.replace(model, encoder="mini", encoder_digest="e" * 64)

    def build(attempt):
        model.save(attempt.directory)
        return Outcome()

    return run_stage(store, Plan(kind="router", name="invented", parents={"index": index.ref}), build)


def index_with_encoder(store):
    def build(attempt):
        (attempt.directory / "rows").write_text("100\n")
        return Outcome(counts={"chunks": 100}, measured={"encoder": "mini", "encoder_digest": "e" * 64})

    return run_stage(store, Plan(kind="index", name="invented"), build)


def test_auto_routes_by_the_release_classifier_over_the_retrievers_embeddings_as_online(store):
    rules = [
        {"strategy": strategy, "intent": intent, "reason": f"{intent} it is"}
        for intent, strategy in zip(KINDS, ("raft", "finetuned", "rag"), strict=True)
    ]
    router = {"rules": rules, "examples": "utterances.csv"}
    recipe = EvaluationRecipe.model_validate({**make_recipe(store.uri).model_dump(), "router": router})
    index = index_with_encoder(store)
    parts = dataclasses.replace(make_parts(store), index=index, router=trained(store, index))
    chooser = pickle.loads(pickle.dumps(open_router(recipe, parts)))  # it travels to Ray's workers
    run = dataclasses.replace(make_run(), router=chooser)
    questions = make_questions(6)
    artifact = answer_all(recipe, store, parts, ["auto"], questions, run, latency_rows=2)["auto"]
    _, vectors = FakeRetriever().search_and_embed([question.text for question in questions], 1)
    online = [
        chooser.route(RouteQuery(question.text, embedding=vector)).strategy
        for question, vector in zip(questions, vectors, strict=True)
    ]
    assert online == ["raft", "finetuned", "rag"] * 2, "without embeddings all of them would be `hybrid`"
    assert [prediction.answer.route.strategy for prediction in load_predictions(artifact)] == online
    routes = {p.question.question_id: p.answer.route for p in load_single_requests(artifact)}
    assert all(route.strategy == online[int(name[1:])] for name, route in routes.items()) and len(routes) == 2
    assert artifact.manifest.parents["router"] == str(parts.router.ref)
    without = predictions_plan(recipe, dataclasses.replace(parts, router=None), "auto", questions)
    assert without.ref != predictions_plan(recipe, parts, "auto", questions).ref


def test_what_was_found_survives_its_way_through_ray_data():
    hits, vectors = FakeRetriever().search_and_embed(["capital of Land1", "river of Land2"], 2)
    found = Retrieved(hits, 0.5, [vectors[0] / 3, None])
    again = Retrieved.from_row(found.to_row())
    assert (again.hits, again.seconds, again.embeddings[1]) == (hits, 0.5, None)
    assert again.embeddings[0].dtype == np.float32 and (again.embeddings[0] == vectors[0] / 3).all()


def test_router_of_another_encoder_is_refused_before_anything_is_answered(store):
    parts = make_parts(store)
    with pytest.raises(ArtifactError, match="reads embeddings by mini"):
        open_router(make_recipe(store.uri), dataclasses.replace(parts, router=trained(store, parts.index)))


def test_batch_engine_is_the_recipes(store, monkeypatch, tmp_path):
    opened = []

    class Vllm:
        def __init__(self, *arguments):
            opened.append(arguments)

    monkeypatch.setitem(sys.modules, "serving.vllm_engine", SimpleNamespace(VllmEngine=Vllm))
    monkeypatch.setattr("training.base_model.base_model_directory", lambda model: tmp_path)
    recipe = EvaluationRecipe.model_validate({**make_recipe(store.uri).model_dump(), "generation": {"engine": "vllm"}})
    parts = make_parts(store)
    engine = default_run(recipe, store, parts).workers.open_engine()
    assert isinstance(engine, Vllm)
    assert opened[0][:2] == (tmp_path, {role: adapter.directory() for role, adapter in parts.adapters.items()})


def test_unknown_strategies_and_missing_adapters_are_refused_before_anything_runs(store):
    recipe, questions = make_recipe(store.uri), make_questions(2)
    with pytest.raises(UserError, match="there is no strategy `magic`"):
        answer_all(recipe, store, make_parts(store), ["magic"], questions, make_run())
    with pytest.raises(UserError, match="lacks"):
        answer_all(recipe, store, make_parts(store, adapters=()), ["raft"], questions, make_run())


@pytest.fixture
def versions(store):
    parts, questions = make_parts(store), make_questions(4)
    strategies = ("base", "rag", "rag_fewshot", "finetuned", "finetuned_rag", "raft")

    def of(recipe=None, **changes):
        used = dataclasses.replace(parts, **changes)
        chosen = recipe or make_recipe(store.uri)
        return {name: str(predictions_plan(chosen, used, name, questions).ref) for name in strategies}

    return parts, of


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_a_change_recomputes_what_depends_on_it_and_nothing_else(versions, store, tmp_path):
    parts, of = versions
    before = of()
    everything = set(before)
    retrieving = {"rag", "rag_fewshot", "finetuned_rag", "raft"}
    assert changed(before, of(index=parts.samples)) == retrieving
    assert changed(before, of(adapters={**parts.adapters, "raft": parts.index})) == {"raft"}
    assert changed(before, of(adapters={**parts.adapters, "finetuned": parts.index})) == {"finetuned", "finetuned_rag"}
    assert changed(before, of(samples=parts.index)) == {"rag_fewshot"}
    assert changed(before, of(base_digest="c" * 64)) == everything
    recipe = make_recipe(store.uri)
    fewer = recipe.model_copy(update={"generation": GenerationConfig(passages=2)})
    assert changed(before, of(fewer)) == retrieving
    one_example = recipe.model_copy(update={"generation": GenerationConfig(examples=1)})
    assert changed(before, of(one_example)) == {"rag_fewshot"}
    shorter = recipe.model_copy(update={"generation": GenerationConfig(context_tokens=500)})
    assert changed(before, of(shorter)) == everything
    other_resources = recipe.model_copy(update={"generation": GenerationConfig(batch_rows=2, threads=1)})
    assert changed(before, of(other_resources)) == set()


def test_auto_depends_on_what_routes_and_not_on_where_its_utterances_lie(versions, store):
    parts, _ = versions

    def version(**router):
        recipe = EvaluationRecipe.model_validate({**make_recipe(store.uri).model_dump(), "router": router})
        return predictions_plan(recipe, parts, "auto", make_questions(4)).ref.version

    here = version(examples="/here/recipes/shop/intents.jsonl")
    assert version(examples="/there/recipes/shop/intents.jsonl") == here
    assert version(examples="/here/recipes/shop/intents.jsonl", default="rag") != here
    assert version(examples="/here/recipes/shop/intents.jsonl", threshold=0.9) != here


def test_an_edited_prompt_file_recomputes_everything(versions, store, tmp_path):
    _, of = versions
    prompt = tmp_path / "prompt.yaml"
    text = (REPOSITORY / "training" / "prompts" / "en.yaml").read_text(encoding="utf-8")
    prompt.write_text(text, encoding="utf-8")
    recipe = make_recipe(store.uri)
    recipe = recipe.model_copy(update={"prompt": recipe.prompt.model_copy(update={"path": str(prompt)})})
    before = of(recipe)
    assert before == of()  # a copy with the same content is the same prompt
    prompt.write_text(text.replace("Quote the sentence", "Quote the words"), encoding="utf-8")
    assert changed(before, of(recipe)) == set(before)


def test_requests_reach_the_engine_sorted_by_length(store, tmp_path):
    recipe = make_recipe(store.uri, window_rows=20)
    questions = [
        dataclasses.replace(question, text="please " * ((7 * number) % 5) + question.text)
        for number, question in enumerate(make_questions(10))
    ]
    engine = FakeEngine(log=tmp_path / "log")
    answer_all(recipe, store, make_parts(store), ["base"], questions, make_run(engine))
    lengths = {f"{question.question_id}/base": len(question.text) for question in questions}
    order = [lengths[name] for name in asked_ids(tmp_path / "log")]
    assert order == sorted(order)


class _Words:
    """A token is a word."""

    window = 100

    def count(self, messages):
        return sum(len(message["content"].split()) for message in messages)


def test_answer_window_trims_and_refuses_as_serving_does(tmp_path):
    recipe = make_recipe(str(tmp_path))
    settings = AnswerSettings(PromptFormat.load(recipe.prompt, "en"), GenerationConfig(max_new_tokens=10))
    long, short = Question("q1", "why " * 99), Question("q2", "Why?")
    passages = [Passage(f"c{n}", f"d{n}", "T", "", "", "word " * 30, 0, 150) for n in range(3)]
    hits = [Hit(passage, 1.0, rank) for rank, passage in enumerate(passages, start=1)]
    asked = []

    class Engine:
        def generate(self, requests):
            asked.extend(requests)
            return [Completion(request.request_id, "Because") for request in requests]

    trimmed = dataclasses.replace(settings, tokens=_Words())
    refused, answered = answer_window("rag", [long, short], [hits, hits], Engine(), trimmed)
    assert "without any passage" in refused.answer.error and refused.answer.abstained
    assert len(asked) == 1 and answered.answer.answer == "Because"
    assert (answered.answer.passages_left_out, len(answered.answer.hits)) == (1, 2)
    [whole] = answer_window("rag", [short], [hits], Engine(), settings)
    assert (whole.answer.passages_left_out, len(whole.answer.hits)) == (0, 3)
