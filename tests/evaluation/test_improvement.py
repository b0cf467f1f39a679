import contextlib
import dataclasses
import json

import pytest
import typer.testing

import training.lora
from cluster.config import RayConfig
from cluster.errors import NotBetterError, UserError
from cluster.releases import open_release, promote, publish_release
from cluster.session import ray_session
from cluster.store import Store
from evaluation.config import EvaluationRecipe
from evaluation.improvement import LEAST_QUESTIONS, Verdict, fair_questions, improve, judge
from evaluation.intervals import Estimate
from evaluation.parts import BatchRun, default_run
from evaluation.pipeline import Workers, run_in_process
from evaluation.records import Prediction
from evaluation.rubric import Rubric
from retrieval.index import build_index
from retrieval.records import Golden, Hit, Passage, Question
from serving.feedback import DeskDoor, DeskSettings, FeedbackDesk, desk_of
from serving.feedback_cli import feedback_app
from serving.interfaces import Found
from serving.records import Answer, Route
from tests.evaluation.fakes import make_questions, make_recipe, samples_artifact
from tests.retrieval.tiny import COUNTRIES, GOODS, country_text
from tests.serving.fakes_api import FakeGraph, Service
from tests.training.conftest import base_path, own_cache  # noqa: F401 - fixtures
from tests.training.tiny import TEST_COUNTRIES, training_recipe
from tests.training.workers import Told, process_group
from training.lora import train_adapter
from training.samples import build_samples, load_questions, load_samples
from training.splits import NEW_QUESTIONS, TRAIN
from training.worker import train

RUBRIC = Rubric("en")


def predictions(right):
    """Answers to as many questions, right where told."""
    return [
        Prediction(
            question,
            Answer("r", question.question_id, "", "", question.answers[0] if is_right else "no", (), (), "raft",
                   Route("raft"), False, "stop"),
        )
        for question, is_right in zip(make_questions(len(right)), right, strict=True)
    ]  # fmt: skip


def judged(before, after, margin=0.02):
    recipe = make_recipe("unused")
    return judge(recipe, "raft", predictions(before), predictions(after)[::-1], RUBRIC, margin)


def test_judge_pairs_by_question_and_refuses_what_is_surely_worse():
    half = [True, False] * 10
    same = judged(half, half)
    assert (same.differences["f1"], same.worse) == (Estimate(0, 0, 0, 20), ())
    worse = judged(half, [False] * 20)
    assert worse.differences["f1"].value == -0.5
    assert worse.differences["f1"].high < 0
    assert worse.worse == ("f1",)
    assert judged([False] * 20, half).worse == ()
    assert "F1 -0.500 [-0.7" in worse.describe()


def test_verdict_refuses_by_interval_or_by_margin():
    def verdict(value, low, high):
        return Verdict("raft", {"f1": Estimate(value, low, high, 30)}, 0.02).worse

    assert verdict(-0.01, -0.015, -0.005) == ("f1",), "small, but sure"
    assert verdict(-0.05, -0.2, 0.1) == ("f1",), "may be chance, but more than the margin"
    assert verdict(-0.01, -0.2, 0.2) == ()
    assert verdict(0.3, 0.1, 0.5) == ()


def test_fair_questions_are_those_that_neither_side_was_trained_on(store, capsys):
    tests = [*make_questions(12), *make_questions(6, NEW_QUESTIONS, start=12)]
    served = samples_artifact(store, tests)
    trained = [
        Question("f1", "what is the CAPITAL of Land0", ("Else",), (), TRAIN),
        Question("f2", "Anything?", ("Yes",), (Golden("land1"),), TRAIN),
        Question("f3", "Anything else?", ("Yes",), (Golden("land12"),), TRAIN),
    ]
    candidate = samples_artifact(store, [*tests, *trained])
    fair = {question.question_id for question in fair_questions(make_recipe(store), served, candidate)}
    assert fair == {f"q{number:03d}" for number in range(18)} - {"q000", "q001"}
    assert "2 of 18" in capsys.readouterr().out
    few = samples_artifact(store, make_questions(LEAST_QUESTIONS - 1))
    with pytest.raises(UserError, match=f"at least {LEAST_QUESTIONS} are needed"):
        fair_questions(make_recipe(store), few, candidate)


