"""Questions generated from chunks by a teacher model, each with an answer and a verbatim quote.

In: chunks, the recipe's `teacher` section, a teacher (an endpoint, or a local model as a function). Out: a
`questions.jsonl` that `samples build` reads, and beside it the rows that were rejected, with their reasons.
Every reply is in the journal before the next request of its slot is sent, so that after a crash no stored reply is
asked for again and at most the requests in flight are repeated. Judging starts from the journal each time: filters may
change without paying again. Not covered: the index that chunks come from, splits, samples.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.progress import say
from cluster.storage import fsync_directory
from retrieval.questions import write_questions
from retrieval.records import Question
from training.asking import Asking, ReadChunks
from training.duplicates import sift
from training.endpoint import Teacher
from training.journal import Journal
from training.teacher_config import TeacherConfig
from training.teacher_prompt import QuestionPrompt, QuestionTexts
from training.teacher_reply import Judge, parse_reply

REASONS_SHOWN = 6


@dataclass(frozen=True)
class Chosen:
    """Which chunks are asked about, and how many are not, by reason."""

    chunk_ids: frozenset[str]
    passed_over: Mapping[str, int]


def choose_chunks(read_chunks: ReadChunks, limit: int | None, seed: int, min_chars: int) -> Chosen:
    """The chunks to ask about: all, or `limit` of them by seed, spread over documents.

    Every document gives one chunk before any gives a second. A higher limit adds chunks and takes none away.
    """
    passed_over: collections.Counter[str] = collections.Counter()
    texts: set[bytes] = set()
    ranked: dict[str, list[tuple[bytes, str]]] = collections.defaultdict(list)
    for chunk in read_chunks():
        text = _digest(f"{chunk.title}\0{chunk.heading}\0{chunk.text}")
        if len(chunk.text.strip()) < min_chars:
            passed_over["chunk is too short"] += 1
        elif text in texts:
            passed_over["same text as an earlier chunk"] += 1
        else:
            texts.add(text)
            ranked[chunk.doc_id].append((_digest(f"{seed}/{chunk.chunk_id}"), chunk.chunk_id))
    rounds = sorted(
        (place, _digest(f"{seed}/{doc_id}"), chunk_id)
        for doc_id, chunks in ranked.items()
        for place, (_, chunk_id) in enumerate(sorted(chunks))
    )
    return Chosen(frozenset(chunk_id for *_, chunk_id in rounds[:limit]), passed_over)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:12]


@dataclass(frozen=True)
class Outcome:
    """What a run made."""

    questions: int
    chunks: int
    asked: int
    """Replies received in this run."""
    tokens_in: int
    """Prompt tokens of this run."""
    tokens_out: int
    cost: float
    """Of this run, from the recipe's prices."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Rejected chunks and questions, by reason."""


def generate_questions(
    config: TeacherConfig,
    texts: QuestionTexts,
    seed: int,
    read_chunks: ReadChunks,
    teacher: Teacher,
    journal_path: Path,
    out: Path,
    *,
    limit: int | None = None,
) -> Outcome:
    """Asks what the journal does not hold yet, and writes the questions that stand up to the checks.

    Args:
        config: The recipe's `teacher` section.
        texts: The prompt file.
        seed: Of the choice of chunks, the order of kinds, the teacher's draws and the waits.
        read_chunks: The chunks of the index.
        teacher: Who is asked; closed at the end.
        journal_path: Where replies are kept.
        out: The questions; rejected rows go to `<out stem>.rejected.jsonl` beside it. Both are replaced atomically.
        limit: Most chunks; none asks about all.

    Raises:
        UserError: The teacher or the journal cannot be used, or no question is left. Replies received are kept.
    """
    check_output(out)
    chosen = choose_chunks(read_chunks, limit, seed, config.min_chunk_chars)
    if not chosen.chunk_ids:
        raise UserError(
            f"teacher: the index has no chunk to ask about ({_describe(chosen.passed_over)}): lower "
            f"teacher.min_chunk_chars ({config.min_chunk_chars}) or raise chunking.max_tokens"
        )
    prompt = QuestionPrompt(texts, config, teacher.name, seed)
    with Journal(journal_path) as journal:
        if journal.damaged_lines:
            say(f"questions: {journal_path} has {journal.damaged_lines} damaged lines; those chunks are asked again")
        asking = Asking(config, prompt, teacher, journal)
        asking.run(read_chunks, chosen.chunk_ids)
        made = _judge_replies(prompt, read_chunks, chosen.chunk_ids, journal, asking.failures)
    sifted = sift(made.questions, texts.stop_words, config.near_duplicate)
    rejected = [*made.rejected, *(_rejected_question(question, reason) for question, reason in sifted.dropped)]
    _write_rejected(rejected_path(out), rejected)
    reasons = collections.Counter(str(row["reason"]) for row in rejected)
    if not sifted.kept:
        raise UserError(
            f"teacher: none of {len(chosen.chunk_ids)} chunks gave a question that stands up to the checks "
            f"({_describe(reasons)}): read {rejected_path(out)}"
        )
    _write_atomically(out, lambda path: write_questions(path, sifted.kept))
    outcome = Outcome(
        questions=len(sifted.kept),
        chunks=len(chosen.chunk_ids),
        asked=asking.replies,
        tokens_in=asking.tokens_in,
        tokens_out=asking.tokens_out,
        cost=asking.cost,
        rejected=reasons,
    )
    _report(outcome, sifted.kept, chosen, teacher, out)
    return outcome


