"""The graph as Ray Serve deployments: ingress (API and router) → retriever → generator.

In: a recipe, the store's address, a release. Out: a Serve application pinned to that release. The deployments are
thin: logic lives in conversation.py, api.py, the engine and the retriever. Each loads and verifies what it serves in
its constructor, so a replica that does not fit its release never becomes ready. The first token is two hops away.
Not covered: bringing the application up and down (serving/service.py).
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from cluster.errors import ArtifactError
from cluster.releases import Release
from cluster.store import ArtifactRef, Store
from retrieval.records import Hit
from serving.api import Limits, make_api
from serving.config import GenerationConfig, ServeConfig, ServingRecipe
from serving.conversation import Conversation, ServedRelease
from serving.engine import Completion, Engine, GenerationRequest
from serving.router import Router
from serving.router_config import RouterConfig
from serving.strategies import available_strategies
from training.config import ModelConfig
from training.format import FORMAT_VERSION, PromptFormat

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

    from cluster.store import Artifact
    from retrieval.retriever import Retriever

INGRESS_CPUS = 0.1
SEARCH_BATCH = 32
CONSTRUCTOR_TRIES = 1  # what fails to load is damaged or does not fit, and will not fit the next time
UNAVAILABLE = (RayActorError, BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError)


class Searches(Protocol):
    """The part of `retrieval.retriever.Retriever` that serving uses."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best hits of each query."""
        ...


class Generator:
    """Owns an engine."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        """`load` opens the engine, on the replica."""
        self._engine = load()

    async def generate(self, request: GenerationRequest) -> Completion:
        """One completion; a caller that goes away frees its slot."""
        ticket = self._engine.submit(request)
        try:
            return await asyncio.wrap_future(ticket.completion)
        finally:
            ticket.cancel()  # without effect on a request that has ended

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[str | Completion, None]:
        """Text pieces as they are generated, then the completion."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[str | Completion] = asyncio.Queue()

        def put(event: str | Completion) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self._engine.submit(request, put)
        ticket.completion.add_done_callback(lambda done: put(done.result()))
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, Completion):
                    return
        finally:
            ticket.cancel()

    async def ready(self) -> None:
        """Returns when the replica answers."""

    def check_health(self) -> None:
        """Serve replaces a replica whose engine is gone."""
        if not self._engine.alive:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


class RetrieverReplica:
    """Owns an index. One search runs at a time, in a thread; what arrives meanwhile is searched together next, so
    nothing waits for a batch to fill (Serve's own batching waits, and does not run in local testing mode)."""

    def __init__(self, load: Callable[[], Searches]) -> None:
        """`load` opens the retriever, on the replica."""
        self._retriever = load()
        self._waiting: list[tuple[str, int, asyncio.Future[list[Hit]]]] = []
        self._drainer: asyncio.Task[None] | None = None

    async def search(self, query: str, k: int) -> list[Hit]:
        """The k best hits; k must not exceed the index."""
        found: asyncio.Future[list[Hit]] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, k, found))
        if self._drainer is None or self._drainer.done():
            self._drainer = asyncio.create_task(self._drain())
        return await found

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:SEARCH_BATCH], self._waiting[SEARCH_BATCH:]
            queries, deepest = [query for query, _, _ in batch], max(k for _, k, _ in batch)
            try:
                results = await asyncio.to_thread(self._retriever.search, queries, deepest)
            except Exception as error:  # noqa: BLE001 - raised again where each query waits
                for _, _, found in batch:
                    if not found.done():
                        found.set_exception(error)
                continue
            for (_, k, found), hits in zip(batch, results, strict=True):
                if not found.done():  # its caller may have gone
                    found.set_result(hits[:k])

    async def ready(self) -> None:
        """Returns when the replica answers."""


