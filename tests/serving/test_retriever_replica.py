import asyncio
import threading
import time

import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.errors import ArtifactError
from retrieval.filters import parse_filter
from retrieval.records import Hit, Passage
from serving.interfaces import SearchQuery
from serving.retriever_replica import RetrieverReplica
from serving.telemetry import Telemetry
from serving.tracing import Tracer
from tests.serving.fakes_graph import NamingRetrievers, pins_of

V0 = pins_of("v0")


class SlowRetriever:
    """Notes the searches and the threads it is called from; fails for a query `bad`."""

    embeds = True

    def __init__(self, passages=3):
        self.searches, self.threads, self.running, self.most_at_once, self.passages = [], set(), 0, 0, passages

    def visible(self, groups):
        return self.passages if "staff" in groups else min(2, self.passages)

    def search(self, queries, k, *, filter=None, groups=None):
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        self.threads.add(threading.current_thread())
        time.sleep(0.05)
        self.running -= 1
        self.searches.append((list(queries), k, filter, groups))
        assert 1 <= k <= self.visible(groups)
        if "bad" in queries:
            raise OSError("the index is gone")
        return [
            [Hit(Passage(query, "d", "", "", "", query, 0, 1), 1.0, rank + 1) for rank in range(k)] for query in queries
        ]

    def search_and_embed(self, queries, k, *, filter=None, groups=None):
        return self.search(queries, k, filter=filter, groups=groups), self.encode_queries(queries)

    def encode_queries(self, queries):
        return np.array([[float(len(query)), 0.0] for query in queries], np.float32)

    def embed(self, texts):
        return self.encode_queries(texts), [len(text.split()) for text in texts], 128


class One:
    def __init__(self, retriever):
        self.retriever = retriever

    def open(self, index):
        return self.retriever


def search_at_once(retriever, *queries):
    replica = RetrieverReplica(One(retriever), lambda: [V0])

    async def all_of_them():
        return await asyncio.gather(*(replica.search(query, V0) for query in queries), return_exceptions=True)

    return asyncio.run(all_of_them())


def test_retriever_searches_together_what_arrives_during_a_search():
    retriever = SlowRetriever()
    replica = RetrieverReplica(One(retriever), lambda: [V0])

    async def one_then_three():
        first = asyncio.create_task(replica.search(SearchQuery("a", 2), V0))
        await asyncio.sleep(0.01)
        return await asyncio.gather(first, *(replica.search(SearchQuery(text, 2), V0) for text in "bcd"))

    found = asyncio.run(one_then_three())
    assert [[hit.passage.text for hit in each.hits] for each in found] == [["a"] * 2, ["b"] * 2, ["c"] * 2, ["d"] * 2]
    assert [queries for queries, *_ in retriever.searches] == [["a"], ["b", "c", "d"]]
    assert threading.main_thread() not in retriever.threads and retriever.most_at_once == 1


def test_retriever_never_searches_callers_of_other_rights_together():
    retriever = SlowRetriever()
    tenant = parse_filter({"tenant": "acme"}, "filter")
    queries = [
        SearchQuery("a", 2),
        SearchQuery("b", 2, groups=frozenset({"staff"})),
        SearchQuery("c", 2, filter=tenant),
        SearchQuery("d", 1),
        SearchQuery("e", 2),
    ]
    search_at_once(retriever, *queries)
    assert [(q, k, f, set(g)) for q, k, f, g in retriever.searches] == [
        (["a", "e"], 2, None, set()),
        (["b"], 2, None, {"staff"}),
        (["c"], 2, tenant, set()),
        (["d"], 1, None, set()),
    ]


def test_retriever_never_searches_two_indexes_together():
    replica = RetrieverReplica(NamingRetrievers(), lambda: [V0])

    async def both():
        return await asyncio.gather(*(replica.search(SearchQuery("a", 1), pins_of(v)) for v in ("v0", "v1", "v0")))

    texts = [found.hits[0].passage.text for found in asyncio.run(both())]
    assert [text.split()[4] for text in texts] == ["index/test/v0", "index/test/v1", "index/test/v0"]


