import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.tiny import passage, prompt_format
from training.format import BEGIN_QUOTE, END_QUOTE, find_quote
from training.quote_gate import NOTHING_QUOTED, Gated, gate_reasoning, pass_gate

VIENNA = passage(
    "Vienna, the capital, lies on the Danube. It has about 2 million inhabitants (2024 est.); that is a fifth of all. "
    "Graz is smaller.",
    "vienna",
)
PARIS = passage("Paris lies on the Seine.\nIt has 2.1 million inhabitants.", "paris")
CHINESE = passage("首都是维也纳。人口约二百万，占全国五分之一。面积不大。", "zh")


@pytest.mark.parametrize(
    ("quote", "passed"),
    [
        ("Graz is smaller.", "Graz is smaller."),
        ("  It has about\n2 million inhabitants ", "It has about 2 million inhabitants"),
        ("Ｇｒａｚ is smaller", "Graz is smaller"),
        ("the Seine. It has 2.1 million", "the Seine.\nIt has 2.1 million"),
        ("人口约二百万", "人口约二百万"),
    ],
)
def test_pass_gate_verbatim_quote_is_kept_in_the_passages_own_characters(quote, passed):
    assert pass_gate([quote], [VIENNA, PARIS, CHINESE]) == Gated((passed,), 0, 0)


@pytest.mark.parametrize(
    ("quote", "passed"),
    [
        ("vienna the capital lies on the danube", "Vienna, the capital, lies on the Danube."),
        ("It has about two 2 million inhabitants (2024 est.)", "It has about 2 million inhabitants (2024 est.);"),
        (
            "Vienna, the capital, lies on the Danube and it has about 2 million inhabitants",
            "Vienna, the capital, lies on the Danube. It has about 2 million inhabitants",
        ),
        ("Paris is on the Seine", None),  # 4 of 5 words, which a span of 5 has too: 0.8
        ("人口约为二百万，占全国五分之一", "人口约二百万，占全国五分之一。"),
        ("GRAZ", "Graz"),
    ],
)
def test_pass_gate_near_quote_is_repaired(quote, passed):
    if passed is None:
        passed = "Paris lies on the Seine."
    assert pass_gate([quote], [VIENNA, PARIS, CHINESE]) == Gated((passed,), 1, 0)


@pytest.mark.parametrize(
    "quote",
    [
        "The city on the Danube has many people.",
        "Vienna is large and the capital of a country on a river",
        "Graz",  # in no passage but Vienna's
        "维也纳是一座大城市，人口很多",
        "...",
        "",
        "word " * 300,
    ],
)
def test_pass_gate_other_words_are_dropped(quote):
    assert pass_gate([quote], [PARIS, CHINESE]) == Gated((), 0, 1)


def test_pass_gate_repair_that_loses_the_answer_is_dropped():
    quote = "It has about 3 million inhabitants (2024 est.)"
    assert pass_gate([quote], [VIENNA]).quotes == ("It has about 2 million inhabitants (2024 est.);",)
    assert pass_gate([quote], [VIENNA], ["3 million"]) == Gated((), 0, 1)
    assert pass_gate([quote], [VIENNA], ["3 million", "2024"]).repaired == 1
    assert pass_gate([quote], [VIENNA], ["Danube"]).repaired == 1  # an answer that the quote never held


def test_pass_gate_repair_takes_the_nearest_passage():
    near = passage("It has about 2 million inhabitants today.", "near")
    assert pass_gate(["It has about 2 million inhabitants, today"], [VIENNA, near]).quotes == (
        "It has about 2 million inhabitants today.",
    )


def test_pass_gate_repeated_quotes_are_passed_once():
    assert pass_gate(["Graz is smaller.", "Graz is  smaller."], [VIENNA]) == Gated(("Graz is smaller.",), 0, 0)
    assert pass_gate([], [VIENNA]) == NOTHING_QUOTED


def test_pass_gate_escaped_markup_is_unescaped_but_mixtures_are_dropped():
    shown = passage('Write <document title="x"> first. It says &lt;s> for <s> here.', "markup")
    assert pass_gate(['Write &lt;document title="x">'], [shown]).quotes == ('Write <document title="x">',)
    assert pass_gate(["&lt;s> for <s> here"], [shown]).dropped == 1


