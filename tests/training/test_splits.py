from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from retrieval.records import Golden, Question
from tests.work import lines_run
from training.config import QuestionsConfig
from training.splits import NEW_DOCUMENTS, NEW_KINDS, NEW_QUESTIONS, TRAIN, assign_splits, held_out_documents, spread


def question(name: str, *documents: str, split: str = "", kind: str = "") -> Question:
    golden = tuple(Golden(document) for document in documents)
    return Question(name, f"{name}?", ("yes",), golden, split, {"kind": kind} if kind else {})


def split_of(questions: list[Question]) -> dict[str, str]:
    return {question.question_id: question.split for question in questions}


GOLDEN_SETS = st.lists(st.sets(st.integers(0, 11), max_size=3), min_size=4, max_size=40)


@given(GOLDEN_SETS, st.floats(0.05, 0.9), st.floats(0, 0.9), st.integers(0, 5))
def test_assign_splits_training_never_shows_a_held_out_document(golden_sets, documents_share, questions_share, seed):
    questions = [question(f"q{i}", *(f"d{d}" for d in sorted(places))) for i, places in enumerate(golden_sets)]
    config = QuestionsConfig(test_documents_fraction=documents_share, test_questions_fraction=questions_share)
    try:
        split = assign_splits(questions, None, config, seed)
    except UserError:
        return  # too few documents, or nothing left to train on or test with
    assert [q.question_id for q in split] == [q.question_id for q in questions]
    new = {golden.doc_id for q in split if q.split == NEW_DOCUMENTS for golden in q.golden}
    assert new == held_out_documents(split)
    for asked in split:
        if asked.split == TRAIN:
            assert not {golden.doc_id for golden in asked.golden} & new
    assert assign_splits(questions, None, config, seed) == split


def test_assign_splits_shares_follow_the_recipe():
    questions = [question(f"q{i}", f"d{i % 50}") for i in range(1000)]
    counts = Counter(q.split for q in assign_splits(questions, None, QuestionsConfig(), 17))
    assert counts[NEW_DOCUMENTS] == 200  # 10 of 50 documents, 20 questions each
    assert 50 <= counts[NEW_QUESTIONS] <= 110  # a tenth of the other 800
    assert sum(counts.values()) == 1000


def test_assign_splits_another_seed_holds_out_other_documents():
    questions = [question(f"q{i}", f"d{i % 50}") for i in range(200)]
    held_out = [held_out_documents(assign_splits(questions, None, QuestionsConfig(), seed)) for seed in (1, 2)]
    assert held_out[0] != held_out[1]


def test_assign_splits_order_of_questions_does_not_move_a_document():
    questions = [question(f"q{i}", f"d{i % 20}") for i in range(100)]
    assert split_of(assign_splits(questions, None, QuestionsConfig(), 3)) == split_of(
        assign_splits(questions[::-1], None, QuestionsConfig(), 3)
    )


def test_assign_splits_question_about_a_seen_and_a_held_out_document_tests():
    pair = question("pair", "d0", "d1")
    singles = [question(f"q{i}", f"d{i}") for i in range(2)]
    split = split_of(assign_splits([*singles, pair], None, QuestionsConfig(test_questions_fraction=0), 1))
    assert split["pair"] == NEW_QUESTIONS
    assert sorted([split["q0"], split["q1"]]) == [NEW_DOCUMENTS, TRAIN]


def test_assign_splits_stated_splits_are_kept():
    stated = [
        question("a", "d1", split=TRAIN),
        question("b", "d1", split=NEW_QUESTIONS),
        question("c", "d2", split=NEW_DOCUMENTS),
        question("d", "d2", split=NEW_KINDS),
    ]
    assert assign_splits(stated, None, QuestionsConfig(), 1) == stated


@pytest.mark.parametrize("seed", range(8))
def test_assign_splits_unstated_questions_follow_the_stated_ones(seed):
    stated = [question("a", "d1", split=TRAIN), question("c", "d2", split=NEW_DOCUMENTS)]
    others = [question(f"o{i}", f"d{i % 6}") for i in range(30)]
    split = assign_splits(
        stated + others, None, QuestionsConfig(test_documents_fraction=0.5, test_questions_fraction=0), seed
    )
    by_document = {q.golden[0].doc_id: q.split for q in split}
    assert by_document["d1"] == TRAIN
    assert by_document["d2"] == NEW_DOCUMENTS
    assert sum(name == NEW_DOCUMENTS for name in by_document.values()) == 3


