"""Admission: how many requests one ingress takes on, and what the others are told.

In: requests coming and going. Out: a slot, or 429 at once with an honest Retry-After. A request that waits costs its
caller time and gains nobody any: beyond what the engines batch together, the wait of everybody grows with each request
let in, so the limit is what keeps the accepted ones quick. Not covered: quotas of a key (serving/quotas.py).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from serving.api_errors import ApiError

LONGEST_RETRY_S = 60
REMEMBERED_REFUSALS = 10_000
RECENT_SHARE = 0.2
"""Weight of the newest duration in the running mean."""


@dataclass(frozen=True)
class Limits:
    """What one ingress takes on."""

    max_in_flight: int
    """Requests under way at once."""
    timeout_s: float
    """Deadline of one request."""
    max_body_bytes: int
    """Longest request body."""


class Admission:
    """Counts requests under way, and refuses more than the limit."""

    def __init__(
        self,
        limit: int,
        changed: Callable[[int], None] = lambda in_flight: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`limit` requests at once; `changed` hears of every change."""
        self._limit = limit
        self._changed = changed
        self._clock = clock
        self._recent_s = 1.0
        self._refused: deque[float] = deque(maxlen=REMEMBERED_REFUSALS)
        self.in_flight = 0

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Holds a slot.

        Raises:
            ApiError: 429; see `retry_after_s`.
        """
        if self.in_flight >= self._limit:
            self._refused.append(self._clock())
            seconds = self.retry_after_s()
            raise ApiError(
                429,
                f"{self.in_flight} requests are under way, which is this server's limit; try again in {seconds} s",
                code="overloaded",
                retry_after_s=seconds,
            )
        self._change(+1)
        began = self._clock()
        try:
            yield
        finally:
            self._change(-1)
            self._recent_s += RECENT_SHARE * (self._clock() - began - self._recent_s)

    def retry_after_s(self) -> int:
        """Seconds in which as many slots come free as requests were refused lately, this one included.

        Full, the slots turn over once in the time that recent requests took; those refused within that time want one
        each. At four times the capacity that is three turns: refused callers come back spread out, not all at once.
        """
        now = self._clock()
        while self._refused and self._refused[0] < now - self._recent_s:
            self._refused.popleft()
        seconds = self._recent_s * (1 + len(self._refused)) / self._limit
        return min(LONGEST_RETRY_S, max(1, math.ceil(seconds)))

    def _change(self, by: int) -> None:
        self.in_flight += by
        self._changed(self.in_flight)
