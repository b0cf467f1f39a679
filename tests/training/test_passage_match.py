import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.records import Golden, Question
from tests.training.tiny import chunk, hits_of
from training.passage_match import (
    find_answer,
    golden_chunk,
    golden_chunks,
    is_verdict,
    mentions,
    nearly_same,
    same_text,
    similarity,
    touches,
)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("83", "83 towns"),
        ("83", "in 83."),
        ("83", "83, 871"),
        ("5.5%", "about 5.5% (2023)"),
        ("5", "it is 5."),
        ("-5", "from -5 to 7"),
        ("15", "10-15 km"),
        ("1990", "Rome,1990,2763"),
        ("3", "1,3,5"),
        ("83,871", "83,871 sq km"),
        ("$5", "costs $5"),
        ("5", "共5个"),
        ("日本", "日本国"),
        ("서울", "수도는 서울은"),
        ("ＭＩＬＬＩＯＮ", "a million"),
        ("São Tomé", "sa\u0303o tome\u0301"),
        ("u.s.", "the U.S. army"),
    ],
)
def test_mentions_whole_answer_is_found(answer, text):
    assert mentions(answer, text)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("83", "83,871"),
        ("871", "83,871"),
        ("1,234", "1,234,567"),
        ("5.5", "15.5%"),
        ("5", "5.5%"),
        ("5", "1.5"),
        ("5", "2,5 Prozent"),
        ("5", "-5 °C"),
        ("5", "\u22125 °C"),
        ("5", "５０"),
        ("3.5 million", "13.5 million"),
        ("$5", "$55"),
        ("2", "version 1.2.3"),
        ("1990", "the 1990s"),
        ("Rome", "Romeo"),
        ("Fran", "França"),
        ("ром", "Кромвель"),
        ("", "anything"),
        (" ", "a b"),
        ("blue", ""),
    ],
)
def test_mentions_part_of_a_longer_word_or_number_is_not_found(answer, text):
    assert not mentions(answer, text)


def test_mentions_looks_past_a_longer_number_for_the_whole_one():
    assert mentions("83", "of 83,871 sq km, 83 are water")


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("83", "of 83,871 sq km, 83 are water", "83"),
        ("ＭＩＬＬＩＯＮ people", "about a million\n people", "million\n people"),
        ("北京", "首都是北京。", "北京"),
        ("blue", "bluebell", None),
        ("", "anything", None),
    ],
)
def test_find_answer_gives_the_places_in_the_original(answer, text, found):
    span = find_answer(answer, text)
    assert (span and text[span[0] : span[1]]) == found


@given(st.text(alphabet="ab 1,.-Ｂé北", max_size=6), st.text(alphabet="ab 1,.-Ｂé北", max_size=20))
def test_find_answer_agrees_with_mentions(answer, text):
    assert (find_answer(answer, text) is not None) == mentions(answer, text)


@pytest.mark.parametrize("answer", ["yes", "No.", "MAYBE", "ｎｏ", "是", "不能。"])
def test_is_verdict_yes_and_no(answer):
    assert is_verdict(answer)


@pytest.mark.parametrize("answer", ["Norway", "2", "yes, in 1990", "", "不能说"])
def test_is_verdict_is_not_every_short_answer(answer):
    assert not is_verdict(answer)


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "北京"]), max_size=12).map(" ".join)


@given(WORDS, WORDS, st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_nearly_same_is_similarity_at_least_the_threshold(left, right, threshold):
    assert nearly_same(left, right, threshold) == (similarity(left, right) >= threshold)


def test_similarity_compares_characters_where_no_spaces_are_set():
    assert similarity("首都是维也纳。", "首都是维也纳，") == 1
    assert similarity("首都是维也纳。", "首都是北京。") == 3 / 8


def test_same_text_ignores_width_and_space():
    assert same_text("a  ｂ\n", "a b")
    assert not same_text("a b", "a c")


def test_touches_one_common_character_is_enough():
    found = chunk("0123456789", "a", 10)
    assert touches(Golden("a", 0, 11), found)
    assert not touches(Golden("a", 0, 10), found)
    assert touches(Golden("a", 19, 30), found)
    assert not touches(Golden("a", 20, 30), found)
    assert touches(Golden("a"), found)
    assert not touches(Golden("b"), found)


def test_golden_chunk_holds_the_earliest_answer_then_ranks_best():
    texts = ["Nothing.", "It is red.", "It is blue.", "Blue again."]
    chunks = [chunk(text, "a", 20 * number) for number, text in enumerate(texts)]
    question = Question("q", "q?", ("blue", "red"), (Golden("a"),))
    places = golden_chunks(question, {"a": chunks})
    assert places == chunks
    assert golden_chunk(question, hits_of([chunks[1], chunks[3], chunks[2]]), places) == chunks[3]
    assert golden_chunk(question, [], places) == chunks[2]
    assert golden_chunk(question, [], [chunks[0], chunks[1]]) == chunks[1]
    assert golden_chunk(question, [], []) is None


def test_golden_chunk_of_a_verdict_is_the_best_ranked():
    chunks = [chunk("There is no doubt.", "a"), chunk("It works.", "a", 30)]
    question = Question("q", "q?", ("no",), (Golden("a"),))
    assert golden_chunk(question, hits_of([chunks[1], chunks[0]]), chunks) == chunks[1]
    said = dataclasses.replace(question, answers=("no doubt",))
    assert golden_chunk(said, hits_of([chunks[1], chunks[0]]), chunks) == chunks[0]
