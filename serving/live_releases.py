"""Which release answers now, and how the next one takes its place.

In: the release that the graph was started with, where promoted releases are found, and how the deployments prepare one.
Out: `current()`. A newly promoted release is opened and prepared beside the old one, and only then current; a request
keeps the release that it began with to its end, because what it pins travels with it. A release that does not load is
refused: the old one goes on, the reason is logged and counted, `refused` names it, and it is tried again later. Plain
asyncio.
Not covered: dropping what is no longer used (serving/residents.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import UserError
from cluster.store import Store
from serving.asking import ServedRelease
from serving.config import ServingRecipe
from serving.conversation import Conversation
from serving.interfaces import Observer, PartUnavailableError, Pins
from serving.opened_release import served_release

logger = logging.getLogger(__name__)

TRY_REFUSED_AGAIN_S = 60.0


class ReleaseSource(Protocol):
    """Finds releases; pickles, and is called in threads."""

    def promoted(self) -> str:
        """Version of the promoted release; empty where none is."""
        ...

    def open(self, version: str) -> ServedRelease:
        """What ingress needs of a release, its pins checked.

        Raises:
            ArtifactError: It does not fit this program, or lacks an artifact.
        """
        ...


@dataclass(frozen=True)
class StoreReleases:
    """The releases of a recipe's store."""

    recipe: ServingRecipe

    def promoted(self) -> str:
        """The store's own mark."""
        from cluster.releases import KIND

        return Store(self.recipe.store.uri).current(KIND, self.recipe.name) or ""

    def open(self, version: str) -> ServedRelease:
        """Reads the release and what ingress needs of its artifacts."""
        from cluster.releases import open_release

        store = Store(self.recipe.store.uri)
        release = open_release(store, self.recipe.name, version)
        return served_release(self.recipe, store, release)


def first_pins(source: ReleaseSource | None, started_with: Pins) -> list[Pins]:
    """What a replica that starts now should load: the promoted release, or else the one that the graph began with."""
    if source is not None and (version := source.promoted()) and not started_with.release.endswith(f"/{version}"):
        try:
            return [source.open(version).pins, started_with]
        except UserError as error:
            logger.warning("the promoted release does not open, %s is taken: %s", started_with.release, error)
    return [started_with]


class LiveReleases:
    """Follows the promoted release; see the module's docstring. All methods are called on one event loop."""

    def __init__(
        self,
        first: Conversation,
        source: ReleaseSource | None,
        converse: Callable[[ServedRelease], Conversation],
        prepare: Callable[[Pins], Awaitable[None]],
        observer: Observer,
        every_s: float,
    ) -> None:
        """`converse` makes the conversation of an opened release, in a thread. Without a source the first stays."""
        self._current = first
        self._source = source
        self._converse = converse
        self._prepare = prepare
        self._observer = observer
        self._every_s = every_s
        self._refused: dict[str, float] = {}
        self.refused = ""
        """The promoted release, while it is refused."""
        self._task: asyncio.Task[None] | None = None

    def current(self) -> Conversation:
        """The conversation of the release that answers now."""
        return self._current

    def follow(self) -> None:
        """Starts to follow, in the background, where there is something to follow."""
        if self._source is None or self._every_s <= 0:
            return
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001 - the store may be away for a while; what serves goes on
                logger.warning("cannot see which release is promoted: %s: %s", type(error).__name__, error)
            await asyncio.sleep(self._every_s)

    async def look(self) -> bool:
        """Takes the promoted release up where it is another; returns whether it was."""
        assert self._source is not None, "there is nothing to follow"
        version = await asyncio.to_thread(self._source.promoted)
        if not version or self._current.release.name.endswith(f"/{version}"):
            self.refused = ""
            return False
        if time.monotonic() < self._refused.get(version, 0.0):
            return False
        try:
            opened = await asyncio.to_thread(self._source.open, version)
            conversation = await asyncio.to_thread(self._converse, opened)
            await self._prepare(opened.pins)
        except PartUnavailableError as error:
            logger.warning("release %s is not taken up yet: %s", version, error)
            return False
        except Exception as error:  # noqa: BLE001 - whatever a release does, the one before goes on
            if version not in self._refused:
                self._observer.count("release_refused")
                logger.error(
                    "release %s is refused, %s goes on: %s", version, self._current.release.name, _reason(error)
                )
            self._refused[version] = time.monotonic() + TRY_REFUSED_AGAIN_S
            self.refused = self._current.release.name.rpartition("/")[0] + f"/{version}"
            return False
        before, self._current = self._current.release.name, conversation
        self._refused.pop(version, None)
        self.refused = ""
        self._observer.count("release_taken_up")
        logger.info("%s answers from now on, %s no longer", conversation.release.name, before)
        return True


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
