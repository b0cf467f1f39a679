"""Tables as plain text, for terminals and logs. In: headers and rows. Out: lines without trailing blanks."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

WIDTH = 100
"""Columns of a report on a terminal."""


def render_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table at most `WIDTH` characters wide, title above and caption below at the left; long cells fold."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = StringIO()
    Console(file=out, width=WIDTH, markup=False, highlight=False, emoji=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
