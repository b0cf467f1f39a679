"""Rated answers, durable: SQLite by default, PostgreSQL by URL.

In: answers with their ratings, reviews of them, deletions. Out: entries to review, counts per intent and strategy. A
rating is on the disk when `rate` returns; several processes may write at once. Entries of several recipes share one
database and do not see each other. Everything is bound as a parameter.
Not covered: tables and connections (serving/feedback_schema.py), answers that wait for their rating
(serving/feedback.py), what becomes of reviewed entries (serving/feedback_questions.py).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from serving.feedback_schema import ID_CHARS, feedback, forgotten, open_engine, parse_url, reading, shown, writing
from serving.records import Interaction, Rating, Tally

MAX_TEXT_CHARS = 20_000
"""Longest question and answer; a longer one is cut, marked, and never exported."""
MAX_CORRECTION_CHARS = 10_000
MAX_COMMENT_CHARS = 5_000
MAX_LISTED = 32
"""Most quotes, and most documents."""
FORGOTTEN_DAYS = 30
"""Days that a deletion is remembered for servers that may still hold the answer in memory."""
PAGE = 500
DAY_S = 86_400.0


class Review(StrEnum):
    """What a reviewer decided about an entry."""

    NEW = "new"
    ACCEPTED = "accepted"
    CORRECTED = "corrected"
    REJECTED = "rejected"


@dataclass(frozen=True)
class Entry:
    """A stored answer, its rating and its review."""

    interaction: Interaction
    rating: Rating | None
    """None: kept unrated."""
    rated_at: float | None
    review: Review
    answer: str
    """The right answer as far as it is known: the reviewer's, else the user's correction, else the one given."""
    doc_ids: tuple[str, ...]
    """Documents that hold it: the reviewer's, else those of the verified quotes."""
    named: bool
    """Whether a reviewer named `doc_ids`."""
    shortened: bool
    """Question or answer was longer than what is kept."""


@dataclass(frozen=True)
class Selection:
    """What to delete: all of these that are given must hold."""

    user: str | None = None
    tenant: str | None = None
    request_id: str | None = None
    before: float | None = None
    """Seconds since 1970."""

    def covers(self, interaction: Interaction) -> bool:
        """Whether an answer is meant."""
        return (
            self.user in (None, interaction.user)
            and self.tenant in (None, interaction.tenant)
            and self.request_id in (None, interaction.request_id)
            and (self.before is None or interaction.at < self.before)
        )


@dataclass(frozen=True)
class Satisfaction:
    """What users think of a strategy."""

    strategy: str
    ratings: int
    satisfied: float
    """Sum over ratings, each between 0 and 1."""
    corrections: int
    unrated: int


