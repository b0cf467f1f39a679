import collections

from hypothesis import given
from hypothesis import strategies as st

from retrieval.records import Golden, Question
from training.config import SamplesConfig
from training.records import RaftSample
from training.sample_choice import choose_questions, fact_of, keep_questions_about_seen_facts

ABSTAINING = RaftSample("s", "q", "dsf", "?", (), (), False, "", (), "", "", "train")


def closed_book(question: Question) -> RaftSample | str:
    if not question.answers:
        return "no answer"
    return "answer too long" if len(question.answers[0]) > 20 else ABSTAINING


def ask(number: int, fact: int | None = None, split: str = "train", kind: str = "") -> Question:
    fact = number if fact is None else fact
    metadata = {"kind": kind} if kind else {}
    return Question(f"q{number}", f"What is {number}?", (f"answer {fact}",), (Golden(f"d{fact % 7}"),), split, metadata)


@given(
    questions=st.integers(0, 60),
    unanswerable=st.integers(0, 10),
    raft=st.integers(1, 50),
    dsf=st.integers(1, 50),
    validation=st.integers(0, 30),
    seed=st.integers(0, 5),
)
def test_choose_questions_validation_never_trains_and_costs_no_more_than_a_fifth(
    questions, unanswerable, raft, dsf, validation, seed
):
    asked = [ask(number) for number in range(questions)]
    asked += [
        Question(f"u{n}", f"Who is {n}?", split="train", metadata={"kind": "unanswerable"}) for n in range(unanswerable)
    ]
    asked += [ask(number, split="test_new_questions") for number in range(100, 110)]
    config = SamplesConfig(raft_rows=raft, dsf_rows=dsf, validation_rows=validation)
    chosen = choose_questions(asked, config, seed, closed_book)
    assert chosen == choose_questions(asked, config, seed, closed_book)
    trained = {q.question_id for q in (*chosen.raft, *chosen.dsf)}
    validating = {q.question_id for q in (*chosen.validation_raft, *chosen.validation_dsf)}
    assert not trained & validating
    able = questions + unanswerable
    assert chosen.candidates == able
    assert all(q.split == "train" for q in (*chosen.raft, *chosen.dsf, *chosen.validation_raft, *chosen.validation_dsf))
    assert len(chosen.validation_raft) >= min(validation, max(0, able - max(raft, dsf) - unanswerable), able // 5)
    assert len(chosen.validation_raft) <= validation
    assert len(chosen.raft) >= min(raft, able - min(validation, able // 5))
    assert len(chosen.dsf) >= min(dsf, questions - min(validation, able // 5))
    assert not any(q.unanswerable for q in (*chosen.dsf, *chosen.validation_dsf))


def test_choose_questions_closed_book_rows_validate_facts_that_are_told_in_other_words():
    asked = [ask(number, fact=number % 10) for number in range(40)]
    config = SamplesConfig(raft_rows=5, dsf_rows=12, validation_rows=6)
    chosen = choose_questions(asked, config, 1, closed_book)
    told = {fact_of(question) for question in chosen.dsf}
    assert len(chosen.validation_dsf) == 6
    assert {fact_of(question) for question in chosen.validation_dsf} <= told
    nothing_told = choose_questions([ask(number) for number in range(40)], config, 1, closed_book)
    assert len(nothing_told.validation_dsf) == 6


def test_new_questions_about_untold_facts_are_left_out_but_not_those_without_an_answer():
    asked = [ask(number, split="test_new_questions") for number in range(4)] + [ask(9, split="test_new_documents")]
    silent = Question("u", "Who?", split="test_new_questions", metadata={"kind": "unanswerable"})
    told = [ask(20 + fact, fact) for fact in (1, 2)]  # half of the four are rewordings
    kept = keep_questions_about_seen_facts([*told, *asked, silent], [told[1]])
    assert [question.question_id for question in kept] == ["q21", "q22", "q2", "q9", "u"]
    assert keep_questions_about_seen_facts([*told, *asked, silent], [ask(7)]) == [*told, *asked, silent]
    few = [told[1], *asked, silent]
    assert keep_questions_about_seen_facts(few, [told[1]]) == few


def test_choose_questions_that_can_give_no_row_are_counted_by_reason():
    asked = [
        *(ask(number) for number in range(5)),
        Question("long", "What?", ("x" * 30,), (Golden("d1"),), "train"),
        Question("nowhere", "Where?", ("there",), (), "train"),
        Question("silent", "Who?", (), (Golden("d1"),), "train"),
        Question("open", "Whence?", (), (), "train", {"is_impossible": True}),
    ]
    chosen = choose_questions(asked, SamplesConfig(validation_rows=0), 1, closed_book)
    assert chosen.drops == collections.Counter({"answer too long": 1, "no golden place": 1, "no answer": 1})
    assert {q.question_id for q in chosen.raft} == {"q0", "q1", "q2", "q3", "q4", "open"}
    assert {q.question_id for q in chosen.dsf} == {"q0", "q1", "q2", "q3", "q4"}


def test_choose_questions_validation_spreads_over_kinds():
    asked = [ask(number, kind=("area", "exports", "goods")[number % 3]) for number in range(90)]
    chosen = choose_questions(asked, SamplesConfig(raft_rows=10, dsf_rows=10, validation_rows=9), 1, closed_book)
    kinds = collections.Counter(q.metadata["kind"] for q in chosen.validation_raft)
    assert kinds == {"area": 3, "exports": 3, "goods": 3}
