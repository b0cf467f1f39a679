import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.records import Golden, Question
from tests.training.tiny import chunk, hits_of, prompt_format
from training.config import SamplesConfig
from training.format import find_quote
from training.passage_match import mentions
from training.raft_rows import RowMaker
from training.records import RaftSample


def maker(texts: dict[str, list[str]], held_out: frozenset[str] = frozenset(), seed: int = 1, **config) -> RowMaker:
    """A maker over documents given as lists of chunk texts, one character apart."""
    chunks_of = {}
    for doc_id, parts in texts.items():
        start, chunks = 0, []
        for part in parts:
            chunks.append(chunk(part, doc_id, start))
            start += len(part) + 1
        chunks_of[doc_id] = chunks
    trainable = sorted(set(chunks_of) - held_out)
    return RowMaker(SamplesConfig(**config), prompt_format(), seed, chunks_of, held_out, trainable)


def ask(answer: str, *golden: Golden, name: str = "q", **metadata: str) -> Question:
    return Question(name, f"{name}?", (answer,), golden, "train", metadata)


# Documents whose chunks hold numbered facts: `fact 3 is v7` appears in several of them.
CORPORA = st.lists(
    st.lists(
        st.lists(st.integers(0, 9), min_size=1, max_size=4).map(
            lambda values: " ".join(f"The value is v{value}." for value in values)
        ),
        min_size=1,
        max_size=4,
    ),
    min_size=2,
    max_size=6,
)


@given(
    corpus=CORPORA,
    source=st.sampled_from(["mined", "random", "mixed"]),
    policy=st.sampled_from(["memorise", "abstain", "drop"]),
    golden_fraction=st.sampled_from([0.0, 0.5, 1.0]),
    distractors=st.integers(0, 4),
    whole=st.booleans(),
    data=st.data(),
)
def test_raft_any_row_keeps_its_promises(corpus, source, policy, golden_fraction, distractors, whole, data):
    texts = {f"d{i}": parts for i, parts in enumerate(corpus)}
    held_out = frozenset({f"d{len(corpus) - 1}"})
    made = maker(
        texts,
        held_out,
        distractor_source=source,
        without_golden=policy,
        golden_fraction=golden_fraction,
        distractors=distractors,
    )
    everything = [found for chunks in made.chunks_of.values() for found in chunks]
    golden = data.draw(st.sampled_from([found for found in everything if found.doc_id not in held_out]))
    answer = data.draw(st.sampled_from(golden.text.replace(".", "").split()[3::4]))
    place = Golden(golden.doc_id) if whole else Golden(golden.doc_id, golden.start, golden.end)
    hits = hits_of(data.draw(st.permutations(everything)))
    question = ask(answer, place)

    row = made.raft(question, hits)

    assert row == made.raft(question, hits)
    if isinstance(row, str):
        assert golden_fraction < 1
        assert policy == "drop" or row == "no passage to show"
        return
    assert len(row.passages) == len(row.golden) <= distractors + 1
    assert sum(row.golden) == row.golden_present
    shown = {(p.doc_id, p.start) for p in row.passages}
    assert len({p.text for p in row.passages}) == len(row.passages)
    assert not {doc_id for doc_id, _ in shown} & held_out
    for found, is_golden in zip(row.passages, row.golden, strict=True):
        assert is_golden == (place.matches(found) and mentions(answer, found.text))
        if not is_golden:
            assert answer not in found.text
            assert found.doc_id != golden.doc_id or not whole
    assert all(any(quote in p.text for p in row.passages) for quote in row.quotes)
    assert bool(row.quotes) == row.golden_present
    expected = prompt_format().texts.abstention if policy == "abstain" and not row.golden_present else answer
    parsed = prompt_format().parse(row.target, row.passages)
    assert (row.answer, parsed.answer) == (expected, expected)
    assert all(citation.verified for citation in parsed.citations)
    if golden_fraction in (0.0, 1.0):
        assert row.golden_present == bool(golden_fraction)


FACTS = {f"d{i}": [f"The height of d{i} is {i},{i:03} m.", f"Other text about d{i}."] for i in range(300)}


