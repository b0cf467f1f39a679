import asyncio
import logging
import pickle
import sqlite3
import time

import pytest

from cluster.errors import UserError
from serving.config import ServingRecipe
from serving.feedback import DeskDoor, DeskSettings, FeedbackDesk, NoFeedback, check_feedback, desk_of, open_door
from serving.feedback_store import MAX_COMMENT_CHARS, MAX_CORRECTION_CHARS, FeedbackStore, Selection
from serving.interfaces import Caller, FeedbackOffError, FeedbackUnavailableError, UnknownRequestError
from serving.records import Tally
from tests.serving.feedback_data import ALICE, interaction, rating

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/feedback.db"


@pytest.fixture
def reader(url):
    opened = FeedbackStore.open(url, "test")
    yield opened
    opened.close()


def desk_at(url, clock=time.time, **settings):
    return FeedbackDesk(DeskSettings(url, "test", **settings), clock)


def ids(store):
    return sorted(entry.interaction.request_id for entry in store.entries())


async def rated(desk, name, satisfied=1.0, caller=ALICE, **fields):
    return (await desk.rate(rating(name, satisfied, **fields), caller)).state


async def test_rated_answer_is_stored_and_unrated_ones_are_not(url, reader):
    desk = desk_at(url)
    await desk.note([interaction("r1"), interaction("r2")])
    assert await rated(desk, "r1", 0.0, correction="Athens, Greece") == "stored"
    assert ids(reader) == ["r1"]
    assert reader.entry("r1").answer == "Athens, Greece"
    assert await desk.waiting() == 1
    assert await desk.tallies() == (Tally("fact_lookup", "raft", 0.0, 1.0),)


async def test_later_rating_replaces_the_earlier_one(url, reader):
    desk = desk_at(url)
    await desk.note([interaction("r1")])
    assert [await rated(desk, "r1", value) for value in (0.0, 1.0)] == ["stored", "stored"]
    assert await desk.tallies() == (Tally("fact_lookup", "raft", 1.0, 0.0),)
    assert await rated(desk_at(url), "r1", 0.5) == "stored", "after a restart of the desk, too"
    assert reader.entry("r1").rating.satisfied == 0.5


@pytest.mark.parametrize("caller", [Caller("other", "k1"), Caller("acme", "k2"), Caller()])
async def test_answer_of_another_tenant_or_key_cannot_be_rated(url, reader, caller):
    desk = desk_at(url)
    await desk.note([interaction("waiting"), interaction("stored")])
    assert await rated(desk, "stored") == "stored"
    assert await rated(desk, "waiting", caller=caller) == "unknown"
    assert await rated(desk, "stored", 0.0, caller=caller) == "unknown"
    assert reader.entry("stored").rating.satisfied == 1.0
    assert await rated(desk, "never-given") == "unknown"


async def test_answer_can_be_rated_within_the_window_alone(url):
    now = [1000.0]
    desk = desk_at(url, lambda: now[0], rating_window_s=60)
    await desk.note([interaction("a", at=1000.0), interaction("b", at=1000.0)])
    now[0] = 1059.0
    assert await rated(desk, "a") == "stored"
    now[0] = 1061.0
    assert await rated(desk, "a", 0.0) == "unknown"
    assert await rated(desk, "b") == "unknown"
    assert await desk.waiting() == 0


