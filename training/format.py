"""The one place where a question and its passages become a prompt, and a completion becomes an answer.

In: a question, the passages shown, a completion. Out: chat messages, a training target, a parsed answer with
verified citations. Sample building, training, offline evaluation and serving all call this module, so that what a
model learns to read and write is what it meets in use.

A target is: optional reasoning, optional quotes inside `##begin_quote##…##end_quote##`, then `<ANSWER>: …`
(the markers of gorilla's RAFT data). `##Reason:` / `##Answer:` of the RAFT paper is read too.
Not covered: tokenisation and chat templates (training/models.py), retrieval.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import yaml
from pydantic import ValidationError

from cluster.config import Section
from cluster.errors import UserError
from cluster.records import Record
from retrieval.records import Passage
from training.config import PromptConfig

FORMAT_VERSION = 1
BEGIN_QUOTE = "##begin_quote##"
END_QUOTE = "##end_quote##"
ANSWER_MARK = "<ANSWER>:"

# Text that would let a document pose as markup, as a target or as another speaker.
_MARKUP = re.compile(
    r"<(?=/?document\b|\||/?ANSWER>|/?s>|start_of_turn|end_of_turn)|##(?=begin_quote|end_quote|Reason|Answer)", re.I
)
_ANSWER_SPLIT = re.compile(r"<ANSWER>\s*[::]?|##\s*Answer\s*[::]", re.I)
_QUOTE = re.compile(re.escape(BEGIN_QUOTE) + r"(.*?)(?:" + re.escape(END_QUOTE) + r"|\Z)", re.S)


class Message(TypedDict):
    """One chat message, as OpenAI's API and the chat templates name its parts."""

    role: str
    content: str


@dataclass(frozen=True)
class Citation(Record):
    """A quote and where it stands: `passage` counts from 1 among the passages shown (0 when not verified), `start`
    and `end` are character offsets into the source document."""

    quote: str
    passage: int
    doc_id: str
    title: str
    uri: str
    start: int
    end: int
    verified: bool


@dataclass(frozen=True)
class ParsedAnswer:
    """A completion taken apart."""

    reasoning: str
    answer: str
    quotes: tuple[str, ...]
    citations: tuple[Citation, ...]
    abstained: bool


@dataclass(frozen=True)
class WorkedExample:
    """A question, its passages and the target: shown before the real question in few-shot prompts."""

    question: str
    passages: tuple[Passage, ...]
    target: str


class Labels(Section):
    """Words that are shown to people beside an answer."""

    sources: str
    uncited: str
    unverified: str


class PromptTexts(Section):
    """The content of a prompt file."""

    system_with_passages: str
    system_without_passages: str
    passage_title: str
    question: str
    abstention: str
    labels: Labels


def prompt_path(config: PromptConfig, language: str) -> Path:
    """The prompt file that a recipe uses."""
    return Path(config.path) if config.path else Path(__file__).parent / "prompts" / f"{language}.yaml"


def load_prompt(config: PromptConfig, language: str) -> PromptTexts:
    """Reads and checks the prompt file.

    Raises:
        UserError: The file is missing, is not YAML, or lacks a text.
    """
    path = prompt_path(config, language)
    try:
        texts = PromptTexts.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        texts.passage_title.format(title="", heading="")
        texts.question.format(question="")
    except OSError as error:
        raise UserError(f"prompt.path: cannot read {path}: {error.strerror}; copy training/prompts/en.yaml") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"prompt.path: {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"prompt.path: {path} is not a prompt file: {' '.join(str(error).split())}") from error
    return texts


def fold(text: str) -> tuple[str, list[int]]:
    """Text under NFKC (which folds full-width forms) with white space collapsed, and each character's origin.

    Returns:
        The folded text and, for each of its characters, the offset in `text` it came from.
    """
    folded: list[str] = []
    origins: list[int] = []
    start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        for char in unicodedata.normalize("NFKC", text[start:end]):
            if char.isspace():
                if folded and folded[-1] != " ":
                    folded.append(" ")
                    origins.append(start)
            else:
                folded.append(char)
                origins.append(start)
        start = end
    if folded and folded[-1] == " ":
        folded.pop()
        origins.pop()
    return "".join(folded), origins


