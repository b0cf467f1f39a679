"""The feedback database: its tables, how it is connected to, and how a failure is told.

In: `feedback.url`. Out: an SQLAlchemy engine whose tables are there and of a version that this program knows. SQLite
runs in WAL mode with every commit on the disk; PostgreSQL through psycopg. A password is read from the environment
variable RAYFT_FEEDBACK_PASSWORD and stands in no error; statements hide their parameters, which are user text.
Not covered: what is read and written (serving/feedback_store.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from cluster.errors import UserError
from serving.interfaces import FeedbackUnavailableError

SCHEMA_VERSION = 1
PASSWORD_VARIABLE = "RAYFT_FEEDBACK_PASSWORD"
BUSY_S = 10
CONNECT_S = 5
STATEMENT_MS = 10_000
WRITE_LOCK = 0x7261796674  # "rayft": one writer at a time on PostgreSQL, as SQLite has it
ID_CHARS = 200

metadata = sa.MetaData()

schema = sa.Table("rayft_feedback_schema", metadata, sa.Column("version", sa.Integer, primary_key=True))

feedback = sa.Table(
    "rayft_feedback",
    metadata,
    sa.Column("recipe", sa.String(ID_CHARS), primary_key=True),
    sa.Column("request_id", sa.String(ID_CHARS), primary_key=True),
    sa.Column("at", sa.Float(53), nullable=False),
    sa.Column("tenant", sa.String(ID_CHARS), nullable=False),
    sa.Column("key_id", sa.String(ID_CHARS), nullable=False),
    sa.Column("user_id", sa.String(ID_CHARS), nullable=False),
    sa.Column("strategy", sa.String(ID_CHARS), nullable=False),
    sa.Column("intent", sa.String(ID_CHARS), nullable=False),
    sa.Column("confidence", sa.Float(53), nullable=False),
    sa.Column("propensity", sa.Float(53), nullable=False),
    sa.Column("experiment", sa.String(ID_CHARS), nullable=False),
    sa.Column("release", sa.String(2 * ID_CHARS), nullable=False),
    sa.Column("question", sa.Text, nullable=False),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("abstained", sa.Boolean, nullable=False),
    sa.Column("quotes", sa.JSON, nullable=False),
    sa.Column("doc_ids", sa.JSON, nullable=False),
    sa.Column("total_ms", sa.Float(53), nullable=False),
    sa.Column("shortened", sa.Boolean, nullable=False),
    sa.Column("satisfied", sa.Float(53)),
    sa.Column("correction", sa.Text, nullable=False),
    sa.Column("comment", sa.Text, nullable=False),
    sa.Column("rated_at", sa.Float(53)),
    sa.Column("review", sa.String(16), nullable=False),
    sa.Column("reviewed_at", sa.Float(53)),
    sa.Column("reviewed_answer", sa.Text, nullable=False),
    sa.Column("reviewed_doc_ids", sa.JSON, nullable=False),
    sa.Index("rayft_feedback_user", "user_id"),
    sa.Index("rayft_feedback_at", "recipe", "at"),
    sa.Index("rayft_feedback_tally", "recipe", "intent", "strategy"),
)

# What was asked to be deleted, so that a server that still has it in memory forgets it, too. Digests, not names.
forgotten = sa.Table(
    "rayft_feedback_forgotten",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("recipe", sa.String(ID_CHARS), nullable=False),
    sa.Column("at", sa.Float(53), nullable=False),
    sa.Column("what", sa.String(16), nullable=False),
    sa.Column("tenant", sa.String(ID_CHARS)),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Index("rayft_feedback_forgotten_digest", "digest"),
)


def parse_url(text: str) -> sa.URL:
    """The database's URL, an SQLite file with its absolute path, without a password.

    Raises:
        UserError: It is none, holds a password, or names a database that is not supported.
    """
    try:
        url = sa.make_url(text)
    except (exc.ArgumentError, ValueError):
        raise UserError(
            "feedback.url is no database URL: give sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
        ) from None
    if url.password is not None:
        raise UserError(
            f"feedback.url holds a password, which would be written beside every result: leave it out and set the "
            f"environment variable {PASSWORD_VARIABLE}"
        )
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise UserError("feedback.url: SQLite needs a file, such as sqlite:///.rayft/feedback.db")
        return url.set(drivername="sqlite", database=str(Path(url.database).expanduser().absolute()))
    if url.get_backend_name() == "postgresql":
        if url.drivername not in ("postgresql", "postgresql+psycopg"):
            raise UserError(f"feedback.url: {url.drivername} is not supported; use postgresql+psycopg")
        return url.set(drivername="postgresql+psycopg")
    raise UserError(f"feedback.url: {url.get_backend_name()} is not supported; use sqlite or postgresql+psycopg")


def open_engine(url: sa.URL) -> sa.Engine:
    """An engine whose tables are there.

    Args:
        url: From `parse_url`.

    Raises:
        UserError: The file's folder cannot be made, the driver is not installed, or a newer rayft wrote the tables.
        FeedbackUnavailableError: The database cannot be reached.
    """
    engine = _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)
    try:
        version = _version(engine)
    except BaseException:
        engine.dispose()
        raise
    if version > SCHEMA_VERSION:
        engine.dispose()
        raise UserError(
            f"feedback.url: {shown(url)} was written by a newer rayft (schema {version}, this one knows "
            f"{SCHEMA_VERSION}): update rayft, or name another database"
        )
    return engine


def _version(engine: sa.Engine) -> int:
    """The version of the tables, made first where there are none; a database that has them is only read."""
    newest = sa.select(sa.func.max(schema.c.version))
    with reading(engine) as connection:
        if sa.inspect(connection).has_table(schema.name):
            found: int | None = connection.execute(newest).scalar()
            if found is not None:
                return found
    with writing(engine) as connection:
        metadata.create_all(connection)
        found = connection.execute(newest).scalar()  # another process may have been first
        if found is None:
            connection.execute(schema.insert().values(version=SCHEMA_VERSION))
    return found or SCHEMA_VERSION


def _sqlite(url: sa.URL) -> sa.Engine:
    folder = Path(str(url.database)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"feedback.url: cannot make the folder {folder}: {error.strerror}") from None
    engine = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_S})

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # sqlite3's own transactions leave tables outside of them
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A reader that turns writer is refused at once when another has written: writers say so first, and wait.
        immediate = connection.get_execution_options().get("rayft_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _postgresql(url: sa.URL) -> sa.Engine:
    password = os.environ.get(PASSWORD_VARIABLE)
    options = {"connect_timeout": CONNECT_S, "options": f"-c statement_timeout={STATEMENT_MS}"}
    try:
        return sa.create_engine(
            url.set(password=password) if password else url,
            hide_parameters=True,
            pool_pre_ping=True,
            connect_args=options,
        )
    except ModuleNotFoundError:
        raise UserError("feedback.url: PostgreSQL needs psycopg: pip install 'rayft[postgres]'") from None


@contextlib.contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that writes; committed, on the disk, when the block ends.

    Raises:
        FeedbackUnavailableError: The database cannot be reached, or is busy for too long.
    """
    with _telling(engine), engine.connect().execution_options(rayft_write=True) as connection, connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITE_LOCK)))
        yield connection


@contextlib.contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that only reads; errors as of `writing`."""
    with _telling(engine), engine.begin() as connection:
        yield connection


@contextlib.contextmanager
def _telling(engine: sa.Engine) -> Iterator[None]:
    """Turns the database's errors into ours, without what was written: that is user text."""
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
        cause = getattr(error, "orig", None) or error
        told = str(cause).strip().splitlines() or [type(cause).__name__]
        raise FeedbackUnavailableError(f"the feedback database {shown(engine.url)} says: {told[0][:300]}") from None
    except exc.SQLAlchemyError as error:
        kind = type(getattr(error, "orig", None) or error).__name__
        raise FeedbackUnavailableError(f"the feedback database {shown(engine.url)} fails: {kind}") from None


def shown(url: sa.URL) -> str:
    """The URL as it may be shown."""
    return url.set(password=None).render_as_string(hide_password=True)
