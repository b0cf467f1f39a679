"""Asking a teacher about chunks, several at a time, and storing each reply before the slot asks again.

In: chunks, the prompt, a teacher, the journal. Out: replies in the journal; the chunks that got none, with the reason.
Not covered: one request's retries (training/endpoint.py), judging replies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.errors import UserError
from cluster.progress import Bar, track
from retrieval.records import Chunk
from training.chat_response import Reply
from training.endpoint import NoReplyError, RefusedError, Teacher
from training.journal import Journal
from training.teacher_config import TeacherConfig
from training.teacher_prompt import QuestionPrompt, TeacherRequest
from training.teacher_reply import parse_reply

ReadChunks = Callable[[], Iterable[Chunk]]
"""Reads the chunks, in the same order each time: they are read more than once so as not to be held."""
AskLocally = Callable[[TeacherRequest], Reply]
"""A local model: blocks until it has answered; called from several threads, so that requests can share a batch.
Raises `RefusedError` for a request that it cannot take."""

UNANSWERED_IN_A_ROW = 10
"""Chunks in a row without any reply after which the endpoint is taken to be down."""


class LocalTeacher:
    """A model in this process, asked through a function."""

    def __init__(self, name: str, ask: AskLocally, concurrency: int) -> None:
        """`name` tells the model apart from others; `concurrency` is how many requests wait for it at once."""
        self._name = name
        self._ask = ask
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="teacher")

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    @property
    def trouble(self) -> Mapping[str, int]:
        """None: a local model is not asked again."""
        return {}

    async def ask(self, request: TeacherRequest) -> Reply:
        """One reply; see `Teacher.ask`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, request)

    async def close(self) -> None:
        """Lets requests under way end."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Asking:
    """One run over the chunks: sends the requests whose replies are not stored yet, `concurrency` at a time."""

    def __init__(self, config: TeacherConfig, prompt: QuestionPrompt, teacher: Teacher, journal: Journal) -> None:
        """The journal is held by the caller; the teacher is closed when the run ends."""
        self._config = config
        self._prompt = prompt
        self._teacher = teacher
        self._journal = journal
        self._waiting: list[dict[str, Any]] = []
        self._turn = asyncio.Lock()
        self._broken: UserError | None = None
        self._unanswered = 0
        self.failures: dict[str, str] = {}
        """Chunk id to the reason why it got no reply in this run."""
        self.replies = 0
        self.tokens_in = 0
        self.tokens_out = 0

    @property
    def cost(self) -> float:
        """Of this run's tokens, from the recipe's prices."""
        return (self.tokens_in * self._config.input_price + self.tokens_out * self._config.output_price) / 1e6

    def run(self, read_chunks: ReadChunks, chunk_ids: frozenset[str]) -> None:
        """Asks about the chunks.

        Raises:
            UserError: No request can succeed, or replies cannot be stored. What was received is stored.
        """
        chunks = (chunk for chunk in read_chunks() if chunk.chunk_id in chunk_ids)
        # One thread writes, so that flushes follow one another.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        try:
            with track("questions", len(chunk_ids), "chunks") as bar:
                asyncio.run(self._run(chunks, bar))
        finally:
            self._writer.shutdown(wait=True)
            if self._waiting and self._broken is None:  # received while the run was being ended
                self._write(self._waiting)

    async def _run(self, chunks: Iterator[Chunk], bar: Bar) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._config.concurrency):
                    group.create_task(self._slot(chunks, bar))
        except BaseExceptionGroup as faults:
            raise _first(faults) from None
        finally:
            await self._teacher.close()

    async def _slot(self, chunks: Iterator[Chunk], bar: Bar) -> None:
        for chunk in chunks:  # shared by all slots
            request = self._prompt.request(chunk)
            if self._is_finished(request.key):
                bar.skip(1)
                await asyncio.sleep(0)  # replies that arrive meanwhile are not kept waiting
                continue
            try:
                await self._finish(chunk, request)
            except RefusedError as error:
                self._fail(chunk, str(error), counts=self.replies == 0)
            except NoReplyError as error:
                self._fail(chunk, f"no reply after {self._config.attempts} attempts: {error}", counts=True)
            bar.advance(1, **self._figures())

    def _is_finished(self, key: str) -> bool:
        """Whether a key has a reply with a question in it, or as many replies as may be paid for."""
        if self._journal.count(key) >= self._config.reply_attempts:
            return True
        return any(parse_reply(str(row["text"])).proposed for row in self._journal.rows(key))

    async def _finish(self, chunk: Chunk, request: TeacherRequest) -> None:
        """Asks until a reply holds a question, or as often as may be paid for."""
        while not self._is_finished(request.key):
            reply = await self._teacher.ask(request.attempt(self._journal.count(request.key)))
            await self._store(
                {
                    "key": request.key,
                    "chunk_id": chunk.chunk_id,
                    "model": self._teacher.name,
                    "text": reply.text,
                    "finish_reason": reply.finish_reason,
                    "tokens_in": reply.tokens_in,
                    "tokens_out": reply.tokens_out,
                }
            )
            self._unanswered = 0
            self.replies += 1
            self.tokens_in += reply.tokens_in
            self.tokens_out += reply.tokens_out

    def _fail(self, chunk: Chunk, reason: str, *, counts: bool) -> None:
        self.failures[chunk.chunk_id] = reason
        self._unanswered += counts
        if self._unanswered >= max(UNANSWERED_IN_A_ROW, self._config.concurrency):
            raise UserError(
                f"teacher: {self._unanswered} chunks in a row got no reply ({reason}): run the same command again when "
                f"the endpoint answers; {len(self._journal)} replies are kept in {self._journal.path}"
            )

    async def _store(self, row: dict[str, Any]) -> None:
        """Returns when the row is on disk. Rows that arrive while others are written share the next flush."""
        self._waiting.append(row)
        async with self._turn:
            rows, self._waiting = self._waiting, []
            if rows:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._write, rows)
            if self._broken is not None:
                raise self._broken

    def _write(self, rows: list[dict[str, Any]]) -> None:
        try:
            self._journal.append(rows)
        except UserError as error:
            self._broken = error

    def _figures(self) -> dict[str, float | str]:
        figures: dict[str, float | str] = {"tokens in": f"{self.tokens_in:,}", "out": f"{self.tokens_out:,}"}
        if self._config.input_price or self._config.output_price:
            figures["cost"] = f"{self.cost:.4f}"
        return figures


def _first(faults: BaseExceptionGroup[BaseException]) -> BaseException:
    """The fault to tell: one that a user can mend before any other."""
    chosen: BaseException = faults.subgroup(UserError) or faults
    while isinstance(chosen, BaseExceptionGroup):
        chosen = chosen.exceptions[0]
    return chosen