def find_quote(quote: str, text: str) -> tuple[int, int] | None:
    """Where `quote` stands in `text`, both folded: character offsets `[start, end)` into `text`, or None."""
    needle, _ = fold(quote)
    haystack, origins = fold(text)
    if not needle:
        return None
    position = haystack.find(needle)
    if position < 0:
        return None
    last = origins[position + len(needle) - 1]
    end = last + 1
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return origins[position], end


def escape(text: str) -> str:
    """Text in which nothing reads as our markup or as a chat template's control token."""
    return _MARKUP.sub(lambda match: match.group().replace("<", "&lt;").replace("##", "# #"), text)


def _unescape(text: str) -> str:
    return text.replace("&lt;", "<").replace("# #", "##")


@dataclass(frozen=True)
class PromptFormat:
    """Renders prompts and targets, and parses completions, for one recipe."""

    texts: PromptTexts
    quotes: bool = True
    reasoning: bool = False

    @classmethod
    def load(cls, config: PromptConfig, language: str) -> PromptFormat:
        """The format that a recipe's prompt section describes."""
        return cls(load_prompt(config, language), config.quotes, config.reasoning)

    def passage_title(self, passage: Passage) -> str:
        """The line that heads a passage in the prompt."""
        if not passage.heading:
            return passage.title
        return self.texts.passage_title.format(title=passage.title, heading=passage.heading)

    def user_turn(self, question: str, passages: Sequence[Passage]) -> str:
        """The user's message: passages in the order given, then the question."""
        parts = [self._document(passage) for passage in passages]
        return "\n".join([*parts, self.texts.question.format(question=escape(question))])

    def _document(self, passage: Passage) -> str:
        title = escape(self.passage_title(passage)).replace('"', "'")
        return f'<document title="{title}">\n{escape(passage.text)}\n</document>'

    def messages(
        self, question: str, passages: Sequence[Passage] | None, examples: Sequence[WorkedExample] = ()
    ) -> list[Message]:
        """Chat messages; `passages=None` asks closed-book."""
        closed_book = passages is None
        system = self.texts.system_without_passages if closed_book else self.texts.system_with_passages
        messages: list[Message] = [{"role": "system", "content": system}]
        for example in examples:
            messages.append({"role": "user", "content": self.user_turn(example.question, example.passages)})
            messages.append({"role": "assistant", "content": example.target})
        messages.append({"role": "user", "content": self.user_turn(question, passages or ())})
        return messages

    def target(self, answer: str, quotes: Sequence[str] = (), reasoning: str = "") -> str:
        """What the model learns to write."""
        parts = [reasoning] if reasoning and self.reasoning else []
        if self.quotes:
            parts += [f"{BEGIN_QUOTE}{escape(quote)}{END_QUOTE}" for quote in quotes]
        return "\n".join([*parts, f"{ANSWER_MARK} {answer}"])

    def parse(self, completion: str, passages: Sequence[Passage]) -> ParsedAnswer:
        """Takes a completion apart and checks every quote against the passages shown."""
        split = _ANSWER_SPLIT.split(completion)
        answer = split[-1] if len(split) > 1 else _QUOTE.sub(" ", completion)
        before = _ANSWER_SPLIT.sub(" ", completion[: len(completion) - len(answer)]) if len(split) > 1 else ""
        quotes = tuple(quote.strip() for quote in _QUOTE.findall(completion) if quote.strip())
        reasoning = re.sub(r"##\s*Reason\s*[::]", " ", _QUOTE.sub(" ", before), flags=re.I)
        answer = " ".join(answer.split())
        return ParsedAnswer(
            reasoning=" ".join(reasoning.split()),
            answer=answer,
            quotes=quotes,
            citations=tuple(self._cite(quote, passages) for quote in quotes),
            abstained=not answer or fold(self.texts.abstention)[0].casefold() in fold(answer)[0].casefold(),
        )

    def _cite(self, quote: str, passages: Sequence[Passage]) -> Citation:
        quote = _unescape(quote)
        for number, passage in enumerate(passages, start=1):
            span = find_quote(quote, passage.text)
            if span:
                start, end = passage.start + span[0], passage.start + span[1]
                return Citation(quote, number, passage.doc_id, passage.title, passage.uri, start, end, verified=True)
        return Citation(quote, 0, "", "", "", 0, 0, verified=False)
