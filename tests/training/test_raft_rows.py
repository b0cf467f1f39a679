import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.records import Golden, Question
from tests.training.tiny import chunk, hits_of, prompt_format
from training.config import SamplesConfig
from training.format import BEGIN_QUOTE, END_QUOTE
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
    distractors=st.tuples(st.integers(0, 2), st.integers(2, 4)) | st.integers(0, 4),
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

    tally = Counter()
    row = made.raft(question, hits, tally)

    assert row == made.raft(question, hits)
    if isinstance(row, str):
        assert golden_fraction < 1
        assert policy == "drop" or row == "no passage to show"
        return
    least, most = made.config.distractor_range
    assert len(row.passages) == len(row.golden) <= most + 1
    assert len(row.passages) > least or tally["short of distractors"] == 1
    assert sum(row.golden) == row.golden_present
    shown = {(p.doc_id, p.start) for p in row.passages}
    assert len({p.text for p in row.passages}) == len(row.passages)
    assert not {doc_id for doc_id, _ in shown} & held_out
    for found, is_golden in zip(row.passages, row.golden, strict=True):
        assert is_golden == (place.matches(found) and mentions(answer, found.text))
        if not is_golden:
            # An answer that a tenth of the corpus holds tells nothing (ten passages at least).
            assert answer not in found.text or not made._pool.tells(answer)
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


def test_raft_number_of_distractors_is_drawn_per_row():
    rows = rows_of(maker(FACTS, distractors=(1, 4), golden_fraction=0.5))
    shown = Counter(len(row.passages) for row in rows)
    assert sorted(shown) == [2, 3, 4, 5]
    assert min(shown.values()) > 40
    with_golden = Counter(len(row.passages) for row in rows if row.golden_present)
    assert sorted(with_golden) == [2, 3, 4, 5]


def test_raft_short_of_distractors_is_made_and_counted():
    made = maker({"a": ["It is blue."], "b": ["Other."]}, golden_fraction=1, distractors=(3, 5))
    tally = Counter()
    row = made.raft(ask("blue", Golden("a")), [], tally)
    assert len(row.passages) == 2
    assert tally["short of distractors"] == 1
    assert tally["distractor: golden place"] == 1
    assert maker(FACTS).raft(ask("7,007 m", Golden("d7", 0, 20)), [], tally)
    assert tally["short of distractors"] == 1


def test_raft_unanswerable_question_shows_distractors_and_abstains():
    texts = {f"d{i}": [f"Text number {i}."] for i in range(20)}
    asked = [Question(f"q{i}", "q?", (), (), "train", {"kind": "unanswerable"}) for i in range(20)]
    for policy in ("memorise", "abstain", "drop"):
        made = maker(texts, frozenset({"d0"}), golden_fraction=1, without_golden=policy)
        for question in asked:
            row = made.raft(question, hits_of([made.chunks_of["d0"][0], made.chunks_of["d1"][0]]))
            assert row.target == "<ANSWER>: The documents do not say."
            assert (row.golden, row.golden_present, row.quotes) == ((False,) * 3, False, ())
            assert "d1" in {p.doc_id for p in row.passages}
            assert "d0" not in {p.doc_id for p in row.passages}
            assert made.dsf(question) == "no answer"
    # A question that merely comes without answers is not known to be unanswerable.
    assert made.raft(Question("q", "q?"), []) == "no answer"


def test_raft_given_quote_passes_the_gate_and_is_counted():
    texts = {"a": ["It was blue in 1990, then red. Now it is blue again."], "b": ["Other."]}
    made = maker(texts, golden_fraction=1)
    for given_quote, expected, counted in (
        ("Now it is blue again.", "Now it is blue again.", "kept"),
        ("it was blue in 1990 then red", "It was blue in 1990, then red.", "repaired"),
        ("Blue is its favourite colour of all", "Now it is blue again.", "dropped"),
    ):
        tally = Counter()
        row = made.raft(ask("blue", Golden("a"), quote=given_quote), [], tally)
        assert row.quotes == (expected,)
        assert tally[f"quote: {counted}"] == 1
        assert tally["quote: kept"] + tally["quote: repaired"] == 1


def test_raft_quote_of_a_distractor_is_verbatim_too_but_the_golden_passage_comes_first():
    texts = {"a": ["The colour. It is blue."], "b": ["The colour. It is unknown."]}
    row = maker(texts, golden_fraction=1).raft(ask("blue", Golden("a"), quote="The colour."), [])
    assert row.quotes == ("The colour.",)
    parsed = prompt_format().parse(
        row.target, [p for p, golden in zip(row.passages, row.golden, strict=True) if golden]
    )
    assert [citation.doc_id for citation in parsed.citations] == ["a"]


def test_raft_answer_is_the_accepted_one_that_the_passage_words():
    made = maker({"a": ["It is the Danube."], "b": ["Other."]}, golden_fraction=1)
    question = Question("q", "q?", ("Donau", "Danube"), (Golden("a"),), "train")
    assert made.raft(question, []).target.endswith("<ANSWER>: Danube")
    assert made.dsf(question).answer == "Donau"