async def test_waiting_answers_are_bounded_in_number_and_in_characters(url):
    few = desk_at(url, max_waiting=3)
    await few.note([interaction(f"r{number}") for number in range(5)])
    assert [await rated(few, f"r{number}") for number in range(5)] == ["unknown"] * 2 + ["stored"] * 3
    assert few.dropped == 2
    short = desk_at(url, max_waiting_chars=4000)
    await short.note([interaction(f"s{number}", answer="x" * 1000) for number in range(5)])
    assert await short.waiting() == 2
    await short.note([interaction("s4", answer="")])
    assert await short.waiting() == 2, "noted again in its own place"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"satisfied": 1.5}, "satisfied: 1.5"),
        ({"satisfied": float("nan")}, "satisfied: nan"),
        ({"correction": "x" * (MAX_CORRECTION_CHARS + 1)}, "correction: 10001 characters"),
        ({"comment": "x" * (MAX_COMMENT_CHARS + 1)}, "comment: 5001 characters"),
    ],
)
async def test_rating_that_cannot_be_is_refused_and_may_be_given_anew(url, fields, told):
    desk = desk_at(url)
    await desk.note([interaction()])
    door = DeskDoor(desk_of(desk))
    with pytest.raises(UserError, match=told):
        await door.rate(rating(**fields), ALICE)
    await door.rate(rating(), ALICE)


async def test_unrated_answers_are_kept_where_the_recipe_says_so(url, reader):
    desk = desk_at(url, keep_unrated=True)
    await desk.note([interaction("r1"), interaction("r2")])
    assert ids(reader) == ["r1", "r2"]
    assert await desk.tallies() == ()
    assert await rated(desk, "r2", 0.0) == "stored"
    assert await desk.tallies() == (Tally("fact_lookup", "raft", 0.0, 1.0),)
    assert await desk.forget(Selection(user="alice")) == 2