def _report(outcome: Outcome, kept: Sequence[Question], chosen: Chosen, teacher: Teacher, out: Path) -> None:
    kinds = collections.Counter(str(question.metadata["kind"]) for question in kept)
    if chosen.passed_over:
        say(f"questions: not asked about: {_describe(chosen.passed_over)}")
    if teacher.trouble:
        say(f"questions: requests sent again: {_describe(teacher.trouble)}")
    if outcome.rejected:
        say(f"questions: rejected: {_describe(outcome.rejected)}; see {rejected_path(out)}")
    say(f"questions: {outcome.questions} from {outcome.chunks} chunks ({_describe(kinds)}) in {out}")


def _describe(reasons: Mapping[str, int]) -> str:
    most = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {reason}" for reason, count in most[:REASONS_SHOWN]]
    rest = sum(count for _, count in most[REASONS_SHOWN:])
    return ", ".join([*shown, *([f"{rest} for other reasons"] if rest else [])]) or "none"


@dataclass
class _Made:
    questions: list[Question] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)


def _judge_replies(
    prompt: QuestionPrompt,
    read_chunks: ReadChunks,
    chunk_ids: frozenset[str],
    journal: Journal,
    failures: Mapping[str, str],
) -> _Made:
    """Judges the stored replies, in the order of the chunks: the result does not depend on when they arrived."""
    judge = Judge(prompt.texts, prompt.config, prompt.model)
    made = _Made()
    for chunk in read_chunks():
        if chunk.chunk_id not in chunk_ids:
            continue
        request = prompt.request(chunk)
        replies = list(journal.rows(request.key))
        place = {"chunk_id": chunk.chunk_id, "doc_id": chunk.doc_id}
        if not replies:
            made.rejected.append({**place, "reason": failures.get(chunk.chunk_id, "not asked")})
            continue
        reply = next((row for row in replies if parse_reply(str(row["text"])).proposed), replies[-1])
        parsed = parse_reply(str(reply["text"]))
        cut = " (cut off at teacher.max_tokens)" if reply["finish_reason"] == "length" else ""
        made.rejected += [{**place, "reason": f"{reason}{cut}"} for reason in parsed.malformed]
        for proposed in parsed.proposed:
            judged = judge.judge(proposed, chunk, request.kinds)
            if isinstance(judged, Question):
                made.questions.append(judged)
            else:
                made.rejected.append({**place, "reason": judged, **proposed.model_dump()})
    return made


def _rejected_question(question: Question, reason: str) -> dict[str, Any]:
    return {
        "chunk_id": question.metadata["chunk_id"],
        "doc_id": question.metadata["doc_id"],
        "reason": reason,
        "kind": question.metadata["kind"],
        "question": question.text,
        "answer": question.answers[0] if question.answers else "",
    }


def rejected_path(out: Path) -> Path:
    """Where the rejected rows go."""
    return out.with_name(f"{out.stem}.rejected.jsonl")


def check_output(out: Path) -> None:
    """Refuses to replace questions that no teacher wrote.

    Raises:
        UserError: naming `--out`.
    """
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name a file")
    if not out.exists():
        return
    with out.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and not _is_generated(line):
                raise UserError(
                    f"--out: {out}:{number} is not a generated question, and would be lost: name another file"
                )


def _is_generated(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("metadata"), dict) and "teacher" in row["metadata"]


def _write_rejected(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    _write_atomically(path, write)


def _write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """A reader sees the old file or the whole new one, also after a crash."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            temporary = Path(folder) / path.name
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from error