class FeedbackStore:
    """The feedback of one recipe in a database."""

    def __init__(self, engine: sa.Engine, recipe: str) -> None:
        """Use `open`."""
        self._engine = engine
        self._recipe = recipe
        self.shown = shown(engine.url)
        """The database's URL, for people."""

    @classmethod
    def open(cls, url: str, recipe: str) -> Self:
        """Connects, and makes the tables where there are none.

        Args:
            url: `feedback.url`.
            recipe: The recipe's name.

        Raises:
            UserError: A URL that is not supported, or tables of a newer rayft.
            FeedbackUnavailableError: The database cannot be reached; as in every method.
        """
        return cls(open_engine(parse_url(url)), recipe)

    def keep(self, interactions: Sequence[Interaction]) -> int:
        """Stores answers that nobody has rated (yet); those that are there already stay. Returns how many are new."""
        if not interactions:
            return 0
        rows = [self._row(interaction) for interaction in interactions]
        with writing(self._engine) as connection:
            kept = 0
            for interaction, row in zip(interactions, rows, strict=True):
                if not self._is_forgotten(connection, interaction):
                    insert = self._insert().values(row).on_conflict_do_nothing().returning(feedback.c.request_id)
                    kept += connection.execute(insert).first() is not None
            return kept

    def rate(self, interaction: Interaction, rating: Rating, now: float | None = None) -> bool:
        """Stores an answer with its rating, in place of an earlier rating; on the disk when it returns.

        Returns:
            False where its deletion was asked for after it was given: nothing is stored.
        """
        rated = _rated(rating, now)
        key = [feedback.c.recipe, feedback.c.request_id]
        insert = self._insert().values({**self._row(interaction), **rated})
        upsert = insert.on_conflict_do_update(index_elements=key, set_=_replacing(rated))
        with writing(self._engine) as connection:
            if self._is_forgotten(connection, interaction):
                return False
            connection.execute(upsert)
            return True

    def rate_stored(self, rating: Rating, *, tenant: str, key_id: str, since: float, now: float | None = None) -> bool:
        """Rates an answer that is stored already; on the disk when it returns.

        Args:
            rating: Replaces the earlier one.
            tenant: Of the caller; another's answer is not found.
            key_id: Of the caller, likewise.
            since: An answer older than this (seconds since 1970) is not found.
            now: Seconds since 1970.

        Returns:
            Whether it was found.
        """
        found = sa.and_(
            feedback.c.recipe == self._recipe,
            feedback.c.request_id == clean(rating.request_id, ID_CHARS),
            feedback.c.tenant == clean(tenant, ID_CHARS),
            feedback.c.key_id == clean(key_id, ID_CHARS),
            feedback.c.at >= since,
        )
        with writing(self._engine) as connection:
            update = feedback.update().where(found).values(**_replacing(_rated(rating, now)))
            return connection.execute(update).rowcount == 1

    def tallies(self) -> list[Tally]:
        """Ratings per intent and strategy; of an answer that was rated several times, the last counts."""
        satisfied = feedback.c.satisfied
        sums = (sa.func.sum(satisfied), sa.func.sum(1 - satisfied))
        key = (feedback.c.intent, feedback.c.strategy)
        query = sa.select(*key, *sums).where(feedback.c.recipe == self._recipe, satisfied.is_not(None))
        with reading(self._engine) as connection:
            rows = connection.execute(query.group_by(*key).order_by(*key)).all()
        return [Tally(intent, strategy, float(good), float(bad)) for intent, strategy, good, bad in rows]

    def satisfaction(self) -> list[Satisfaction]:
        """Counts per strategy, by name."""
        satisfied, strategy = feedback.c.satisfied, feedback.c.strategy
        corrected = sa.func.sum(sa.case((feedback.c.correction != "", 1), else_=0))
        counts = (sa.func.count(satisfied), sa.func.coalesce(sa.func.sum(satisfied), 0), corrected, sa.func.count())
        query = sa.select(strategy, *counts).where(feedback.c.recipe == self._recipe)
        with reading(self._engine) as connection:
            rows = connection.execute(query.group_by(strategy).order_by(strategy)).all()
        return [Satisfaction(row[0], int(row[1]), float(row[2]), int(row[3]), int(row[4] - row[1])) for row in rows]

    def entries(self, reviews: Collection[Review] = (), *, rated: bool = False) -> Iterator[Entry]:
        """Entries by time, oldest first, a page at a time.

        Args:
            reviews: Only in one of these states; none takes all.
            rated: Only rated ones.
        """
        place = (feedback.c.at, feedback.c.request_id)
        query = sa.select(feedback).where(feedback.c.recipe == self._recipe).order_by(*place).limit(PAGE)
        if reviews:
            query = query.where(feedback.c.review.in_([str(review) for review in reviews]))
        if rated:
            query = query.where(feedback.c.satisfied.is_not(None))
        after: tuple[float, str] | None = None
        while True:
            page = query if after is None else query.where(sa.tuple_(*place) > sa.tuple_(*map(sa.literal, after)))
            with reading(self._engine) as connection:
                rows = connection.execute(page).mappings().all()
            yield from map(_entry, rows)
            if len(rows) < PAGE:
                return
            after = (rows[-1]["at"], rows[-1]["request_id"])

    def entry(self, request_id: str) -> Entry | None:
        """One entry."""
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(feedback).where(*self._named(request_id))).mappings().one_or_none()
        return None if row is None else _entry(row)

    def review(self, request_id: str, review: Review, *, answer: str = "", doc_ids: Sequence[str] = ()) -> bool:
        """Records a reviewer's decision in place of an earlier one; returns whether there is such an entry.

        Args:
            request_id: Which.
            review: The decision.
            answer: The right answer, in place of the one known so far; "" leaves it.
            doc_ids: The documents that hold it, in place of those of the quotes; none leaves them.
        """
        values = {
            "review": str(review),
            "reviewed_at": time.time(),
            "reviewed_answer": clean(answer, MAX_CORRECTION_CHARS),
            "reviewed_doc_ids": _listed(doc_ids, ID_CHARS),
        }
        with writing(self._engine) as connection:
            return connection.execute(feedback.update().where(*self._named(request_id)).values(**values)).rowcount == 1

    def delete(self, selection: Selection) -> int:
        """Deletes entries for good, and has servers forget what they hold of them in memory; returns how many
        entries were stored. A selection of nothing in particular is refused."""
        assert selection != Selection(), "would delete everything"
        columns = {"user": feedback.c.user_id, "tenant": feedback.c.tenant, "request_id": feedback.c.request_id}
        where = [feedback.c.recipe == self._recipe]
        for name, column in columns.items():
            if (value := getattr(selection, name)) is not None:
                where.append(column == clean(value, ID_CHARS))
        if selection.before is not None:
            where.append(feedback.c.at < selection.before)
        now = time.time()
        with writing(self._engine) as connection:
            deleted = connection.execute(feedback.delete().where(*where)).rowcount
            connection.execute(forgotten.delete().where(forgotten.c.at < now - FORGOTTEN_DAYS * DAY_S))
            what = "user" if selection.request_id is None else "request_id"
            meant = getattr(selection, what)
            if meant is not None and selection.before is None:
                row = {"recipe": self._recipe, "at": now, "what": what, "digest": _digest(meant)}
                connection.execute(forgotten.insert().values(**row, tenant=selection.tenant))
        if deleted and self._engine.dialect.name == "sqlite":
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")  # the log still holds the text
        return int(deleted)

    def is_forgotten(self, interactions: Sequence[Interaction]) -> list[bool]:
        """For each answer, whether its deletion was asked for after it was given."""
        with reading(self._engine) as connection:
            if connection.execute(sa.select(forgotten.c.id).where(forgotten.c.recipe == self._recipe)).first() is None:
                return [False] * len(interactions)
            return [self._is_forgotten(connection, interaction) for interaction in interactions]

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    def _named(self, request_id: str) -> tuple[sa.ColumnElement[bool], ...]:
        return feedback.c.recipe == self._recipe, feedback.c.request_id == clean(request_id, ID_CHARS)

    def _is_forgotten(self, connection: sa.Connection, interaction: Interaction) -> bool:
        row = forgotten.c
        told = sa.select(row.id).where(
            row.recipe == self._recipe,
            row.at >= interaction.at,
            sa.or_(row.tenant.is_(None), row.tenant == interaction.tenant),
            sa.or_(
                sa.and_(row.what == "user", row.digest == _digest(interaction.user)),
                sa.and_(row.what == "request_id", row.digest == _digest(interaction.request_id)),
            ),
        )
        return connection.execute(told.limit(1)).first() is not None

    def _insert(self) -> Any:
        return (sqlite if self._engine.dialect.name == "sqlite" else postgresql).insert(feedback)

    def _row(self, interaction: Interaction) -> dict[str, Any]:
        """An answer as a row; texts that are too long are cut, and the row says so."""
        return {
            "recipe": self._recipe,
            "request_id": clean(interaction.request_id, ID_CHARS),
            "at": interaction.at,
            "tenant": clean(interaction.tenant, ID_CHARS),
            "key_id": clean(interaction.key_id, ID_CHARS),
            "user_id": clean(interaction.user, ID_CHARS),
            "strategy": clean(interaction.strategy, ID_CHARS),
            "intent": clean(interaction.intent, ID_CHARS),
            "confidence": interaction.confidence,
            "propensity": interaction.propensity,
            "experiment": clean(interaction.experiment, ID_CHARS),
            "release": clean(interaction.release, 2 * ID_CHARS),
            "question": clean(interaction.question, MAX_TEXT_CHARS),
            "answer": clean(interaction.answer, MAX_TEXT_CHARS),
            "abstained": interaction.abstained,
            "quotes": _listed(interaction.quotes, MAX_TEXT_CHARS // MAX_LISTED),
            "doc_ids": _listed(interaction.doc_ids, ID_CHARS),
            "total_ms": interaction.total_ms,
            "shortened": max(len(interaction.question), len(interaction.answer)) > MAX_TEXT_CHARS,
            "correction": "",
            "comment": "",
            "review": str(Review.NEW),
            "reviewed_answer": "",
            "reviewed_doc_ids": [],
        }


def clean(text: str, chars: int) -> str:
    """Text that both databases store: without NUL and lone surrogates, at most `chars` characters."""
    return text[:chars].replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _listed(texts: Sequence[str], chars: int) -> list[str]:
    return [clean(text, chars) for text in texts[:MAX_LISTED]]


def _digest(text: str) -> str:
    return hashlib.sha256(clean(text, ID_CHARS).encode()).hexdigest()


def _rated(rating: Rating, now: float | None) -> dict[str, Any]:
    return {
        "satisfied": rating.satisfied,
        "correction": clean(rating.correction, MAX_CORRECTION_CHARS),
        "comment": clean(rating.comment, MAX_COMMENT_CHARS),
        "rated_at": time.time() if now is None else now,
    }


def _replacing(rated: Mapping[str, Any]) -> dict[str, Any]:
    """What a later rating sets: an entry that was reviewed is to be reviewed again, unless it says the same."""
    same = sa.and_(feedback.c.satisfied == rated["satisfied"], feedback.c.correction == rated["correction"])
    return {**rated, "review": sa.case((same, feedback.c.review), else_=str(Review.NEW))}


def _entry(row: sa.RowMapping) -> Entry:
    interaction = Interaction.from_row({**row, "user": row["user_id"]})
    rating = None
    if row["satisfied"] is not None:
        rating = Rating(row["request_id"], row["satisfied"], row["correction"], row["comment"])
    return Entry(
        interaction,
        rating,
        row["rated_at"],
        Review(row["review"]),
        row["reviewed_answer"] or row["correction"] or row["answer"],
        tuple(row["reviewed_doc_ids"] or row["doc_ids"]),
        bool(row["reviewed_doc_ids"]),
        row["shortened"],
    )
