"""From a question to a generation request, and from a completion to an answer: pure functions.

In: a question, a strategy, the hits found for it, the completion. Out: the request (with the passages that fit the
model's context), and the `Answer` with its quotes
checked against the passages that the model was shown. Serving and offline evaluation call the same functions, so
their answers are the same. Not covered: searching, generating, HTTP. Imports no torch, ray or faiss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from retrieval.records import Hit
from serving.config import GenerationConfig
from serving.context_budget import CountsTokens, fitting, room_for_prompt
from serving.engine import Completion, GenerationRequest
from serving.records import Answer, Route, Timings, Usage
from serving.strategies import HYBRID, STRATEGIES, Strategy
from training.format import BEGIN_QUOTE, END_QUOTE, Citation, Labels, Message, PromptFormat, WorkedExample, escape


@dataclass(frozen=True)
class Prepared:
    """A request, and what its prompt shows."""

    request: GenerationRequest
    hits: tuple[Hit, ...]
    """The hits whose passages are shown, in the order shown."""
    passages_left_out: int = 0
    """Passages that did not fit the model's context."""


def prepare(
    question: str,
    strategy: Strategy,
    hits: Sequence[Hit],
    prompt_format: PromptFormat,
    examples: Sequence[WorkedExample],
    generation: GenerationConfig,
    *,
    request_id: str = "",
    seed: int = 0,
    tokens: CountsTokens | None = None,
    instructions: str = "",
) -> Prepared:
    """The request that asks `question` under `strategy`.

    Args:
        question: The question, which stands alone.
        strategy: How to answer.
        hits: In rank order; the first `generation.passages` that fit are shown, where the strategy shows passages.
        prompt_format: Renders the prompt.
        examples: The first `generation.examples` are shown, where the strategy shows examples.
        generation: Limits and sampling.
        request_id: Names the request.
        seed: Fixes the draws.
        tokens: Counts the prompt; without it nothing is trimmed, and the engine refuses what is too long.
        instructions: The caller's own system message. Only the base model is shown it, below ours: an adapter has
            learned one system message, and what it writes under another was never measured.

    Raises:
        ContextLengthError: The question does not fit the model's context even without passages.
    """
    found = tuple(hits[: generation.passages]) if strategy.retrieves else ()
    examples = examples[: generation.examples] if strategy.few_shot else ()
    instructions = "" if strategy.adapter is not None else escape(instructions.strip())

    def render(places: Sequence[int]) -> list[Message]:
        passages = [found[place].passage for place in places] if strategy.retrieves else None
        system, *turns = prompt_format.messages(question, passages, examples)
        if instructions:
            system = {"role": "system", "content": f"{system['content']}\n{instructions}"}
        return [system, *turns]

    places: Sequence[int] = range(len(found))
    if tokens is not None:
        room = room_for_prompt(tokens.window, generation.max_new_tokens, generation.context_tokens)
        places = fitting(render, len(found), tokens, room)
    request = GenerationRequest(
        request_id=request_id,
        messages=tuple(render(places)),
        adapter=strategy.adapter,
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        seed=seed,
    )
    return Prepared(request, tuple(found[place] for place in places), len(found) - len(places))


def passage_tokens(hits: Sequence[Hit], tokens: CountsTokens | None) -> int | None:
    """Tokens of the passages found, for the router's rules on `context_length`; none where they cannot be counted."""
    if tokens is None:
        return None
    return tokens.count([{"role": "user", "content": "\n".join(hit.passage.text for hit in hits)}])


