import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid

import pytest
import sqlalchemy as sa

from cluster.errors import UserError
from serving.feedback_schema import SCHEMA_VERSION, open_engine, parse_url, schema
from serving.feedback_store import MAX_CORRECTION_CHARS, MAX_TEXT_CHARS, FeedbackStore, Review, Selection
from serving.interfaces import FeedbackUnavailableError
from serving.records import Interaction, Tally
from tests.serving.feedback_data import interaction, rating

POSTGRES = os.environ.get("RAYFT_TEST_POSTGRES", "")
NO_POSTGRES = "set RAYFT_TEST_POSTGRES to the URL of a database to run this on PostgreSQL"
HOSTILE = "'; DROP TABLE rayft_feedback; -- \0 \ud800 中文 %s :x ?"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.skipif(not POSTGRES, reason=NO_POSTGRES))])
def url(request, tmp_path):
    return f"sqlite:///{tmp_path}/feedback.db" if request.param == "sqlite" else POSTGRES


@pytest.fixture
def recipe():
    return f"test-{uuid.uuid4().hex[:8]}"  # a PostgreSQL database outlives the test


@pytest.fixture
def feedback_store(url, recipe):
    opened = FeedbackStore.open(url, recipe)
    yield opened
    opened.close()


def test_rating_is_read_back_with_all_that_is_known_of_the_answer(feedback_store):
    given = interaction()
    assert feedback_store.rate(given, rating(satisfied=0.25, correction="Athína", comment="almost"))
    entry = feedback_store.entry("r1")
    assert entry.interaction == given
    assert (entry.rating, entry.review) == (rating(satisfied=0.25, correction="Athína", comment="almost"), Review.NEW)
    assert (entry.answer, entry.doc_ids) == ("Athína", ("greece",))
    assert feedback_store.entry("r2") is None


def test_rating_again_replaces_and_is_counted_once(feedback_store):
    feedback_store.rate(interaction(), rating(satisfied=0.0))
    feedback_store.rate(interaction(), rating(satisfied=1.0))
    assert feedback_store.rate_stored(rating(satisfied=0.75), tenant="acme", key_id="k1", since=0)
    feedback_store.rate(interaction("r2", strategy="rag"), rating("r2", 1.0))
    feedback_store.rate(interaction("r3"), rating("r3", 0.5))
    feedback_store.keep([interaction("r4", strategy="base")])
    assert feedback_store.tallies() == [Tally("fact_lookup", "raft", 1.25, 0.75), Tally("fact_lookup", "rag", 1.0, 0.0)]


@pytest.mark.parametrize("other", [{"tenant": "else"}, {"key_id": "k2"}, {"since": 2.0**40}])
def test_rating_a_stored_answer_of_another_or_too_late_finds_nothing(feedback_store, other):
    feedback_store.rate(interaction(), rating(satisfied=1.0))
    assert not feedback_store.rate_stored(
        rating(satisfied=0), **{"tenant": "acme", "key_id": "k1", "since": 0, **other}
    )
    assert feedback_store.entry("r1").rating.satisfied == 1.0


def test_recipes_in_one_database_do_not_see_each_other(feedback_store, url, recipe):
    feedback_store.rate(interaction(), rating())
    other = FeedbackStore.open(url, recipe + "-other")
    assert (other.entry("r1"), other.tallies(), list(other.entries())) == (None, [], [])
    assert not other.rate_stored(rating(), tenant="acme", key_id="k1", since=0)
    assert other.delete(Selection(user="alice")) == 0
    assert feedback_store.entry("r1") is not None
    other.close()


def test_hostile_text_is_stored_as_text(feedback_store):
    feedback_store.rate(interaction(question=HOSTILE, user=HOSTILE, quotes=(HOSTILE,)), rating(correction=HOSTILE))
    stored = HOSTILE.replace("\0", "\ufffd").replace("\ud800", "?")
    entry = feedback_store.entry("r1")
    assert (entry.interaction.question, entry.interaction.quotes, entry.answer) == (stored, (stored,), stored)
    assert feedback_store.delete(Selection(user=HOSTILE)) == 1


