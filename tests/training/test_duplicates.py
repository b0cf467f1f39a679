from hypothesis import given
from hypothesis import strategies as st

from retrieval.records import Golden, Question
from tests.work import lines_run
from training.duplicates import AMBIGUOUS, ANSWERED, DUPLICATE, LEAK, content_words, drop_repeats, sift

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


def test_questions_whose_numbers_differ_are_two():
    words = "How many tons of copper did the old mine at the northern coast yield in {}?"
    assert len(kept(question(words.format(2015), "9"), question(words.format(2016), "9"), threshold=0.7)) == 2


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
    def work(count):
        questions = [
            question(f"Is machine number{n} of series{n % 97} heavier than part{n * 7919} there?", "Yes", number=n)
            for n in range(count)
        ]
        kept = []
        lines = lines_run(lambda: kept.extend(sift(questions, STOP, 0.75).kept))
        assert len(kept) == count
        return lines

    assert work(2400) < work(300) * 8 * 1.2


def named(name, text, *answers, doc_ids=("greece",), kind=""):
    golden = tuple(Golden(doc_id) for doc_id in doc_ids) if answers else ()
    metadata = {"kind": kind, "doc_id": doc_ids[0]} if kind else {}
    return Question(name, text, answers, golden, "", metadata)


def faults(*questions, tests=(), threshold=0.9):
    return {q.question_id: reason for q, reason in drop_repeats(questions, tests, threshold).dropped}


LONG = "Which of the rivers that rise in the mountains of the north flows through {}?"


def test_drop_repeats_wants_a_common_answer_and_document():
    first = named("a", LONG.format("the capital"), "Ilisos", "the Ilisos")
    same = named("b", LONG.format("its capital"), "the ilisos", doc_ids=("europe", "greece"))
    assert faults(first, same) == {"b": DUPLICATE}
    assert faults(same, first) == {"a": DUPLICATE}
    assert faults(first, named("b", same.text, "Kifisos")) == {}
    assert faults(first, named("b", same.text, "Ilisos", doc_ids=("europe",))) == {}
    assert faults(first, same, threshold=1) == {}


def test_drop_repeats_population_of_france_is_not_that_of_spain():
    both = [named(land, f"What is the population of {land}?", "68 million", doc_ids=(land,)) for land in ("F", "S")]
    assert faults(*both) == {}
    assert faults(*both, tests={"S"}) == {}


def test_drop_repeats_training_question_gives_way_to_the_test_question_wherever_it_stands():
    first, again = named("a", LONG.format("the capital"), "Ilisos"), named("b", LONG.format("its capital"), "Ilisos")
    assert faults(first, again, tests={"b"}) == {"a": LEAK}
    assert faults(first, again, tests={"a"}) == {"b": LEAK}
    assert faults(first, again, tests={"a", "b"}) == {"b": DUPLICATE}


def test_drop_repeats_same_words_and_answer_about_another_document_leak_and_are_no_duplicates():
    first = named("a", "Which river flows through the capital?", "Ilisos")
    other = named("b", "Through the capital flows which river?", "Ilisos", doc_ids=("europe",))
    assert faults(first, other) == {}
    assert faults(first, other, tests={"b"}) == {"a": LEAK}


def test_drop_repeats_same_question_with_another_answer_elsewhere_is_kept():
    assert faults(named("a", "How large is it?", "1"), named("b", "How large is it?", "2", doc_ids=("b",))) == {}


def test_drop_repeats_unanswerable_questions_are_one_by_document_and_none_where_another_has_an_answer():
    first = named("a", "Who owns the mine?", kind="unanswerable")
    assert faults(first, named("b", "Who owns the mine?", kind="unanswerable")) == {"b": DUPLICATE}
    assert faults(first, named("b", "Who owns the mine?", kind="unanswerable", doc_ids=("b",))) == {}
    assert faults(first, named("b", "who owns the mine", "Ann", doc_ids=("b",))) == {"a": ANSWERED}
    assert faults(named("b", "Who owns the mine?", "Ann"), first, tests={"a"}) == {"a": ANSWERED}


word_lists = st.lists(st.sampled_from("abcdefg1"), min_size=1, max_size=6)
facts = st.tuples(word_lists, st.sets(st.sampled_from("xy"), max_size=2), st.sets(st.sampled_from("dn"), min_size=1))


@given(st.lists(st.tuples(facts, st.booleans()), max_size=20), st.sampled_from([0.3, 0.5, 0.75, 1.0]))
def test_drop_repeats_agrees_with_comparing_all_pairs(items, threshold):
    questions = [
        named(str(n), " ".join(words), *sorted(answers), doc_ids=sorted(documents))
        for n, ((words, answers, documents), _) in enumerate(items)
    ]
    tests = {str(n) for n, (_, tested) in enumerate(items) if tested}
    expected, kept_tests, kept_others = {}, [], []

    def near(one, other):
        left, right = set(one.text.split()), set(other.text.split())
        answers = set(one.answers) & set(other.answers) or not (one.answers or other.answers)
        places = set(one.documents or [""]) & set(other.documents or [""])
        return answers and places and len(left & right) >= threshold * len(left | right) and "1" not in left ^ right

    def gives_away(one, other):
        answers = set(one.answers) & set(other.answers) or not (one.answers or other.answers)
        return bool(answers) and set(one.text.split()) == set(other.text.split())

    for candidate in sorted(questions, key=lambda q: q.question_id not in tests):
        name = candidate.question_id
        if name in tests:
            if any(near(candidate, other) for other in kept_tests):
                expected[name] = DUPLICATE
            else:
                kept_tests.append(candidate)
        elif any(near(candidate, other) or gives_away(candidate, other) for other in kept_tests):
            expected[name] = LEAK
        elif any(near(candidate, other) for other in kept_others):
            expected[name] = DUPLICATE
        else:
            kept_others.append(candidate)
    result = drop_repeats(questions, tests, threshold)
    assert {q.question_id: reason for q, reason in result.dropped} == expected
    assert [q.question_id for q in result.kept] == [q.question_id for q in questions if q.question_id not in expected]
