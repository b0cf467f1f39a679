"""OpenAI's plain completions: a prompt is a question, answered by the same strategies as a chat.

In: `CompletionRequest` bodies, answers. Out: `Ask`, JSON-ready dicts. A question-answering model does not continue
texts: what only makes sense for that (`suffix`, `echo`, `best_of` above 1, `logprobs`) is refused.
Shapes: https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from serving.answering import readable
from serving.api_errors import invalid
from serving.asking import Ask
from serving.chat_shapes import GenerationBody, completion, details, strategy_of, usage
from serving.citation_shapes import answer_fields
from serving.interfaces import Caller
from serving.records import Answer
from serving.request_bodies import Unsupported, read_filter
from training.format import Labels

TEXT_COMPLETION = "text_completion"
"""The object's name, whole and as part of a stream."""


class CompletionRequest(GenerationBody):
    """The body of POST /v1/completions."""

    unsupported: ClassVar[Unsupported] = {
        **GenerationBody.unsupported,
        "best_of": (None, 1),
        "echo": (None, False),
        "logprobs": (None,),
        "suffix": (None, ""),
    }

    prompt: str | list[str] | list[int] | list[list[int]]

    def ask(self, request_id: str, available: Sequence[str], caller: Caller) -> Ask:
        """The question that this request asks.

        Raises:
            ApiError: There is no such model, this caller may not use it, or a value is wrong.
        """
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]  # type: ignore[assignment]  # checked in the next line
        if not isinstance(prompt, str):
            raise invalid("prompt", "one text; several at once, and tokens, are not supported", "unsupported_parameter")
        if not prompt.strip():
            raise invalid("prompt", "it is the question, and it is empty")
        return Ask(
            request_id=request_id,
            question=prompt.strip(),
            strategy=strategy_of(self.model, available, caller),
            metadata=self.metadata or {},
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stops(),
            caller=caller,
            user=self.user or "",
            filter=read_filter(self.rayft.filter, "rayft.filter") if self.rayft else None,
        )


def completion_response(
    answer: Answer, model: str, created: int, labels: Labels, shapes: Sequence[str] = ()
) -> dict[str, Any]:
    """OpenAI's text_completion object."""
    text = readable(answer, labels)
    whole = completion(TEXT_COMPLETION, answer.request_id, model, created, answer.finish_reason, text=text)
    return {**whole, "usage": usage(answer), **answer_fields(answer, shapes), "rayft": details(answer)}
