"""Searching a published index, or a catalog of several collections.

In: an index artifact (every file verified before it is parsed), and the recipe's encoder. Out: the k best passages of
each query, best first, equal scores by chunk id: by vectors (`dense`), by words (`lexical`), or both fused (`hybrid`);
under a filter; ordered anew by a cross-encoder where the recipe names one. Dense search embeds queries with the encoder
that built the index and refuses any other; lexical search needs no encoder.
A catalog is searched like one index: by score where all its collections are searched alike, by reciprocal rank where
their scores are of different kinds.
Not covered: who the caller is; `groups` comes from the server.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from cluster.errors import ArtifactError, UserError
from retrieval.attributes import attribute_values
from retrieval.config import EncoderConfig, SearchConfig, SearchMode
from retrieval.encoder import BASE_INPUT, Encoder, EncoderSource, encoder_digest, load_encoder
from retrieval.filters import EVERYTHING, NOTHING, Filter, Kind, typed
from retrieval.fusion import Ranking, by_convex_sum, by_reciprocal_rank, by_score
from retrieval.records import Chunk, Document, Hit, Passage
from retrieval.shards import INDEX_FORMAT

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cluster.manifest import ArtifactRef
    from cluster.store import Artifact
    from retrieval.by_document import ChunksByDocument
    from retrieval.rerank import Reranker
    from retrieval.searcher import IndexSearcher

Mode = Literal["dense", "lexical", "hybrid"]
Place = tuple[int, int]
"""Number of the member, global row in it."""
COLLECTION = "collection"
"""Key that a filter over a catalog may name."""


def require_chunks(index: Artifact, k: int, key: str) -> None:
    """Refuses a `k` that no search of the index could fill, before anything is loaded.

    Raises:
        UserError: naming `key`, the recipe key that `k` came from.
    """
    _require_rows(int(index.manifest.counts["chunks"]), k, key)


def _require_rows(rows: int, k: int, key: str) -> None:
    if not 1 <= k <= rows:
        raise UserError(f"{key} is {k} but the index has {rows} chunks: set {key} to between 1 and {rows}")


class _Member:
    """One index, with the collection that it is."""

    def __init__(
        self, searcher: IndexSearcher, source: EncoderSource | None, collection: str = "", access: Sequence[str] = ()
    ) -> None:
        self.searcher = searcher
        self.source = source
        """None in a lexical index."""
        self.collection = collection
        self.access = frozenset(access)

    def resolve(self, mode: SearchMode) -> Mode:
        """`mode`, or what the index was built for.

        Raises:
            UserError: the index cannot serve it.
        """
        found: Mode = self.searcher.table.mode if mode == "auto" else mode
        if found != "lexical" and not self.searcher.has_vectors:
            raise UserError(
                f"search.mode is {found}, but {self.searcher.ref} holds no embeddings: set search.mode=lexical, "
                f"or build the index with search.mode={found} and an encoder that knows its language"
            )
        if found != "dense" and not self.searcher.has_words:
            raise UserError(
                f"search.mode is {found}, but {self.searcher.ref} has no lexical files: set search.mode=dense"
            )
        return found


class Retriever:
    """An opened index or catalog. Searches on CPU may run from several threads; on a GPU they take turns."""

    def __init__(self, artifact: Artifact, members: list[_Member], search: SearchConfig, device: str | None) -> None:
        """Use `Retriever.open`."""
        self.ref: ArtifactRef = artifact.ref
        self._members = members
        self._config = search
        self._device = device
        self._encoders: dict[str, Encoder] = {}
        self._reranker: Reranker | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        encoder: EncoderConfig,
        search: SearchConfig | None = None,
        *,
        device: str | None = None,
    ) -> Retriever:
        """Verify and map an index artifact, or a catalog and the indexes that it names.

        Args:
            artifact: Of kind `index`.
            encoder: The recipe's encoder; loaded at the first dense search. An index that a tuned encoder embedded
                is searched with that one, and a collection with an encoder of its own with its own.
            search: How to search (the recipe's `search` section); none takes the defaults.
            device: Of the query encoder; by default `cuda` where there is one.

        Raises:
            ArtifactError: damaged, of another format, or built by another encoder (both are named).
            UserError: `search.gpu` where there is no GPU search.
        """
        from retrieval.collections import is_catalog, read_catalog

        config = search or SearchConfig()
        if not is_catalog(artifact):
            return cls(artifact, [_open_member(artifact, encoder, config)], config, device)
        members = [
            _open_member(artifact.store.open_ref(entry.ref), entry.encoder or encoder, config, entry.name, entry.access)
            for entry in read_catalog(artifact)
        ]
        return cls(artifact, members, config, device)

    def __len__(self) -> int:
        """Number of chunks."""
        return sum(member.searcher.live for member in self._members)

    @property
    def mode(self) -> Mode:
        """How a search without `mode` searches; of a catalog, its first collection."""
        return self._members[0].resolve(self._config.mode)

    def search(
        self,
        queries: Sequence[str],
        k: int,
        key: str = "k",
        *,
        filter: Filter | None = None,
        mode: SearchMode | None = None,
        groups: frozenset[str] | None = None,
    ) -> list[list[Hit]]:
        """The k best passages of each query, best first; fewer only where fewer are allowed. A lexical hit may score 0.

        Args:
            queries: Any number; embedded and searched together.
            k: Passages per query.
            key: Recipe key that `k` came from, to name in the error.
            filter: Only passages that match; of a catalog, `collection` names the collection.
            mode: Instead of the recipe's `search.mode`.
            groups: Of the caller; only collections that are open to one of them, or to everybody, are searched.
                None is a trusted caller, who sees all.

        Raises:
            UserError: `k` is not between 1 and the number of chunks that the caller may see, or the index cannot serve
                the mode.
        """
        return self._search(queries, k, key, filter, mode, groups, {})

    def search_and_embed(
        self, queries: Sequence[str], k: int, *, filter: Filter | None = None, groups: frozenset[str] | None = None
    ) -> tuple[list[list[Hit]], npt.NDArray[np.float32] | None]:
        """`search`, and the query embeddings by the (first) index's encoder (n, dim) float32, in one pass; none where
        no index here has an encoder.

        Raises:
            UserError: as `search`.
        """
        source = self._first_source()
        vectors = None if source is None else self._encode(source, queries)
        known = {} if source is None or vectors is None else {source.digest(): vectors}
        return self._search(queries, k, "k", filter, None, groups, known), vectors

    def visible(self, groups: frozenset[str] | None) -> int:
        """Number of chunks that a caller of these groups may see; None sees all."""
        return sum(self._members[place].searcher.live for place in self._open_to(groups))

    def _open_to(self, groups: frozenset[str] | None) -> list[int]:
        return [
            place
            for place, member in enumerate(self._members)
            if groups is None or not member.access or member.access & groups
        ]

    def _search(
        self,
        queries: Sequence[str],
        k: int,
        key: str,
        filter: Filter | None,
        mode: SearchMode | None,
        groups: frozenset[str] | None,
        vectors: dict[str, npt.NDArray[np.float32]],
    ) -> list[list[Hit]]:
        visible, rows = self._open_to(groups), self.visible(groups)
        if groups is not None and not rows:
            return [[] for _ in queries]
        _require_rows(rows, k, key)
        if not queries:
            return []
        wanted = {place: self._bound(self._members[place], filter) for place in visible}
        searched = {place: bound for place, bound in wanted.items() if bound != NOTHING}
        depth = max(k, self._config.rerank_candidates) if self._config.rerank else k
        found = self._find(queries, depth, searched, mode or self._config.mode, vectors)
        hits = self._hits(found, searched)
        return self._load_reranker().rerank(queries, hits, k) if self._config.rerank else hits

    @property
    def embeds(self) -> bool:
        """Whether an index here has an encoder."""
        return self._first_source() is not None

    def kinds(self) -> dict[str, set[Kind]]:
        """The keys that a filter may name, and the kinds of their values."""
        found: dict[str, set[Kind]] = {}
        for member in self._members:
            for key, kinds in member.searcher.kinds().items():
                found.setdefault(key, set()).update(kinds)
        return {**found, COLLECTION: {"text"}} if self.collections else found

    @property
    def collections(self) -> list[str]:
        """Names of a catalog's collections."""
        return [member.collection for member in self._members if member.collection]

    def holds(self, doc_id: str) -> bool:
        """Whether a document of that id has a passage here."""
        return any(member.searcher.holds(doc_id) for member in self._members)

    def chunks(self) -> Iterator[Chunk]:
        """Chunks that are not deleted, in document and offset order, collection by collection."""
        for member in self._members:
            yield from member.searcher.chunks()

    def by_document(self) -> ChunksByDocument:
        """The chunks of each document, read from the mapped files when they are asked for."""
        from retrieval.by_document import ChunksByDocument

        return ChunksByDocument([member.searcher for member in self._members])

    def documents(self) -> Iterator[Document]:
        """Documents that are not deleted, in corpus order, with their text, collection by collection."""
        for member in self._members:
            yield from member.searcher.documents()

    def encode_queries(self, queries: Sequence[str]) -> npt.NDArray[np.float32]:
        """Query embeddings by the (first) index's encoder, (n, dim) float32; loads it at the first call.

        Raises:
            UserError: no index here has an encoder.
        """
        return self._encode(self._require_source(), queries)

    def embed(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], list[int], int]:
        """As `encode_queries`, with the tokens of each text before it is cut, and the most tokens that are read."""
        source = self._require_source()
        vectors = self._encode(source, texts)
        with self._lock:
            encoder = self._encoders[source.digest()]
            return vectors, encoder.count_tokens(texts), encoder.max_tokens

    def _first_source(self) -> EncoderSource | None:
        return next((member.source for member in self._members if member.source is not None), None)

    def _require_source(self) -> EncoderSource:
        source = self._first_source()
        if source is None:
            raise UserError(f"{self.ref} is lexical: it has no encoder")
        return source

    def _encode(self, source: EncoderSource, queries: Sequence[str]) -> npt.NDArray[np.float32]:
        digest = source.digest()
        with self._lock:  # one owner: padding buffers and torch's thread pool are shared
            if digest not in self._encoders:
                self._encoders[digest] = load_encoder(source, self._device)
            return self._encoders[digest].encode_queries(queries)

    def _load_reranker(self) -> Reranker:
        from retrieval.rerank import Reranker

        with self._lock:
            if self._reranker is None:
                self._reranker = Reranker(self._config.rerank, self._device)
            return self._reranker

    def _bound(self, member: _Member, filter: Filter | None) -> Filter | None:
        if filter is None or not member.collection:
            return filter
        scalar = typed(member.collection)
        assert scalar is not None, "a name is text"
        bound = filter.bind(COLLECTION, [scalar])
        return None if bound == EVERYTHING else bound

    def _find(
        self,
        queries: Sequence[str],
        k: int,
        wanted: dict[int, Filter | None],
        mode: SearchMode,
        known: dict[str, npt.NDArray[np.float32]],
    ) -> list[Ranking[Place]]:
        """Rankings over all members: as one index where their scores compare, else by rank."""
        modes = {place: self._members[place].resolve(mode) for place in wanted}
        encoders = {self._members[place].searcher.table.encoder_digest for place in wanted if modes[place] != "lexical"}
        vectors = {
            digest: known[digest] if digest in known else self._encode(source, queries)
            for digest, source in (
                (self._members[place].searcher.table.encoder_digest, self._members[place].source)
                for place in wanted
                if modes[place] != "lexical"
            )
            if source is not None
        }
        if len(set(modes.values())) <= 1 and len(encoders) <= 1:
            return self._search_alike(queries, vectors, k, wanted, next(iter(modes.values()), "dense"))
        each = [
            self._search_alike(queries, vectors, k, {place: bound}, modes[place]) for place, bound in wanted.items()
        ]
        constant = self._config.rrf_constant
        return [by_reciprocal_rank(rankings, constant, k, self._names) for rankings in zip(*each, strict=True)]

    def _search_alike(
        self,
        queries: Sequence[str],
        vectors: dict[str, npt.NDArray[np.float32]],
        k: int,
        wanted: dict[int, Filter | None],
        mode: Mode,
    ) -> list[Ranking[Place]]:
        """Members whose scores compare, as if they were one index."""
        depth = max(k, self._config.candidates) if mode == "hybrid" else k
        dense: list[Ranking[Place]] = []
        words: list[Ranking[Place]] = []
        if mode != "lexical":
            found = {
                place: self._members[place].searcher.dense(
                    vectors[self._members[place].searcher.table.encoder_digest], depth, bound
                )
                for place, bound in wanted.items()
            }
            dense = self._merged(len(queries), found, depth)
        if mode != "dense":
            found = {
                place: self._members[place].searcher.lexical(queries, depth, bound, worded=mode == "hybrid")
                for place, bound in wanted.items()
            }
            words = self._merged(len(queries), found, depth)
        if mode != "hybrid":
            return dense or words
        return [self._fused(one, other, k) for one, other in zip(dense, words, strict=True)]

    def _fused(self, dense: Ranking[Place], words: Ranking[Place], k: int) -> Ranking[Place]:
        if self._config.fusion == "convex":
            return by_convex_sum(dense, words, self._config.dense_weight, k, self._names)
        return by_reciprocal_rank([dense, words], self._config.rrf_constant, k, self._names)

    def _merged(self, queries: int, found: dict[int, list[Ranking[int]]], k: int) -> list[Ranking[Place]]:
        merged = []
        for query in range(queries):
            items = [((place, row), score) for place, rankings in found.items() for row, score in rankings[query]]
            merged.append(items if len(found) == 1 else by_score(items, k, self._names))
        return merged

    def _names(self, places: Sequence[Place]) -> list[str]:
        """Chunk id and collection, which tell passages with equal scores apart."""
        names: dict[Place, str] = {}
        for number in {number for number, _ in places}:
            rows = [row for member, row in places if member == number]
            member = self._members[number]
            for row, chunk_id in zip(rows, member.searcher.chunk_ids(rows), strict=True):
                names[number, row] = f"{chunk_id} {member.collection}"
        return [names[place] for place in places]

    def _hits(self, found: list[Ranking[Place]], wanted: dict[int, Filter | None]) -> list[list[Hit]]:
        chunks: dict[Place, Chunk] = {}
        for number, bound in wanted.items():
            member = self._members[number]
            rows = [row for ranking in found for (place, row), _ in ranking if place == number]
            for row, chunk in member.searcher.chunks_at(rows).items():
                if bound is not None and not bound.matches(attribute_values(vars(chunk))):
                    raise ArtifactError(
                        f"{member.searcher.ref}: its attributes are not those of its chunks (chunk {chunk.chunk_id}): "
                        "rebuild the index"
                    )
                chunks[number, row] = chunk
        return [
            [
                Hit(Passage.of(chunks[place]), score, rank, self._members[place[0]].collection)
                for rank, (place, score) in enumerate(ranking, start=1)
            ]
            for ranking in found
        ]


