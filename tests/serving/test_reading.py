import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.records import Hit
from serving.answering import finish, readable
from serving.engine import Completion
from serving.reading import AnswerReader
from serving.strategies import STRATEGIES
from tests.serving.fakes import CITED, GREECE, prompt_format
from training.format import ANSWER_MARK, BEGIN_QUOTE, END_QUOTE

FORMAT = prompt_format()
LABELS = FORMAT.texts.labels
HITS = [Hit(GREECE, 1.0, 1)]


def read(text, strategy, cut=1):
    """What a reader sees, piece by piece, and the finished answer's readable text."""
    reader = AnswerReader(STRATEGIES[strategy], LABELS)
    pieces = [reader.push(text[at : at + cut]) for at in range(0, len(text), cut)]
    answer = finish(Completion("id", text), STRATEGIES[strategy], HITS, FORMAT)
    return [*pieces, reader.end(answer)], readable(answer, LABELS)


@pytest.mark.parametrize("strategy", ["raft", "rag", "base", "rag_fewshot"])
@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_reader_pieces_join_to_the_readable_answer(strategy, cut):
    pieces, expected = read(CITED + "  , the\n capital", strategy, cut)
    assert "".join(pieces).endswith(expected)
    assert "##" not in "".join(pieces) and "ANSWER" not in "".join(pieces)


def test_reader_taught_model_shows_the_answer_as_it_comes_and_nothing_before():
    pieces, expected = read(CITED, "raft")
    shown = [piece for piece in pieces if piece]
    assert shown[:6] == list("Athens") and "".join(shown) == expected


def test_reader_untaught_model_is_shown_at_once():
    pieces, expected = read("It is Athens", "rag")
    assert pieces[:2] == ["I", "t"] and "".join(pieces) == expected


def test_reader_marker_of_an_untaught_model_is_never_shown_in_part():
    pieces, _ = read("Well <b>#1</b> ##begin_quote##x##end_quote##", "rag")
    assert "".join(pieces[:-1]) == "Well <b>#1</b>"


def test_reader_second_answer_is_sent_whole():
    pieces, expected = read("<ANSWER>: Patras <ANSWER>: Athens", "finetuned")
    assert "".join(pieces) == "Patras\n\n" + expected


def test_reader_taught_model_without_a_mark_is_shown_at_the_end():
    pieces, expected = read("Athens", "raft")
    assert pieces[:-1] == [""] * 6 and pieces[-1] == expected


FRAGMENT = st.sampled_from([ANSWER_MARK, BEGIN_QUOTE, END_QUOTE, "Athens", " ", "\n", "<", "#", "##", "首都", "<ANSW"])


@given(st.lists(FRAGMENT, max_size=8).map("".join), st.sampled_from(sorted(STRATEGIES)))
def test_reader_any_text_never_shows_a_whole_marker_and_ends_with_the_answer(text, strategy):
    pieces, expected = read(text, strategy)
    assert "".join(pieces).endswith(expected)
    assert not any(marker in "".join(pieces) for marker in (ANSWER_MARK, BEGIN_QUOTE, END_QUOTE))


@pytest.mark.parametrize("cut", [1, 2, 1000])
@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("<ANSWER>: Write &lt;s> and &#91;INST] first", "finetuned"),
        ("<ANSWER>: if a &lt; b then # # stop", "finetuned"),
        ("Use &lt;s> here", "rag"),
        ("<answer> Athens", "finetuned"),
        ("<ANSWER>：雅典", "finetuned"),
        ("##Reason: it says so ##Answer: Athens", "raft"),
        ("Athens ##BEGIN_QUOTE##Athens is the capital.##END_QUOTE##", "rag"),
        ("## Athens\n## Sparta #1", "rag"),
        ("1 & 2 # 3 < 4", "rag"),
    ],
)
def test_reader_pieces_joined_are_the_readable_answer_exactly(text, strategy, cut):
    pieces, expected = read(text, strategy, cut)
    assert "".join(pieces) == expected


def test_reader_heading_of_an_untaught_model_does_not_hold_the_rest_back():
    pieces, _ = read("## Athens is old and large", "rag")
    assert "".join(pieces[:-1]) == "## Athens is old and large"


def test_reader_unverified_quote_is_never_shown_as_a_source():
    pieces, _ = read("##begin_quote##Lisbon is the capital.##end_quote##<ANSWER>: Lisbon", "raft")
    assert "".join(pieces) == "Lisbon (quote not found in the documents)"


def test_reader_abstention_names_no_source():
    text = f"##begin_quote##Athens is the capital.##end_quote##<ANSWER>: {FORMAT.texts.abstention}"
    pieces, _ = read(text, "raft")
    assert "".join(pieces) == FORMAT.texts.abstention