def rows_of(made: RowMaker) -> list[RaftSample | str]:
    everything = [found for chunks in made.chunks_of.values() for found in chunks]
    return [
        made.raft(ask(f"{i},{i:03} m", Golden(f"d{i}", 0, 20), name=f"q{i}"), hits_of(everything[:24]))
        for i in range(300)
    ]


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_raft_golden_fraction_is_the_share_of_rows(fraction):
    rows = rows_of(maker(FACTS, golden_fraction=fraction))
    assert sum(row.golden_present for row in rows) / len(rows) == pytest.approx(fraction, abs=0.08)
    # A row without its golden passage shows one distractor more: the number of passages betrays nothing.
    assert {len(row.passages) for row in rows} == {3}


def test_raft_golden_passage_stands_in_every_place():
    places = Counter(row.golden.index(True) for row in rows_of(maker(FACTS, golden_fraction=1)))
    assert sorted(places) == [0, 1, 2]
    assert min(places.values()) > 60


def test_raft_without_golden_follows_the_policy():
    memorised = rows_of(maker(FACTS, golden_fraction=0, without_golden="memorise"))
    assert all(row.target == f"<ANSWER>: {row.answer}" and not row.quotes for row in memorised)
    assert memorised[7].answer == "7,007 m"
    abstained = rows_of(maker(FACTS, golden_fraction=0, without_golden="abstain"))
    assert {row.target for row in abstained} == {"<ANSWER>: The documents do not say."}
    dropped = rows_of(maker(FACTS, golden_fraction=0.5, without_golden="drop"))
    assert 100 < sum(row == "dropped without its golden passage" for row in dropped) < 200
    assert all(row.golden_present for row in dropped if isinstance(row, RaftSample))


def test_raft_mined_takes_the_best_hits_and_random_does_not():
    far = [chunk(f"far {i}", f"far{i}") for i in range(40)]
    near = [chunk(f"near {i}", f"near{i}") for i in range(4)]
    golden = chunk("The answer is blue.", "gold")
    made = maker({}, golden_fraction=1, distractors=4)
    chunks_of = {found.doc_id: [found] for found in (*far, *near, golden)}
    question, hits = ask("blue", Golden("gold", 0, 19)), hits_of([*near, golden])

    def titles(source: str) -> set[str]:
        config = SamplesConfig(golden_fraction=1, distractors=4, distractor_source=source)
        row = dataclasses.replace(made, config=config, chunks_of=chunks_of, trainable=sorted(chunks_of)).raft(
            question, hits
        )
        return {p.doc_id for p in row.passages if p.doc_id != "gold"}

    assert titles("mined") == {"near0", "near1", "near2", "near3"}
    mixed = titles("mixed")
    assert {"near0", "near1"} <= mixed
    assert sum(name.startswith("far") for name in mixed) >= 1
    assert sum(name.startswith("far") for name in titles("random")) >= 3


def test_raft_same_row_whatever_the_other_questions():
    rows = rows_of(maker(FACTS))
    assert rows_of(maker(FACTS))[200] == rows[200]
    assert (
        maker(FACTS).raft(
            ask("200,200 m", Golden("d200", 0, 20), name="q200"),
            hits_of([found for chunks in maker(FACTS).chunks_of.values() for found in chunks][:24]),
        )
        == rows[200]
    )
    assert rows_of(maker(FACTS, seed=2)) != rows


def test_raft_whole_document_golden_takes_the_chunk_that_holds_the_answer():
    made = maker({"a": ["It is old.", "It is blue.", "Also blue and long."], "b": ["Other."]}, golden_fraction=1)
    hits = hits_of([made.chunks_of["b"][0], made.chunks_of["a"][2], made.chunks_of["a"][0]])
    row = made.raft(ask("blue", Golden("a")), hits)
    assert [p.text for p, golden in zip(row.passages, row.golden, strict=True) if golden] == ["Also blue and long."]
    assert {p.doc_id for p, golden in zip(row.passages, row.golden, strict=True) if not golden} == {"b"}