class Ingress:
    """Routes and answers; the HTTP API's home."""

    def __init__(
        self,
        served: ServedRelease,
        router: RouterConfig,
        limits: Limits,
        generator: DeploymentHandle,
        retriever: DeploymentHandle | None,
    ) -> None:
        """Handles lead to the other deployments."""
        self._generator, self._retriever = generator, retriever
        self._limits = limits
        self._conversation = Conversation(
            served, Router(router, served.available), self._search, self._generate, self._stream
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is constructed."""
        return make_api(self._conversation, self._limits, self._check_ready, UNAVAILABLE)

    async def _search(self, query: str, k: int) -> list[Hit]:
        assert self._retriever is not None, "strategies that retrieve are offered only beside an index"
        hits: list[Hit] = await self._retriever.search.remote(query, k)
        return hits

    async def _generate(self, request: GenerationRequest) -> Completion:
        completion: Completion = await self._generator.generate.remote(request)
        return completion

    async def _stream(self, request: GenerationRequest) -> AsyncGenerator[str | Completion, None]:
        response = self._generator.options(stream=True).stream.remote(request)
        ended = False
        try:
            async for event in response:
                ended = isinstance(event, Completion)
                yield event
        finally:
            if not ended:
                response.cancel()

    async def _check_ready(self) -> None:
        await self._generator.ready.remote()
        if self._retriever is not None:
            await self._retriever.ready.remote()


@dataclass(frozen=True)
class Loaders:
    """How replicas open what they serve; both must pickle."""

    engine: Callable[[], Engine]
    retriever: Callable[[], Searches] | None


def assemble(served: ServedRelease, router: RouterConfig, config: ServeConfig, loaders: Loaders) -> serve.Application:
    """The application; queues are bounded at ingress, so the deployments behind it take what ingress lets in."""
    in_flight = config.max_queued_requests
    behind = 2 * in_flight + 8  # `hybrid` asks twice
    generator = serve.deployment(
        Generator,
        name="generator",
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        num_replicas=config.generator.min_replicas,
        max_ongoing_requests=behind,
        ray_actor_options={"num_cpus": config.generator.cpus, "num_gpus": config.generator.gpus},
    ).bind(loaders.engine)
    retriever = None
    if loaders.retriever is not None:
        retriever = serve.deployment(
            RetrieverReplica,
            name="retriever",
            max_constructor_retry_count=CONSTRUCTOR_TRIES,
            num_replicas=config.retriever.min_replicas,
            max_ongoing_requests=behind,
            ray_actor_options={"num_cpus": config.retriever.cpus, "num_gpus": config.retriever.gpus},
        ).bind(loaders.retriever)
    limits = Limits(in_flight, config.request_timeout_s, config.max_body_bytes)
    # Ingress must see the requests that it refuses, hence far more at once than it admits.
    return serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        max_ongoing_requests=max(1000, 4 * in_flight),
        ray_actor_options={"num_cpus": INGRESS_CPUS},
    ).bind(served, router, limits, generator, retriever)


def build_app(recipe: ServingRecipe, store: Store, release: Release) -> serve.Application:
    """The application that serves `release`.

    Raises:
        ArtifactError: The release does not fit this program, or lacks an artifact.
    """
    served = served_release(recipe, store, release)
    adapters = {name: str(ref) for name, ref in release.adapters.items()}
    engine = functools.partial(
        open_engine, recipe.model.model_dump(), recipe.generation.model_dump(), store.uri, adapters, release.base_digest
    )
    retriever = functools.partial(
        open_retriever, recipe.encoder.model_dump(), recipe.search.model_dump(), store.uri, str(release.index)
    )
    return assemble(served, recipe.router, recipe.serve, Loaders(engine, retriever))


def served_release(recipe: ServingRecipe, store: Store, release: Release) -> ServedRelease:
    """What ingress needs of a release, read from its artifacts."""
    from training.samples import load_examples

    if release.adapters and release.prompt_format != FORMAT_VERSION:
        raise ArtifactError(
            f"{release.ref} was trained with prompt format {release.prompt_format}, this program writes format "
            f"{FORMAT_VERSION}: train again"
        )
    examples = load_examples(store.open_ref(release.samples)) if release.samples else ()
    return ServedRelease(
        name=str(release.ref),
        available=available_strategies(release.adapters, has_index=True, has_examples=bool(examples)),
        prompt_format=PromptFormat.load(recipe.prompt, recipe.language),
        examples=examples,
        generation=recipe.generation,
        seed=recipe.seed,
        passages=_public_chunks(store.open_ref(release.index)),
    )


def open_engine(
    model: dict[str, Any], generation: dict[str, Any], store_uri: str, adapters: dict[str, str], base_digest: str
) -> Engine:
    """The engine of a release; called on the replica.

    Raises:
        ArtifactError: The base model is not the one that the release was made with.
    """
    from cluster.model_source import model_digest
    from serving.transformers_engine import TransformersEngine
    from training.base_model import base_model_directory

    config, settings, store = ModelConfig(**model), GenerationConfig(**generation), Store(store_uri)
    base = base_model_directory(config)
    if base_digest and (found := model_digest(base)) != base_digest:
        raise ArtifactError(
            f"model.base: the release was made with a base model of digest {base_digest[:12]}, {config.base} has "
            f"{found[:12]}; serve the base model that the adapters were trained on"
        )
    directories = {name: store.open_ref(ArtifactRef.parse(ref)).directory() for name, ref in adapters.items()}
    return TransformersEngine(base, directories, config.precision, settings.batch_rows, settings.threads)


def open_retriever(encoder: dict[str, Any], search: dict[str, Any], store_uri: str, index: str) -> Searches:
    """The retriever of a release; called on the replica."""
    from retrieval.config import EncoderConfig, SearchConfig
    from retrieval.retriever import Retriever

    artifact = Store(store_uri).open_ref(ArtifactRef.parse(index))
    retriever = Retriever.open(artifact, EncoderConfig(**encoder), SearchConfig(**search))
    retriever.search(["warm up"], 1)  # the encoder is loaded at the first search: 5 s that no user should wait
    return PublicSearch(retriever)


class PublicSearch:
    """A retriever as a caller without any group sees it: collections with `access` are not there."""

    def __init__(self, retriever: Retriever) -> None:
        """Wrap an opened retriever."""
        self._retriever = retriever

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best public hits of each query."""
        return self._retriever.search(queries, k, groups=frozenset())


def _public_chunks(index: Artifact) -> int:
    """Chunks that everybody may see; a catalog counts them apart."""
    counts = index.manifest.counts
    return int(counts.get("public_chunks", counts["chunks"]))