def test_assign_splits_document_both_seen_and_new_is_refused():
    stated = [question("a", "d1", "d2", split=TRAIN), question("c", "d2", split=NEW_DOCUMENTS)]
    with pytest.raises(UserError, match="question a trains on the document d2"):
        assign_splits(stated, None, QuestionsConfig(), 1)


def test_assign_splits_test_file_tells_new_questions_from_new_documents():
    train = [question("a", "d1"), question("b", "d2", split=NEW_QUESTIONS)]
    tests = [question("x", "d1"), question("y", "d9"), question("z"), question("k", "d8", split=NEW_KINDS)]
    split = split_of(assign_splits(train, tests, QuestionsConfig(), 1))
    assert split == {
        "a": TRAIN,
        "b": NEW_QUESTIONS,
        "x": NEW_QUESTIONS,
        "y": NEW_DOCUMENTS,
        "z": NEW_DOCUMENTS,
        "k": NEW_KINDS,
    }


def test_assign_splits_test_file_never_trains():
    split = split_of(assign_splits([question("a", "d1")], [question("x", "d2", split=TRAIN)], QuestionsConfig(), 1))
    assert split == {"a": TRAIN, "x": NEW_DOCUMENTS}


@pytest.mark.parametrize(
    ("questions", "tests", "told"),
    [
        ([question("a", "d1", split="dev")], None, "question a has the split 'dev'; use one of train"),
        ([question("a", "d1")], [question("a", "d2")], "questions.test_path: question a stands in questions.path too"),
        ([question("a", "d1"), question("b", "d1")], None, "name 1 golden documents; holding documents out needs two"),
        ([question("a"), question("b")], None, "name 0 golden documents"),
        ([question("a", "d1", split=NEW_DOCUMENTS)], None, "left to train on"),
        ([question("a", "d1", split=TRAIN)], None, "left to test with"),
    ],
)
def test_assign_splits_bad_questions_are_one_line(questions, tests, told):
    with pytest.raises(UserError) as caught:
        assign_splits(questions, tests, QuestionsConfig(), 1)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_spread_is_even_over_kinds_and_documents():
    questions = [question(f"common{i}", f"d{i % 10}", kind="common") for i in range(100)]
    questions += [question(f"other{i}", f"d{i % 10}", kind="other") for i in range(100)]
    questions += [question(f"rare{i}", f"d{i}", kind="rare") for i in range(3)]
    chosen = spread(questions, 23, seed=1)
    assert Counter(q.metadata["kind"] for q in chosen) == {"common": 10, "other": 10, "rare": 3}
    for kind in ("common", "other"):
        assert len({q.golden[0].doc_id for q in chosen if q.metadata["kind"] == kind}) == 10


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 5)), max_size=40), st.integers(1, 50))
def test_spread_takes_each_question_once_and_fewer_rows_are_a_prefix(facts, rows):
    questions = [question(f"q{i}", f"d{d}", kind=kind) for i, (kind, d) in enumerate(facts)]
    everything = spread(questions, len(questions), seed=2)
    assert sorted(q.question_id for q in everything) == sorted(q.question_id for q in questions)
    assert spread(questions, rows, seed=2) == everything[:rows]


def test_spread_without_kinds_or_golden_documents_still_takes_all():
    questions = [question(f"q{i}") for i in range(5)]
    assert len(spread(questions, 9, seed=1)) == 5
    assert spread([], 9, seed=1) == []


def unanswerable(name: str, document: str = "", split: str = "") -> Question:
    metadata = {"kind": "unanswerable"} | ({"doc_id": document} if document else {})
    return Question(name, f"{name}?", (), (), split, metadata)


