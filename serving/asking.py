"""What a conversation is asked, of which release, and through which doors.

In: nothing. Out: the records that ingress and the API's shapes make, and that a conversation reads. Those of a release
pickle. Not covered: answering (serving/conversation.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrieval.filters import Filter
from serving.config import GenerationConfig
from serving.engine import Completion
from serving.follow_up import FollowUp, RewritePrompt
from serving.interfaces import ANYBODY, Caller, Embed, FeedbackDoor, Generate, Observer, Pins, Search, Stream
from serving.strategies import AUTO
from training.format import Message, PromptFormat, WorkedExample


@dataclass
class Taken:
    """What a question has sent to the model and got from it so far: what it costs where nobody gets an answer."""

    prompts: list[Sequence[Message]] = field(default_factory=list)
    pieces: int = 0
    """Of text, a token each at the least."""


@dataclass(frozen=True)
class Ask:
    """A question, who asks it and what they wish; None takes the recipe's."""

    request_id: str
    question: str
    strategy: str = AUTO
    metadata: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    caller: Caller = ANYBODY
    history: tuple[Message, ...] = ()
    """Every message before the question, oldest first. Turns of `user` and `assistant` tell what the question refers
    to; those of `system` and `developer` are the caller's instructions (see `serving.answering.prepare`)."""
    user: str = ""
    """The end user, as the caller names them: A/B tests treat them alike, and feedback is deleted by it."""
    filter: Filter | None = None
    """Only matching documents are searched, among those that the caller's key opens."""
    taken: Taken = field(default_factory=Taken, compare=False, repr=False)
    """Counted while the question is answered."""

    @property
    def instructions(self) -> str:
        """The caller's system messages."""
        return "\n".join(turn["content"] for turn in self.history if turn["role"] in ("system", "developer"))


@dataclass(frozen=True)
class ServedRelease:
    """What answers: everything that ingress needs of a release, without the models. It pickles."""

    pins: Pins
    available: tuple[str, ...]
    prompt_format: PromptFormat
    examples: tuple[WorkedExample, ...]
    generation: GenerationConfig
    seed: int
    passages: int = 0
    """Passages of the index that everybody may see."""
    embeds: bool = False
    """Whether the index has an encoder; a lexical one has none, and nothing is embedded."""
    update_frequencies: Mapping[str, str] = field(default_factory=dict)
    """How often each collection changes, as its recipe declares it; "" names a recipe's only corpus."""
    follow_up: FollowUp = "rules"
    """How a later turn's question is made to stand alone."""
    rewrite_prompt: RewritePrompt | None = None
    """What the base model is asked with `follow_up` `model`; without it, the rules are taken."""

    @property
    def name(self) -> str:
        """The release's reference, which every answer names."""
        return self.pins.release


@dataclass(frozen=True)
class Doors:
    """How a conversation reaches the other parts of the graph."""

    search: Search
    generate: Generate
    stream: Stream
    embed: Embed | None = None
    feedback: FeedbackDoor | None = None
    observer: Observer | None = None


class GenerationFailedError(Exception):
    """The engine could not serve the request; `completion` says why."""

    def __init__(self, completion: Completion) -> None:
        """Keeps the completion."""
        super().__init__(completion.error)
        self.completion = completion