def test_retriever_k_beyond_what_the_caller_may_see_gives_fewer_hits():
    few, more, none = search_at_once(
        SlowRetriever(), SearchQuery("a", 9), SearchQuery("a", 9, groups=frozenset({"staff"})), SearchQuery("a", 0)
    )
    assert (len(few.hits), len(more.hits), len(none.hits)) == (2, 3, 0)
    [empty] = search_at_once(SlowRetriever(passages=0), SearchQuery("a", 3, embed=True))
    assert empty.hits == () and empty.embedding is not None


def test_retriever_gives_the_embedding_to_those_who_asked_for_it():
    plain, wanted, only = search_at_once(
        SlowRetriever(), SearchQuery("a", 1), SearchQuery("bb", 1, embed=True), SearchQuery("ccc", 0, embed=True)
    )
    assert plain.embedding is None
    assert wanted.embedding.tolist() == [2.0, 0.0] and len(wanted.hits) == 1
    assert only.embedding.tolist() == [3.0, 0.0] and only.hits == ()
    lexical = SlowRetriever()
    lexical.embeds = False
    [found] = search_at_once(lexical, SearchQuery("a", 1, embed=True))
    assert found.embedding is None and len(found.hits) == 1


def test_retriever_embeds_texts_with_their_tokens():
    replica = RetrieverReplica(One(SlowRetriever()), lambda: [V0])
    embedded = asyncio.run(replica.embed(["a bb", "c"], V0))
    assert embedded.vectors.tolist() == [[4.0, 0.0], [1.0, 0.0]]
    assert (embedded.tokens, embedded.max_tokens) == ((2, 1), 128)


def test_retriever_failure_reaches_every_caller_of_that_batch_and_not_the_next():
    retriever = SlowRetriever()
    failed = search_at_once(retriever, SearchQuery("x", 1), SearchQuery("bad", 1))
    assert [type(found) for found in failed] == [OSError, OSError]
    assert [len(found.hits) for found in search_at_once(retriever, SearchQuery("x", 1), SearchQuery("y", 2))] == [1, 2]


def test_retriever_batches_are_bounded():
    retriever = SlowRetriever()
    search_at_once(retriever, *[SearchQuery(str(number), 1) for number in range(70)])
    assert [len(queries) for queries, *_ in retriever.searches] == [32, 32, 6]


def test_retriever_does_not_search_for_a_caller_that_has_gone():
    retriever = SlowRetriever()
    replica = RetrieverReplica(One(retriever), lambda: [V0])

    async def leave():
        first = asyncio.create_task(replica.search(SearchQuery("a", 1), V0))
        gone = asyncio.create_task(replica.search(SearchQuery("gone", 1), V0))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(first, gone, return_exceptions=True)
        await replica.search(SearchQuery("b", 1), V0)

    asyncio.run(leave())
    assert ["a"] in [queries for queries, *_ in retriever.searches] or ["a", "gone"] in [
        queries for queries, *_ in retriever.searches
    ]
    assert ["gone"] not in [queries for queries, *_ in retriever.searches]


def test_retriever_prepare_of_what_does_not_load_raises_and_changes_nothing():
    replica = RetrieverReplica(NamingRetrievers(), lambda: [V0])

    async def prepare():
        with pytest.raises(ArtifactError, match="index/test/broken is damaged"):
            await replica.prepare(pins_of("broken"))
        await replica.prepare(pins_of("v1", index=False))
        return await replica.search(SearchQuery("a", 1), V0)

    assert len(asyncio.run(prepare()).hits) == 1


def test_retriever_says_what_it_found_in_a_span_below_the_callers():
    spans = InMemorySpanExporter()
    observer = Telemetry(tracer=Tracer(SimpleSpanProcessor(spans), "retriever"))
    replica = RetrieverReplica(NamingRetrievers(), lambda: [V0], observe=lambda: observer)
    asyncio.run(replica.search(SearchQuery("a", 3, traceparent=f"00-{'4' * 32}-{'5' * 16}-01"), V0))
    [span] = spans.get_finished_spans()
    assert (span.name, f"{span.parent.span_id:x}", f"{span.context.trace_id:x}") == ("search", "5" * 16, "4" * 32)
    assert span.attributes == {"rayft.k": 3, "rayft.hits": 1}
    replica.__del__()  # as Serve does when the replica stops
    assert spans._stopped, "nothing is left unsent"
