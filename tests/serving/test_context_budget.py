import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.records import Hit, Passage
from serving.answering import prepare
from serving.config import GenerationConfig
from serving.context_budget import ContextLengthError, fitting, room_for_prompt
from serving.strategies import STRATEGIES
from tests.serving.fakes import prompt_format

FORMAT = prompt_format()


class Words:
    """A token is a word or a blank between words: 2n-1 for n words, so that parts do not add up to the whole."""

    def __init__(self, window=1000):
        self.window, self.counted = window, 0

    def count(self, messages):
        self.counted += 1
        return sum(max(0, 2 * len(message["content"].split()) - 1) for message in messages)


def hits(*words):
    """One passage of each number of words."""
    return [
        Hit(Passage(f"c{n}", f"d{n}", f"T{n}", "", "", "w " * size, 0, 2 * size), 1.0, n)
        for n, size in enumerate(words, start=1)
    ]


def prepared(found, tokens, question="Why?", **generation):
    settings = GenerationConfig(**{"passages": 10, "max_new_tokens": 10, **generation})
    return prepare(question, STRATEGIES["rag"], found, FORMAT, (), settings, tokens=tokens)


def shown(made):
    return [hit.passage.chunk_id for hit in made.hits]


def test_prepare_where_all_fits_is_the_same_as_without_a_budget():
    found = hits(5, 5, 5)
    assert prepared(found, Words()) == prepared(found, None)
    assert prepared(found, Words()).passages_left_out == 0


def test_prepare_leaves_out_the_lowest_whole_and_says_how_many():
    tokens = Words(window=130)
    made = prepared(hits(20, 20, 20), tokens)
    assert shown(made) == ["c1"] and made.passages_left_out == 2
    assert made.request.messages[-1]["content"].count("w ") == 20, "shown whole"
    assert tokens.count(made.request.messages) <= 130 - 10


def test_prepare_passes_over_one_that_is_too_long_for_what_still_fits():
    assert shown(prepared(hits(500, 5, 5), Words(window=130))) == ["c2", "c3"]


def test_prepare_question_too_long_is_refused_before_generation():
    with pytest.raises(ContextLengthError, match="without any passage, and there is room for 50"):
        prepared([], Words(window=60), question="why " * 60)


def test_prepare_more_new_tokens_leave_less_room():
    assert len(prepared(hits(20, 20), Words(window=200)).hits) == 2
    assert len(prepared(hits(20, 20), Words(window=200), max_new_tokens=100).hits) == 1
    assert len(prepared(hits(20, 20), Words(window=2000), context_tokens=100).hits) == 1


def test_room_is_the_lower_of_window_and_recipe():
    assert (room_for_prompt(100, 30, None), room_for_prompt(100, 30, 50), room_for_prompt(100, 30, 90)) == (70, 50, 70)


def test_prepare_tokenises_seldom():
    roomy, tight = Words(window=100_000), Words(window=130)
    prepared(hits(*[20] * 10), roomy)
    prepared(hits(*[20] * 10), tight)
    assert roomy.counted == 1, "bytes tell that it fits"
    assert tight.counted <= 13, "bare, whole, each passage, the choice"


@given(st.lists(st.integers(1, 60), max_size=8), st.integers(0, 500))
def test_fitting_any_sizes_fit_and_no_better_passage_is_missed(sizes, room):
    tokens = Words()

    def render(places):
        return [{"role": "user", "content": " ".join(["q", *("w " * sizes[place] for place in places)])}]

    if room < 1:
        with pytest.raises(ContextLengthError):
            fitting(render, len(sizes), tokens, room)
        return
    kept = fitting(render, len(sizes), tokens, room)
    assert tokens.count(render(kept)) <= room and list(kept) == sorted(set(kept))
    for place in set(range(len(sizes))) - set(kept):
        better = [other for other in kept if other < place]
        assert tokens.count(render([*better, place])) > room, "a better one was left out though it fits"


def test_fitting_passages_that_cost_more_together_are_counted_together():
    class Crowded(Words):
        def count(self, messages):
            passages = messages[0]["content"].count("p")
            return passages + passages**2

    def render(places):
        return [{"role": "user", "content": "p with words " * len(places)}]

    assert fitting(render, 4, Crowded(), room=8) == (0, 1), "each costs 2, three together 12"
