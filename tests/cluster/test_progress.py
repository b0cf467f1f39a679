import io

import pytest
from rich.console import Console

from cluster import progress
from cluster.progress import complain, describe_bytes, describe_seconds, relay, say, track


def test_lines_are_written_as_they_are(capsys):
    say("[bold]not markup[/] :smile: " + "x" * 300)
    complain("to the error stream")
    relay("half a ")
    relay("line\n")
    captured = capsys.readouterr()
    assert captured.out == "[bold]not markup[/] :smile: " + "x" * 300 + "\nhalf a line\n"
    assert captured.err == "to the error stream\n"


def test_progress_in_a_pipe_is_a_line_now_and_then_and_one_at_the_end(capsys, monkeypatch):
    clock = iter(range(0, 1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with track("index: embed", 10, "chunks") as bar:
        for _ in range(10):
            bar.advance(1, loss=0.25)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 5
    assert lines[0].startswith("index: embed: ")
    assert "/10 chunks" in lines[0]
    assert "ETA" in lines[0]
    assert "loss 0.25" in lines[0]
    assert lines[-1].startswith("index: embed: 10 chunks in ")


def test_work_of_an_earlier_run_does_not_flatter_the_rate(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with track("predict", None, "rows") as bar:
        bar.skip(100)
        bar.advance(2)
    assert "102 rows (100 from an earlier run)" in capsys.readouterr().out
    assert bar.done == 102


def test_a_failed_block_claims_no_success(capsys):
    with pytest.raises(ValueError, match="no"), track("x", 2, "rows"):
        raise ValueError("no")
    assert capsys.readouterr().out == ""


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(progress, "_console", lambda stderr=False: console)
    with track("train", 4, "steps") as bar:
        bar.advance(4, loss="0.5")
        say("a line above the bar")
    assert "a line above the bar" in written.getvalue()
    assert "4/4 steps" in written.getvalue()
    assert "train: 4 steps in" in written.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (12.3, "12 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds_read_as_a_person_says_them(seconds, text):
    assert describe_seconds(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (150_000_000, "150 MB"), (2.1e12, "2.1 TB")]
)
def test_bytes_read_as_a_person_says_them(size, text):
    assert describe_bytes(size) == text