def test_raft_answer_that_stands_nowhere_takes_the_best_ranked_golden_chunk():
    made = maker({"a": ["It is old.", "It is large."], "b": ["Other."]}, golden_fraction=1)
    row = made.raft(ask("yes", Golden("a")), hits_of([made.chunks_of["a"][1], made.chunks_of["a"][0]]))
    assert "It is large." in [p.text for p, golden in zip(row.passages, row.golden, strict=True) if golden]
    assert row.quotes == ()
    assert row.target == "<ANSWER>: yes"


def test_raft_missing_or_held_out_golden_gives_a_reason():
    made = maker({"a": ["It is blue."], "b": ["It is red."]}, frozenset({"b"}))
    for place in (Golden("nowhere"), Golden("a", 5000, 5010)):
        assert made.raft(ask("blue", place), []) == "golden passage not in the index"
    assert made.raft(ask("red", Golden("b")), []) == "golden passage held out"
    assert made.raft(ask("blue"), []) == "no golden place"
    assert isinstance(made.dsf(ask("blue")), RaftSample)
    assert made.raft(Question("q", "q?", (), (Golden("a"),)), []) == "no answer"
    assert made.raft(ask("x" * 121, Golden("a")), []) == "answer too long"


def test_raft_no_golden_and_no_distractor_gives_a_reason():
    made = maker({"a": ["It is blue."]}, golden_fraction=0, distractors=2)
    assert made.raft(ask("blue", Golden("a")), []) == "no passage to show"


def test_raft_reasoning_is_kept_only_with_its_golden_passage():
    texts = {"a": ["It is blue."], "b": ["Other."]}
    question = ask("blue", Golden("a"), reasoning="The sky is meant.")
    reasoned = dataclasses.replace(maker(texts, golden_fraction=1), prompt_format=prompt_format(reasoning=True))
    assert reasoned.raft(question, []).target.startswith("The sky is meant.\n##begin_quote##It is blue.")
    without = dataclasses.replace(reasoned, config=SamplesConfig(golden_fraction=0))
    assert without.raft(question, []).target == "<ANSWER>: blue"


def test_quote_is_the_shortest_sentence_inside_the_golden_span():
    text = "It was blue in 1990. Now it is blue. Blue is a long story of many words. It is not red."
    made = maker({"a": [text]})
    found = made.chunks_of["a"][0]
    assert made.quote(ask("blue", Golden("a")), found) == "Now it is blue."
    start = text.index("Blue is")
    assert made.quote(ask("blue", Golden("a", start, start + 40)), found) == "Blue is a long story of many words."
    assert made.quote(ask("green", Golden("a")), found) == ""


def test_quote_lines_and_chinese_sentences_are_sentences():
    made = maker({"a": ["total: 83,871 sq km\nland: 82,445 sq km"], "b": ["首都是维也纳。人口约九百万。面积不大。"]})
    assert made.quote(ask("82,445 sq km", Golden("a")), made.chunks_of["a"][0]) == "land: 82,445 sq km"
    assert made.quote(ask("九百万", Golden("b")), made.chunks_of["b"][0]) == "人口约九百万。"


def test_quote_number_is_not_taken_from_a_longer_number():
    made = maker({"a": ["The area is 83,871 sq km. The rate is 15.5%. It has 83 towns. In truth it is 5.5% here."]})
    found = made.chunks_of["a"][0]
    assert made.quote(ask("83", Golden("a")), found) == "It has 83 towns."
    assert made.quote(ask("5.5%", Golden("a")), found) == "In truth it is 5.5% here."


def test_quote_answer_with_a_full_stop_in_it_is_quoted_with_its_line():
    made = maker({"a": ["Other line.\nIt was moved to St. Petersburg in 1712. It is large."]})
    quote = made.quote(ask("St. Petersburg", Golden("a")), made.chunks_of["a"][0])
    assert quote == "It was moved to St. Petersburg in 1712. It is large."
    assert find_quote(quote, made.chunks_of["a"][0].text)


def test_dsf_shows_no_passages_and_quotes_nothing():
    row = maker({}).dsf(ask("blue", Golden("a")))
    assert (row.objective, row.passages, row.quotes, row.golden_present) == ("dsf", (), (), False)
    assert row.target == "<ANSWER>: blue"
    assert maker({}).dsf(Question("q", "q?")) == "no answer"
    assert maker({}, max_answer_chars=3).dsf(ask("blue")) == "answer too long"


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
