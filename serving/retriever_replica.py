"""The retriever deployment: complete copies of the indexes that the releases under way need.

In: searches and texts with the pins of their release. Out: hits, with the query's embedding where it is wanted. One
search runs at a time (GPU searches must take turns), in a thread; what arrives meanwhile is searched together next
where index, caller's groups, filter and k are the same, so nothing waits for a batch to fill and no caller's documents
are in reach of another's search. What a caller may see comes from the query alone.
Not covered: searching (retrieval/retriever.py), who the caller is.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.store import ArtifactRef, Store
from retrieval.config import EncoderConfig, SearchConfig
from retrieval.filters import Filter
from retrieval.records import Hit
from serving.generator import first_that_loads
from serving.interfaces import Embedded, Found, Observer, Pins, SearchQuery
from serving.observing import OpenSpan
from serving.residents import Residents
from serving.telemetry import SilentObserver

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SEARCH_BATCH = 32


class Searches(Protocol):
    """The part of `retrieval.retriever.Retriever` that serving uses."""

    @property
    def embeds(self) -> bool:
        """Whether the index has an encoder."""
        ...

    def visible(self, groups: frozenset[str] | None) -> int:
        """Passages that a caller of these groups may see."""
        ...

    def search(
        self, queries: Sequence[str], k: int, *, filter: Filter | None = None, groups: frozenset[str] | None = None
    ) -> list[list[Hit]]:
        """The k best hits of each query."""
        ...

    def search_and_embed(
        self, queries: Sequence[str], k: int, *, filter: Filter | None = None, groups: frozenset[str] | None = None
    ) -> tuple[list[list[Hit]], npt.NDArray[np.float32] | None]:
        """The k best hits of each query, and the queries' embeddings."""
        ...

    def encode_queries(self, queries: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeddings (n, dim) float32."""
        ...

    def embed(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], list[int], int]:
        """Embeddings (n, dim) float32, the tokens of each text before it is cut, the most tokens that are read."""
        ...


class RetrieverSource(Protocol):
    """Opens indexes on a replica; pickles."""

    def open(self, index: str) -> Searches:
        """The retriever of an index.

        Raises:
            ArtifactError: It is missing, damaged or of another encoder.
        """
        ...


@dataclass
class _Asked:
    query: SearchQuery
    index: str
    retriever: Searches
    found: asyncio.Future[Found]

    def together_with(self, other: _Asked) -> bool:
        return (self.index, self.query.groups, self.query.filter, self.query.k) == (
            other.index,
            other.query.groups,
            other.query.filter,
            other.query.k,
        )


class RetrieverReplica:
    """Owns the indexes; see the module's docstring."""

    def __init__(
        self,
        source: RetrieverSource,
        first: Callable[[], list[Pins]],
        keep_s: float = 300.0,
        observe: Callable[[], Observer] = SilentObserver,
    ) -> None:
        """Opens an index, before the replica counts as ready; see `Generator` for the arguments."""
        self._observer = observe()
        self._source = source
        self._indexes: Residents[Searches] = Residents(lambda _, retriever: None, keep_s)
        self._waiting: list[_Asked] = []
        self._drainer: asyncio.Task[None] | None = None
        candidates = [pins for pins in first() if pins.index]
        pins, retriever = first_that_loads(candidates, lambda pins: source.open(pins.index))
        self._indexes.add(pins.index, retriever)

    async def search(self, query: SearchQuery, pins: Pins) -> Found:
        """The best passages that the caller may see, k of them or all."""
        with OpenSpan(self._observer, "search", {"k": query.k}, query.traceparent) as span:
            async with self._indexes.held(pins.index, functools.partial(self._source.open, pins.index)) as retriever:
                self._indexes.keep({pins.index})
                waiting: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
                self._waiting.append(_Asked(query, pins.index, retriever, waiting))
                if self._drainer is None or self._drainer.done():
                    self._drainer = asyncio.create_task(self._drain())
                found = await waiting
                span.set(hits=len(found.hits))
                return found

    async def embed(self, texts: Sequence[str], pins: Pins) -> Embedded:
        """Embeddings by the index's encoder.

        Raises:
            UserError: The index has none.
        """
        async with self._indexes.held(pins.index, functools.partial(self._source.open, pins.index)) as retriever:
            vectors, tokens, max_tokens = await asyncio.to_thread(retriever.embed, list(texts))
            return Embedded(vectors, tuple(tokens), max_tokens)

    async def prepare(self, pins: Pins) -> None:
        """Loads the pinned index, beside what serves; without effect where none is pinned.

        Raises:
            ArtifactError: It does not load; everything else goes on as before.
        """
        if pins.index:
            async with self._indexes.held(pins.index, functools.partial(self._source.open, pins.index)):
                pass

    async def _drain(self) -> None:
        while self._waiting:
            batch = [asked for asked in self._waiting if asked.together_with(self._waiting[0])][:SEARCH_BATCH]
            taken = {id(asked) for asked in batch}
            self._waiting = [asked for asked in self._waiting if id(asked) not in taken]
            batch = [asked for asked in batch if not asked.found.done()]  # its caller may have gone
            if not batch:
                continue
            try:
                results = await asyncio.to_thread(_search, batch)
            except Exception as error:  # noqa: BLE001 - raised again where each query waits
                for asked in batch:
                    if not asked.found.done():
                        asked.found.set_exception(error)
                continue
            for asked, found in zip(batch, results, strict=True):
                if not asked.found.done():
                    asked.found.set_result(found)

    async def ready(self) -> None:
        """Returns when the replica answers."""

    def __del__(self) -> None:
        if hasattr(self, "_observer"):
            self._observer.close()


def _search(batch: list[_Asked]) -> list[Found]:
    """Searches what belongs together, in a thread."""
    query, retriever = batch[0].query, batch[0].retriever
    texts = [asked.query.text for asked in batch]
    embed = retriever.embeds and any(asked.query.embed for asked in batch)
    k = min(query.k, retriever.visible(query.groups))
    if k < 1:
        vectors = retriever.encode_queries(texts) if embed else None
        hits: list[list[Hit]] = [[] for _ in texts]
    elif embed:
        hits, vectors = retriever.search_and_embed(texts, k, filter=query.filter, groups=query.groups)
    else:
        hits, vectors = retriever.search(texts, k, filter=query.filter, groups=query.groups), None
    return [
        Found(tuple(best), vectors[place] if vectors is not None and asked.query.embed else None)
        for place, (asked, best) in enumerate(zip(batch, hits, strict=True))
    ]


@dataclass(frozen=True)
class StoreRetrievers:
    """Retrievers over the indexes of a store, as the recipe says."""

    encoder: EncoderConfig
    search: SearchConfig
    store_uri: str

    def open(self, index: str) -> Searches:
        """The retriever, warm: the encoder is loaded at the first search, 5 s that no user should wait."""
        from retrieval.retriever import Retriever

        artifact = Store(self.store_uri).open_ref(ArtifactRef.parse(index))
        retriever = Retriever.open(artifact, self.encoder, self.search)
        retriever.search_and_embed(["warm up"], 1)
        return retriever