def _open_member(
    artifact: Artifact, encoder: EncoderConfig, search: SearchConfig, collection: str = "", access: Sequence[str] = ()
) -> _Member:
    from retrieval.searcher import IndexSearcher

    manifest = artifact.manifest
    if manifest.kind != "index" or manifest.format != INDEX_FORMAT:
        raise ArtifactError(
            f"{artifact.ref} is a {manifest.kind} of format {manifest.format}, this rayft searches an index of "
            f"format {INDEX_FORMAT}: run `rayft index build RECIPE`"
        )
    lexical = manifest.measured.get("mode") == "lexical"
    source = None if lexical else _source_of(artifact, encoder)
    searcher = IndexSearcher.open(artifact, gpu=search.gpu)
    if source is not None and searcher.table.encoder_digest != source.digest():
        raise _other_encoder(artifact, searcher.table.encoder, searcher.table.encoder_digest, source)
    return _Member(searcher, source, collection, access)


def _source_of(artifact: Artifact, encoder: EncoderConfig) -> EncoderSource:
    """The encoder that embedded the index: the tuned one among its parents, or else the recipe's.

    Raises:
        ArtifactError: the tuned one was tuned from another model than the recipe's.
    """
    from cluster.manifest import ArtifactRef

    parent = artifact.manifest.parents.get("encoder")
    if parent is None:
        return EncoderSource(encoder)
    tuned = artifact.store.open_ref(ArtifactRef.parse(parent))
    base = tuned.manifest.inputs.get(BASE_INPUT, "")
    if base != encoder_digest(encoder):
        raise _other_encoder(artifact, f"{parent}, tuned from another model", base, EncoderSource(encoder))
    return EncoderSource.of_artifact(encoder, tuned)


def _other_encoder(artifact: Artifact, name: str, digest: str, offered: EncoderSource) -> ArtifactError:
    return ArtifactError(
        f"{artifact.ref} was built with the encoder {name} ({digest[:12]}), the recipe's encoder.model is "
        f"{offered.config.model} ({offered.digest()[:12]}): run `rayft index build RECIPE`, or set encoder.model back"
    )