def finish(
    completion: Completion,
    strategy: Strategy,
    hits: Sequence[Hit],
    prompt_format: PromptFormat,
    *,
    question_id: str = "",
    route: Route | None = None,
    retrieval_ms: float = 0.0,
    total_ms: float | None = None,
    release: str = "",
    standalone: str = "",
    passages_left_out: int = 0,
) -> Answer:
    """The answer that `completion` holds, its quotes verified against the hits shown.

    Args:
        completion: What the engine returned; one that ended in an error becomes an abstention with that error.
        strategy: The strategy that was asked.
        hits: The hits that the prompt shows (`Prepared.hits`).
        prompt_format: The format that the prompt was written in.
        question_id: Id of the question, offline.
        route: How the strategy was chosen; none says that it was asked for. With `require_quote`, an answer without a
            verified quote becomes an abstention.
        retrieval_ms: Milliseconds spent searching.
        total_ms: Milliseconds from question to answer; none adds up the hops.
        release: The release that answered.
        standalone: The question that was answered, where it is not the caller's own.
        passages_left_out: Passages that did not fit the prompt.
    """
    shown = tuple(hits) if strategy.retrieves else ()
    parsed = prompt_format.parse(completion.text, [hit.passage for hit in shown])
    failed = completion.finish_reason == "error"
    route = route or Route(strategy.name, reason="asked for")
    hops = retrieval_ms + completion.queue_ms + completion.generation_ms
    answer = Answer(
        request_id=completion.request_id,
        question_id=question_id,
        text=completion.text,
        reasoning=parsed.reasoning,
        answer=_without_markers(parsed.answer),
        quotes=parsed.quotes,
        citations=parsed.citations,
        strategy=strategy.name,
        route=route,
        abstained=parsed.abstained or failed,
        finish_reason=completion.finish_reason,
        error=completion.error,
        hits=shown,
        usage=Usage(completion.prompt_tokens, completion.completion_tokens),
        timings_ms=Timings(
            retrieval=retrieval_ms,
            queue=completion.queue_ms,
            generation=completion.generation_ms,
            total=hops if total_ms is None else total_ms,
        ),
        release=release,
        standalone=standalone,
        passages_left_out=passages_left_out,
    )
    if route.require_quote and not answer.abstained and not verified(answer):
        return _abstention(dataclasses.replace(answer, route=_without_a_quote(route)), prompt_format)
    return answer


def _without_a_quote(route: Route) -> Route:
    """The route of an answer that was dropped for want of a quote."""
    why = "no quote verified, so there is no answer"
    return dataclasses.replace(route, reason=f"{route.reason}; {why}" if route.reason else why)


def _abstention(answer: Answer, prompt_format: PromptFormat) -> Answer:
    """The answer as an abstention; what was found stays with it."""
    return dataclasses.replace(answer, answer=prompt_format.texts.abstention, quotes=(), citations=(), abstained=True)


def _without_markers(text: str) -> str:
    """The answer without a marker that the model left open or closed twice."""
    for marker in (BEGIN_QUOTE, END_QUOTE):
        text = text.replace(marker, " ")
    return " ".join(text.split())


def verified(answer: Answer) -> tuple[Citation, ...]:
    """The citations that may be shown as sources."""
    return tuple(citation for citation in answer.citations if citation.verified)


def combine(cited: Answer, closed_book: Answer, prompt_format: PromptFormat, route: Route) -> Answer:
    """The hybrid answer: `cited` when one of its quotes verifies, else `closed_book` (without a source), else an
    abstention; an error of a leg that it needs is its own. Tokens are added up; the two ran side by side, so the times
    are those of the one that took longer."""
    if cited.error or (verified(cited) and not cited.abstained):
        chosen = cited
    elif closed_book.error or not closed_book.abstained:
        chosen = dataclasses.replace(closed_book, hits=cited.hits, passages_left_out=cited.passages_left_out)
    else:
        chosen = _abstention(cited, prompt_format)
        if route.require_quote and _without_a_quote(route) in (cited.route, closed_book.route):
            route = _without_a_quote(route)
    retrieval = cited.timings_ms.retrieval
    # By what the engine took, not by `total`: online, the second to be read has the later total, and offline the
    # closed-book one has searched nothing.
    slower = max(cited.timings_ms, closed_book.timings_ms, key=lambda timings: timings.queue + timings.generation)
    total = max(cited.timings_ms.total, closed_book.timings_ms.total, retrieval + slower.queue + slower.generation)
    return dataclasses.replace(
        chosen,
        strategy=HYBRID,
        route=route,
        usage=Usage(
            cited.usage.prompt_tokens + closed_book.usage.prompt_tokens,
            cited.usage.completion_tokens + closed_book.usage.completion_tokens,
        ),
        timings_ms=dataclasses.replace(slower, retrieval=retrieval, total=total),
    )


def notes(answer: Answer, labels: Labels) -> str:
    """What follows the answer's own words: source markers and the list of sources, or why there is none."""
    sources = list(dict.fromkeys(verified(answer)))
    if answer.abstained:
        return ""
    if sources:
        marks = "".join(f" [{number}]" for number in range(1, len(sources) + 1))
        lines = [
            f"[{number}] {citation.title}: “{' '.join(citation.quote.split())}”"
            + (f" ({citation.uri})" if citation.uri else "")
            for number, citation in enumerate(sources, start=1)
        ]
        return "\n".join([f"{marks}\n\n{labels.sources}:", *lines])
    if answer.quotes:
        return f" ({labels.unverified})"
    closed_book = answer.strategy == HYBRID or not STRATEGIES[answer.strategy].retrieves
    return f" ({labels.uncited})" if closed_book else ""


def readable(answer: Answer, labels: Labels) -> str:
    """The answer as a person wants to read it; a quote that does not verify is never listed as a source."""
    return answer.answer + notes(answer, labels)