async def test_database_that_is_away_is_told_and_used_again_when_it_is_back(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("serving.feedback.RETRY_S", 0.0)
    place = tmp_path / "gone"
    place.write_text("a file where a folder should be")
    desk = desk_at(f"sqlite:///{place}/feedback.db")
    door = DeskDoor(desk_of(desk))
    door.note(interaction(question="zebra-secret"))
    with pytest.raises(FeedbackUnavailableError):
        await door.rate(rating(), ALICE)
    assert (await desk.tallies(), await desk.waiting()) == ((), 1)
    await desk.check_health()
    place.unlink()
    await door.rate(rating(), ALICE)
    assert await desk.waiting() == 0
    assert "zebra-secret" not in caplog.text


async def test_locked_database_is_unavailable_and_keeps_the_answer(url, reader, monkeypatch, tmp_path):
    monkeypatch.setattr("serving.feedback_schema.BUSY_S", 0.1)
    desk = desk_at(url)
    await desk.note([interaction()])
    await desk.tallies()
    holder = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert await rated(desk, "r1") == "unavailable"
    holder.execute("ROLLBACK")
    assert await rated(desk, "r1") == "stored"
    holder.close()


async def test_deletion_reaches_memory_of_a_running_desk_and_is_not_undone_by_a_late_rating(url, reader, monkeypatch):
    monkeypatch.setattr("serving.feedback.FORGET_EVERY_S", 0.0)
    desk = desk_at(url)
    await desk.note([interaction("a"), interaction("b"), interaction("c", user="bob")])
    await rated(desk, "a")
    assert reader.delete(Selection(user="alice")) == 1, "another process, as `rayft feedback delete`"
    assert await rated(desk, "b") == "unknown"
    assert ids(reader) == []
    await desk.note([interaction("d", at=time.time() - 60)])
    await desk.check_health()
    assert await desk.waiting() == 1
    assert await rated(desk, "c") == "stored"


async def test_forget_removes_from_memory_and_store_and_counts(url, reader):
    desk = desk_at(url)
    await desk.note([interaction("a"), interaction("b"), interaction("c", user="bob")])
    await rated(desk, "a")
    assert await desk.forget(Selection(user="alice", tenant="else")) == 0
    assert await desk.forget(Selection(user="alice")) == 2
    assert (ids(reader), await desk.waiting()) == ([], 1)


async def test_retention_deletes_what_is_too_old(url, reader):
    reader.rate(interaction("old", at=time.time() - 8 * 86_400), rating("old"))
    reader.rate(interaction("new", at=time.time() - 6 * 86_400), rating("new"))
    await desk_at(url).check_health()
    assert ids(reader) == ["new", "old"]
    await desk_at(url, retention_days=7).check_health()
    assert ids(reader) == ["new"]


async def test_door_sends_what_is_noted_and_a_rating_waits_for_it(url, reader):
    door = DeskDoor(desk_of(desk_at(url)))
    for number in range(5):
        door.note(interaction(f"r{number}"))
    await asyncio.gather(*(door.rate(rating(f"r{number}"), ALICE) for number in range(5)))
    assert len(ids(reader)) == 5
    with pytest.raises(UnknownRequestError):
        await door.rate(rating("never"), ALICE)


async def test_door_renews_its_counts_in_the_background(url):
    desk = desk_at(url)
    door = DeskDoor(desk_of(desk), refresh_s=0.0)
    assert list(door.tallies()) == []
    door.note(interaction())
    await door.rate(rating(), ALICE)
    for _ in range(100):
        door.tallies()
        await asyncio.sleep(0.01)
        if door.tallies():
            break
    assert list(door.tallies()) == [Tally("fact_lookup", "raft", 1.0, 0.0)]


async def test_door_to_a_dead_or_slow_desk_never_blocks_and_never_raises(caplog):
    hangs = asyncio.Event()

    async def slow(method, *arguments):
        await hangs.wait()

    async def dead(method, *arguments):
        raise ConnectionError("zebra-secret")

    for call in (slow, dead):
        door = DeskDoor(call)
        began = time.perf_counter()
        for number in range(3000):
            door.note(interaction(f"r{number}"))
        assert list(door.tallies()) == []
        assert time.perf_counter() - began < 1
        await asyncio.sleep(0.05)
        assert door.lost >= 999, "bounded"
    with pytest.raises(FeedbackUnavailableError):
        await door.rate(rating(), ALICE)
    assert "zebra-secret" not in caplog.text
    hangs.set()
    await asyncio.sleep(0)


def test_door_without_an_event_loop_does_not_raise():
    door = DeskDoor(desk_of(None))
    door.note(interaction())
    assert list(door.tallies()) == []


async def test_no_feedback_is_noted_and_refused_where_there_is_no_url():
    door = open_door(None)
    assert isinstance(door, NoFeedback)
    door.note(interaction())
    assert list(door.tallies()) == []
    with pytest.raises(FeedbackOffError):
        await door.rate(rating(), ALICE)


def test_settings_pickle_with_an_absolute_path_and_without_a_password(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFT_FEEDBACK_PASSWORD", "hunter2")
    monkeypatch.chdir(tmp_path)
    settings = pickle.loads(pickle.dumps(DeskSettings.of(ServingRecipe(name="test"))))
    assert settings.url == f"sqlite:///{tmp_path}/.rayft/feedback.db"
    remote = ServingRecipe(name="test", feedback={"url": "postgresql://rayft@db.example/feedback"})
    assert DeskSettings.of(remote).url == "postgresql+psycopg://rayft@db.example/feedback"
    assert b"hunter2" not in pickle.dumps(DeskSettings.of(remote))


def test_check_feedback_refuses_a_bad_url_and_warns_of_a_database_that_is_away(tmp_path, capsys, free_port):
    assert not check_feedback(ServingRecipe(name="test", feedback={"url": ""}))
    assert check_feedback(ServingRecipe(name="test", feedback={"url": f"sqlite:///{tmp_path}/f.db"}))
    with pytest.raises(UserError, match=r"feedback\.url"):
        check_feedback(ServingRecipe(name="test", feedback={"url": "mysql://h/d"}))
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    away = {"url": f"postgresql://u@127.0.0.1:{free_port}/d"}
    assert check_feedback(ServingRecipe(name="test", feedback=away))
    assert "503" in capsys.readouterr().err


def test_user_text_is_never_logged(url, caplog):
    caplog.set_level(logging.DEBUG)

    async def run():
        desk = desk_at(url)
        await desk.note([interaction(question="zebra-secret")])
        await rated(desk, "r1", correction="zebra-secret")
        await desk.check_health()

    asyncio.run(run())
    assert "zebra-secret" not in caplog.text