def test_improve_without_an_adapter_says_what_to_do_first(store, tmp_path):
    index = samples_artifact(store, make_questions(1)).ref  # any artifact
    promote(store, "invented", publish_release(store, "invented", index=index).version)
    with pytest.raises(UserError, match=r"has no adapter; train and release first"):
        improve(make_recipe(store), store, tmp_path / "f.jsonl")


# ---- the whole loop ----


class Quoting(FakeGraph):
    """Finds the country's own text, quotes the right sentence and draws a wrong conclusion."""

    def __init__(self):
        super().__init__({"raft": ""})

    async def search(self, query, pins):
        place = next(place for place, name in enumerate(COUNTRIES) if name.lower() in query.text.lower())
        name, text = COUNTRIES[place], country_text(place)
        shown = Passage(name, name.lower(), name, "", "", text, 0, len(text))
        if "export" in query.text:
            sentence = (
                f"In year {query.text[-5:-1]} it exported {int(query.text[-5:-1]) - 1990} tons of {GOODS[place]}."
            )
        else:
            sentence = f"total: {83 + place},{871 - place} sq km"
        self.texts["raft"] = f"##begin_quote##{sentence}##end_quote##\n<ANSWER>: nothing"
        return Found((Hit(shown, 1.0, 1),))


@dataclasses.dataclass
class World:
    recipe: EvaluationRecipe
    store: Store


def fit_here(recipe, config, storage):
    return train(config, 0, 1, Told())


def on_spot(recipe, store, parts):
    """The recipe's own engine and retriever, in this process."""
    return dataclasses.replace(default_run(recipe, store, parts), runner=run_in_process)


