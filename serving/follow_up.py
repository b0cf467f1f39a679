"""The question that a later turn of a conversation means: what is searched, and what the model is asked.

In: the turns before the question, and the question. Out: the question as it would stand alone; word for word the
question where it does already, or where the rules are not sure of its meaning. The models are trained on single
questions, so the turns themselves are not shown to them.
By rules: pronouns and ellipses in English and Chinese, resolved against the user turn before, which has itself been
made to stand alone. By the model: one more generation, whose reply is taken only where it can be a question of this
conversation. Not covered: references to what an answer said (“the second one”), other languages.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from cluster.config import Section
from cluster.errors import UserError
from serving import follow_up_chinese, follow_up_english
from serving.earlier_turn import Earlier, read_answer
from training.format import Message, escape

FollowUp = Literal["rules", "model", "off"]
TURNS = 12
"""Earlier messages that are read, the newest ones."""
EARLIER_CHARACTERS = 400
"""A longer message is about more than one thing, so that nothing refers to it for sure."""
SHOWN_CHARACTERS = 500
"""Characters of each earlier message that the model is shown."""
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]{4,}|\d+")


class RewritePrompt(Section):
    """The content of a prompt file for `serve.follow_up: model`."""

    system: str
    """What the model is told."""
    earlier: str = Field(pattern=r"\{role\}.*\{text\}")
    """A line per earlier message."""
    user: str
    """Names of the two roles."""
    assistant: str
    question: str = Field(pattern=r"\{question\}")
    """Below them, the question to rewrite."""
    max_new_tokens: int = Field(default=64, ge=8)
    """Longest reply."""


def rewrite_prompt_path(path: str, language: str) -> Path:
    """The prompt file that a recipe uses."""
    return Path(path) if path else Path(__file__).parent / "prompts" / f"follow_up_{language}.yaml"


def load_rewrite_prompt(path: str, language: str) -> RewritePrompt:
    """Reads and checks the prompt file.

    Raises:
        UserError: The file is missing, is not YAML, or lacks a text.
    """
    place = rewrite_prompt_path(path, language)
    try:
        found = RewritePrompt.model_validate(yaml.safe_load(place.read_text(encoding="utf-8")))
        found.earlier.format(role="", text="")
        found.question.format(question="")
    except OSError as error:
        raise UserError(
            f"serve.follow_up_prompt: cannot read {place}: {error.strerror}; copy serving/prompts/follow_up_en.yaml"
        ) from error
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(
            f"serve.follow_up_prompt: {place}: {'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"serve.follow_up_prompt: {place}: {' '.join(str(error).split())}") from error
    return found


def by_rules(history: Sequence[Message], question: str) -> str:
    """The question that `question` means after `history`, oldest message first."""
    earlier: Earlier | None = None
    for turn in [turn for turn in history if turn["role"] in ("user", "assistant")][-TURNS:]:
        text = turn["content"].strip()
        if turn["role"] == "assistant":
            if earlier is not None:
                answer, titles = read_answer(text)
                earlier = dataclasses.replace(earlier, answer=answer, titles=titles)
        elif text and not _is_small_talk(text):
            earlier = Earlier(_resolve(text, earlier) if len(text) <= EARLIER_CHARACTERS else "")
    return _resolve(question, earlier)


def _resolve(question: str, earlier: Earlier | None) -> str:
    if earlier is None:
        return question
    if _CHINESE.search(question):
        return follow_up_chinese.resolve(question, earlier)
    return follow_up_english.resolve(question, earlier)


def _is_small_talk(text: str) -> bool:
    return follow_up_chinese.is_small_talk(text) or follow_up_english.is_small_talk(text)


def rewriting(history: Sequence[Message], question: str, prompt: RewritePrompt) -> tuple[Message, ...]:
    """The prompt that asks the base model for the question; empty where there is no earlier question."""
    turns = [turn for turn in history if turn["role"] in ("user", "assistant") and turn["content"].strip()][-TURNS:]
    if not any(turn["role"] == "user" for turn in turns):
        return ()
    names = {"user": prompt.user, "assistant": prompt.assistant}
    lines = [
        prompt.earlier.format(role=names[turn["role"]], text=escape(_one_line(turn["content"])[:SHOWN_CHARACTERS]))
        for turn in turns
    ]
    asked = prompt.question.format(question=escape(_one_line(question)))
    return ({"role": "system", "content": prompt.system}, {"role": "user", "content": "\n".join([*lines, asked])})


def rewritten(reply: str, history: Sequence[Message], question: str) -> str:
    """The question that a model's reply holds; empty where the reply is none, or not one of this conversation.

    It must be one line, not much longer than what it was made from, in the question's script, a question where the
    question was one, and made of words of the conversation: most of a reply that answers or invents is not.
    """
    text = _one_line(reply.strip().split("\n", 1)[0]).strip("\"'“”「」 ")
    users = [turn["content"] for turn in history if turn["role"] == "user"][-TURNS:]
    if not text or text != escape(text) or len(text) > len(question) + max(map(len, users), default=0) + 40:
        return ""
    if bool(_CHINESE.search(question)) != bool(_CHINESE.search(text)):
        return ""
    if question.rstrip().endswith(("?", "？")) and not text.endswith(("?", "？")):
        return ""
    known = {word.casefold() for turn in history for word in _WORD.findall(turn["content"])}
    known |= {word.casefold() for word in _WORD.findall(question)}
    words = [word.casefold() for word in _WORD.findall(text)]
    kept = sum(word in known for word in words)
    of_question = {word.casefold() for word in _WORD.findall(question)}
    if not words or kept < 0.6 * len(words) or (of_question and not of_question & set(words)):
        return ""
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())
