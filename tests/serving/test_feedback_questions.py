import dataclasses
import json

import pytest

from cluster.errors import UserError
from retrieval.questions import read_questions, write_questions
from retrieval.records import UNANSWERABLE, Golden, Question
from serving.feedback_questions import (
    CONTRADICTED,
    EMPTY,
    REPEATED,
    SHORTENED,
    export_questions,
    known_questions,
    question_of,
    write_export,
)
from serving.feedback_store import Entry, Review
from tests.serving.feedback_data import interaction, rating
from training.config import TrainingRecipe
from training.duplicates import LEAK
from training.splits import HELD_OUT, NEW_DOCUMENTS, NEW_QUESTIONS, TRAIN


def entry(request_id="r1", review=Review.ACCEPTED, answer=None, doc_ids=None, *, shortened=False, **fields):
    given = interaction(request_id, **fields)
    documents = given.doc_ids if doc_ids is None else doc_ids
    known = given.answer if answer is None else answer
    return Entry(given, rating(request_id), 1.0, review, known, documents, doc_ids is not None, shortened)


def known(name, text, answer, document, split=TRAIN):
    return Question(name, text, (answer,), (Golden(document),), split)


def test_accepted_answer_is_a_question_with_its_documents_and_where_it_is_from():
    question = question_of(entry(at=0.0))
    assert (question.text, question.answers, question.golden, question.split) == (
        "What is the capital of Greece?",
        ("Athens",),
        (Golden("greece"),),
        TRAIN,
    )
    assert question.metadata == {
        "kind": "feedback",
        "source": "feedback",
        "request_id": "r1",
        "asked": "1970-01-01",
        "release": "release/test/0123456789abcdef",
        "strategy": "raft",
        "review": "accepted",
        "intent": "fact_lookup",
        "satisfied": 1.0,
        "quote": "Athens is the capital.",
    }
    assert "alice" not in json.dumps(question.to_row()), "who asked is nobody's business in a training file"


def test_documents_of_a_corrected_answer_are_those_that_hold_it():
    cited = question_of(entry(review=Review.CORRECTED, answer="Athens"))
    assert cited.golden == (Golden("greece"),)
    wrong_source = question_of(entry(review=Review.CORRECTED, answer="Sparta"))
    assert wrong_source.golden == (), "the quoted document says another thing"
    assert "quote" not in wrong_source.metadata
    named = question_of(entry(review=Review.CORRECTED, answer="Sparta", doc_ids=("laconia",)))
    assert named.golden == (Golden("laconia"),)


def test_accepted_abstention_teaches_to_abstain_and_a_corrected_one_the_answer():
    given = interaction(abstained=True, quotes=(), doc_ids=(), answer="I do not know")
    abstained = dataclasses.replace(entry(), interaction=given, answer="I do not know", doc_ids=())
    question = question_of(abstained)
    assert (question.answers, question.golden, question.metadata["kind"]) == ((), (), UNANSWERABLE)
    assert question.unanswerable
    answered = dataclasses.replace(abstained, review=Review.CORRECTED, answer="Athens")
    assert question_of(answered).answers == ("Athens",)


def test_entry_that_was_cut_or_has_no_answer_gives_no_question():
    assert question_of(entry(shortened=True)) == SHORTENED
    assert question_of(entry(answer="  ")) == EMPTY


def test_export_holds_nothing_that_tests():
    test = known("t", "Which river crosses Athens?", "Ilisos", "seen", NEW_QUESTIONS)
    others = [test, known("n", "Anything?", "Yes", "held", NEW_DOCUMENTS), known("q", "What is it?", "It", "seen")]
    entries = [
        entry("same-words", question="which RIVER crosses athens", answer="Kifisos"),
        entry("held-out", question="Who is on the wall?", answer="Pheidias", doc_ids=("held",)),
        entry("again", question="What is it?", answer="it", doc_ids=("seen",)),
        entry("fine", question="Who painted the door?"),
        entry("rejected", review=Review.REJECTED, question="Rejected?"),
        entry("new", review=Review.NEW, question="New?"),
    ]
    exported = export_questions(entries, others, 0.9)
    assert {q.question_id: q.metadata.get("near_duplicate", False) for q in exported.questions} == {
        "feedback-again": True,
        "feedback-fine": False,
    }
    assert sorted(exported.left_out) == [("held-out", HELD_OUT), ("same-words", LEAK)]
    assert exported.repeats == 1


def test_newer_feedback_wins_over_older_of_the_same_question():
    entries = [
        entry("old", at=1.0, answer="Sparta"),
        entry("older-agrees", at=0.5),
        entry("newest", at=2.0),
        entry("same-words", at=1.5, question="The capital of Greece is what?", answer="ATHENS!"),
    ]
    exported = export_questions(entries, [], 0.9)
    assert [question.question_id for question in exported.questions] == ["feedback-newest"]
    assert dict(exported.left_out) == {"old": CONTRADICTED, "older-agrees": REPEATED, "same-words": REPEATED}


def test_known_questions_leave_the_train_file_out(store, tmp_path):
    write_questions(tmp_path / "q.jsonl", [known("a", "A?", "1", "d1"), known("b", "B?", "2", "d2", NEW_DOCUMENTS)])
    write_questions(tmp_path / "f.jsonl", [known("c", "C?", "3", "d1", "")])
    paths = {"path": str(tmp_path / "q.jsonl"), "train_path": str(tmp_path / "f.jsonl")}
    recipe = TrainingRecipe.model_validate({"name": "test", "questions": paths})
    assert [question.question_id for question in known_questions(recipe, store)] == ["a", "b"]
    assert known_questions(TrainingRecipe(name="test"), store) == []


def test_write_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    out = tmp_path / "new" / "f.jsonl"
    question = question_of(entry())
    write_export(out, [question])
    write_export(out, [question, dataclasses.replace(question, question_id="feedback-2")])
    assert read_questions(out) == [question, dataclasses.replace(question, question_id="feedback-2")]
    assert list(out.parent.iterdir()) == [out]
    own = tmp_path / "q.jsonl"
    write_questions(own, [known("a", "A?", "1", "d1")])
    before = own.read_bytes()
    with pytest.raises(UserError, match="not from feedback"):
        write_export(own, [question])
    assert own.read_bytes() == before