def test_assign_splits_no_document_held_out_tests_questions_about_seen_documents():
    questions = [question(f"q{i}", f"d{i % 10}") for i in range(200)] + [question("lone", "d99")]
    config = QuestionsConfig(test_documents_fraction=0, test_questions_fraction=0.2)
    split = assign_splits(questions, None, config, 17)
    counts = Counter(q.split for q in split)
    assert set(counts) == {TRAIN, NEW_QUESTIONS}
    assert 20 <= counts[NEW_QUESTIONS] <= 60
    seen = {q.golden[0].doc_id for q in split if q.split == TRAIN}
    assert seen == {q.golden[0].doc_id for q in questions}


@pytest.mark.parametrize("seed", range(5))
def test_assign_splits_lone_question_of_a_document_never_tests_a_seen_document(seed):
    questions = [question(f"q{i}", f"d{i}") for i in range(60)]
    split = assign_splits(questions, None, QuestionsConfig(test_questions_fraction=0.5), seed)
    assert Counter(q.split for q in split) == {TRAIN: 48, NEW_DOCUMENTS: 12}


def test_assign_splits_one_document_can_still_test_new_questions():
    questions = [question(f"q{i}", "d0") for i in range(40)]
    split = assign_splits(questions, None, QuestionsConfig(test_documents_fraction=0), 1)
    assert {q.split for q in split} == {TRAIN, NEW_QUESTIONS}


def test_assign_splits_unanswerable_questions_follow_their_documents():
    questions = [question(f"q{i}", f"d{i % 50}") for i in range(500)]
    questions += [unanswerable(f"u{i}", f"d{i % 50}") for i in range(500)]
    split = assign_splits(questions, None, QuestionsConfig(), 17)
    held_out = held_out_documents(split)
    assert len(held_out) == 10
    for asked in split:
        assert (asked.split == NEW_DOCUMENTS) == (asked.documents[0] in held_out)
    counts = Counter(q.split for q in split if q.unanswerable)
    assert counts[NEW_DOCUMENTS] == 100
    assert 20 <= counts[NEW_QUESTIONS] <= 65
    assert sum(counts.values()) == 500


def test_assign_splits_unanswerable_questions_about_no_document_get_the_same_shares():
    questions = [question(f"q{i}", f"d{i % 50}") for i in range(100)] + [unanswerable(f"u{i}") for i in range(1000)]
    split = assign_splits(questions, None, QuestionsConfig(), 17)
    counts = Counter(q.split for q in split if q.unanswerable)
    assert 150 <= counts[NEW_DOCUMENTS] <= 250
    assert 50 <= counts[NEW_QUESTIONS] <= 115
    assert split_of(split) == split_of(assign_splits(questions[::-1], None, QuestionsConfig(), 17))


def test_assign_splits_test_split_of_a_file_is_told_apart_by_what_training_sees():
    stated = [
        question("a", "d1", split=TRAIN),
        question("b", "d2"),
        question("c", "d1", "d7", split="test"),
        question("d", "d3", split="test"),
        unanswerable("e", "d2", split="test"),
        unanswerable("f", "d3", split="test"),
    ]
    split = split_of(assign_splits(stated, None, QuestionsConfig(), 1))
    assert split == {"a": TRAIN, "b": TRAIN, "c": NEW_QUESTIONS, "d": NEW_DOCUMENTS, "e": NEW_QUESTIONS,
                     "f": NEW_DOCUMENTS}  # fmt: skip


def test_spread_keeps_the_share_of_unanswerable_questions_in_every_beginning():
    questions = [question(f"q{i}", f"d{i % 7}", kind="ab"[i % 2]) for i in range(90)]
    questions += [unanswerable(f"u{i}", f"d{i}") for i in range(30)]
    everything = spread(questions, 1000, seed=3)
    assert len({q.question_id for q in everything}) == 120
    for rows in (4, 20, 60, 120):
        assert abs(sum(q.unanswerable for q in everything[:rows]) - rows / 4) <= 1
    assert [q for q in everything if not q.unanswerable] == spread(questions[:90], 90, seed=3)


def test_spread_of_one_crowded_document_among_many_is_linear():
    def work(count):
        questions = [question(f"q{i}", "crowded" if i % 2 else f"d{i}") for i in range(count)]
        spread_out = []
        lines = lines_run(lambda: spread_out.extend(spread(questions, count, seed=1)))
        assert len(spread_out) == count
        return lines

    assert work(2400) < work(300) * 8 * 1.2
