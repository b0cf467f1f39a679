"""Stored feedback as a person reads it, and as a program does.

In: entries and counts. Out: lines of text, in which users' words cannot steer the terminal, and JSON objects.
Not covered: commands (serving/feedback_cli.py).
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any

from cluster.text_table import render_table
from serving.feedback_store import Entry, Satisfaction

Z_95 = 1.959963984540054
"""Standard normal quantile at 0.975."""


def describe_entry(entry: Entry) -> str:
    """An entry on a few lines, its request id first."""
    given, rating = entry.interaction, entry.rating
    when = datetime.datetime.fromtimestamp(given.at, datetime.UTC).strftime("%Y-%m-%d %H:%M")
    told = [given.strategy, *([f"intent {given.intent}"] if given.intent else []), f"{when} UTC", str(entry.review)]
    lines = [f"{given.request_id}  ({', '.join(told)})", f"  Q: {given.question}"]
    lines.append(f"  A: {given.answer}{' (abstained)' if given.abstained else ''}")
    lines += [f"     “{quote}”" for quote in given.quotes]
    if given.doc_ids:
        lines.append(f"     in {', '.join(given.doc_ids)}")
    lines.append("  unrated" if rating is None else f"  rated {rating.satisfied:g} (1 is satisfied, 0 is not)")
    if rating and rating.correction:
        lines.append(f"  user's correction: {rating.correction}")
    if rating and rating.comment:
        lines.append(f"  user's comment: {rating.comment}")
    if entry.shortened:
        lines.append("  cut when it was stored: it will not be exported")
    return "\n".join(printable(line) for line in lines)


def printable(text: str) -> str:
    """Text on one line without control characters, which could steer the terminal that shows it."""
    return "".join(char if char.isprintable() else " " for char in text)


def entry_json(entry: Entry) -> dict[str, Any]:
    """An entry as a JSON object."""
    given, rating = entry.interaction, entry.rating
    return {
        **given.to_row(),
        "satisfied": rating.satisfied if rating else None,
        "correction": rating.correction if rating else "",
        "comment": rating.comment if rating else "",
        "rated_at": entry.rated_at,
        "review": str(entry.review),
        "reviewed_answer": entry.answer,
        "reviewed_doc_ids": list(entry.doc_ids),
        "shortened": entry.shortened,
    }


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95% score interval of a share (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927): [0, 1] without a trial."""
    if n == 0:
        return 0.0, 1.0
    share, square = successes / n, Z_95**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = Z_95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def stats_json(rows: Sequence[Satisfaction]) -> list[dict[str, Any]]:
    """Counts and the share of satisfied ratings with its interval, per strategy."""
    told = []
    for row in rows:
        low, high = wilson(row.satisfied, row.ratings)
        share = row.satisfied / row.ratings if row.ratings else None
        told.append(
            {
                "strategy": row.strategy,
                "ratings": row.ratings,
                "satisfied": None if share is None else {"value": share, "low": low, "high": high, "n": row.ratings},
                "corrections": row.corrections,
                "unrated": row.unrated,
            }
        )
    return told


def stats_table(rows: Sequence[Satisfaction], title: str) -> str:
    """The same as a table."""
    cells = []
    for row in stats_json(rows):
        share = row["satisfied"]
        told = "–" if share is None else f"{share['value']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"
        cells.append(
            [printable(row["strategy"]), str(row["ratings"]), told, str(row["corrections"]), str(row["unrated"])]
        )
    caption = "Share of satisfied ratings with Wilson's 95% interval. Users chose what to rate: no random sample."
    return render_table(title, ["strategy", "ratings", "satisfied", "corrections", "unrated"], cells, caption)
