"""Which passages fit the model's context, counted with its tokenizer before anything is generated.

In: a prompt's parts, how many tokens it may have. Out: the passages to show, best first; a passage is shown whole or
left out. Where everything fits, which a count of bytes often tells, nothing is tokenised.
Not covered: the tokenizer itself (serving/prompt_tokens.py). Imports no torch, ray or faiss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.errors import UserError
from training.format import Message


class CountsTokens(Protocol):
    """The part of the model's tokenizer that a budget needs."""

    @property
    def window(self) -> int:
        """Most tokens of a prompt and its completion together."""
        ...

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of a chat prompt under the model's template, as the engine will see it."""
        ...


class ContextLengthError(UserError):
    """The question does not fit the model's context, even without any passage."""


Render = Callable[[Sequence[int]], Sequence[Message]]
"""The prompt that shows the passages at these places, in this order."""


def room_for_prompt(window: int, max_new_tokens: int, context_tokens: int | None) -> int:
    """Most tokens that a prompt may have beside `max_new_tokens`; `context_tokens` may set it lower."""
    room = window - max_new_tokens
    return room if context_tokens is None else min(room, context_tokens)


def fitting(render: Render, passages: int, tokens: CountsTokens, room: int) -> tuple[int, ...]:
    """Places of the passages that are shown, ascending: in rank order, each one that still fits.

    Args:
        render: Renders the prompt.
        passages: How many there are, best first.
        tokens: Counts a prompt.
        room: Most tokens of the prompt.

    Raises:
        ContextLengthError: The prompt does not fit without any passage.
    """
    everything = tuple(range(passages))
    bare = render(())
    needed = tokens.count(bare)
    if needed > room:
        raise ContextLengthError(
            f"the prompt has {needed} tokens without any passage, and there is room for {max(room, 0)}: shorten the "
            "question or ask for fewer new tokens"
        )
    whole = render(everything)
    # A token stands for at least one byte, and the template adds to both prompts alike.
    if needed + _bytes(whole) - _bytes(bare) <= room or tokens.count(whole) <= room:
        return everything
    kept, spent = [], needed
    for place in everything:
        cost = tokens.count(render((place,))) - needed
        if spent + cost <= room:
            kept.append(place)
            spent += cost
    # Tokens may melt or part where passages meet, so the sum is only nearly the whole.
    while kept and tokens.count(render(kept)) > room:
        kept.pop()
    return tuple(kept)


def _bytes(messages: Sequence[Message]) -> int:
    return sum(len(message["content"].encode(errors="replace")) for message in messages)
