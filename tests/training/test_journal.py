import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from training.journal import Journal

ROWS = [{"key": "a", "text": "first"}, {"key": "b", "text": "zwei \u4e8c\n"}, {"key": "a", "text": "second"}]


def test_rows_are_read_back_by_key_in_order_after_reopening(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append(ROWS[:1])
        journal.append(ROWS[1:])
        assert [row["text"] for row in journal.rows("a")] == ["first", "second"]
    with Journal(path) as journal:
        assert [row["text"] for row in journal.rows("a")] == ["first", "second"]
        assert list(journal.rows("b")) == [ROWS[1]]
        assert (len(journal), journal.count("a"), journal.count("c"), list(journal.rows("c"))) == (3, 2, 0, [])


@given(cut=st.integers(0, 200), texts=st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_cut_anywhere_keeps_the_whole_rows_and_takes_new_ones(tmp_path_factory, cut, texts):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    with Journal(path) as journal:
        journal.append([{"key": str(place), "text": text} for place, text in enumerate(texts)])
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    with Journal(path) as journal:
        assert (len(journal), journal.damaged_lines) == (whole, 0)
        journal.append([{"key": "new", "text": "after"}])
        assert list(journal.rows("new")) == [{"key": "new", "text": "after"}]
    with Journal(path) as journal:
        kept = [row["text"] for place in range(len(texts)) for row in journal.rows(str(place))]
        assert kept == texts[:whole]
        assert journal.count("new") == 1


def test_block_of_zeros_at_the_end_is_removed(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append(ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 512)  # what a file system may leave of a write that a power cut interrupted
    with Journal(path) as journal:
        assert len(journal) == 3
    assert path.read_bytes() == whole


def test_damaged_line_inside_is_counted_and_the_others_are_read(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append(ROWS)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1].replace(b"{", b"?"), b"[1]", lines[2], b""]))
    with Journal(path) as journal:
        assert journal.damaged_lines == 2
        assert [row["text"] for row in journal.rows("a")] == ["first", "second"]


def test_append_flushes_to_the_disk_before_it_returns(tmp_path, monkeypatch):
    path, flushed = tmp_path / "j.jsonl", []
    fsync = os.fsync

    def spy(handle):
        fsync(handle)
        flushed.append(path.stat().st_size)

    with Journal(path) as journal:
        monkeypatch.setattr(os, "fsync", spy)
        journal.append(ROWS[:2])
        assert flushed == [path.stat().st_size]
        journal.append(ROWS[2:])
        assert flushed[1:] == [path.stat().st_size]


def test_full_disk_names_the_key_and_leaves_whole_rows(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append(ROWS[:1])
        write = os.write
        calls = []

        def fills_up(handle, data):
            calls.append(data)
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return write(handle, data[:10])

        monkeypatch.setattr(os, "write", fills_up)
        with pytest.raises(UserError, match=r"teacher\.directory: cannot write .*No space left"):
            journal.append(ROWS[1:])
        monkeypatch.setattr(os, "write", write)
        assert path.read_bytes().count(b"\n") == 1
        assert path.read_bytes().endswith(b"\n")
        journal.append(ROWS[1:2])
        assert list(journal.rows("b")) == [ROWS[1]]


def test_second_holder_is_refused_until_the_first_lets_go(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path), pytest.raises(UserError, match=r"^teacher\.directory: another process is writing"):
        Journal(path)
    with Journal(path) as journal:
        journal.append(ROWS)


def test_holder_that_was_killed_blocks_nobody(tmp_path):
    path = tmp_path / "j.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path; from training.journal import Journal;"
        "j = Journal(Path(sys.argv[1])); j.append([{'key': 'k'}]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False)
    assert done.returncode == -9
    with Journal(path) as journal:
        assert journal.count("k") == 1


def test_folder_that_cannot_be_made_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^teacher\.directory: cannot write"):
        Journal(tmp_path / "file" / "journal.jsonl")
