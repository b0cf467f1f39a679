"""The generator deployment: engines with adapters, as many as the releases under way need.

In: generation requests with the pins of their release. Out: completions, or text pieces and then the completion. What a
request's pins name and this replica lacks is loaded when it is asked for, beside what serves; what the newest release
does not need is dropped some time after its last use. A caller that goes away frees its slot.
Not covered: generating (the engines), which release is current (serving/live_releases.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import ArtifactError
from cluster.store import ArtifactRef, Store
from serving.config import GenerationConfig
from serving.engine import Completion, Engine, GenerationRequest
from serving.interfaces import Observer, Pins
from serving.observing import OpenSpan
from serving.residents import Residents
from serving.telemetry import SilentObserver
from training.config import ModelConfig

logger = logging.getLogger(__name__)


class EngineSource(Protocol):
    """Opens engines on a replica; pickles."""

    def base(self, pins: Pins) -> str:
        """Digest of the base model that the pins mean."""
        ...

    def open(self, pins: Pins) -> Engine:
        """An engine with the pinned base model and adapters, these under the names of their artifacts.

        Raises:
            ArtifactError: A part is missing, damaged or does not fit.
        """
        ...

    def adapter(self, ref: str) -> Path:
        """The directory of an adapter.

        Raises:
            ArtifactError: It is missing or damaged.
        """
        ...


@dataclass
class _Loaded:
    engine: Engine
    adapters: Residents[None]


class Generator:
    """Owns the engines; see the module's docstring."""

    def __init__(
        self,
        source: EngineSource,
        first: Callable[[], list[Pins]],
        keep_s: float = 300.0,
        observe: Callable[[], Observer] = SilentObserver,
    ) -> None:
        """Opens the engine of a release, before the replica counts as ready.

        Args:
            source: Opens engines.
            first: Pins to start with: the first that loads is taken, and the error of the last is raised.
            keep_s: Seconds that a part is kept after its last use, once a newer release is served.
            observe: Makes the observer whose spans stand below those of ingress.
        """
        self._observer = observe()
        self._source = source
        self._keep_s = keep_s
        self._engines: Residents[_Loaded] = Residents(lambda _, loaded: loaded.engine.close(), keep_s)
        pins, loaded = first_that_loads(first(), self._open)
        self._engines.add(source.base(pins), loaded)

    def _open(self, pins: Pins) -> _Loaded:
        engine = self._source.open(pins)
        adapters: Residents[None] = Residents(lambda ref, _: engine.unload_adapter(ref), self._keep_s)
        for ref in pins.adapters.values():
            adapters.add(ref, None)
        return _Loaded(engine, adapters)

    @contextlib.asynccontextmanager
    async def _engine(self, pins: Pins, adapter: str | None) -> AsyncIterator[Engine]:
        """The engine that has the adapter, both of them kept while the block runs."""
        base = self._source.base(pins) if pins.base_digest else await asyncio.to_thread(self._source.base, pins)
        async with self._engines.held(base, functools.partial(self._open, pins)) as loaded:
            self._engines.keep({base})
            loaded.adapters.keep(pins.adapters.values())
            if adapter not in pins.adapters.values():  # the engine says what it thinks of an unknown one
                yield loaded.engine
                return
            async with self._adapter(loaded, str(adapter)):
                yield loaded.engine

    def _adapter(self, loaded: _Loaded, ref: str) -> contextlib.AbstractAsyncContextManager[None]:
        def load() -> None:
            loaded.engine.load_adapter(ref, self._source.adapter(ref))

        return loaded.adapters.held(ref, load)

    async def generate(self, request: GenerationRequest, pins: Pins) -> Completion:
        """One completion; a caller that goes away frees its slot."""
        with self._span(request) as span:
            async with self._engine(pins, request.adapter) as engine:
                ticket = engine.submit(request)
                try:
                    return _told(span, await asyncio.wrap_future(ticket.completion))
                finally:
                    ticket.cancel()  # without effect on a request that has ended

    async def stream(self, request: GenerationRequest, pins: Pins) -> AsyncGenerator[str | Completion, None]:
        """Text pieces as they are generated, then the completion."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[str | Completion] = asyncio.Queue()

        def put(event: str | Completion) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self._span(request) as span:
            async with self._engine(pins, request.adapter) as engine:
                ticket = engine.submit(request, put)
                ticket.completion.add_done_callback(lambda done: put(done.result()))
                try:
                    while True:
                        for event in _joined(await events.get(), events):
                            if isinstance(event, Completion):
                                yield _told(span, event)
                                return
                            yield event
                finally:
                    ticket.cancel()

    def _span(self, request: GenerationRequest) -> OpenSpan:
        """Around all that the replica does for a request: loading what it pins, waiting, generating."""
        return OpenSpan(self._observer, "engine", {"adapter": request.adapter or ""}, request.traceparent)

    async def prepare(self, pins: Pins) -> None:
        """Loads what the pins name, beside what serves.

        Raises:
            ArtifactError: It does not load; everything else goes on as before.
        """
        base = await asyncio.to_thread(self._source.base, pins)
        async with self._engines.held(base, functools.partial(self._open, pins)) as loaded:
            for ref in pins.adapters.values():
                async with self._adapter(loaded, ref):
                    pass

    async def ready(self) -> None:
        """Returns when the replica answers."""

    def check_health(self) -> None:
        """Serve replaces a replica whose engine is gone."""
        if not all(loaded.engine.alive for loaded in self._engines.things()):
            raise RuntimeError("an engine has stopped")

    def __del__(self) -> None:
        if hasattr(self, "_engines"):
            for loaded in self._engines.things():
                loaded.engine.close()
        if hasattr(self, "_observer"):
            self._observer.close()


def _told(span: OpenSpan, completion: Completion) -> Completion:
    """The completion, its figures told to the span."""
    span.set(
        finish_reason=completion.finish_reason,
        error_code=completion.error_code,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        queue_ms=completion.queue_ms,
        generation_ms=completion.generation_ms,
    )
    return completion


def _joined(first: str | Completion, events: asyncio.Queue[str | Completion]) -> list[str | Completion]:
    """What has arrived by now, the text in one piece: every piece is a message between processes."""
    text, arrived = "", first
    while isinstance(arrived, str):
        text += arrived
        if events.empty():
            return [text]
        arrived = events.get_nowait()
    return [text, arrived] if text else [arrived]


def first_that_loads(candidates: list[Pins], load: Callable[[Pins], Any]) -> tuple[Pins, Any]:
    """The first pins that load, with what was loaded. A replica that starts while a release that does not load is
    promoted takes the one that the graph was started with.

    Raises:
        ArtifactError: None loads; the last one's error.
    """
    for pins in candidates[:-1]:
        try:
            return pins, load(pins)
        except ArtifactError as error:
            logger.warning("%s does not load, %s is taken: %s", pins.release, candidates[-1].release, error)
    return candidates[-1], load(candidates[-1])


@dataclass(frozen=True)
class StoreEngines:
    """Engines over the artifacts of a store, as the recipe says."""

    model: ModelConfig
    generation: GenerationConfig
    store_uri: str

    def base(self, pins: Pins) -> str:
        """The pinned digest, or that of the recipe's base model."""
        from cluster.model_source import model_digest
        from training.base_model import base_model_directory

        return pins.base_digest or model_digest(base_model_directory(self.model))

    def open(self, pins: Pins) -> Engine:
        """The engine; refuses another base model than the pinned one, naming both."""
        from cluster.model_source import model_digest
        from training.base_model import base_model_directory

        base = base_model_directory(self.model)
        if pins.base_digest and (found := model_digest(base)) != pins.base_digest:
            raise ArtifactError(
                f"model.base: the release was made with a base model of digest {pins.base_digest[:12]}, "
                f"{self.model.base} has {found[:12]}; serve the base model that the adapters were trained on"
            )
        directories = {ref: self.adapter(ref) for ref in pins.adapters.values()}
        return open_engine(base, directories, self.generation, self.model)

    def adapter(self, ref: str) -> Path:
        """The adapter's verified directory."""
        return Store(self.store_uri).open_ref(ArtifactRef.parse(ref)).directory()


def open_engine(base: Path, adapters: dict[str, Path], generation: GenerationConfig, model: ModelConfig) -> Engine:
    """The recipe's engine; the other one is not imported."""
    if generation.engine == "vllm":
        from serving.vllm_engine import VllmEngine

        return VllmEngine(base, adapters, generation, model.precision)
    from serving.transformers_engine import TransformersEngine

    return TransformersEngine(base, adapters, model.precision, generation.batch_rows, generation.threads)
