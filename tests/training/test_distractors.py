import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.records import Chunk, Golden, Passage, Question
from tests.training.tiny import chunk, hits_of
from training.config import SamplesConfig
from training.distractors import AnswerTells, DistractorPool

ASKED = Question("q", "q?", ("blue",), (Golden("gold", 0, 19),), "train")
GOLDEN = chunk("The answer is blue.", "gold")


def pool(chunks: list[Chunk], held_out: frozenset[str] = frozenset(), **config) -> DistractorPool:
    chunks_of: dict[str, list[Chunk]] = {}
    for found in chunks:
        chunks_of.setdefault(found.doc_id, []).append(found)
    return DistractorPool(SamplesConfig(**config), 1, chunks_of, held_out, sorted(set(chunks_of) - held_out))


def choose(
    made: DistractorPool, hits: list[Chunk], count: int, question: Question = ASKED, seed: int = 0
) -> tuple[list[str], dict[str, int]]:
    """Ids of the documents chosen, and how many candidates were refused, by reason."""
    tally: Counter[str] = Counter()
    chosen = made.choose(question, GOLDEN, hits_of(hits), count, random.Random(seed), tally)
    assert all(key.startswith("distractor: ") for key in tally)
    return [passage.doc_id for passage in chosen], {key.removeprefix("distractor: "): n for key, n in tally.items()}


NEAR = [chunk(f"near text number {i}", f"near{i}") for i in range(8)]
FAR = [chunk(f"far text number {i}", f"far{i}") for i in range(60)]


def test_choose_mined_takes_the_best_hits_in_order():
    made = pool([*NEAR, *FAR], distractor_source="mined")
    assert choose(made, NEAR, 3) == (["near0", "near1", "near2"], {})


def test_choose_mined_fills_up_at_random_where_hits_are_few():
    names, _ = choose(pool([*NEAR, *FAR]), NEAR[:2], 5)
    assert names[:2] == ["near0", "near1"]
    assert len(set(names)) == 5


def test_choose_random_ignores_the_hits_until_nothing_else_is_left():
    made = pool(FAR, distractor_source="random")
    names, _ = choose(made, NEAR, 4)
    assert len(names) == 4
    assert all(name.startswith("far") for name in names)
    names, _ = choose(pool([], distractor_source="random"), NEAR, 4)
    assert names == ["near0", "near1", "near2", "near3"]


@pytest.mark.parametrize(("count", "mined"), [(2, {1}), (4, {2}), (3, {1, 2}), (1, {0, 1}), (0, {0})])
def test_choose_mixed_is_half_and_half_and_an_odd_one_goes_to_either(count, mined):
    made = pool([*NEAR, *FAR], distractor_source="mixed")
    # `far` alone may be drawn here: so that every near one was mined.
    made = dataclasses.replace(made, trainable=[name for name in made.trainable if name.startswith("far")])
    seen = Counter()
    for seed in range(200):
        names, _ = choose(made, NEAR, count, seed=seed)
        assert len(names) == count
        seen[sum(name.startswith("near") for name in names)] += 1
    assert set(seen) == mined
    assert min(seen.values()) > 70


def test_choose_same_heading_shows_the_field_of_other_documents():
    def field(doc_id: str, heading: str) -> Chunk:
        start = 100 * ("Area", "Coast", "Climate").index(heading)
        return dataclasses.replace(chunk(f"{heading} of {doc_id}", doc_id, start), heading=heading)

    countries = [f"c{i}" for i in range(20)]
    chunks = [field(name, heading) for name in countries for heading in ("Area", "Coast", "Climate")]
    golden = next(found for found in chunks if (found.doc_id, found.heading) == ("c3", "Area"))
    question = Question("q", "q?", ("none such",), (Golden("c3", golden.start, golden.end),), "train")
    own = [found for found in chunks if found.doc_id == "c3" and found is not golden]
    made = pool(chunks, frozenset({"c5"}), distractor_source="same_heading")
    shown = Counter()
    for seed in range(100):
        chosen = made.choose(question, golden, hits_of(own), 4, random.Random(seed), Counter())
        assert [(p.doc_id, p.heading) for p in chosen[2:]] == [("c3", "Coast"), ("c3", "Climate")]
        assert [p.heading for p in chosen[:2]] == ["Area", "Area"]
        shown.update(p.doc_id for p in chosen[:2])
    assert set(shown) == set(countries) - {"c3", "c5"}
    # Without a heading there is nothing to go by: all are mined.
    chosen = made.choose(
        question, dataclasses.replace(golden, heading=""), hits_of(own), 2, random.Random(1), Counter()
    )
    assert [p.heading for p in chosen] == ["Coast", "Climate"]


