import json
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.config import CorpusConfig
from retrieval.documents import BlockContent, read_block, scan_corpus
from retrieval.records import Document


def read(path: Path, **options: object) -> BlockContent:
    blocks = scan_corpus(CorpusConfig.model_validate({"path": str(path), **options}), 1).blocks
    contents = [read_block(block) for block in blocks]
    documents = [document for content in contents for document in content.documents]
    return BlockContent(documents, [item for content in contents for item in content.rejected])


def rejected(path: Path, **options: object) -> list[str]:
    content = read(path, **options)
    assert all("\n" not in item.reason for item in content.rejected)
    return [item.describe() for item in content.rejected]


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def test_read_text_is_kept_exactly_and_titles_come_from_headings_or_names(tmp_path: Path) -> None:
    (tmp_path / "one.md").write_bytes("\ufeffintro\r\n# 标题\r\n".encode())
    (tmp_path / "two.markdown").write_text("## only a section\n", encoding="utf-8")
    (tmp_path / "wide.txt").write_bytes("größe 标题 \n".encode("utf-16"))
    assert read(tmp_path).documents == [
        Document("one.md", "标题", "intro\r\n# 标题\r\n", "one.md"),
        Document("two.markdown", "two", "## only a section\n", "two.markdown"),
        Document("wide.txt", "wide", "größe 标题 \n", "wide.txt", {"encoding": "utf-16"}),
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "holds no text: it is blank"),
        ("größe".encode("latin-1"), "is not UTF-8 (byte 2): convert it to UTF-8"),
        ("标题".encode()[:-1], "is cut off in the middle of a character (byte 3)"),
        ("hello".encode("utf-16-le"), "is binary, or UTF-16 without its mark (a zero byte at byte 1)"),
        ("hello".encode("utf-32"), "is binary, or UTF-16 without its mark (a zero byte at byte 2)"),
        (b"\xff\xfeab\x00\xd8", "is cut off in the middle of a character (byte 4)"),
        (b"\x7fELF\x02\x01\x01\x00", "is binary, or UTF-16 without its mark (a zero byte at byte 7)"),
        (b"x" * 1001, "has more than 0.001 MB (corpus.max_file_mb)"),
    ],
)
def test_read_bad_text_file_is_rejected_and_the_others_are_read(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    (tmp_path / "good.txt").write_text("fine", encoding="utf-8")
    found = read(tmp_path, max_file_mb=0.001)
    assert [document.doc_id for document in found.documents] == ["good.txt"]
    assert [(item.uri, item.place, item.reason, item.bytes) for item in found.rejected] == [
        ("bad.txt", "", reason, len(content))
    ]


def test_read_file_that_is_gone_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("{}", encoding="utf-8")
    (block,) = scan_corpus(CorpusConfig(path=str(tmp_path)), 1).blocks
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").unlink()
    reasons = [item.reason for item in read_block(block).rejected]
    assert [reason[:16] for reason in reasons] == ["cannot be read: "] * 2


def test_read_lines_beir_keeps_text_and_other_columns_become_metadata(tmp_path: Path) -> None:
    text = "  first\r\nＦｕｌｌ width \u3000 e\u0301 "
    rows = [
        {"_id": "a", "title": "A", "text": text, "metadata": {"year": 2024}, "uri": "https://e.org/a", "tags": ["x"]},
        b"",
        {"_id": 7, "text": "no title", "year": None},
        {"text": "no id", "metadata": '{"k": 1}'},
    ]
    assert read(write_lines(tmp_path / "c.jsonl", rows)).documents == [
        Document("a", "A", text, "https://e.org/a", {"tags": ["x"], "year": 2024}),
        Document("7", "", "no title"),
        Document("c.jsonl#4", "", "no id", "", {"k": 1}),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{nonsense", "is not JSON: Expecting property name"),
        (b'{"_id": "b", "text": "\xff"}', "is not UTF-8 (byte 22 of the line)"),
        ({"_id": "", "text": "x"}, "has no id in its column '_id'"),
        ({"_id": 1.5, "text": "x"}, "has no id in its column '_id'"),
        (
            {"_id": "a", "body": "x"},
            "has no text in its column 'text' (corpus.columns.text); its columns are '_id', 'body'",
        ),
        ({"_id": "a", "text": 5}, "has no text in its column 'text'"),
        ({"_id": "a", "text": " \n"}, "holds no text: it is blank"),
        ([1, 2], "is not a JSON object"),
        (b'{"_id": "a", "text": "\\ud800"}', "holds half a UTF-16 character"),
        (b'{"_id": "a", "text": "x", "k": {"\\uDfff": 1}}', "holds half a UTF-16 character"),
        (b'{"_id": "a", "text": "x", "v": NaN}', "is not JSON: NaN is not a JSON number"),
        (b'{"_id": "a", "text": "x", "v": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b"[" * 100_000, "is not JSON that can be read: nested too deeply"),
        ({"_id": "a", "text": "x", "title": ["t"]}, "has a 'title' that is no string"),
        ({"_id": "a", "text": "x", "metadata": "{"}, "has a 'metadata' that is not JSON"),
        ({"_id": "a", "text": "x" * 200_000}, "has more than 0.15 MB (corpus.max_file_mb)"),
    ],
)
def test_read_bad_line_is_rejected_with_its_number_and_reading_goes_on(
    tmp_path: Path, row: object, reason: str
) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"_id": "0", "text": "x"}, row, {"_id": "2", "text": "y"}])
    found = read(path, max_file_mb=0.15)
    assert [document.doc_id for document in found.documents] == ["0", "2"]
    (item,) = found.rejected
    assert item.describe().startswith(f"c.jsonl, line 2: {reason}")
    assert item.bytes == len(path.read_bytes().split(b"\n")[1]) + 1


