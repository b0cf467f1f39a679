"""Ingress's way to the other deployments: the retriever and the generator, with the pins of a request's release.

In: Serve's handles. Out: the functions that a conversation is given (serving/interfaces.py). A replica that dies before
it has answered is asked once more, elsewhere; one that dies in the middle of a stream breaks it, loudly. A caller that
goes away, or whose time is up, is cancelled on the replica. Not covered: deadlines (serving/api.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from cluster.errors import ArtifactError
from serving.engine import Completion, GenerationRequest
from serving.interfaces import Embedded, Found, Observer, PartUnavailableError, Pins, SearchQuery, StreamBrokenError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

REPLICA_DIED = (RayActorError, ReplicaUnavailableError)
NOT_THERE = (BackPressureError, DeploymentUnavailableError)
PREPARE_S = 600.0


class Hops:
    """The deployments behind ingress."""

    def __init__(self, generator: DeploymentHandle, retriever: DeploymentHandle | None, observer: Observer) -> None:
        """A graph without an index has no retriever."""
        self._generator = generator
        self._streaming = generator.options(stream=True)
        self._retriever = retriever
        self._observer = observer

    @property
    def retrieves(self) -> bool:
        """Whether there is a retriever."""
        return self._retriever is not None

    async def search(self, query: SearchQuery, pins: Pins) -> Found:
        """`serving.interfaces.Search`."""
        assert self._retriever is not None, "strategies that retrieve are offered only beside an index"
        method = self._retriever.search
        found: Found = await self._ask(lambda: method.remote(query, pins))
        return found

    async def embed(self, texts: Sequence[str], pins: Pins) -> Embedded:
        """`serving.interfaces.Embed`."""
        assert self._retriever is not None, "there are embeddings only beside an index"
        method = self._retriever.embed
        embedded: Embedded = await self._ask(lambda: method.remote(list(texts), pins))
        return embedded

    async def generate(self, request: GenerationRequest, pins: Pins) -> Completion:
        """`serving.interfaces.Generate`."""
        method = self._generator.generate
        completion: Completion = await self._ask(lambda: method.remote(request, pins))
        return completion

    async def stream(self, request: GenerationRequest, pins: Pins) -> AsyncGenerator[str | Completion, None]:
        """`serving.interfaces.Stream`."""
        for last in (False, True):
            response = self._streaming.stream.remote(request, pins)
            started = ended = False
            try:
                async for event in response:
                    started, ended = True, isinstance(event, Completion)
                    yield event
                if not ended:
                    raise StreamBrokenError("the stream stopped short of its completion")
                return
            except (*REPLICA_DIED, StreamBrokenError) as error:
                if ended:  # the answer is whole, and its reader has it
                    return
                if started:
                    self._observer.count("stream_broken")
                    raise StreamBrokenError(f"{request.request_id}: a generator replica died") from error
                self._again(error, last)
            except NOT_THERE as error:
                raise PartUnavailableError(type(error).__name__) from error
            except RayTaskError as error:
                raise _own(error) from None
            finally:
                if not ended:
                    response.cancel()

    async def prepare(self, pins: Pins) -> None:
        """Has every replica load what the pins name, beside what serves.

        Raises:
            ArtifactError: It does not load.
            PartUnavailableError: A replica was lost meanwhile.
        """
        if pins.index and self._retriever is None:
            raise ArtifactError(
                f"{pins.release} has an index, and the graph was started without a retriever: restart it"
            )
        handles = [self._generator, *([self._retriever] if self._retriever and pins.index else [])]
        try:
            for handle in handles:
                # One first, which waits until there is a replica: a broadcast to none would prepare nothing.
                await handle.prepare.remote(pins)
                await handle.broadcast("prepare", pins).results_async(timeout_s=PREPARE_S)
        except (*REPLICA_DIED, *NOT_THERE, TimeoutError) as error:
            raise PartUnavailableError(type(error).__name__) from error
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None

    async def ready(self) -> None:
        """Returns when both answer."""
        await self._ask(self._generator.ready.remote)
        if self._retriever is not None:
            await self._ask(self._retriever.ready.remote)

    async def _ask(self, call: Callable[[], Any]) -> Any:
        for last in (False, True):
            response = call()
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except REPLICA_DIED as error:
                self._again(error, last)
            except NOT_THERE as error:
                raise PartUnavailableError(type(error).__name__) from error
            except RayTaskError as error:
                raise _own(error) from None
        raise AssertionError("the second failure is raised")

    def _again(self, error: Exception, last: bool) -> None:
        """Counts the one retry; raises where it was used."""
        if last:
            raise PartUnavailableError(f"two replicas died in a row ({type(error).__name__})") from error
        self._observer.count("retried")


def _own(error: RayTaskError) -> Exception:
    """The replica's own exception, without Ray's traceback in its text. An artifact that does not load on this replica
    is not the caller's fault."""
    cause = error.cause
    if isinstance(cause, ArtifactError):
        logger.error("a replica could not load a part of its release: %s", cause)
        return PartUnavailableError("a part of the release does not load")
    return cause if isinstance(cause, Exception) else error