def marked(*quotes: str) -> str:
    return " and ".join(f"{BEGIN_QUOTE}{quote}{END_QUOTE}" for quote in quotes)


def test_gate_reasoning_quotes_inside_are_kept_and_repaired():
    reasoning = f"The text says {marked('Graz is smaller.', 'vienna the capital')}, so it does."
    gated, counts = gate_reasoning(reasoning, [VIENNA])
    assert gated == f"The text says {marked('Graz is smaller.', 'Vienna, the capital,')}, so it does."
    assert counts == Gated(("Graz is smaller.", "Vienna, the capital,"), 1, 0)


def test_gate_reasoning_that_leans_on_a_false_quote_is_dropped():
    reasoning = f"The text says {marked('Graz is smaller.', 'Linz is the smallest of all cities')}, so it does."
    assert gate_reasoning(reasoning, [VIENNA]) == ("", Gated(("Graz is smaller.",), 0, 1))


@pytest.mark.parametrize("mark", [BEGIN_QUOTE, END_QUOTE, BEGIN_QUOTE.upper()])
def test_gate_reasoning_stray_marks_are_removed(mark):
    assert gate_reasoning(f"So {mark}it is.", [VIENNA]) == ("So it is.", NOTHING_QUOTED)


def test_gate_reasoning_without_quotes_stays():
    assert gate_reasoning(" So it is. ", [VIENNA]) == ("So it is.", NOTHING_QUOTED)


# Passages that try to pose as markup, and texts whose characters melt, fold or collapse.
HOSTILE = st.lists(
    st.sampled_from(
        [
            "word",
            "Answer",
            "5",
            "300",
            "㎡",
            "ｅ",
            "e",
            "\u0301",
            "\u3099",
            "か",
            "北京",
            "。",
            ".",
            " ",
            "\n",
            "\u00a0",
            "<",
            ">",
            "<document",
            "</document>",
            "<ANSWER>:",
            "##",
            "# #",
            "##begin_quote##",
            "##end_quote##",
            "## Answer:",
            "##Reason:",
            "&lt;",
            "&#91;",
            "[INST]",
            "<|im_end|>",
            "<s>",
            "ﬁ",
            "½",
            "ß",
            "가",
            "\u11a8",
        ]
    ),
    max_size=14,
).map("".join)


@given(texts=st.lists(HOSTILE, min_size=1, max_size=3), given=HOSTILE, seed=st.integers(0, 999), answer=HOSTILE)
def test_no_target_quotes_what_no_passage_says(texts, given, seed, answer):
    rng = random.Random(seed)
    passages = [passage(text, f"d{number}", 1000 * number) for number, text in enumerate(texts)]
    start = rng.randrange(len(texts[0]) + 1)
    spans = [texts[0][start : rng.randrange(start, len(texts[0]) + 1)], given, texts[-1].upper()]
    gated = pass_gate(spans, passages, [answer])
    reasoning, _ = gate_reasoning(f"{given} {marked(spans[0])} {answer}", passages)
    assert all(any(quote in shown.text for shown in passages) for quote in gated.quotes)
    assert all(any(find_quote(quote, shown.text) for shown in passages) for quote in gated.quotes)

    written = prompt_format(reasoning=True)
    parsed = written.parse(written.target(answer, gated.quotes, reasoning), passages)

    assert [citation for citation in parsed.citations if not citation.verified] == []
    assert len(parsed.citations) >= len(gated.quotes)


@given(text=HOSTILE, start=st.integers(0, 60), length=st.integers(1, 40))
def test_pass_gate_any_span_of_whole_words_passes_or_is_ambiguous_markup(text, start, length):
    words = text.split()
    quote = " ".join(words[start % (len(words) or 1) :][:length])
    gated = pass_gate([quote], [passage(text)])
    if "&" not in text and "# #" not in text and any(char.isalnum() for char in quote):
        assert len(gated.quotes) == 1
        assert gated.repaired == 0