def test_long_text_is_cut_and_marked(feedback_store):
    feedback_store.rate(interaction(answer="x" * (MAX_TEXT_CHARS + 1)), rating())
    feedback_store.rate(interaction("r2"), rating("r2", correction="y" * (MAX_CORRECTION_CHARS + 1)))
    assert feedback_store.entry("r1").shortened
    assert len(feedback_store.entry("r1").interaction.answer) == MAX_TEXT_CHARS
    assert not feedback_store.entry("r2").shortened
    assert len(feedback_store.entry("r2").answer) == MAX_CORRECTION_CHARS


def test_entries_come_by_time_over_several_pages(feedback_store, monkeypatch):
    monkeypatch.setattr("serving.feedback_store.PAGE", 3)
    for number in range(8):
        feedback_store.rate(interaction(f"r{number}", at=1000.0 - number // 2), rating(f"r{number}"))
    feedback_store.keep([interaction("unrated", at=1.0)])
    found = [entry.interaction.request_id for entry in feedback_store.entries(rated=True)]
    assert found == ["r6", "r7", "r4", "r5", "r2", "r3", "r0", "r1"]
    assert next(iter(feedback_store.entries())).interaction.request_id == "unrated"


def test_review_is_recorded_and_begun_anew_by_another_rating(feedback_store):
    feedback_store.rate(interaction(), rating(satisfied=0.0))
    assert feedback_store.review("r1", Review.CORRECTED, answer="Athens, Greece", doc_ids=["greece-2"])
    entry = feedback_store.entry("r1")
    assert (entry.review, entry.answer, entry.doc_ids) == (Review.CORRECTED, "Athens, Greece", ("greece-2",))
    feedback_store.rate(interaction(), rating(satisfied=0.0, comment="as before"))
    assert feedback_store.entry("r1").review == Review.CORRECTED
    assert [e.interaction.request_id for e in feedback_store.entries([Review.CORRECTED])] == ["r1"]
    feedback_store.rate(interaction(), rating(satisfied=0.0, correction="Sparta"))
    assert feedback_store.entry("r1").review == Review.NEW
    assert not feedback_store.review("never", Review.ACCEPTED)


def test_keep_leaves_a_rating_alone(feedback_store):
    feedback_store.rate(interaction(), rating())
    assert feedback_store.keep([interaction(), interaction("r2")]) == 1
    assert feedback_store.entry("r1").rating is not None
    assert feedback_store.entry("r2").rating is None
    feedback_store.rate(interaction("r2"), rating("r2", 0.5))
    assert feedback_store.entry("r2").rating.satisfied == 0.5


@pytest.mark.parametrize(
    ("selection", "left"),
    [
        (Selection(user="alice"), ["b1", "old"]),
        (Selection(user="alice", tenant="else"), ["a1", "a2", "b1", "old"]),
        (Selection(request_id="a1"), ["a2", "b1", "old", "x1"]),
        (Selection(before=500.0), ["a1", "a2", "b1", "x1"]),
    ],
)
def test_delete_removes_what_is_meant(feedback_store, selection, left):
    for name, user, tenant in (
        ("a1", "alice", "acme"),
        ("a2", "alice", "acme"),
        ("b1", "bob", "acme"),
        ("x1", "alice", "else"),
    ):
        feedback_store.rate(interaction(name, user=user, tenant=tenant), rating(name))
    feedback_store.rate(interaction("old", user="carol", at=400.0), rating("old"))
    assert feedback_store.delete(selection) == 5 - len(left)
    assert sorted(entry.interaction.request_id for entry in feedback_store.entries()) == left


def test_answer_given_before_its_deletion_is_not_stored_any_more(feedback_store):
    before = interaction(at=time.time() - 5)
    feedback_store.delete(Selection(user="alice", tenant="acme"))
    feedback_store.delete(Selection(request_id="r7"))
    others = [interaction("r2", user="bob"), interaction("r3", tenant="else"), interaction("r4", at=time.time() + 5)]
    by_id = interaction("r7", user="bob", at=time.time() - 5)
    assert not feedback_store.rate(before, rating())
    assert feedback_store.keep([before]) == 0
    assert feedback_store.is_forgotten([before, *others, by_id]) == [True, False, False, False, True]
    assert feedback_store.rate(others[2], rating("r4")), "asked after the deletion"


def test_deleted_text_is_gone_from_the_file(tmp_path):
    opened = FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db", "test")
    opened.rate(interaction(question="zebra-secret " * 50), rating())
    opened.delete(Selection(user="alice"))
    assert not any(b"zebra-secret" in path.read_bytes() for path in tmp_path.iterdir()), "nor in the log, while open"
    opened.close()


def test_acknowledged_ratings_survive_sigkill(url, recipe, monkeypatch):
    command = [sys.executable, "-m", "tests.serving.feedback_writer", url, recipe, "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    acknowledged = [process.stdout.readline().strip() for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    reader = FeedbackStore.open(url, "test")
    assert acknowledged == [f"{recipe}-{number}" for number in range(5)]
    assert all(reader.entry(name) is not None for name in acknowledged)
    reader.delete(Selection(user="alice"))
    reader.close()


def test_processes_write_at_once_and_lose_nothing(url, recipe):
    writers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.serving.feedback_writer", url, f"{recipe}-{number}", "40"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    acknowledged = [writer.stdout.readline().strip() for _ in range(40) for writer in writers]
    for writer in writers:
        writer.kill()
        writer.wait()
    reader = FeedbackStore.open(url, "test")
    stored = {entry.interaction.request_id for entry in reader.entries()}
    assert len(set(acknowledged)) == 120
    assert set(acknowledged) <= stored
    reader.delete(Selection(user="alice"))
    reader.close()


def test_newer_schema_is_refused_and_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/feedback.db"
    engine = open_engine(parse_url(url))
    with engine.begin() as connection:
        connection.execute(sa.update(schema).values(version=SCHEMA_VERSION + 1))
    engine.dispose()
    with pytest.raises(
        UserError, match=rf"newer rayft \(schema {SCHEMA_VERSION + 1}, this one knows {SCHEMA_VERSION}\)"
    ):
        FeedbackStore.open(url, "test")


def test_sqlite_is_in_wal_mode_with_full_synchronisation(tmp_path):
    engine = open_engine(parse_url(f"sqlite:///{tmp_path}/feedback.db"))
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nonsense", "no database URL"),
        ("sqlite://", "needs a file"),
        ("mysql://u@h/d", "mysql is not supported"),
        ("postgresql+asyncpg://u@h/d", "asyncpg is not supported"),
        ("postgresql://user:hunter2@h/d", "RAYFT_FEEDBACK_PASSWORD"),
    ],
)
def test_url_that_cannot_be_used_is_refused_in_one_line(url, told):
    with pytest.raises(UserError, match=told) as caught:
        parse_url(url)
    assert "hunter2" not in str(caught.value)
    assert str(caught.value).startswith("feedback.url")


def test_sqlite_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_url("sqlite:///.rayft/feedback.db").database == str(tmp_path / ".rayft/feedback.db")


def test_locked_database_is_unavailable_and_tells_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.feedback_schema.BUSY_S", 0.1)
    opened = FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db", "test")
    holder = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(FeedbackUnavailableError, match="locked") as caught:
        opened.rate(interaction(question="zebra-secret"), rating())
    assert "zebra-secret" not in str(caught.value)
    holder.execute("ROLLBACK")
    holder.close()
    assert opened.rate(interaction(), rating()), "works again once the lock is gone"
    opened.close()


def test_unreachable_postgresql_is_unavailable_without_the_password(monkeypatch, free_port):
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    monkeypatch.setenv("RAYFT_FEEDBACK_PASSWORD", "hunter2")
    with pytest.raises(FeedbackUnavailableError) as caught:
        FeedbackStore.open(f"postgresql+psycopg://user@127.0.0.1:{free_port}/feedback", "test")
    assert "hunter2" not in str(caught.value)
    assert str(free_port) in str(caught.value)
    assert caught.value.__cause__ is None, "the cause may hold the connection string"


def test_every_field_of_an_interaction_is_stored(feedback_store):
    given = interaction(abstained=True)
    feedback_store.keep([given])
    found = feedback_store.entry("r1").interaction
    assert {name: getattr(found, name) for name in Interaction.__dataclass_fields__} == {
        name: getattr(given, name) for name in Interaction.__dataclass_fields__
    }
