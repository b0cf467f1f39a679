"""What the command line writes to the terminal: lines, and progress with a rate and an ETA.

In: a sentence, or counts as work advances. Out: on a terminal a rich bar; in a pipe, a file or a Ray job's log a
plain line every few seconds, so that a log stays readable. Lines go to standard output (`complain` to standard error).
Not covered: logging of servers and workers (the `logging` module), and results that other programs parse.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 5.0


@functools.cache
def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """Write one line (or several) to standard output, above any bar that is live."""
    _console().print(text, soft_wrap=True)


def complain(text: str) -> None:
    """Write one line to standard error."""
    _console(stderr=True).print(text, soft_wrap=True)


def relay(text: str) -> None:
    """Pass on another program's output as it is, such as a job's log."""
    console = _console()
    console.file.write(text)
    console.file.flush()


def describe_bytes(size: int) -> str:
    """`0 B`, `1.5 MB`, `2.1 GB` (powers of 1000)."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def describe_seconds(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _describe_figures(figures: dict[str, float | str]) -> str:
    return "".join(
        f", {name} {value if isinstance(value, str) else format(value, '.4g')}" for name, value in figures.items()
    )


class Bar:
    """Progress of one piece of work; made by `track`, safe to advance from several threads."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self._figures: dict[str, float | str] = {}
        self._began = time.monotonic()
        self._last_line = self._began
        self._lock = threading.Lock()
        self._skipped = 0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, n: int = 1, **figures: float | str) -> None:
        """Count `n` more units; `figures` (loss=0.41) are shown beside the rate."""
        with self._lock:
            self.done += n
            self._figures.update(figures)
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, completed=self.done, figures=f" {self.unit}{self._status()}")
            elif time.monotonic() - self._last_line >= LINE_EVERY_S:
                self._last_line = time.monotonic()
                of_total = "" if self.total is None else f"/{self.total}"
                say(f"{self.label}: {self.done}{of_total} {self.unit}{self._status()}")

    def skip(self, n: int) -> None:
        """Count `n` units that an earlier run finished, without letting them flatter the rate."""
        with self._lock:
            self.done += n
            self._skipped += n

    def _rate(self) -> float:
        elapsed = time.monotonic() - self._began
        return (self.done - self._skipped) / elapsed if elapsed > 0 else 0.0

    def _status(self) -> str:
        rate = self._rate()
        text = f", {rate:.3g} {self.unit}/s"
        if self.total is not None and rate > 0:
            text += f", ETA {describe_seconds(max(0, self.total - self.done) / rate)}"
        return text + _describe_figures(self._figures)

    def _finish(self) -> None:
        elapsed = time.monotonic() - self._began
        earlier = f" ({self._skipped} from an earlier run)" if self._skipped else ""
        say(
            f"{self.label}: {self.done} {self.unit}{earlier} in {describe_seconds(elapsed)}, "
            f"{self._rate():.3g} {self.unit}/s{_describe_figures(self._figures)}"
        )


@contextlib.contextmanager
def track(label: str, total: int | None, unit: str) -> Iterator[Bar]:
    """Show the progress of a block of work; a closing line with count, time and rate when it ends well.

    Args:
        label: What is being done, such as `index: embed`.
        total: Units expected; none when it is not known (then there is no ETA).
        unit: Plural noun of what `Bar.advance` counts, such as `chunks`.
    """
    bar = Bar(label, total, unit)
    if not _console().is_terminal:
        yield bar
        bar._finish()
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total}{task.fields[figures]}"),
    )
    with Progress(*columns, console=_console(), transient=True) as progress:
        bar._progress = progress
        bar._task = progress.add_task(label, total=total, figures=f" {unit}")
        yield bar
    bar._progress = None
    bar._finish()
