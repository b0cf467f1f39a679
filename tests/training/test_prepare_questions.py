import json
from collections import Counter
from pathlib import Path

import pytest

from cluster.errors import UserError
from recipes.factbook import write_factbook
from retrieval.questions import read_questions, write_questions
from retrieval.records import Golden, Question
from tests.retrieval.test_squad import FILE
from training.config import TrainingRecipe
from training.duplicates import ANSWERED, DUPLICATE, LEAK
from training.splits import HELD_OUT, NEW_DOCUMENTS, NEW_QUESTIONS, TRAIN, prepare_questions


def recipe(path: Path, corpus: Path | str = "", **questions: object) -> TrainingRecipe:
    values = {"name": "tiny", "corpus": {"path": str(corpus)}, "questions": {"path": str(path), **questions}}
    return TrainingRecipe.model_validate(values)


def about(name: str, text: str, answer: str, document: str, split: str = "") -> Question:
    return Question(name, text, (answer,), (Golden(document),), split)


def test_factbook_loses_no_question_though_its_tests_are_rewordings(tmp_path):
    _, path = write_factbook(tmp_path, "europe", 17)
    prepared = prepare_questions(recipe(path))
    assert not prepared.drops
    assert prepared.questions == read_questions(path)
    counts = Counter(question.split for question in prepared.questions)
    assert counts[TRAIN] == counts[NEW_QUESTIONS] > 1000


def test_repeats_are_dropped_before_the_split_and_told(tmp_path, capsys):
    words = "Which of the rivers that rise in the mountains of the north flows through {} capital?"
    questions = [about(f"q{i}", f"What is number {i}?", str(i), f"d{i % 6}") for i in range(60)]
    questions += [about(name, words.format(name), "Ilisos", "d1") for name in ("the", "its", "our")]
    questions += [Question("u", "What is number 7?", (), (), "", {"kind": "unanswerable"})]
    write_questions(tmp_path / "q.jsonl", questions)
    prepared = prepare_questions(recipe(tmp_path / "q.jsonl"))
    assert prepared.drops == {DUPLICATE: 2, ANSWERED: 1}
    assert [q.question_id for q in prepared.questions] == [f"q{i}" for i in range(60)] + ["the"]
    told = "questions: left out 3 of 64: 1 meant to be unanswerable, but answered elsewhere, 2 near-duplicate question"
    assert told in capsys.readouterr().out
    kept = prepare_questions(recipe(tmp_path / "q.jsonl", near_duplicate=1))
    assert kept.drops == {ANSWERED: 1}


def test_training_question_that_repeats_one_of_the_test_file_is_dropped(tmp_path):
    train = [about("a", "What is the capital of France?", "Paris", "d1"), about("b", "What else?", "Rome", "d1")]
    write_questions(tmp_path / "q.jsonl", train)
    tests = [about("t", "The capital of France is what?", "paris", "d2"), about("s", "What else, then?", "Rome", "d1")]
    write_questions(tmp_path / "t.jsonl", tests)
    prepared = prepare_questions(recipe(tmp_path / "q.jsonl", test_path=str(tmp_path / "t.jsonl")))
    assert prepared.drops == {LEAK: 1}
    assert {q.question_id: q.split for q in prepared.questions} == {"b": TRAIN, "t": NEW_DOCUMENTS, "s": NEW_QUESTIONS}


def test_drawn_split_lets_no_training_question_give_a_test_question_away(tmp_path, capsys):
    once = [about(f"q{i}", f"What is number {i}?", str(i), f"d{i}") for i in range(20)]
    again = [about(f"r{i}", f"Number {i} is what?", str(i), f"d{(i + 7) % 20}") for i in range(20)]
    write_questions(tmp_path / "q.jsonl", [*once, *again])
    prepared = prepare_questions(recipe(tmp_path / "q.jsonl", test_documents_fraction=0.5))
    asked = {split: {q.answers for q in prepared.questions if q.split == split} for split in (TRAIN, NEW_DOCUMENTS)}
    assert asked[TRAIN] and asked[NEW_DOCUMENTS] and not asked[TRAIN] & asked[NEW_DOCUMENTS]
    assert prepared.drops[LEAK] == 40 - len(prepared.questions) > 0
    assert f"{prepared.drops[LEAK]} repeats a test question" in capsys.readouterr().out


