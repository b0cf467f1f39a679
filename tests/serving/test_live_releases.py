import asyncio

import pytest

from cluster.errors import ArtifactError
from serving.interfaces import PartUnavailableError
from serving.live_releases import LiveReleases, first_pins
from tests.serving.fakes_graph import pins_of, release_of
from tests.serving.test_hops import Counts


class Spoken:
    """Stands for a conversation."""

    def __init__(self, served):
        self.release = served


class Releases:
    """A promoted version, how preparing it ends, and what happened in which order."""

    def __init__(self):
        self.version, self.fault, self.looks, self.prepared = "v0", None, 0, []

    def promoted(self):
        self.looks += 1
        if isinstance(self.version, Exception):
            raise self.version
        return self.version

    def open(self, version):
        if version == "gone":
            raise ArtifactError("gone is not in the store")
        return release_of(version)

    async def prepare(self, pins):
        self.prepared.append(pins.release)
        await asyncio.sleep(0.05)
        if self.fault is not None:
            raise self.fault

    def live(self, every_s=0.01):
        counts = Counts()
        live = LiveReleases(Spoken(release_of("v0")), self, Spoken, self.prepare, counts, every_s)
        return live, counts


def now(live):
    return live.current().release.name.rpartition("/")[2]


def test_live_release_is_prepared_before_it_is_current():
    releases = Releases()
    live, counts = releases.live()

    async def look():
        releases.version = "v1"
        taking_up = asyncio.create_task(live.look())
        await asyncio.sleep(0.03)
        seen = now(live)
        assert await taking_up
        return seen

    assert asyncio.run(look()) == "v0" and now(live) == "v1"
    assert releases.prepared == ["release/test/v1"] and counts.events == ["release_taken_up"]
    assert not asyncio.run(live.look()) and releases.prepared == ["release/test/v1"], (
        "what serves is not prepared again"
    )


@pytest.mark.parametrize("version,fault", [("gone", None), ("v1", ArtifactError("damaged")), ("v1", RuntimeError("?"))])
def test_live_release_that_does_not_load_is_refused_once_and_the_old_one_goes_on(version, fault, caplog):
    releases = Releases()
    live, counts = releases.live()
    releases.version, releases.fault = version, fault
    for _ in range(3):
        assert not asyncio.run(live.look())
    assert now(live) == "v0" and counts.events == ["release_refused"]
    assert live.refused == f"release/test/{version}"
    assert len(releases.prepared) <= 1, "it is not loaded again at every look"
    assert [record for record in caplog.records if f"release {version} is refused" in record.message]
    releases.version, releases.fault = "v2", None
    assert asyncio.run(live.look()) and now(live) == "v2" and not live.refused


def test_live_release_that_was_refused_is_forgotten_when_the_old_one_is_promoted_again():
    releases = Releases()
    live, _ = releases.live()
    releases.version, releases.fault = "v1", ArtifactError("damaged")
    asyncio.run(live.look())
    releases.version = "v0"
    assert live.refused and not asyncio.run(live.look()) and not live.refused


def test_live_release_is_tried_again_when_a_replica_was_lost_meanwhile():
    releases = Releases()
    live, counts = releases.live()
    releases.version, releases.fault = "v1", PartUnavailableError("ActorDiedError")
    assert not asyncio.run(live.look()) and counts.events == []
    releases.fault = None
    assert asyncio.run(live.look()) and now(live) == "v1"


def test_live_release_follows_although_the_store_is_away_for_a_while():
    releases = Releases()
    live, _ = releases.live()

    async def follow():
        releases.version = OSError("no store")
        live.follow()
        await asyncio.sleep(0.1)
        releases.version = "v1"
        await asyncio.sleep(0.3)

    asyncio.run(follow())
    assert now(live) == "v1"


def test_live_release_stays_where_nothing_is_to_be_followed():
    releases = Releases()
    live, _ = releases.live(every_s=0)

    async def follow():
        releases.version = "v1"
        live.follow()
        await asyncio.sleep(0.1)

    asyncio.run(follow())
    assert now(live) == "v0" and releases.looks == 0


def test_first_pins_are_the_promoted_release_and_then_the_one_started_with():
    releases = Releases()
    v0, v1 = pins_of("v0"), pins_of("v1")
    assert first_pins(None, v0) == [v0] == first_pins(releases, v0)
    releases.version = "v1"
    assert first_pins(releases, v0) == [v1, v0]
    releases.version = "gone"
    assert first_pins(releases, v0) == [v0]
