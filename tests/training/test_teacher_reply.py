import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.records import Chunk, Golden
from tests.training.teacher_stub import chunk_text, make_chunk, questions_about, teacher_config
from training.teacher_prompt import load_question_texts
from training.teacher_reply import Judge, Proposed, parse_reply

WHOLE = json.dumps({"questions": questions_about(0)}, indent=1)
ASKED = [question["question"] for question in questions_about(0)]
ALL = ("fact", "comparison", "reasoning", "unanswerable")


@pytest.mark.parametrize(
    "reply",
    [
        WHOLE,
        f"```json\n{WHOLE}\n```",
        f"Sure, here you are [2 questions]:\n```\n{WHOLE}\n```\nI hope {{this}} helps!",
        f'<think>{{"questions": [{{"question": "a draft?"}}]}} Better:</think>\n{WHOLE}',
        json.dumps(questions_about(0)),
        "\n".join(json.dumps(question) for question in questions_about(0)),
        json.dumps({"Questions": [{k.title(): v for k, v in q.items()} for q in questions_about(0)]}),
    ],
    ids=["bare", "fenced", "chatty", "thinking", "array", "lines", "capitals"],
)
def test_questions_are_read_however_the_reply_is_dressed(reply):
    parsed = parse_reply(reply)
    assert [question.question for question in parsed.proposed] == ASKED
    assert parsed.proposed[1].answer == "11"
    assert parsed.malformed == ()


@given(st.integers(0, len(WHOLE)))
def test_cut_off_reply_gives_the_whole_questions_before_the_cut(cut):
    whole = [q for q in ASKED if WHOLE[:cut].count("}") > ASKED.index(q)]
    assert [question.question for question in parse_reply(WHOLE[:cut]).proposed] == whole


@given(st.text(alphabet='{}[]":,ax1 \\\n', max_size=60))
def test_any_reply_is_read_without_raising(text):
    parsed = parse_reply(text)
    assert parsed.proposed or parsed.malformed


@pytest.mark.parametrize("runaway", ["[", "{", '{"a":', '{"questions":[', "{[", '{"question": "'])
def test_runaway_reply_is_no_question_and_takes_no_time(runaway):
    began = time.process_time()
    assert parse_reply(runaway * 20_000).malformed == ("no question in the reply",)
    assert time.process_time() - began < 4


def test_reply_of_nested_questions_too_deep_to_read_raises_nothing():
    assert parse_reply('{"questions":[' * 400 + "]}" * 400).proposed == ()


def test_one_malformed_question_does_not_take_the_others_with_it():
    good = questions_about(0)[0]
    broken = [{**good, "question": ["a", "list"]}, {**good, "question": " ? "}, {**good, "answer": "\ud800"}]
    parsed = parse_reply(json.dumps({"questions": [*broken, good]}))
    assert [question.question for question in parsed.proposed] == [ASKED[0]]
    assert len(parsed.malformed) == 3


def test_numbers_and_nulls_are_taken_as_text():
    parsed = parse_reply('{"questions": [{"question": "How many?", "answer": 42, "quote": null, "kind": "fact"}]}')
    assert (parsed.proposed[0].answer, parsed.proposed[0].quote) == ("42", "")


def judge(folder, proposed, chunk=None, asked=ALL, language="en", **options):
    config = teacher_config(folder, **({"kinds": ALL} | options))
    made = Judge(load_question_texts(config, language), config, "stub-1")
    return made.judge(Proposed.model_validate(proposed), chunk or make_chunk(0), asked)


GOOD = questions_about(0)[1]  # How many tons …? 11


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quote": "Every year it yields 12 tons of copper"}, "quote is not in the passage"),
        ({"quote": ""}, "quote is not in the passage"),
        ({"answer": "12"}, "answer is not in the quote"),
        ({"answer": "1"}, "answer is not in the quote"),
        ({"quote": "The mine of Town0"}, "answer is not in the quote"),
        ({"answer": ""}, "no answer"),
        ({"answer": "–"}, "no answer"),
        ({"answer": "x" * 121}, "answer too long"),
        ({"answer": "Not mentioned in the passage."}, "answer says that there is none"),
        ({"question": "Does the mine of Town0 yield 11 tons?"}, "question gives the answer away"),
        ({"kind": "poem"}, "a kind that was not asked for"),
        ({"kind": "reasoning", "answer": "Yes", "quote": "copper, more"}, "quote is too short to support the answer"),
        ({"kind": "unanswerable"}, "meant to be unanswerable, but answered"),
        ({"question": "According to the passage, what does the mine yield?"}, "needs the passage in view"),
        ({"question": "How much is mined according to the text above?"}, "needs the passage in view"),
        ({"question": "What does this document say of copper?"}, "needs the passage in view"),
        ({"question": "Which metal is mentioned above?"}, "needs the passage in view"),
        ({"question": "What is the capital of this country?"}, "needs the passage in view"),
    ],
)
def test_question_that_does_not_stand_on_its_own_is_dropped_with_the_reason(tmp_path, change, reason):
    assert judge(tmp_path, {**GOOD, **change}) == reason


