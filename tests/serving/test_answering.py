import dataclasses

import pytest

from cluster.errors import UserError
from retrieval.records import Hit
from serving.answering import combine, finish, prepare, readable, verified
from serving.config import GenerationConfig
from serving.engine import Completion
from serving.records import Answer, Route, Timings
from serving.strategies import STRATEGIES, available_strategies, require_strategy
from tests.serving.fakes import CITED, GREECE, SPAIN, prompt_format
from training.format import WorkedExample

FORMAT = prompt_format()
LABELS = FORMAT.texts.labels
HITS = [Hit(GREECE, 0.9, 1), Hit(SPAIN, 0.5, 2)]
EXAMPLES = tuple(WorkedExample(f"example {i}", (SPAIN,), "<ANSWER>: Madrid") for i in range(3))


def request(strategy, **generation):
    return prepare(
        "Capital of Greece?", STRATEGIES[strategy], HITS, FORMAT, EXAMPLES, GenerationConfig(**generation)
    ).request


def answer(text, strategy="raft", **completion):
    return finish(Completion("id", text, **completion), STRATEGIES[strategy], HITS, FORMAT)


@pytest.mark.parametrize("name", STRATEGIES)
def test_prepare_each_strategy_shows_what_its_row_says(name):
    strategy, prepared = STRATEGIES[name], request(name)
    prompt = "\n".join(message["content"] for message in prepared.messages)
    assert prepared.adapter == strategy.adapter
    assert ("capital: Athens" in prompt) == strategy.retrieves
    assert ("example 1" in prompt) == strategy.few_shot
    assert "example 2" not in prompt, "generation.examples is 2"
    assert prepared.messages[-1]["role"] == "user" and "Capital of Greece?" in prepared.messages[-1]["content"]


def test_prepare_shows_no_more_passages_than_the_recipe_says():
    prompt = request("rag", passages=1).messages[-1]["content"]
    assert "Athens" in prompt and "Madrid" not in prompt


def test_finish_quote_is_verified_with_offsets_of_the_document():
    made = answer(CITED, prompt_tokens=5, completion_tokens=3, queue_ms=1.0, generation_ms=2.0)
    assert made.answer == "Athens" and not made.abstained
    assert [(c.doc_id, c.start, c.end, c.verified) for c in made.citations] == [("greece", 109, 131, True)]
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 3)
    assert made.timings_ms.total == 3.0


def test_finish_quote_of_a_passage_not_shown_is_not_verified():
    text = "##begin_quote##Lisbon##end_quote## <ANSWER>: Lisbon"
    assert not verified(answer(text))
    assert not verified(finish(Completion("id", CITED), STRATEGIES["raft"], [Hit(SPAIN, 1.0, 1)], FORMAT))


def test_finish_stray_markers_are_not_part_of_the_answer():
    assert answer("<ANSWER>: Athens ##end_quote## ##begin_quote##").answer == "Athens"


def test_finish_error_abstains_and_says_so():
    made = answer("", finish_reason="error", error="too long")
    assert made.abstained and made.error == "too long" and made.finish_reason == "error"


def test_finish_cut_short_is_not_hidden():
    assert answer("##begin_quote##Ath", finish_reason="length").finish_reason == "length"


def test_readable_lists_verified_quotes_once_and_never_the_markers():
    made = answer("##begin_quote##Athens is the capital.##end_quote##" * 2 + "<ANSWER>: Athens")
    assert readable(made, LABELS) == "Athens [1]\n\nSources:\n[1] Greece: “Athens is the capital.” (https://x.org/gr)"


def test_readable_unverified_quote_is_marked_and_never_a_source():
    shown = readable(answer("##begin_quote##Lisbon##end_quote## <ANSWER>: Lisbon"), LABELS)
    assert shown == "Lisbon (quote not found in the documents)"


def test_readable_closed_book_is_marked_in_the_recipe_language():
    assert readable(answer("<ANSWER>: Athens", "finetuned"), LABELS) == "Athens (not from the documents)"
    assert readable(answer("<ANSWER>: 雅典", "finetuned"), prompt_format("zh").texts.labels) == "雅典 (非文档内容)"


ROUTE = Route("hybrid", reason="asked for")


def test_combine_takes_the_cited_answer_when_its_quote_verifies():
    made = combine(answer(CITED), answer("<ANSWER>: Patras", "finetuned"), FORMAT, ROUTE)
    assert (made.answer, made.strategy, made.route) == ("Athens", "hybrid", ROUTE)
    assert verified(made)


def test_combine_falls_back_to_the_closed_book_answer_marked_uncited():
    unverified = answer("##begin_quote##Lisbon##end_quote## <ANSWER>: Lisbon")
    made = combine(unverified, answer("<ANSWER>: Patras", "finetuned"), FORMAT, ROUTE)
    assert made.answer == "Patras" and not made.citations
    assert readable(made, LABELS) == "Patras (not from the documents)"
    assert made.hits == tuple(HITS)


def test_combine_abstains_when_neither_holds():
    made = combine(answer("<ANSWER>: Lisbon"), answer("", "finetuned"), FORMAT, ROUTE)
    assert made.abstained and made.answer == FORMAT.texts.abstention and not made.citations


def test_combine_adds_tokens_and_takes_the_longer_time():
    cited = answer(CITED, prompt_tokens=5, completion_tokens=3, generation_ms=5.0)
    closed = answer("<ANSWER>: Patras", "finetuned", prompt_tokens=2, completion_tokens=1, generation_ms=9.0)
    made = combine(cited, closed, FORMAT, ROUTE)
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.timings_ms.total) == (7, 4, 9.0)