def test_document_trained_on_and_held_out_is_refused(tmp_path):
    questions = [about("a", "One?", "1", "d1", TRAIN), about("b", "Two?", "2", "d1", NEW_DOCUMENTS)]
    write_questions(tmp_path / "q.jsonl", questions)
    with pytest.raises(UserError, match="question a trains on the document d1"):
        prepare_questions(recipe(tmp_path / "q.jsonl"))


def test_columns_of_the_recipe_are_read_in_both_files(tmp_path):
    rows = [
        {"id": str(i), "question": f"What is {i}?", "answers": str(i), "golden": f"d{i}", "why": "Seen."} for i in "12"
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.csv").write_text("id,question,answers,golden\n9,What is nine?,9,d1\n")
    columns = {"id": "id", "text": "question", "reasoning": "why"}
    prepared = prepare_questions(recipe(tmp_path / "q.jsonl", test_path=str(tmp_path / "t.csv"), columns=columns))
    assert [(q.question_id, q.split, q.metadata) for q in prepared.questions] == [
        ("1", TRAIN, {"reasoning": "Seen."}),
        ("2", TRAIN, {"reasoning": "Seen."}),
        ("9", NEW_QUESTIONS, {}),
    ]


def test_squad_file_is_corpus_and_questions_at_once(tmp_path):
    (tmp_path / "dev.json").write_bytes(FILE)
    prepared = prepare_questions(recipe(tmp_path / "dev.json", tmp_path / "dev.json", test_documents_fraction=0.5))
    assert {q.split for q in prepared.questions} >= {TRAIN, NEW_DOCUMENTS}
    assert sum(q.unanswerable for q in prepared.questions) == 1


def split_file(path: Path) -> None:
    questions = [about(f"q{i}", f"What is number {i}?", str(i), f"d{i % 6}") for i in range(60)]
    write_questions(path, [*questions, Question("u", "What is nothing?", (), (), "", {"kind": "unanswerable"})])


def test_questions_that_only_train_join_and_move_no_other(tmp_path, capsys):
    split_file(tmp_path / "q.jsonl")
    before = prepare_questions(recipe(tmp_path / "q.jsonl")).questions
    test = next(q for q in before if q.split == NEW_QUESTIONS)
    held_out = next(q.documents[0] for q in before if q.split == NEW_DOCUMENTS)
    seen = next(q for q in before if q.split == TRAIN and not q.unanswerable)
    more = [
        about("new", "Who painted the door?", "Pheidias", "d-of-nobody"),
        about("held-out", "Who painted the wall?", "Pheidias", held_out),
        about("leak", test.text.upper().replace("?", ""), "another answer", seen.documents[0]),
        about("again", seen.text, seen.answers[0], seen.documents[0]),
        about("answers-u", "What is nothing?", "a question", seen.documents[0], TRAIN),
    ]
    write_questions(tmp_path / "more.jsonl", more)
    capsys.readouterr()
    after = prepare_questions(recipe(tmp_path / "q.jsonl", train_path=str(tmp_path / "more.jsonl")))
    assert after.questions[: len(before)] == before
    joined = [q.question_id for q in after.questions[len(before) :]]
    assert joined == (["new", "answers-u"] if split_of(before, "u") == TRAIN else ["new"])
    assert all(q.split == TRAIN for q in after.questions[len(before) :])
    assert (after.drops[HELD_OUT], after.drops[DUPLICATE]) == (1, 1)
    assert after.drops[LEAK] == 5 - 2 - len(joined)
    assert "of 66: 1 about a document that is held out, 1 near-duplicate question" in capsys.readouterr().out


def split_of(questions: list[Question], name: str) -> str:
    return next(question.split for question in questions if question.question_id == name)


@pytest.mark.parametrize(
    ("question", "told"),
    [
        (about("q1", "What else?", "1", "d1"), "question q1 stands in questions.path"),
        (about("n", "What else?", "1", "d1", NEW_QUESTIONS), "'test_new_questions'.*leave the split out"),
    ],
)
def test_questions_that_only_train_are_refused_where_they_cannot(tmp_path, question, told):
    split_file(tmp_path / "q.jsonl")
    write_questions(tmp_path / "more.jsonl", [question])
    with pytest.raises(UserError, match=rf"questions\.train_path: .*{told}"):
        prepare_questions(recipe(tmp_path / "q.jsonl", train_path=str(tmp_path / "more.jsonl")))
