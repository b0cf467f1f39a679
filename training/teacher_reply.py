"""From a teacher's reply to questions whose answers stand in the passage.

In: the reply's text and the chunk that was asked about. Out: well-formed questions, and for each of those either a
`Question` with its golden span or the reason why it is dropped. Plain functions of their arguments: a reply that is
stored can be judged again at no cost. Not covered: asking, storing, comparing questions (training/duplicates.py).
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from retrieval.records import Chunk, Golden, Question
from training.duplicates import content_words
from training.format import find_quote, fold
from training.passage_match import mentions
from training.teacher_config import QuestionKind, TeacherConfig
from training.teacher_prompt import QuestionTexts

MIN_QUOTE_WORDS = 3  # a quote of "the" would be verbatim in any passage
MAX_UNREADABLE = (
    1000  # each unreadable object costs up to a pass over the text: 50,000 braces took 22 s without a bound
)
_DECODER = json.JSONDecoder()
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)
_QUOTATION = "\"'“”‘’«»「」『』… ."


class Proposed(BaseModel):
    """A question as a teacher wrote it; more keys than these are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True, str_strip_whitespace=True)

    kind: str = ""
    question: str
    answer: str = ""
    quote: str = ""
    reasoning: str = ""

    @field_validator("answer", "quote", "reasoning", "kind", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        if isinstance(value, bool):  # `"answer": true` is a yes
            return "Yes" if value else "No"
        return "" if value is None else value

    @field_validator("question", "answer", "quote", "reasoning", "kind")
    @classmethod
    def _is_unicode(cls, value: str) -> str:
        value.encode()  # JSON may spell half a character (`\ud800`), which no file can hold
        return value

    @field_validator("question")
    @classmethod
    def _asks(cls, value: str) -> str:
        if not any(char.isalnum() for char in value):
            raise ValueError("empty")
        return " ".join(value.split())


@dataclass(frozen=True)
class ParsedReply:
    """What could be read of a reply: whole questions, and the reasons why others are none."""

    proposed: tuple[Proposed, ...]
    malformed: tuple[str, ...]


def parse_reply(text: str) -> ParsedReply:
    """The questions in a reply: bare, fenced or chatty JSON; of one that was cut off, those that are whole."""
    proposed: list[Proposed] = []
    malformed: list[str] = []
    for value in _json_objects(_THOUGHTS.sub("", text)):
        for item in _items(value):
            try:
                proposed.append(Proposed.model_validate(item))
            except (ValidationError, UnicodeEncodeError) as error:
                malformed.append(_describe(error))
    if not proposed and not malformed:
        malformed.append("no question in the reply")
    return ParsedReply(tuple(proposed), tuple(malformed))


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object in a text, arrays looked into; inside one that does not end, the whole ones that it holds."""
    position = failures = 0
    while (start := text.find("{", position)) >= 0 and failures < MAX_UNREADABLE:
        try:
            value, position = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            position, failures = start + 1, failures + 1
        else:
            yield value


def _items(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    folded = {str(key).strip().lower(): inner for key, inner in value.items()}
    if "question" in folded:
        yield folded
    elif isinstance(folded.get("questions"), list):
        for inner in folded["questions"]:
            yield from _items(inner) if isinstance(inner, dict) else ()


def _describe(error: ValidationError | UnicodeEncodeError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "malformed question: not valid Unicode"
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"malformed question: {'.'.join(map(str, fault['loc']))} {fault['type'].replace('_', ' ')}"


@dataclass(frozen=True)
class Judge:
    """Decides which questions are kept."""

    texts: QuestionTexts
    config: TeacherConfig
    model: str
    """Name of the teacher, written into each question's metadata."""

    def judge(self, proposed: Proposed, chunk: Chunk, asked: Sequence[QuestionKind]) -> Question | str:
        """The question with its golden span, or the reason why it is dropped."""
        kind = self._kind(proposed.kind, asked)
        if kind is None:
            return "a kind that was not asked for"
        text = _plain(proposed.question, chunk.text)
        if any(pattern.search(text) for pattern in self._needs_passage):
            return "needs the passage in view"
        if kind == "unanswerable":
            return self._unanswerable(proposed, chunk, text)
        answer = _plain(proposed.answer, chunk.text)
        reason = self._fault_of_answer(answer, text, kind)
        if reason:
            return reason
        span = _find(proposed.quote, chunk.text)
        if span is None:
            return "quote is not in the passage"
        quote = chunk.text[span[0] : span[1]]
        if kind == "fact" and not mentions(answer, quote):
            return "answer is not in the quote"
        if kind != "fact" and len(content_words(quote, frozenset())) < MIN_QUOTE_WORDS:
            return "quote is too short to support the answer"
        golden = Golden(chunk.doc_id, chunk.start + span[0], chunk.start + span[1])
        return self._question(proposed, chunk, text, kind, (answer,), (golden,))

    def _fault_of_answer(self, answer: str, question: str, kind: QuestionKind) -> str:
        if not any(char.isalnum() for char in answer):
            return "no answer"
        if len(answer) > self.config.answer_chars:
            return "answer too long"
        if any(pattern.search(answer) for pattern in self._abstains):
            return "answer says that there is none"
        if kind == "fact" and mentions(answer, question):
            return "question gives the answer away"
        return ""

    def _unanswerable(self, proposed: Proposed, chunk: Chunk, text: str) -> Question | str:
        answer = proposed.answer
        if any(char.isalnum() for char in answer) and not any(pattern.search(answer) for pattern in self._abstains):
            return "meant to be unanswerable, but answered"
        return self._question(proposed, chunk, text, "unanswerable", (), ())

    def _question(
        self,
        proposed: Proposed,
        chunk: Chunk,
        text: str,
        kind: QuestionKind,
        answers: tuple[str, ...],
        golden: tuple[Golden, ...],
    ) -> Question:
        digest = hashlib.sha256(f"{chunk.chunk_id}/{kind}/{fold(text)[0]}".encode()).hexdigest()[:16]
        metadata: dict[str, Any] = {"kind": kind, "teacher": self.model, "chunk_id": chunk.chunk_id}
        metadata |= {"doc_id": chunk.doc_id, "answerable": kind != "unanswerable"}
        if self.config.reasoning and proposed.reasoning and golden:
            metadata["reasoning"] = proposed.reasoning
        return Question(f"gen-{digest}", text, answers, golden, "", metadata)

    def _kind(self, stated: str, asked: Sequence[QuestionKind]) -> QuestionKind | None:
        if len(set(asked)) == 1:
            return asked[0]
        wanted = stated.casefold().strip()
        return next((kind for kind in asked if wanted == kind), None)

    @cached_property
    def _needs_passage(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(pattern, re.I) for pattern in self.texts.needs_passage)

    @cached_property
    def _abstains(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(pattern, re.I) for pattern in self.texts.abstains)


def _find(quote: str, passage: str) -> tuple[int, int] | None:
    """Where a quote stands, verbatim after folding; without the quotation marks that teachers set around it."""
    for candidate in dict.fromkeys((quote, html.unescape(quote).replace("# #", "##"), quote.strip(_QUOTATION))):
        span = find_quote(candidate, passage)
        if span is not None:
            return span
    return None


def _plain(text: str, passage: str) -> str:
    """Text without the escapes under which the prompt shows markup, unless the passage itself has them."""
    return html.unescape(text) if "&" in text and "&" not in passage else text
