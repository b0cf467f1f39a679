import json
import os
import pickle
from pathlib import Path

import pytest

from cluster.errors import UserError
from retrieval.blocks import CorpusBlock
from retrieval.config import CorpusConfig
from retrieval.documents import corpus_digest, read_block, read_documents, scan_corpus
from retrieval.records import Document


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def corpus(path: object, **options: object) -> CorpusConfig:
    return CorpusConfig.model_validate({"path": str(path), **options})


def ids(path: object) -> list[str]:
    return [document.doc_id for document in read_documents(corpus(path, strict=True))]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Text files at three depths, hidden ones, and a picture."""
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("a.TXT", "a1.md", "b/one.md", "b/c/two.md", "b/c/x[1].txt", ".git/x.md", ".hidden.md"):
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_read_documents_folder_is_recursive_sorted_and_leaves_hidden_files_out(tree: Path) -> None:
    assert ids(tree) == ["a.TXT", "a1.md", "b/c/two.md", "b/c/x[1].txt", "b/one.md"]
    assert scan_corpus(corpus(tree), 1).ignored == 1


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.md", ["a1.md"]),
        ("**/*.md", ["a1.md", "b/c/two.md", "b/one.md"]),
        ("b/**", ["c/two.md", "c/x[1].txt", "one.md"]),
        ("b/*/*.txt", ["c/x[1].txt"]),
        ("b/**/t*.md", ["c/two.md"]),
        ("a[0-9].*", ["a1.md"]),
        ("[!0-9]1.md", ["a1.md"]),
    ],
)
def test_read_documents_glob_matches_as_a_shell_does(
    tree: Path, pattern: str, expected: list[str], scheme: str
) -> None:
    assert ids(f"{scheme}{tree}/{pattern}") == expected


def test_read_documents_local_path_may_hold_question_marks_and_literal_brackets(tree: Path) -> None:
    assert ids(tree / "b" / "**" / "t?o.md") == ["c/two.md"]
    assert ids(tree / "b" / "c" / "x[1].txt") == ["x[1].txt"]
    with pytest.raises(UserError, match=r"^corpus\.path: .* matches no file of a known format"):
        ids(tree / "a[!0-9].md")


def test_read_documents_remote_uri_and_local_path_give_the_same_documents_and_digest(tree: Path) -> None:
    local, remote = corpus(tree), corpus(f"file://{tree}/")
    assert list(read_documents(remote)) == list(read_documents(local))
    assert corpus_digest(remote) == corpus_digest(local)
    assert ids(f"file://{tree}/b/one.md") == ids(tree / "b" / "one.md") == ["one.md"]


def test_read_documents_folder_with_a_corpus_file_reads_that_only(tmp_path: Path) -> None:
    write(tmp_path / "corpus.jsonl", {"_id": "a", "text": "x"})
    write(tmp_path / "queries.jsonl", {"_id": "q", "text": "what?"})
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    assert ids(tmp_path) == ["a"]


def test_scan_corpus_missing_empty_or_foreign_paths_say_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    formats = r"\.txt \.md \.html \.pdf \.docx \.pptx \.jsonl \.csv \.parquet"
    for path, message in [
        ("", r"^corpus\.path is empty: set it to"),
        (tmp_path / "nowhere", rf"^corpus\.path: .*nowhere does not exist: .*{formats}"),
        (tmp_path / "nowhere/*.md", r"^corpus\.path: .*nowhere does not exist"),
        (tmp_path / "picture.png", rf"^corpus\.path: .*picture\.png is of no known format: give one of {formats}"),
        (tmp_path, rf"^corpus\.path: .* holds no file of a known format \({formats}\); it holds \.png"),
        ("s4://bucket/x", r"^corpus\.path: cannot read s4://bucket/x: "),
    ]:
        for call in (lambda config: scan_corpus(config, 1), corpus_digest):
            with pytest.raises(UserError, match=message) as error:
                call(corpus(path))
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^collections\.a\.corpus\.path: "):
        scan_corpus(corpus(tmp_path / "nowhere"), 1, key="collections.a.corpus.path")


@pytest.mark.parametrize("block_bytes", [1, 700, 2000, 10**9])
def test_scan_corpus_blocks_of_any_size_give_back_every_document_in_order(tmp_path: Path, block_bytes: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "字" * (n * 13 % 97) + "x", "n": n} for n in range(40)]
    write(tmp_path / "rows.jsonl", *[row if n % 5 else b"" for n, row in enumerate(rows)], b"{broken")
    quoted = "".join(f'"line {n}\n\nsays ""x""",{n}\r\n' for n in range(40))
    (tmp_path / "rows.csv").write_text("text,n\n" + quoted, encoding="utf-8", newline="")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    for n, row in enumerate(rows):
        (tmp_path / f"{n:02d}.txt").write_text(str(row["text"]), encoding="utf-8")
    blocks = scan_corpus(corpus(tmp_path), 1, block_bytes).blocks
    assert [block.ordinal for block in blocks] == list(range(len(blocks)))
    contents = [read_block(pickle.loads(pickle.dumps(CorpusBlock.from_row(block.to_row())))) for block in blocks]
    read = [(document.doc_id, document.text) for content in contents for document in content.documents]
    assert read == (
        [(f"{n:02d}.txt", row["text"]) for n, row in enumerate(rows)]
        + [(f"rows.csv#{n + 1}", f'line {n}\n\nsays "x"') for n in range(40)]
        + [(f"rows.jsonl#{n + 1}", row["text"]) for n, row in enumerate(rows) if n % 5]
        + [(f"rows.parquet#{n + 1}", row["text"]) for n, row in enumerate(rows)]
    )
    assert [item.describe()[:19] for content in contents for item in content.rejected] == ["rows.jsonl, line 41"]
    files = [block.files for block in blocks]
    assert len(blocks) == 1 if block_bytes == 10**9 else len(blocks) > 3
    if block_bytes == 1:
        assert [files.count((f"rows.{kind}",)) for kind in ("csv", "jsonl", "parquet")] == [40, 41, 6]


