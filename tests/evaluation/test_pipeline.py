"""The same tasks through Ray Data actors as in this process."""

import functools
import os
from dataclasses import dataclass

import pytest

from cluster.errors import UserError
from evaluation.batch import answer_all, load_predictions
from evaluation.parts import BatchRun
from evaluation.pipeline import Workers, run_on_ray
from tests.evaluation.fakes import FakeEngine, FakeRetriever, make_parts, make_questions, make_recipe, make_run

pytestmark = pytest.mark.usefixtures("ray_module")


def answers(artifact):
    return [
        (p.question.question_id, p.answer.text, p.answer.citations, p.answer.hits) for p in load_predictions(artifact)
    ]


def test_ray_gives_the_answers_of_a_plain_loop(store, tmp_path):
    from cluster.store import Store

    strategies, questions = ["finetuned", "raft"], make_questions(10)
    recipe, log = make_recipe(store.uri), tmp_path / "log"
    run = BatchRun(Workers(functools.partial(FakeEngine, log=log), FakeRetriever), run_on_ray(recipe.evaluate))
    on_ray = answer_all(recipe, store, make_parts(store), strategies, questions, run, latency_rows=2)
    other = Store(str(tmp_path / "other"))
    plain = answer_all(
        make_recipe(other.uri), other, make_parts(other), strategies, questions, make_run(), latency_rows=2
    )
    for strategy in strategies:
        assert answers(on_ray[strategy]) == answers(plain[strategy])
        assert on_ray[strategy].manifest.counts == plain[strategy].manifest.counts
    sizes = [line.count(",") + 1 for line in log.read_text(encoding="utf-8").splitlines()]
    assert sorted(sizes) == [1, 1, 1, 1, 2, 2, 4, 4, 4, 4]


class _TooFewChunks(FakeRetriever):
    def search(self, queries, k):
        raise UserError(f"generation.passages: {k} is more than the index's 2 chunks; lower it")


def test_a_users_mistake_inside_a_worker_stays_one_clear_line(store):
    recipe = make_recipe(store.uri)
    run = BatchRun(Workers(FakeEngine, _TooFewChunks), run_on_ray(recipe.evaluate))
    with pytest.raises(UserError) as caught:
        answer_all(recipe, store, make_parts(store), ["rag"], make_questions(3), run)
    assert str(caught.value) == "generation.passages: 3 is more than the index's 2 chunks; lower it"


@dataclass
class _Deadly(FakeEngine):
    def generate(self, requests):
        if any(request.request_id.startswith("q009/") for request in requests):
            os._exit(1)  # what the kernel's out-of-memory killer looks like from outside
        return super().generate(requests)


def test_a_worker_that_keeps_dying_ends_the_run_and_finished_windows_are_kept(store, tmp_path):
    recipe, questions, log = make_recipe(store.uri), make_questions(10), tmp_path / "log"
    deadly = BatchRun(Workers(_Deadly, FakeRetriever), run_on_ray(recipe.evaluate))
    with pytest.raises(UserError, match=r"a worker died again and again .* lower generation\.batch_rows"):
        answer_all(recipe, store, make_parts(store), ["raft"], questions, deadly)
    artifacts = answer_all(recipe, store, make_parts(store), ["raft"], questions, make_run(FakeEngine(log=log)))
    assert len(load_predictions(artifacts["raft"])) == 10
    assert "q009/raft" in log.read_text(encoding="utf-8")
    assert "q000/raft" not in log.read_text(encoding="utf-8")
