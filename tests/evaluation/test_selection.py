from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from evaluation.selection import kind_of, questions_digest, require_distinct, select_questions
from tests.evaluation.fakes import make_questions


@given(st.integers(1, 30), st.integers(0, 40), st.integers(0, 5), st.randoms())
def test_selection_is_even_over_kinds_and_blind_to_order(total, count, seed, random):
    questions = make_questions(total)
    shuffled = list(questions)
    random.shuffle(shuffled)
    chosen = select_questions(questions, count, seed)
    assert chosen == select_questions(shuffled, count, seed)
    assert len(chosen) == min(count, total) == len({question.question_id for question in chosen})
    per_kind = Counter(kind_of(question) for question in chosen)
    available = Counter(kind_of(question) for question in questions)
    for kind, taken in per_kind.items():
        assert taken == available[kind] or taken >= max(per_kind.values()) - 1


def test_another_seed_selects_other_questions():
    questions = make_questions(300)
    assert select_questions(questions, 20, 1) != select_questions(questions, 20, 2)


def test_digest_sees_every_change_of_content():
    questions = make_questions(3)
    assert questions_digest(questions) == questions_digest(make_questions(3))
    assert questions_digest(questions) != questions_digest(questions[:2])
    assert questions_digest(questions) != questions_digest(make_questions(3, split="other"))


def test_repeated_ids_and_empty_lists_are_refused():
    with pytest.raises(UserError, match=r"q001.*twice"):
        require_distinct([*make_questions(3), *make_questions(1, start=1)])
    with pytest.raises(UserError, match="there is none"):
        require_distinct([])
