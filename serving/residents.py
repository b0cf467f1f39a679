"""What a replica keeps loaded: brought in when a request names it, dropped some time after its last use.

In: a key (an artifact's reference, a model's digest) and a function that loads what it names. Out: the loaded thing,
held while somebody uses it. Loads run in a thread, one at a time, so requests that need nothing new are not held up.
All methods are called on one event loop. Not covered: what is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class _Resident(Generic[T]):
    thing: T
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)


class Residents(Generic[T]):
    """Loaded things by key."""

    def __init__(self, unload: Callable[[str, T], None], keep_s: float) -> None:
        """`unload` runs in a thread when a thing that nobody holds was not used for `keep_s` seconds."""
        self._unload = unload
        self._keep_s = keep_s
        self._loaded: dict[str, _Resident[T]] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._wanted: frozenset[str] = frozenset()
        self._sweeper: asyncio.Task[None] | None = None

    def add(self, key: str, thing: T) -> None:
        """Takes in something that is loaded already."""
        self._loaded[key] = _Resident(thing)

    def things(self) -> list[T]:
        """All that is loaded."""
        return [resident.thing for resident in self._loaded.values()]

    def __contains__(self, key: str) -> bool:
        """Whether it is loaded."""
        return key in self._loaded

    def keep(self, keys: Collection[str]) -> None:
        """Names what is kept however long it is not used: the parts of the release that was asked for last."""
        self._wanted = frozenset(keys)
        if self._loaded.keys() - self._wanted and (self._sweeper is None or self._sweeper.done()):
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    @contextlib.asynccontextmanager
    async def held(self, key: str, load: Callable[[], T]) -> AsyncIterator[T]:
        """The thing of that key, loaded first where it is not; it stays loaded inside the block."""
        while (resident := self._loaded.get(key)) is None:
            if key not in self._loading:
                self._loading[key] = asyncio.get_running_loop().create_task(self._bring(key, load))
            # Shielded: a caller that goes away must not leave a load running that nobody waits for.
            await asyncio.shield(self._loading[key])
        resident.users += 1
        try:
            yield resident.thing
        finally:
            resident.users -= 1
            resident.last_used = time.monotonic()

    async def _bring(self, key: str, load: Callable[[], T]) -> None:
        try:
            async with self._one_at_a_time:
                began = time.perf_counter()
                thing = await asyncio.to_thread(load)
                logger.info("%s loaded in %.1f s", key, time.perf_counter() - began)
                self._loaded[key] = _Resident(thing)
        finally:
            del self._loading[key]

    async def _sweep(self) -> None:
        """Drops what is due, until only the wanted is left."""
        while others := self._loaded.keys() - self._wanted:
            for key in others:
                async with self._one_at_a_time:  # what is dropped and asked for again is loaded after it was dropped
                    resident = self._loaded[key]
                    if resident.users or time.monotonic() - resident.last_used < self._keep_s or key in self._wanted:
                        continue
                    del self._loaded[key]
                    await asyncio.to_thread(self._unload, key, resident.thing)
                logger.info("%s dropped", key)
            await asyncio.sleep(max(0.05, self._keep_s / 4))