def test_scan_corpus_does_not_read_documents_but_for_a_bounded_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", *({"_id": str(n), "text": f"t{n} " * 50} for n in range(4000)))
    first, again, other = (scan_corpus(corpus(path), seed, 5000).sample for seed in (1, 1, 2))
    assert len(first) == 128
    assert first == again != other
    assert len({int(text.split()[0][1:]) // 100 for text in first}) > 10
    (tmp_path / "long.txt").write_text("字" * 100_000, encoding="utf-8")
    (sample,) = scan_corpus(corpus(tmp_path / "long.txt"), 1).sample
    assert set(sample) == {"字"}
    assert len(sample) <= 4000


def test_read_block_documents_with_one_id_keep_the_first(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", {"_id": "a", "text": "first"}, {"_id": "a", "text": "second"})
    (block,) = scan_corpus(corpus(tmp_path), 1).blocks
    content = read_block(block)
    assert content.documents == [Document("a", "", "first")]
    (rejected,) = content.rejected
    assert rejected.describe() == "rows.jsonl, id a: has the id of an earlier document: ids must differ"


def test_read_documents_strict_stops_at_the_first_rejection(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", {"_id": "a", "text": "x"}, b"{broken")
    assert [document.doc_id for document in read_documents(corpus(tmp_path))] == ["a"]
    with pytest.raises(UserError, match=r"^corpus\.path: rows\.jsonl, line 2: is not JSON: "):
        list(read_documents(corpus(tmp_path, strict=True)))


def test_corpus_digest_changes_with_what_is_read_and_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one", encoding="utf-8")
    digests = [corpus_digest(corpus(tmp_path))]
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / ".a.md.swp").write_bytes(b"x")
    os.utime(tmp_path / "a.md", (1, 1))
    assert corpus_digest(corpus(tmp_path)) == digests[0]
    assert corpus_digest(corpus(tmp_path, columns={"text": "body"})) == digests[0]
    (tmp_path / "a.md").write_text("two", encoding="utf-8")
    digests.append(corpus_digest(corpus(tmp_path)))
    (tmp_path / "a.md").rename(tmp_path / "b.md")
    digests.append(corpus_digest(corpus(tmp_path)))
    digests.append(corpus_digest(corpus(tmp_path, max_file_mb=0.000001)))
    write(tmp_path / "rows.jsonl", {"text": "x", "body": "y"})
    digests.append(corpus_digest(corpus(tmp_path)))
    digests.append(corpus_digest(corpus(tmp_path, columns={"text": "body"})))
    assert len(set(digests)) == 6


def test_corpus_digest_of_converted_files_follows_the_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.html").write_text("<p>x</p>", encoding="utf-8")
    before = corpus_digest(corpus(tmp_path))
    monkeypatch.setattr("retrieval.documents.metadata.version", lambda package: "999")
    assert corpus_digest(corpus(tmp_path)) != before