def test_combine_times_are_those_of_the_slower_engine_whichever_was_read_last():
    cited = dataclasses.replace(answer(CITED), timings_ms=Timings(4.0, 1.0, 90.0, 95.0))
    closed = dataclasses.replace(answer("<ANSWER>: Patras", "finetuned"), timings_ms=Timings(0.0, 0.0, 38.0, 102.0))
    assert combine(cited, closed, FORMAT, ROUTE).timings_ms == Timings(4.0, 1.0, 90.0, 102.0)
    offline = dataclasses.replace(closed, timings_ms=Timings(0.0, 0.0, 93.0, 93.0))
    assert combine(cited, offline, FORMAT, ROUTE).timings_ms == Timings(4.0, 0.0, 93.0, 97.0)


def test_answer_survives_a_row():
    made = answer(CITED)
    assert Answer.from_row(made.to_row()) == made


def test_available_strategies_follow_the_parts():
    def names(*adapters, index=True, examples=False):
        return available_strategies(adapters, has_index=index, has_examples=examples)

    assert names() == ("base", "rag", "auto")
    assert names(examples=True) == ("base", "rag", "rag_fewshot", "auto")
    assert names("raft") == ("base", "rag", "raft", "auto")
    assert names("raft", "finetuned")[-2:] == ("hybrid", "auto")
    assert names("finetuned", index=False) == ("base", "finetuned", "auto")


def test_require_strategy_names_what_there_is():
    with pytest.raises(UserError, match="`raft` needs a part that this release lacks; available: base, rag"):
        require_strategy("raft", ("base", "rag"))
    with pytest.raises(UserError, match="there is no strategy `oracle`"):
        require_strategy("oracle", ("base",))


QUOTED = Route("raft", intent="guideline", reason="guidelines are quoted", require_quote=True)
UNVERIFIED = "##begin_quote##Lisbon##end_quote## <ANSWER>: Lisbon"


@pytest.mark.parametrize("text", [UNVERIFIED, "<ANSWER>: Lisbon", "Lisbon, I suppose"])
def test_finish_without_a_verified_quote_abstains_where_one_is_required(text):
    made = finish(Completion("id", text), STRATEGIES["raft"], HITS, FORMAT, route=QUOTED)
    assert made.abstained and made.answer == FORMAT.texts.abstention and "Lisbon" not in readable(made, LABELS)
    assert not made.quotes and not made.citations
    assert made.hits == tuple(HITS), "what was found stays"
    assert made.text == text
    assert made.route.reason == "guidelines are quoted; no quote verified, so there is no answer"
    shown = finish(Completion("id", text), STRATEGIES["raft"], HITS, FORMAT)
    assert not shown.abstained and shown.answer.startswith("Lisbon")


def test_finish_with_a_verified_quote_answers_where_one_is_required():
    made = finish(Completion("id", CITED), STRATEGIES["raft"], HITS, FORMAT, route=QUOTED)
    assert made.answer == "Athens" and not made.abstained and len(verified(made)) == 1
    assert made.route == QUOTED


def test_finish_own_abstention_and_errors_stay_what_they_are_where_a_quote_is_required():
    said = FORMAT.texts.abstention
    own = finish(Completion("id", f"<ANSWER>: {said}"), STRATEGIES["raft"], HITS, FORMAT, route=QUOTED)
    assert own.abstained and own.route == QUOTED
    failed = Completion("id", "", finish_reason="error", error="out of memory")
    broken = finish(failed, STRATEGIES["raft"], HITS, FORMAT, route=QUOTED)
    assert broken.error == "out of memory" and broken.route == QUOTED


def test_combine_never_takes_the_closed_book_answer_where_a_quote_is_required():
    route = Route("hybrid", require_quote=True)

    def legs(text):
        return [
            finish(Completion("id", said), STRATEGIES[name], HITS, FORMAT, route=route)
            for name, said in (("raft", text), ("finetuned", "<ANSWER>: Patras"))
        ]

    refused = combine(*legs(UNVERIFIED), FORMAT, route)
    assert refused.abstained and "no quote verified, so there is no answer" in refused.route.reason
    own = combine(*legs(f"<ANSWER>: {FORMAT.texts.abstention}"), FORMAT, route)
    assert own.abstained and "no quote verified" in own.route.reason, "the closed-book answer has no quote"
    cited = combine(*legs(CITED), FORMAT, route)
    assert cited.answer == "Athens" and not cited.abstained and cited.route == route


def test_combine_keeps_the_error_of_a_leg_that_the_answer_needs():
    def failed(strategy):
        broken = Completion("id", "", finish_reason="error", error="out of memory", prompt_tokens=5)
        return finish(broken, STRATEGIES[strategy], HITS, FORMAT)

    closed_book, unverified = answer("<ANSWER>: Patras", "finetuned"), answer(UNVERIFIED)
    for made in (
        combine(failed("raft"), closed_book, FORMAT, ROUTE),
        combine(unverified, failed("finetuned"), FORMAT, ROUTE),
    ):
        assert (made.error, made.finish_reason, made.strategy) == ("out of memory", "error", "hybrid")
        assert made.abstained and made.hits == tuple(HITS) and made.usage.prompt_tokens == 5
    assert combine(answer(CITED), failed("finetuned"), FORMAT, ROUTE).answer == "Athens", "it needs no other"
