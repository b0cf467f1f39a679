"""The one place where a question and its passages become a prompt, and a completion becomes an answer.

In: a question, the passages shown, a completion. Out: chat messages, a training target, a parsed answer with
verified citations. Sample building, training, offline evaluation and serving all call this module, so that what a
model learns to read and write is what it meets in use.

A target is: optional reasoning, optional quotes inside `##begin_quote##…##end_quote##`, then `<ANSWER>: …`
(the markers of gorilla's RAFT data). `##Reason:` / `##Answer:` of the RAFT paper is read too.
Not covered: tokenisation and chat templates (training/batching.py), retrieval.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import yaml
from pydantic import Field, ValidationError

from cluster.config import Section
from cluster.errors import UserError
from cluster.recipe import nearest_key
from cluster.records import Record
from retrieval.records import Passage
from training.config import PromptConfig

FORMAT_VERSION = 1
BEGIN_QUOTE = "##begin_quote##"
END_QUOTE = "##end_quote##"
ANSWER_MARK = "<ANSWER>:"
_PROBE = "rayft?"
_NOT_SPACE = re.compile(r"\S+")

# Characters that are not seen, between the letters of a tag or a mark.
_UNSEEN = r"\u200b-\u200f\u2060-\u2064\ufeff\u00ad"
_GAP = rf"[\s/／{_UNSEEN}]*+"  # possessive, as a hostile text of blanks would cost its length squared otherwise


def _word(word: str) -> str:
    """A pattern for a word, whatever hidden characters stand in it."""
    return f"[{_UNSEEN}]*+".join(["", *word, ""])


# Text that would let a document pose as markup, as a target or as another speaker: our own marks, tags of roles, and
# what the tokenizers of the usual families turn into control tokens: `<|…|>` (ChatML, Llama 3), `<｜…｜>` (DeepSeek),
# `<start_of_turn>`, `<turn|>`, `<unused7>` (Gemma), `<s>`, `<<SYS>>`, `[INST]` (Llama 2, Mistral), `[TOOL_CALLS]`
# (Mistral), `<think>`, `<tool_call>` (Qwen), `<file_sep>` (SmolLM2), `<BOS_TOKEN>` (Command R), `[gMASK]` (GLM).
# Other tags, such as `<b>` and `vector<int>`, stay as they are.
_CONTROL = (
    r"(?:s|bos|eos|pad|unk|mask|cls|sep|sop|eop|eod|eot|think|image|filename|reponame|endoftext|(?:unused|reserved)\d+"
    r"|system|developer|user|assistant|human|model|tool|\w{0,40}_\w{0,40}|[\w\u2581]{0,40}[|｜][\w|｜\u2581]{0,40})"
)
_BRACKETED = r"(?:INST|IMG|THINK|ARGS|PREFIX|MIDDLE|SUFFIX|AUDIO|[A-Z]+(?:_[A-Z]+)+)"
_MARK = rf"{_word('begin_quote')}|{_word('end_quote')}|\s*Reason|\s*Answer"
_MARKUP = re.compile(
    rf"[<＜](?={_GAP}{_word('document')}\b|[|｜]|{_GAP}{_word('ANSWER')}\s*[>＞]|[/／]?{_CONTROL}[>＞]"
    r"|/?(?:start|end)_of_turn|<?/?SYS>)"
    rf"|\[(?=(?-i:/?{_BRACKETED})\]|INST\]|/INST\]|[gs]MASK\])"
    rf"|##(?={_MARK})",
    re.I,
)
_ESCAPES = {"<": "&lt;", "＜": "&#65308;", "[": "&#91;", "##": "# #"}
# Only before a mark: in `##end_quote## # #begin_quote##`, the first `# #` is none.
_ESCAPED = re.compile(rf"&lt;|&#65308;|&#91;|# #(?={_MARK})", re.I)
_ESCAPED_BY = {escaped: plain for plain, escaped in _ESCAPES.items()}
_ANSWER_SPLIT = re.compile(r"<ANSWER>\s*[:\uff1a]?|##\s*Answer\s*[:\uff1a]", re.I)
_REASON = re.compile(r"##\s*Reason\s*[:\uff1a]", re.I)
# A quote that a cut-off completion leaves open ends where the next mark begins.
_QUOTE = re.compile(
    re.escape(BEGIN_QUOTE)
    + r"(.*?)(?:"
    + re.escape(END_QUOTE)
    + r"|(?="
    + re.escape(BEGIN_QUOTE)
    + "|"
    + _ANSWER_SPLIT.pattern
    + r")|\Z)",
    re.S | re.I,
)
# A quote inside a target: its text is the only group.
MARKED_QUOTE = re.compile(f"{re.escape(BEGIN_QUOTE)}(.*?){re.escape(END_QUOTE)}", re.S | re.I)


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
    abstention: str = Field(pattern=r"\w")
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
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise UserError(f"prompt.path: {path} is not a prompt file; copy training/prompts/en.yaml")
        texts = PromptTexts.model_validate(found)
        texts.passage_title.format(title="", heading="")
        asked = texts.question.format(question=_PROBE)
    except OSError as error:
        raise UserError(f"prompt.path: cannot read {path}: {error.strerror}; copy training/prompts/en.yaml") from error
    except ValidationError as error:
        raise UserError(f"prompt.path: {path}: {_first_fault(error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"prompt.path: {path} is not YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt.path: {path} is not UTF-8 (byte {error.start})") from error
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        reason = f"unknown placeholder {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"prompt.path: {path}: {reason}; passage_title knows {{title}} and {{heading}}, question knows {{question}}"
        ) from error
    if _PROBE not in asked:
        raise UserError(f"prompt.path: {path}: question does not show {{question}}, so the model would not see it")
    return texts


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return (
            f"unknown key {key}; did you mean {nearest_key(key, PromptTexts) or 'a key of training/prompts/en.yaml'}?"
        )
    if fault["type"] == "missing":
        return f"{key} is missing; training/prompts/en.yaml shows every key"
    return f"{key}: {fault['msg']}"


@lru_cache(maxsize=65536)
def _continues(char: str) -> bool:
    """Whether a character may melt into the one before it: an accent, a voicing mark, a jamo of a Korean syllable."""
    first = unicodedata.normalize("NFKC", char)[0]
    return bool(unicodedata.combining(first)) or "\u1160" <= first <= "\u11ff"


def _cluster_end(text: str, start: int) -> int:
    """The end of the characters that NFKC must see together, from `start`."""
    end = start + 1
    while end < len(text) and text[end] >= "\u0300" and _continues(text[end]):
        end += 1
    return end


def fold(text: str) -> tuple[str, list[int]]:
    """Text under NFKC (which folds full-width forms) with white space collapsed, and each character's origin.

    Returns:
        The folded text and, for each of its characters, the offset in `text` it came from.
    """
    folded: list[str] = []
    origins: list[int] = []
    gap = 0  # where the white space before a word begins
    for word in _NOT_SPACE.finditer(text):
        start, end = word.span()
        if folded and folded[-1] != " ":
            folded.append(" ")
            origins.append(gap)
        gap, piece = end, word.group()
        if piece.isascii():
            folded.append(piece)
            origins.extend(range(start, end))
        else:
            _fold_word(text, start, end, folded, origins)
    if folded and folded[-1] == " ":
        folded.pop()
        origins.pop()
    return "".join(folded), origins


def _fold_word(text: str, start: int, end: int, folded: list[str], origins: list[int]) -> None:
    """Appends the word `text[start:end]`, cluster by cluster; what NFKC turns into white space is white space."""
    while start < end:
        after = _cluster_end(text, start)
        for char in unicodedata.normalize("NFKC", text[start:after]):
            if not char.isspace():
                folded.append(char)
                origins.append(start)
            elif folded and folded[-1] != " ":
                folded.append(" ")
                origins.append(start)
        start = after


def fold_text(text: str) -> str:
    """What `fold` folds `text` to, without the origins: ten times as fast."""
    words = text.split()
    if not text.isascii():
        words = [word if unicodedata.is_normalized("NFKC", word) else fold(word)[0] for word in words]
    return " ".join(filter(None, words))


@lru_cache(maxsize=64)
def _folded(text: str) -> tuple[str, list[int]]:
    """`fold`, kept for the next quote of the same passage: not to be changed."""
    return fold(text)


def find_quote(quote: str, text: str) -> tuple[int, int] | None:
    """Where `quote` stands in `text`, both folded: character offsets `[start, end)` into `text`, or None.

    A match that begins or ends inside what one character folds to (`300 m` in `300 ㎡`) is none.
    """
    needle = fold_text(quote)
    plain = fold_text(text)
    position = plain.find(needle) if needle else -1
    if position < 0:
        return None
    if len(plain) == len(text) and text.isascii():  # most text: each character folds to one, in its own place
        return position, position + len(needle)
    haystack, origins = _folded(text)
    position = haystack.find(needle)
    while position >= 0:
        end = position + len(needle)
        if _cuts_between(haystack, origins, position) and _cuts_between(haystack, origins, end):
            return origins[position], _cluster_end(text, origins[end - 1])
        position = haystack.find(needle, position + 1)
    return None


def _cuts_between(haystack: str, origins: Sequence[int], place: int) -> bool:
    """Whether the folded text can be cut before `place` without cutting a character of the original."""
    inside = 0 < place < len(haystack) and " " not in haystack[place - 1 : place + 1]
    return not (inside and origins[place - 1] == origins[place])


def escape(text: str) -> str:
    """Text in which nothing reads as our markup or as a chat template's control token."""
    return _MARKUP.sub(lambda match: _ESCAPES[match.group()], text)


