import time

from hypothesis import given
from hypothesis import strategies as st

from retrieval.records import Golden, Question
from training.duplicates import AMBIGUOUS, ANSWERED, DUPLICATE, content_words, sift

STOP = frozenset({"what", "is", "the", "of", "in", "which", "was", "when", "year", "s", "a"})


def question(text, answer="Athens", doc_id="greece", number=0):
    answers = (answer,) if answer else ()
    golden = (Golden(doc_id, 0, 9),) if answer else ()
    return Question(f"{text}/{number}", text, answers, golden, "", {"doc_id": doc_id})


def kept(*questions, threshold=0.75):
    return [q.text for q in sift(questions, STOP, threshold).kept]


def reasons(*questions, threshold=0.75):
    return [reason for _, reason in sift(questions, STOP, threshold).dropped]


def test_same_words_in_another_order_with_the_same_answer_are_one_anywhere():
    first = question("What is the capital of Greece?")
    again = question("Greece's capital is what?", "athens", doc_id="europe")
    assert kept(first, again) == [first.text]
    assert reasons(first, again) == [DUPLICATE]


def test_same_template_about_other_things_is_two_questions():
    greece = question("What is the total area of the country Greece?", "131,957 sq km")
    france = question("What is the total area of the country France?", "551,500 sq km", doc_id="france")
    assert kept(greece, france) == [greece.text, france.text]


def test_nearly_the_same_words_are_one_about_the_same_document_only():
    words = "When was the treaty of the northern islands signed{}?"
    first = question(words.format(""), "1947")
    assert kept(first, question(words.format(" there"), "1947")) == [first.text]
    assert len(kept(first, question(words.format(" there"), "1947", doc_id="italy"))) == 2
    assert len(kept(first, question(words.format(" there"), "1948"))) == 2
    assert len(kept(first, question(words.format(" there"), "1947"), threshold=1)) == 2


def test_same_question_with_different_answers_is_kept_nowhere():
    both = [question("What is the total area?", answer, doc_id) for answer, doc_id in (("1", "a"), ("2", "b"))]
    assert reasons(*both) == [AMBIGUOUS, AMBIGUOUS]


def test_longer_form_of_the_answer_is_the_same_answer():
    short = question("What is the capital of Greece?", "Athens")
    long = question("What is the capital of Greece?", "Athens (Attica)", doc_id="europe")
    assert sift([short, long], STOP, 0.75).kept == [short]
    assert reasons(short, long) == [DUPLICATE]


def test_unanswerable_question_that_another_place_answers_is_dropped_in_either_order():
    unanswerable, answered = question("What is the capital of Greece?", ""), question("What is the capital of Greece?")
    assert sift([unanswerable, answered], STOP, 0.75).dropped == [(unanswerable, ANSWERED)]
    assert sift([answered, unanswerable], STOP, 0.75).dropped == [(unanswerable, ANSWERED)]


def test_chinese_counts_characters_as_words():
    assert content_words("希腊的首都Athens是?", {"的", "是"}) == ["希", "腊", "首", "都", "athens"]
    first = question("希腊的首都是哪里？", "雅典")
    assert len(kept(first, question("希腊的首都在哪里？", "雅典"), threshold=0.7)) == 1


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6), st.sampled_from(["x", "y"])),
        max_size=25,
    ),
    st.sampled_from([0.3, 0.5, 0.75, 1.0]),
)
def test_prefix_index_finds_what_comparing_all_pairs_finds(items, threshold):
    questions = [question(" ".join(words), answer, number=n) for n, (words, answer) in enumerate(items)]
    result = sift(questions, frozenset(), threshold)
    alive = [q for q in questions if (q, AMBIGUOUS) not in result.dropped]
    expected = []
    for candidate in alive:
        words = set(candidate.text.split())
        near = (
            other
            for other in expected
            if other.answers == candidate.answers
            and len(words & set(other.text.split())) >= threshold * len(words | set(other.text.split()))
        )
        if next(near, None) is None:
            expected.append(candidate)
    assert [q.question_id for q in result.kept] == [q.question_id for q in expected]


def test_work_grows_linearly_even_for_one_document():
    def seconds(count):
        questions = [
            question(f"Is machine number{n} of series{n % 97} heavier than part{n * 7919} there?", "Yes", number=n)
            for n in range(count)
        ]
        began = time.process_time()
        assert len(sift(questions, STOP, 0.75).kept) == count
        return time.process_time() - began

    small = min(seconds(1000) for _ in range(3))
    assert seconds(8000) < small * 8 * 3
