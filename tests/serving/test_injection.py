"""Hostile passages, rendered; the figures with a real tokenizer and a model are benchmarks/injection.py's."""

import re
import time
from collections import Counter

import pytest

from benchmarks.injection import (
    CONTROL_TOKENS,
    MARKER,
    QUESTIONS,
    load_cases,
    looks_like,
    our_messages,
    plain_messages,
    structure,
)
from retrieval.records import Passage
from training.config import PromptConfig
from training.format import PromptFormat, escape, unescape

CASES = load_cases()


class Tokenizer:
    """ChatML; takes the control tokens of every family for its own, wherever they stand."""

    def __init__(self):
        tokens = dict.fromkeys(token for family in CONTROL_TOKENS.values() for token in family)
        self.added_tokens_decoder = dict(enumerate(tokens))
        self._ids = {token: number for number, token in self.added_tokens_decoder.items()}
        self._pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        return "".join([*turns, "<|im_start|>assistant\n"])

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [self._ids[found] for found in self._pattern.findall(text)]}


def test_the_corpus_is_as_large_and_as_mixed_as_it_is_said_to_be():
    assert len(CASES) >= 40 and len({case.id for case in CASES}) == len(CASES)
    assert Counter(case.language for case in CASES)["zh"] >= 5
    assert all(
        MARKER in "".join([c.passage.title, c.passage.text, c.passage.heading, c.passage.uri]) or c.kind == "look-alike"
        for c in CASES
    )


def test_no_hostile_passage_changes_the_structure_of_our_prompt():
    tallies = structure(CASES, Tokenizer())
    assert tallies["ours"].ids == []
    assert len(tallies["plain"].ids) >= 35, "the corpus attacks: plain concatenation lets most of it through"


def test_no_look_alike_passes_for_our_marks():
    tallies = structure(CASES, Tokenizer(), lenient=True)
    assert tallies["ours"].ids == []
    assert len(tallies["plain"].ids) >= 15


@pytest.mark.parametrize("token", [token for family in CONTROL_TOKENS.values() for token in family])
def test_a_control_token_is_escaped_and_comes_back(token):
    assert token not in escape(f"a{token}b")
    assert unescape(escape(f"a{token}b")) == f"a{token}b"


@pytest.mark.parametrize(
    "text", ["<b>bold</b>", "vector<int> x", "a < b", "[WHO] said [1](x)", "## Heading", "List<String>"]
)
def test_ordinary_text_stays_as_it_is(text):
    assert escape(text) == text


@pytest.mark.parametrize(
    "unit", ["<", "< ", "<_", "<a_", "<\u200b", "[A_", "# # ", "## ", "_", " ", "\u200b", "<|", "A_"]
)
def test_escaping_a_hostile_text_takes_a_time_that_grows_with_its_length(unit):
    text = "<" + unit * (200_000 // len(unit))
    began = time.process_time()
    unescape(escape(text))
    assert time.process_time() - began < 2  # 0.02 to 0.1 s; squared, it is minutes


def test_plain_and_ours_differ_in_the_escaping_alone():
    prompt = PromptFormat.load(PromptConfig(), "en")
    harmless = [Passage("c", "d", "Title", "Heading", "", "Some text.", 0, 10)]
    assert plain_messages(prompt, QUESTIONS["en"], harmless) == our_messages(prompt, QUESTIONS["en"], harmless)
    assert looks_like(our_messages(prompt, QUESTIONS["en"], harmless))["<document"] == 1
