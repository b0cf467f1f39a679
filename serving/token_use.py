"""Tokens that keys have used per day, in the feedback database, so that a restart does not give a second day's worth.

In: counts by key, seldom (serving/quotas.py writes every few seconds). Out: the counts of a day. Rows of other days
are deleted when a new day begins. Not covered: the quota itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from serving.feedback_schema import open_engine, parse_url, reading, writing

_metadata = sa.MetaData()
_use = sa.Table(
    "rayft_token_use",
    _metadata,
    sa.Column("recipe", sa.String(200), primary_key=True),
    sa.Column("key_id", sa.String(64), primary_key=True),
    sa.Column("day", sa.Integer, primary_key=True),
    sa.Column("tokens", sa.BigInteger, nullable=False),
)


class TokenUse:
    """The table. Several processes may add at once."""

    def __init__(self, url: str, recipe: str) -> None:
        """Connects and makes the table.

        Args:
            url: The recipe's `feedback.url`, not empty.
            recipe: The recipe's name; several may share a database.

        Raises:
            UserError: The URL is none that feedback could use.
            FeedbackUnavailableError: The database cannot be reached.
        """
        self._recipe = recipe
        self._engine = open_engine(parse_url(url))
        with writing(self._engine) as connection:
            _metadata.create_all(connection)

    def load(self, day: int) -> dict[str, int]:
        """Tokens by key on `day`, in days since 1970 (UTC)."""
        wanted = sa.select(_use.c.key_id, _use.c.tokens).where(_use.c.recipe == self._recipe, _use.c.day == day)
        with reading(self._engine) as connection:
            return {key_id: int(tokens) for key_id, tokens in connection.execute(wanted)}

    def add(self, day: int, more: Mapping[str, int]) -> None:
        """Adds to the counts of `day`, in one transaction, and deletes earlier days."""
        with writing(self._engine) as connection:
            connection.execute(_use.delete().where(_use.c.recipe == self._recipe, _use.c.day < day))
            for key_id, tokens in more.items():
                row = (_use.c.recipe == self._recipe, _use.c.key_id == key_id, _use.c.day == day)
                changed = connection.execute(_use.update().where(*row).values(tokens=_use.c.tokens + tokens))
                if not changed.rowcount:
                    values = {"recipe": self._recipe, "key_id": key_id, "day": day, "tokens": tokens}
                    connection.execute(_use.insert().values(**values))

    def close(self) -> None:
        """Ends its connections."""
        self._engine.dispose()