def test_choose_counts_every_candidate_refused_by_reason():
    refused = [
        chunk("held text", "held"),
        chunk("n the middle of it", "gold", 3),  # touches the golden place
        chunk("This one is blue too.", "false"),
        chunk("The answer, is: BLUE", "copy"),  # the golden passage's words
        chunk("fine text number one", "fine"),
        chunk("Fine text, number one!", "again"),
    ]
    made = pool([], frozenset({"held"}))
    names, counts = choose(made, [*refused, *NEAR], 3)
    assert names == ["fine", "near0", "near1"]
    assert counts == {
        "held-out document": 1,
        "golden place": 1,
        "holds the answer": 1,
        "near-duplicate of the golden passage": 1,
        "near-duplicate of a passage shown": 1,
    }


def test_choose_fewer_than_wanted_rather_than_repeats():
    made = pool([chunk("Same text.", f"d{i}") for i in range(30)])
    names, counts = choose(made, [], 3)
    assert len(names) == 1
    assert counts["near-duplicate of a passage shown"] >= 20


def test_choose_near_duplicates_by_the_recipes_threshold():
    hits = [chunk("one two three four five", "a"), chunk("one two three four six", "b")]  # 4 of 6 words
    assert choose(pool([], near_duplicate=0.67), hits, 2)[0] == ["a", "b"]
    assert choose(pool([], near_duplicate=0.66), hits, 2)[0] == ["a"]


def test_choose_whole_document_golden_refuses_the_document():
    question = dataclasses.replace(ASKED, golden=(Golden("gold"),))
    elsewhere = chunk("Quite another part.", "gold", 500)
    assert choose(pool([]), [elsewhere, NEAR[0]], 1)[0] == ["gold"]
    assert choose(pool([]), [elsewhere, NEAR[0]], 1, question) == (["near0"], {"golden place": 1})


def test_choose_yes_and_no_refuse_nobody():
    hits = [chunk(f"There is no doubt about number {i}", f"d{i}") for i in range(5)]
    for answer, expected in (("no", 5), ("No.", 5), ("no doubt", 0)):
        question = dataclasses.replace(ASKED, answers=(answer,))
        assert len(choose(pool([]), hits, 5, question)[0]) == expected


def test_answer_tells_unless_the_corpus_is_full_of_it():
    texts = [f"In {1900 + i} there were 2 of them." if i % 4 == 0 else f"Text {i}." for i in range(100)]
    tells = AnswerTells(texts)
    assert not tells("2")
    assert not tells("yes")
    assert tells("1904")
    assert tells("3.5 million")
    # A few passages hold anything: 2 of 4 say nothing about how common an answer is.
    assert AnswerTells(texts[:4])("2")


def test_choose_common_answer_refuses_nobody_in_a_large_corpus():
    chunks = [chunk(f"Number {i} of 2 kinds.", f"d{i}") for i in range(60)]
    question = dataclasses.replace(ASKED, answers=("2",))
    assert choose(pool(chunks), chunks[:3], 3, question) == (["d0", "d1", "d2"], {})
    few = pool(chunks[:5])
    assert choose(few, chunks[:3], 3, question)[0] == []


CHUNKS = [
    chunk(text, f"d{i}") for i, text in enumerate(["a b", "a  b", "c blue", "d e f", "g h", "blue", "i j k", "l"])
]


@given(
    source=st.sampled_from(["mined", "random", "mixed", "same_heading"]),
    count=st.integers(0, 5),
    order=st.permutations(CHUNKS),
    held=st.sets(st.sampled_from([f"d{i}" for i in range(8)]), max_size=3),
    seed=st.integers(0, 99),
)
def test_choose_any_source_shows_only_what_may_be_shown(source, count, order, held, seed):
    made = pool(CHUNKS, frozenset(held), distractor_source=source)
    names, _ = choose(made, order, count, seed=seed)
    may = [name for name in ("d0", "d1", "d3", "d4", "d6", "d7") if name not in held]
    distinct = len(may) - ({"d0", "d1"} <= set(may))
    assert set(names) <= set(may)
    assert len(names) == len(set(names)) == min(count, distinct)
    assert not {"d0", "d1"} <= set(names)


def test_choose_random_source_does_not_depend_on_the_order_of_hits():
    made = pool([*NEAR, *FAR], distractor_source="random")
    assert choose(made, NEAR, 3) == choose(made, NEAR[::-1], 3)


def test_choose_passages_are_the_chunks():
    tally: Counter[str] = Counter()
    chosen = pool(FAR).choose(ASKED, GOLDEN, [], 2, random.Random(3), tally)
    assert all(passage in [Passage.of(found) for found in FAR] for passage in chosen)
