"""The closed-book half of `hybrid`: generated beside the cited answer, and cancelled where that one holds.

In: its request and the doors to the generator. Out: its completion, or what it has taken by the time that nobody needs
it any more. Not covered: which of the two answers counts (serving/answering.py).
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from serving.asking import Doors, Taken
from serving.context_budget import CountsTokens
from serving.engine import Completion, GenerationRequest
from serving.interfaces import Pins, StreamBrokenError


class ClosedBookLeg:
    """One such request; it begins at once, on the running loop."""

    def __init__(self, request: GenerationRequest, pins: Pins, doors: Doors, taken: Taken) -> None:
        """`taken` counts for the whole question."""
        self._request, self._pins, self._doors, self._taken = request, pins, doors, taken
        self._pieces = 0
        self._task = asyncio.create_task(self._generate())

    async def _generate(self) -> Completion:
        """A completion, counted while it is generated, because a cancelled one does not say what it took."""
        try:
            async with aclosing(self._doors.stream(self._request, self._pins)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Completion):
                        return piece
                    self._pieces += 1
                    self._taken.pieces += 1
        except StreamBrokenError:  # nobody has seen the pieces, so the answer may be generated anew
            self._pieces = 0
        return await self._doors.generate(self._request, self._pins)

    async def completion(self) -> Completion:
        """Waits for it; raises what the doors raise."""
        return await self._task

    async def so_far(self, tokens: CountsTokens | None) -> Completion:
        """The completion where it is there, else what the request has taken: nothing before its first piece, and then
        its prompt and a token per piece (a piece that waits for the rest of a character holds several, so this is the
        least)."""
        if self._task.done() and not self._task.cancelled() and not self._task.exception():
            return self._task.result()
        prompt_tokens = 0
        if self._pieces and tokens is not None:
            prompt_tokens = await asyncio.to_thread(tokens.count, self._request.messages)
        return Completion(
            self._request.request_id,
            finish_reason="error",
            prompt_tokens=prompt_tokens,
            completion_tokens=self._pieces,
            error="its answer is not needed",
            error_code="cancelled",
        )

    async def end(self) -> None:
        """Cancels what is still under way, and waits until it has ended."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