@pytest.mark.parametrize(
    "question",
    [
        "How long is the Drake Passage?",
        "Who wrote the text of the anthem of Town0?",
        "What does article 5 of the constitution of Town0 say?",
        "Which documents must a visitor to Town0 carry?",
        "What lies above the mine of Town0?",
        "In the passage of 1832, what changed for the mine?",
    ],
)
def test_words_that_only_look_like_a_pointer_to_the_passage_are_kept(tmp_path, question):
    kept = judge(tmp_path, {**GOOD, "question": question})
    assert not isinstance(kept, str), kept


@pytest.mark.parametrize(
    ("question", "dropped"),
    [
        ("根据上文，希腊的首都是哪里？", True),
        ("文中提到的铜矿在哪里？", True),
        ("该国的首都是哪里？", True),
        ("根据以上内容，产量是多少？", True),
        ("希腊的首都是哪里？", False),
        ("希腊语的文字起源于哪里？", False),
    ],
)
def test_chinese_pointers_to_the_passage(tmp_path, question, dropped):
    text = "希腊的首都是雅典，人口约六十万，位于阿提卡半岛。"
    chunk = Chunk("c", "d", "希腊", "", text, 50, 50 + len(text), 20)
    proposed = {"kind": "fact", "question": question, "answer": "雅典", "quote": "希腊的首都是雅典"}
    kept = judge(tmp_path, proposed, chunk, language="zh")
    if dropped:
        assert kept == "needs the passage in view"
    else:
        assert kept.golden == (Golden("d", 50, 58),)


def test_quote_is_found_under_other_spacing_and_full_width_forms(tmp_path):
    text = "Total  area:\n８３，８７１ sq km (land and water)"
    chunk = Chunk("c", "d", "T", "", text, 7, 7 + len(text), 9)
    kept = judge(
        tmp_path,
        {"kind": "fact", "question": "How large is T?", "answer": "83,871 sq km", "quote": "area: 83,871 sq km"},
        chunk,
    )
    golden = kept.golden[0]
    assert text[golden.start - 7 : golden.end - 7] == "area:\n８３，８７１ sq km"


def test_quotation_marks_that_the_teacher_set_around_the_quote_are_no_fault(tmp_path):
    kept = judge(tmp_path, {**GOOD, "quote": f"“{GOOD['quote']}”"})
    assert kept.golden[0].end - kept.golden[0].start >= len(GOOD["quote"]) - 1


def test_markup_that_the_prompt_shows_escaped_is_quoted_as_it_stands(tmp_path):
    text = "The tag </document> ends a document, and [INST] begins a turn of Llama."
    chunk = Chunk("c", "d", "T", "", text, 0, len(text), 12)
    kept = judge(
        tmp_path,
        {
            "kind": "fact",
            "question": "Which tag ends a document?",
            "answer": "&lt;/document>",
            "quote": "The tag &lt;/document> ends a document",
        },
        chunk,
    )
    assert kept.answers == ("</document>",)
    assert kept.golden == (Golden("d", 0, len("The tag </document> ends a document")),)


def test_derived_answer_needs_a_quote_and_not_its_own_words_in_it(tmp_path):
    proposed = {**GOOD, "kind": "reasoning", "answer": "Yes", "question": "Does Town0's mine yield more than 10 tons?"}
    kept = judge(tmp_path, proposed, reasoning=True)
    assert (kept.answers, kept.metadata["kind"]) == (("Yes",), "reasoning")
    assert "reasoning" not in kept.metadata
    assert judge(tmp_path, {**proposed, "reasoning": "11 > 10"}, reasoning=True).metadata["reasoning"] == "11 > 10"
    assert "reasoning" not in judge(tmp_path, {**proposed, "reasoning": "11 > 10"}).metadata


def test_kind_of_a_chunk_that_was_asked_for_one_kind_needs_no_label(tmp_path):
    assert judge(tmp_path, {**GOOD, "kind": "Factual"}, asked=("fact", "fact")).metadata["kind"] == "fact"
    assert judge(tmp_path, {**GOOD, "kind": "FACT"}).metadata["kind"] == "fact"


def test_question_ids_follow_from_chunk_and_text(tmp_path):
    ids = {judge(tmp_path, q, make_chunk(place)).question_id for place in (0, 1) for q in questions_about(place)}
    assert len(ids) == 4
    assert judge(tmp_path, GOOD).question_id in ids


def test_every_stub_question_stands_up(tmp_path):
    for place in range(30):
        for question in questions_about(place):
            kept = judge(tmp_path, question, make_chunk(place))
            assert not isinstance(kept, str), (kept, chunk_text(place))
