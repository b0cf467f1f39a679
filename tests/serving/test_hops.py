import asyncio

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from cluster.errors import ArtifactError, UserError
from serving.engine import Completion
from serving.hops import Hops
from serving.interfaces import PartUnavailableError, SearchQuery, StreamBrokenError
from serving.telemetry import SilentObserver
from tests.serving.fakes import base_request
from tests.serving.fakes_graph import pins_of

DIED, DONE = ActorDiedError(), Completion("r", "Athens")
PINS, REQUEST = pins_of("v0"), base_request("Capital?")


class Counts(SilentObserver):
    def __init__(self):
        super().__init__()
        self.events = []

    def count(self, event):
        self.events.append(event)


class Response:
    """One call's: `said` ends in an exception, or in a value; a float waits."""

    def __init__(self, said):
        self._said = said
        self.cancelled = False

    def cancel(self):
        self.cancelled = True

    def __await__(self):
        return self._last().__await__()

    async def _last(self):
        async for event in self:
            last = event
        return last

    async def __aiter__(self):
        for event in self._said:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, float):
                await asyncio.sleep(event)
                continue
            yield event


class Handle:
    """A deployment that says what the test tells it to, call by call."""

    def __init__(self, *calls):
        self._calls = [Response(said) for said in calls]
        self.made = []

    def options(self, **_):
        return self

    def __getattr__(self, method):
        return self

    def remote(self, *args):
        self.made.append(self._calls[len(self.made)])
        return self.made[-1]


def hops_of(*calls, retriever=()):
    counts = Counts()
    return Hops(Handle(*calls), Handle(*retriever), counts), counts


async def collect(stream):
    events = []
    try:
        async for event in stream:
            events.append(event)
    except Exception as error:  # noqa: BLE001 - looked at by the test
        events.append(error)
    return events


def test_request_whose_replica_died_is_asked_once_more_and_counted():
    hops, counts = hops_of([DIED], [DONE])
    assert asyncio.run(hops.generate(REQUEST, PINS)) == DONE and counts.events == ["retried"]
    hops, counts = hops_of([DIED], [DIED])
    with pytest.raises(PartUnavailableError):
        asyncio.run(hops.generate(REQUEST, PINS))
    assert counts.events == ["retried"]


def test_search_whose_replica_died_is_asked_once_more():
    hops, counts = hops_of(retriever=([DIED], ["found"]))
    assert asyncio.run(hops.search(SearchQuery("a", 1), PINS)) == "found" and counts.events == ["retried"]


def test_stream_whose_replica_died_before_the_first_piece_is_asked_once_more():
    hops, counts = hops_of([DIED], ["A", DONE])
    assert asyncio.run(collect(hops.stream(REQUEST, PINS))) == ["A", DONE] and counts.events == ["retried"]
    hops, counts = hops_of([DIED], [DIED])
    assert isinstance(asyncio.run(collect(hops.stream(REQUEST, PINS)))[-1], PartUnavailableError)


@pytest.mark.parametrize("end", [[DIED], []], ids=["died", "stopped short"])
def test_stream_that_breaks_after_its_first_piece_is_neither_repeated_nor_taken_for_whole(end):
    hops, counts = hops_of(["A", *end], ["A", DONE])
    *pieces, last = asyncio.run(collect(hops.stream(REQUEST, PINS)))
    assert pieces == ["A"] and isinstance(last, StreamBrokenError) and counts.events == ["stream_broken"]


def test_stream_whose_replica_dies_after_the_completion_is_whole():
    hops, counts = hops_of(["A", DONE, DIED])
    assert asyncio.run(collect(hops.stream(REQUEST, PINS))) == ["A", DONE] and counts.events == []


def test_stream_whose_reader_leaves_is_cancelled_on_the_replica_and_one_that_ended_is_not():
    hops, _ = hops_of(["A", "B", DONE])

    async def leave():
        stream = hops.stream(REQUEST, PINS)
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    assert hops._generator.made[0].cancelled
    hops, _ = hops_of(["A", DONE])
    asyncio.run(collect(hops.stream(REQUEST, PINS)))
    assert not hops._generator.made[0].cancelled


def test_request_whose_time_is_up_is_cancelled_on_the_replica():
    hops, _ = hops_of([5.0, DONE])

    async def hurry():
        async with asyncio.timeout(0.05):
            await hops.generate(REQUEST, PINS)

    with pytest.raises(TimeoutError):
        asyncio.run(hurry())
    assert hops._generator.made[0].cancelled


def test_full_deployment_is_unavailable_and_not_asked_again():
    hops, counts = hops_of([BackPressureError(1, 1)])
    with pytest.raises(PartUnavailableError):
        asyncio.run(hops.generate(REQUEST, PINS))
    assert counts.events == []


def on_replica(error):
    return RayTaskError("search", "Traceback with a question in it", error).as_instanceof_cause()


def test_error_of_a_replica_arrives_as_itself_and_without_its_traceback():
    hops, _ = hops_of(retriever=([on_replica(UserError("it has no encoder"))],))
    with pytest.raises(UserError) as raised:
        asyncio.run(hops.embed(["a"], PINS))
    assert str(raised.value) == "it has no encoder"


def test_part_that_does_not_load_for_a_request_is_not_the_callers_fault():
    for call in ("generate", "stream"):
        hops, _ = hops_of([on_replica(ArtifactError("adapter/raft/v0 is damaged"))])
        if call == "generate":
            with pytest.raises(PartUnavailableError):
                asyncio.run(hops.generate(REQUEST, PINS))
        else:
            assert isinstance(asyncio.run(collect(hops.stream(REQUEST, PINS)))[-1], PartUnavailableError)