@pytest.fixture(scope="module")
def world(base_path, encoder_path, corpus_path, tmp_path_factory):  # noqa: F811
    """A promoted release with a RAFT adapter, trained on the tiny corpus."""
    folder = tmp_path_factory.mktemp("loop")
    rows = {"raft_rows": 30, "dsf_rows": 30}
    # A rate at which a random model learns what letters there are: 2 nats within one epoch.
    fast = {"learning_rate": 1.0, "probe_rows": 0}
    made = training_recipe(folder, corpus_path, encoder_path, base_path, samples=rows, train=fast)
    sections = {
        "feedback": {"url": f"sqlite:///{folder}/feedback.db"},
        "generation": {"passages": 2, "max_new_tokens": 12},
        "evaluate": {"new_documents": 12, "new_questions": 6, "bootstrap_resamples": 200},
    }
    recipe = EvaluationRecipe.model_validate({**made.model_dump(), **sections})
    store = Store(recipe.store.uri)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("RAYFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
            patch.delenv(name, raising=False)
        patch.setattr(training.lora, "_fit", fit_here)
        patch.setattr(training.lora, "ray_session", lambda config: contextlib.nullcontext())
        stack.enter_context(process_group(tmp_path_factory.mktemp("group") / "store"))
        stack.enter_context(ray_session(RayConfig(num_cpus=2)))
        index = build_index(recipe, store)
        samples = build_samples(recipe, store, index)
        adapter = train_adapter(recipe, store, samples, "raft")
        ref = publish_release(
            store,
            recipe.name,
            index=index.ref,
            samples=samples.ref,
            adapters={"raft": adapter.ref},
            base_digest=adapter.manifest.config["base_digest"],
            prompt_format=adapter.manifest.config["prompt_format"],
        )
        promote(store, recipe.name, ref.version)
        give_feedback(recipe)
        yield World(recipe, store)


def give_feedback(recipe):
    """Asks over the HTTP API and corrects each answer; then reviews on the command line."""
    desk = FeedbackDesk(DeskSettings.of(recipe))
    service = Service(Quoting(), feedback=DeskDoor(desk_of(desk)))
    asked = {}
    with service.client:
        for place, name in enumerate(COUNTRIES):
            for year in (1993, 1997):
                question = f"How much did {name} export in {year}?"
                asked[question] = f"{year - 1990} tons of {GOODS[place]}"
        asked["how large is AUSTRIA altogether?"] = "83,871 sq km"
        for question, right in asked.items():
            reply = service.post("rayft-raft", [{"role": "user", "content": question}])
            body = {"request_id": reply.json()["id"], "rating": "down", "correction": right}
            assert service.send("/v1/feedback", body).status_code == 200
    app, runner = feedback_app(lambda name, overrides: recipe), typer.testing.CliRunner()
    shown = runner.invoke(app, ["review", "tiny", "--json"], catch_exceptions=False).output.splitlines()
    assert len(shown) == len(asked) == 17
    for row in map(json.loads, shown):
        runner.invoke(app, ["accept", "tiny", row["request_id"]], catch_exceptions=False)


def trained_otherwise(recipe, **train):
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


class Oracle:
    """Knows the answers, or nothing."""

    def __init__(self, answers):
        self.answers = answers

    def generate(self, requests):
        from serving.engine import Completion

        def say(request):
            prompt = request.messages[-1]["content"]
            answer = next((text for question, text in self.answers.items() if question in prompt), "nothing")
            return Completion(request.request_id, f"<ANSWER>: {answer}", "stop", 1, 1, 0.0, 1.0)

        return [say(request) for request in requests]


@pytest.mark.slow
def test_feedback_loop_refuses_a_candidate_that_answers_worse(world, tmp_path):
    served = open_release(world.store, "tiny")
    known = {q.text: q.answers[0] for q in load_questions(world.store.open_ref(served.samples)) if q.answers}

    def run_of(recipe, store, parts):
        oracle = Oracle(known if parts.samples.ref == served.samples else {})
        return BatchRun(
            Workers(lambda: oracle, default_run(recipe, store, parts).workers.open_retriever), run_in_process
        )

    generation = world.recipe.generation.model_copy(update={"max_new_tokens": 11})  # answers of its own
    changed = trained_otherwise(world.recipe, epochs=2).model_copy(update={"generation": generation})
    with pytest.raises(NotBetterError, match=r"is not promoted, it is worse by F1 .* stays"):
        improve(changed, world.store, tmp_path / "f.jsonl", run_of=run_of)
    assert world.store.current("release", "tiny") == served.version


@pytest.mark.slow
def test_feedback_loop_refuses_an_adapter_that_training_made_worse(world, tmp_path):
    served = open_release(world.store, "tiny")
    spoilt = trained_otherwise(world.recipe, learning_rate=1e-9)
    with pytest.raises(NotBetterError, match="not published, it is worse: validation loss"):
        improve(spoilt, world.store, tmp_path / "f.jsonl", run_of=on_spot)
    assert world.store.current("release", "tiny") == served.version


@pytest.mark.slow
def test_feedback_loop_trains_evaluates_and_promotes(world, tmp_path, capsys):
    served = open_release(world.store, "tiny")
    before = load_questions(world.store.open_ref(served.samples))
    recipe = trained_otherwise(world.recipe, epochs=2)
    candidate = improve(recipe, world.store, tmp_path / "f.jsonl", run_of=on_spot)
    told = capsys.readouterr().out
    assert world.store.current("release", "tiny") == candidate.version != served.version
    assert (candidate.index, candidate.base_digest) == (served.index, served.base_digest)
    samples = world.store.open_ref(candidate.samples)
    after = load_questions(samples)
    taught = {question.question_id for question in after} - {question.question_id for question in before}
    assert len(taught) == 12, "of 17: four are about held-out countries, one repeats a test question"
    assert all(name.startswith("feedback-") for name in taught)
    assert not {doc for q in after if q.question_id in taught for doc in q.documents} & set(TEST_COUNTRIES)
    assert [q for q in after if q.split != TRAIN] == [q for q in before if q.split != TRAIN]
    rows = [row for row in load_samples(samples, "raft") if row.question_id in taught]
    assert len(rows) >= 5
    assert any(quote in "".join(map(country_text, range(8))) for row in rows for quote in row.quotes)
    assert "left out 4 of 17: about a document that is held out" in told
    assert "left out 1 of 17: repeats a test question" in told
    assert "raft, candidate minus served: F1 " in told
    assert "not worse than release/tiny/" in told
    again = improve(recipe, world.store, tmp_path / "f.jsonl", run_of=on_spot)
    assert again.version == candidate.version
    assert "is served already" in capsys.readouterr().out
