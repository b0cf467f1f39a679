import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.records import Golden, Question
from tests.training.tiny import chunk
from training.quote_choice import LONGEST_QUOTE, choose_quote


def choose(text: str, answer: str, *golden: Golden, asked: str = "q?", reasoning: str = "", start: int = 0) -> str:
    question = Question("q", asked, (answer,), golden or (Golden("a"),))
    return choose_quote(question, answer, reasoning, chunk(text, "a", start))


COLOURS = "It was blue in 1990. Now it is blue. Blue is a long story of many words. It is not red."


def test_choose_quote_is_the_shortest_sentence_that_holds_the_answer():
    assert choose(COLOURS, "blue") == "Now it is blue."
    assert choose(COLOURS, "green") == ""


def test_choose_quote_prefers_the_sentence_that_the_question_is_about():
    assert choose(COLOURS, "blue", asked="Which story of many words is long?") == "Blue is a long story of many words."
    text = "这些设备被用来治疗一氧化碳中毒。肺中氧气浓度的增加有助于取代血红素中的一氧化碳。"
    asked = "肺部氧气浓度增加会取代什么?"
    assert choose(text, "一氧化碳", asked=asked) == "肺中氧气浓度的增加有助于取代血红素中的一氧化碳。"


def test_choose_quote_stays_with_the_golden_span():
    start = COLOURS.index("Blue is")
    assert choose(COLOURS, "blue", Golden("a", start, start + 30)) == "Blue is a long story of many words."


def test_choose_quote_golden_span_of_the_answer_alone_is_widened_to_its_sentence():
    start = COLOURS.index("1990")
    assert choose(COLOURS, "1990", Golden("a", start, start + 4)) == "It was blue in 1990."


def test_choose_quote_spans_are_offsets_into_the_document():
    start = 700 + COLOURS.index("1990")
    assert choose(COLOURS, "1990", Golden("a", start, start + 4), start=700) == "It was blue in 1990."


def test_choose_quote_lines_and_chinese_sentences_are_sentences():
    assert choose("total: 83,871 sq km\nland: 82,445 sq km", "82,445 sq km") == "land: 82,445 sq km"
    assert choose("首都是维也纳。人口约九百万。面积不大。", "九百万") == "人口约九百万。"


def test_choose_quote_number_is_not_taken_from_a_longer_number():
    text = "The area is 83,871 sq km. The rate is 15.5%. It has 83 towns. In truth it is 5.5% here."
    assert choose(text, "83") == "It has 83 towns."
    assert choose(text, "5.5%") == "In truth it is 5.5% here."


def test_choose_quote_answer_that_a_full_stop_cuts_is_quoted_with_its_line():
    text = "Other line.\nIt was moved to St. Petersburg in 1712. It is large."
    assert choose(text, "St. Petersburg") == "It was moved to St. Petersburg in 1712. It is large."


TRIAL = (
    "We asked whether aspirin prevents strokes. There was no funding. Strokes occurred in 12% of the aspirin group "
    "and in 11% of the control group. Age was 60."
)


def test_choose_quote_verdict_is_not_looked_up_as_a_word():
    asked, reasoning = "Does aspirin prevent strokes?", "Strokes occurred as often in the control group."
    quote = choose(TRIAL, "no", asked=asked, reasoning=reasoning)
    assert quote == "Strokes occurred in 12% of the aspirin group and in 11% of the control group."


def test_choose_quote_free_answer_without_a_related_sentence_has_none():
    assert choose(TRIAL, "never", asked="How do volcanoes erupt?", reasoning="Magma rises.") == ""


def test_choose_quote_free_answer_takes_the_span_it_was_given():
    start, end = TRIAL.index("There was"), TRIAL.index(" Age was")
    quote = choose(TRIAL, "it does not help", Golden("a", start, end), asked="How do volcanoes erupt?")
    assert quote == TRIAL[start:end]


def test_choose_quote_question_in_the_passage_is_no_evidence():
    text = "Does aspirin prevent strokes? Aspirin did not prevent them."
    assert choose(text, "no", asked="Does aspirin prevent strokes?") == "Aspirin did not prevent them."


def test_choose_quote_record_in_one_line_is_cut_to_the_clause_of_the_answer():
    call = "torch.hub.load(repo_or_dir='a/b', model='m', pretrained=True)"
    text = f'{{"about": "{"word " * 80}", "call": "{call}", "tags": ["x", "y"], "more": "{"word " * 80}"}}'
    assert choose(text, call) == f'"call": "{call}"'


@given(
    words=st.lists(st.sampled_from(["word", "long,", "b;", "文，", "e\u0301t", "x"]), min_size=1, max_size=200),
    place=st.floats(0, 1),
)
def test_choose_quote_long_sentence_keeps_the_answer_and_the_limit(words, place):
    words.insert(int(place * len(words)), "answer 42")
    text = " ".join(words)
    quote = choose(text, "answer 42")
    assert "answer 42" in quote
    assert quote in text
    assert len(quote) <= LONGEST_QUOTE


@pytest.mark.parametrize("text", ["", " \n ", "?", "..."])
def test_choose_quote_empty_passages_have_none(text):
    assert choose(text, "yes") == ""
    assert choose(text, "blue", Golden("a", 0, 1)) in ("", text.strip())