def test_read_row_files_in_utf16_with_a_mark_are_read_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,n\ngröße,1\n".encode("utf-16"))
    (tmp_path / "b.jsonl").write_bytes('{"text": "标题"}\n'.encode("utf-16"))
    for block_bytes in (1, None):
        blocks = scan_corpus(CorpusConfig(path=str(tmp_path)), 1, block_bytes).blocks
        assert [document for block in blocks for document in read_block(block).documents] == [
            Document("a.csv#1", "", "größe", "", {"n": 1, "encoding": "utf-16"}),
            Document("b.jsonl#1", "", "标题", "", {"encoding": "utf-16"}),
        ]


def test_read_csv_mapped_columns_numbers_and_delimiters(tmp_path: Path) -> None:
    columns = {"id": "key", "text": "body", "title": "name"}
    for delimiter in (",", ";", "\t"):
        path = tmp_path / "rows.csv"
        rows = ["\ufeffkey,body,name,year,zip,rate,note", 'k1,"a\n""b""",N,2020,007,-1.5,', "k2,c,,1e3,12,1.50,x"]
        path.write_text("\r\n".join(row.replace(",", delimiter) for row in rows), encoding="utf-8", newline="")
        assert read(path, columns=columns).documents == [
            Document("k1", "N", 'a\n"b"', "", {"year": 2020, "zip": "007", "rate": -1.5}),
            Document("k2", "", "c", "", {"year": "1e3", "zip": 12, "rate": "1.50", "note": "x"}),
        ]


def test_read_bad_csv_rows_are_rejected_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'_id,text\na,one\nb\n,two\nc,\nd,"x"y\ne,gr\xf6\xdfe\nf,six\ng,"never closed\n')
    assert [document.doc_id for document in read(path).documents] == ["a", "f"]
    assert rejected(path) == [
        "rows.csv, row 2: has 1 cells where the header has 2",
        "rows.csv, row 3: has no id in its column '_id': give it a string or a whole number",
        "rows.csv, row 4: holds no text: it is blank",
        "rows.csv, row 5: is not CSV: ',' expected after '\"'",
        "rows.csv, row 6: is not UTF-8 (byte 2 of its column 'text')",
        "rows.csv, row 8: is not CSV: unexpected end of data",
    ]


def test_read_parquet_values_become_json_and_bad_rows_are_rejected(tmp_path: Path) -> None:
    table = pa.table(
        {
            "_id": pa.array([1, 2, None, 4]),
            "text": pa.array(["a", None, "c", "d"], pa.large_string()).dictionary_encode(),
            "when": pa.array([datetime(2024, 5, 1, 12, tzinfo=UTC)] * 4),
            "price": pa.array([Decimal("1.50"), None, None, Decimal("2.00")]),
            "ratio": [float("nan"), 0.5, 0.5, 0.5],
            "raw": [b"\xff"] * 4,
            "tags": [["x"], [], None, ["y", "z"]],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert read(tmp_path).documents == [
        Document("1", "", "a", "", {"when": "2024-05-01T12:00:00+00:00", "price": 1.5, "tags": ["x"]}),
        Document("4", "", "d", "", {"when": "2024-05-01T12:00:00+00:00", "price": 2, "ratio": 0.5, "tags": ["y", "z"]}),
    ]
    assert [text.split(" (")[0] for text in rejected(tmp_path)] == [
        "t.parquet, row 2: has no text in its column 'text'",
        "t.parquet, row 3: has no id in its column '_id': give it a string or a whole number",
    ]


def test_read_parquet_text_that_is_not_utf8_is_one_row(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"\xff\xfe", b"fine"]).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "t.parquet")
    assert [document.text for document in read(tmp_path).documents] == ["good", "fine"]
    (reason,) = rejected(tmp_path)
    assert reason.startswith("t.parquet, row 2: holds a value that cannot be read: 'utf-8' codec")


def test_read_row_files_without_rows_or_text_column_are_rejected_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name,value\n" + "x,1\n" * 50, encoding="utf-8")
    (tmp_path / "b.csv").write_text("text\n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_bytes(b"\n\n")
    pq.write_table(pa.table({"body": ["x"] * 50}), tmp_path / "d.parquet", row_group_size=5)
    (tmp_path / "e.parquet").write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    (tmp_path / "f.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-200])
    blocks = scan_corpus(CorpusConfig(path=str(tmp_path)), 1, 40).blocks
    reasons = [item.describe() for block in blocks for item in read_block(block).rejected]
    assert [reason.partition(";")[0].partition(": ")[2][:32] for reason in reasons] == [
        "has no column 'text' (corpus.col",
        "is empty: it holds no rows",
        "is empty: it holds no rows",
        "has no text column 'text' (corpu",
        "is not Parquet that can be read:",
        "is not Parquet that can be read:",
    ]
