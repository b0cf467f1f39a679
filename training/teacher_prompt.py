"""What a teacher is asked: the prompt file, and the request for one chunk.

In: the recipe's `teacher` section and language, a chunk. Out: chat messages, a JSON schema for the reply, and a key
that names the request by everything that its reply depends on. Not covered: sending it, reading the reply.
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from cluster.config import Section
from cluster.errors import UserError
from cluster.recipe import nearest_key
from retrieval.records import Chunk
from training.format import Message, escape
from training.teacher_config import QuestionKind, TeacherConfig

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_KNOWN = ("title", "heading", "passage", "count", "kinds", "descriptions", "answer_chars", "reasoning")
_EXAMPLE = "training/prompts/questions_en.yaml"


class KindTexts(Section):
    """How each kind of question is described to the teacher."""

    fact: str
    comparison: str
    reasoning: str
    unanswerable: str


class ExampleQuestion(Section):
    """A question of a worked example."""

    kind: QuestionKind
    question: str
    answer: str
    quote: str
    reasoning: str


class Example(Section):
    """A passage and what a good reply asks about it."""

    title: str
    heading: str
    passage: str
    questions: tuple[ExampleQuestion, ...]


class QuestionTexts(Section):
    """The content of a question prompt file."""

    system: str
    user: str
    reasoning: str
    kinds: KindTexts
    examples: tuple[Example, ...] = ()
    """Shown as earlier turns, as many as `teacher.examples` says; of each, the questions of the kinds asked for."""
    needs_passage: tuple[str, ...] = ()
    """Regular expressions of questions that only make sense beside the passage."""
    abstains: tuple[str, ...] = ()
    """Regular expressions of answers that say there is none."""
    stop_words: frozenset[str] = Field(default=frozenset())
    """Words that near-duplicate questions may differ in."""

    @field_validator("user")
    @classmethod
    def _placeholders_are_known(cls, user: str) -> str:
        found = _PLACEHOLDER.findall(user)
        unknown = [name for name in found if name not in _KNOWN]
        if unknown:
            raise ValueError(f"unknown placeholder {{{unknown[0]}}}; known: {', '.join(_KNOWN)}")
        if "passage" not in found:
            raise ValueError("{passage} is missing, so the teacher would not see the passage")
        return user

    @field_validator("needs_passage", "abstains")
    @classmethod
    def _patterns_compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns


@dataclass(frozen=True)
class TeacherRequest:
    """One request for questions about a chunk. `key` names it: the same key is never paid for twice."""

    key: str
    messages: tuple[Message, ...]
    kinds: tuple[QuestionKind, ...]
    schema: Mapping[str, Any]
    max_tokens: int
    temperature: float
    seed: int

    def attempt(self, number: int) -> TeacherRequest:
        """The same request with a seed of its own, for asking again after reply `number` (from 0) was of no use."""
        seed = int(hashlib.sha256(f"{self.seed}/{self.key}/{number}".encode()).hexdigest()[:7], 16)
        return TeacherRequest(self.key, self.messages, self.kinds, self.schema, self.max_tokens, self.temperature, seed)


def question_prompt_path(config: TeacherConfig, language: str) -> Path:
    """The prompt file that a recipe uses."""
    if config.prompt_path:
        return Path(config.prompt_path).expanduser()
    return Path(__file__).parent / "prompts" / f"questions_{language}.yaml"


def load_question_texts(config: TeacherConfig, language: str) -> QuestionTexts:
    """Reads and checks the prompt file.

    Raises:
        UserError: naming `teacher.prompt_path`; the file is missing, is not YAML, or lacks a text.
    """
    path = question_prompt_path(config, language)
    where = f"teacher.prompt_path: {path}"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"teacher.prompt_path: cannot read {path}: {error.strerror}; copy {_EXAMPLE}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is not a prompt file; copy {_EXAMPLE}")
    try:
        return QuestionTexts.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_fault(error)}") from error


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key}; did you mean {nearest_key(key, QuestionTexts) or f'a key of {_EXAMPLE}'}?"
    if fault["type"] == "missing":
        return f"{key} is missing; {_EXAMPLE} shows every key"
    return f"{key}: {fault['msg'].removeprefix('Value error, ')}"


@dataclass(frozen=True)
class QuestionPrompt:
    """Makes the requests of one recipe."""

    texts: QuestionTexts
    config: TeacherConfig
    model: str
    """Name of the teacher model, part of every key."""
    seed: int

    def request(self, chunk: Chunk) -> TeacherRequest:
        """The request for a chunk; the kinds are asked in turn, starting at another one for each chunk."""
        kinds = self._kinds_for(chunk)
        messages = self._messages(chunk, kinds)
        # Everything that shapes the reply: chunk, prompt, kinds and their number are in the messages.
        shaped = [messages, self.model, self.config.temperature, self.config.max_tokens, self.seed]
        key = hashlib.sha256(json.dumps(shaped, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:32]
        return TeacherRequest(
            key, messages, kinds, self._schema, self.config.max_tokens, self.config.temperature, self.seed
        )

    def _kinds_for(self, chunk: Chunk) -> tuple[QuestionKind, ...]:
        kinds = self.config.kinds
        first = int(hashlib.sha256(f"{self.seed}/{chunk.chunk_id}".encode()).hexdigest()[:8], 16)
        return tuple(kinds[(first + place) % len(kinds)] for place in range(self.config.questions_per_chunk))

    def _messages(self, chunk: Chunk, kinds: tuple[QuestionKind, ...]) -> tuple[Message, ...]:
        messages: list[Message] = [{"role": "system", "content": self.texts.system.strip()}]
        for example in self.texts.examples[: self.config.examples]:
            asked = [question for question in example.questions if question.kind in kinds]
            if not asked:
                continue
            turn = self._turn(example.title, example.heading, example.passage, [question.kind for question in asked])
            hidden = None if self.config.reasoning else {"reasoning"}
            reply = {"questions": [question.model_dump(exclude=hidden) for question in asked]}
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": json.dumps(reply, ensure_ascii=False)})
        messages.append({"role": "user", "content": self._turn(chunk.title, chunk.heading, chunk.text, kinds)})
        return tuple(messages)

    def _turn(self, title: str, heading: str, passage: str, kinds: Sequence[QuestionKind]) -> str:
        counts = collections.Counter(kinds)
        asked = [kind for kind in self.config.kinds if kind in counts]
        values = {
            "title": escape(title),
            "heading": escape(heading),
            "passage": escape(passage),
            "count": str(len(kinds)),
            "kinds": ", ".join(f"{counts[kind]} {kind}" for kind in asked),
            "descriptions": "\n".join(f"- {getattr(self.texts.kinds, kind)}" for kind in asked),
            "answer_chars": str(self.config.answer_chars),
            "reasoning": self.texts.reasoning if self.config.reasoning else "",
        }
        # In one pass, so that a passage which holds `{title}` is shown as it is.
        user = _PLACEHOLDER.sub(lambda match: values[match.group(1)], self.texts.user)
        return "\n".join(line.rstrip() for line in user.splitlines()).strip()

    @cached_property
    def _schema(self) -> dict[str, Any]:
        """Of the reply, in the strict subset: every property required, none beside them."""
        properties: dict[str, Any] = {
            "kind": {"type": "string", "enum": list(self.config.kinds)},
            "question": {"type": "string"},
            "answer": {"type": "string"},
            "quote": {"type": "string"},
        }
        if self.config.reasoning:
            properties["reasoning"] = {"type": "string"}
        item = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        return {
            "type": "object",
            "properties": {"questions": {"type": "array", "items": item}},
            "required": ["questions"],
            "additionalProperties": False,
        }