def unescape(text: str) -> str:
    """The inverse of `escape`, which also takes for an escape what a text may hold of itself (`&lt;`)."""
    return _ESCAPED.sub(lambda match: _ESCAPED_BY[match.group().lower()], text)


def _as_written(text: str) -> str:
    """Text without the escapes under which a target shows it; `&lt;` that no escape put there stays."""
    plain = unescape(text)
    return plain if escape(plain) == text else text


def _marked(quote: str) -> str:
    return f"{BEGIN_QUOTE}{escape(quote)}{END_QUOTE}"


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
        """What the model learns to write. Quotes may also stand inside the reasoning, between their marks; all else is
        escaped, so that neither the reasoning nor the answer can pose as a quote or as an answer."""
        parts = [self._reasoning(reasoning)] if reasoning and self.reasoning else []
        if self.quotes:
            parts += [_marked(quote) for quote in quotes]
        return "\n".join([*parts, f"{ANSWER_MARK} {escape(answer)}"])

    def _reasoning(self, reasoning: str) -> str:
        """Reasoning as a target shows it; without quotes, the words between the marks stay as words."""
        pieces = MARKED_QUOTE.split(reasoning)
        shown = [escape(piece) for piece in pieces]
        if self.quotes:
            shown[1::2] = map(_marked, pieces[1::2])
        return "".join(shown)

    def parse(self, completion: str, passages: Sequence[Passage]) -> ParsedAnswer:
        """Takes a completion apart and checks every quote against the passages shown."""
        *before, last = _ANSWER_SPLIT.split(completion)
        marked = bool(before)
        if not marked:  # no answer mark: an answer without the format, or reasoning that was cut off
            last, *before = _REASON.split(completion, maxsplit=1)
        # An answer that is nothing but a quote is that quote's text; other quotes beside an answer are no part of it.
        answer = _QUOTE.sub(" ", last).replace(END_QUOTE, " ")
        if marked and not answer.strip():
            answer = _QUOTE.sub(r" \1 ", last)
        answer = _as_written(" ".join(answer.split()))
        reasoning = _REASON.sub(" ", _QUOTE.sub(" ", " ".join(before)))
        found = (quote.strip() for quote in _QUOTE.findall(completion))
        citations = tuple(self._cite(quote, passages) for quote in found if quote)
        return ParsedAnswer(
            reasoning=_as_written(" ".join(reasoning.split())),
            answer=answer,
            quotes=tuple(citation.quote for citation in citations),
            citations=citations,
            abstained=not answer or self._abstention() in fold(answer)[0].casefold(),
        )

    def _abstention(self) -> str:
        """What an answer that abstains says, whether or not it ends in a full stop."""
        return fold(self.texts.abstention)[0].casefold().rstrip(".!。")

    def _cite(self, quote: str, passages: Sequence[Passage]) -> Citation:
        # The prompt shows passages escaped; a document may also hold `&lt;` of its own.
        for candidate in dict.fromkeys((quote, unescape(quote))):
            for number, passage in enumerate(passages, start=1):
                span = find_quote(candidate, passage.text)
                if span:
                    start, end = passage.start + span[0], passage.start + span[1]
                    return Citation(
                        candidate, number, passage.doc_id, passage.title, passage.uri, start, end, verified=True
                    )
        return Citation(unescape(quote), 0, "", "", "", 0, 0, verified=False)