def test_raft_yes_or_no_quotes_the_sentence_that_the_reasoning_is_about():
    texts = {"a": ["There is no doubt. The trial found that aspirin prevented strokes."], "b": ["Other."]}
    question = ask("no", Golden("a"), reasoning="Strokes were not prevented.")
    made = maker(texts, golden_fraction=1)
    assert made.raft(question, []).quotes == ("The trial found that aspirin prevented strokes.",)
    tally = Counter()
    row = made.raft(ask("no", Golden("b"), reasoning="Strokes were not prevented."), [], tally)
    assert (row.quotes, tally["quote: none"]) == ((), 1)


def test_raft_quotes_and_reasoning_can_be_switched_off():
    inside = f"It says {BEGIN_QUOTE}It is blue.{END_QUOTE} there."
    question = ask("blue", Golden("a"), reasoning=inside)
    made = maker({"a": ["It is blue."], "b": ["Other."]}, golden_fraction=1)

    def row(**options: bool) -> RaftSample:
        return dataclasses.replace(made, prompt_format=prompt_format(**options)).raft(question, [])

    # What the reasoning quotes need not be quoted a second time.
    assert row(reasoning=True).target == f"{inside}\n<ANSWER>: blue"
    assert row(reasoning=True, quotes=False).target == "It says It is blue. there.\n<ANSWER>: blue"
    assert row(reasoning=True, quotes=False).reasoning == "It says It is blue. there."
    assert row().target == f"{BEGIN_QUOTE}It is blue.{END_QUOTE}\n<ANSWER>: blue"
    assert (row().reasoning, row(quotes=False).quotes) == ("", ())
    assert row(quotes=False).target == "<ANSWER>: blue"


def test_raft_reasoning_with_a_false_quote_is_left_out_and_counted():
    inside = f"It says {BEGIN_QUOTE}It has always been green.{END_QUOTE}"
    made = maker({"a": ["It is blue."], "b": ["Other."]}, golden_fraction=1)
    reasoned = dataclasses.replace(made, prompt_format=prompt_format(reasoning=True))
    tally = Counter()
    row = reasoned.raft(ask("blue", Golden("a"), reasoning=inside), [], tally)
    assert row.target == f"{BEGIN_QUOTE}It is blue.{END_QUOTE}\n<ANSWER>: blue"
    assert (tally["quote: dropped"], tally["reasoning: dropped with its quote"], tally["quote: kept"]) == (1, 1, 1)


def test_raft_memorised_row_has_no_reasoning_and_no_given_quote():
    made = maker({"a": ["It is blue."], "b": ["Other."]}, golden_fraction=0)
    made = dataclasses.replace(made, prompt_format=prompt_format(reasoning=True))
    row = made.raft(ask("blue", Golden("a"), reasoning="So.", quote="It is blue."), [])
    assert (row.target, row.reasoning, row.quotes) == ("<ANSWER>: blue", "", ())


@settings(max_examples=20)
@given(
    source=st.sampled_from(["mined", "random", "mixed", "same_heading"]),
    order=st.permutations(range(16)),
    block=st.integers(1, 16),
    seed=st.integers(0, 3),
)
def test_raft_rows_and_counts_are_the_same_whatever_the_blocks_and_the_order(source, order, block, seed):
    texts = {f"d{i}": [f"The height of d{i} is {i},{i:03} m.", "Other text."] for i in range(16)}
    config = {"distractor_source": source, "distractors": (1, 3), "golden_fraction": 0.6}
    asked = [ask(f"{i},{i:03} m", Golden(f"d{i}", 0, 20), name=f"q{i}") for i in range(16)]
    everything = [found for chunks in maker(texts).chunks_of.values() for found in chunks]

    def rows(numbers: list[int], size: int) -> tuple[dict[int, RaftSample | str], Counter]:
        made, total = {}, Counter()
        for start in range(0, len(numbers), size):  # a worker of its own for each block
            worker, tally = maker(texts, frozenset({"d3"}), seed, **config), Counter()
            made |= {
                n: worker.raft(asked[n], hits_of(everything[n : n + 6]), tally) for n in numbers[start : start + size]
            }
            total += tally
        return made, total

    assert rows(list(order), block) == rows(list(range(16)), 16)


def test_dsf_shows_no_passages_and_quotes_nothing():
    row = maker({}).dsf(ask("blue", Golden("a")))
    assert (row.objective, row.passages, row.quotes, row.golden_present) == ("dsf", (), (), False)
    assert row.target == "<ANSWER>: blue"
    reasoned = dataclasses.replace(maker({}), prompt_format=prompt_format(reasoning=True))
    assert reasoned.dsf(ask("blue", Golden("a"), reasoning="So it is.")).target == "<ANSWER>: blue"
    assert maker({}).dsf(Question("q", "q?")) == "no answer"
    assert maker({}, max_answer_chars=3).dsf(ask("blue")) == "answer too long"
