import json
from pathlib import Path

import pytest

from cluster.errors import UserError
from retrieval.documents import corpus_digest, read_block, read_documents, scan_corpus
from retrieval.records import Document


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def test_read_documents_beir_lines_keep_text_and_metadata(tmp_path: Path) -> None:
    text = "  first\r\nＦｕｌｌ width \u3000 e\u0301 "
    path = write(
        tmp_path / "corpus.jsonl",
        {"_id": "a", "title": "A", "text": text, "metadata": {"year": 2024}, "uri": "https://example.org/a"},
        b"",
        {"_id": 7, "text": "no title"},
    )
    assert list(read_documents(str(path))) == [
        Document("a", "A", text, "https://example.org/a", {"year": 2024}),
        Document("7", "", "no title"),
    ]


def test_read_documents_folder_is_recursive_sorted_and_leaves_hidden_files_out(tmp_path: Path) -> None:
    (tmp_path / "b" / ".git").mkdir(parents=True)
    (tmp_path / "b" / "one.md").write_bytes("\ufeffintro\r\n# 标题\r\n".encode())
    (tmp_path / "a.TXT").write_text("text", encoding="utf-8")
    (tmp_path / "b" / ".git" / "x.md").write_text("hidden", encoding="utf-8")
    (tmp_path / ".hidden.md").write_text("hidden", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(read_documents(str(tmp_path))) == [
        Document("a.TXT", "a", "text", "a.TXT"),
        Document("b/one.md", "标题", "intro\r\n# 标题\r\n", "b/one.md"),
    ]


def test_read_documents_single_markdown_file_without_heading_takes_its_name_as_title(tmp_path: Path) -> None:
    file = tmp_path / "notes.markdown"
    file.write_text("## only a section\n", encoding="utf-8")
    assert list(read_documents(str(file))) == [
        Document("notes.markdown", "notes", "## only a section\n", "notes.markdown")
    ]


def test_read_documents_folder_with_a_corpus_file_reads_that(tmp_path: Path) -> None:
    write(tmp_path / "corpus.jsonl", {"_id": "a", "text": "x"})
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    assert [document.doc_id for document in read_documents(str(tmp_path))] == ["a"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"_id": "a", "text": "x"}, b"{nonsense"], r"corpus\.jsonl:2 is not JSON"),
        ([{"_id": "a", "text": "x"}, b'{"_id": "b", "text": "\xff"}'], r"corpus\.jsonl:2 is not UTF-8"),
        ([{"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}], r"two documents with the id 'a'"),
        ([{"text": "x"}], r"corpus\.jsonl:1 has no _id"),
        ([{"_id": "a", "title": "x"}], r"corpus\.jsonl:1 has no text"),
        ([[1, 2]], r"corpus\.jsonl:1 is not a JSON object"),
        ([{"_id": "a", "text": " \n"}], r"holds no text"),
        ([b'{"_id": "a", "text": "\\ud800"}'], r"corpus\.jsonl:1 holds half a UTF-16 character"),
    ],
)
def test_read_documents_bad_line_names_key_and_place(tmp_path: Path, rows: list[object], message: str) -> None:
    path = write(tmp_path / "corpus.jsonl", *rows)
    with pytest.raises(UserError, match=rf"^corpus\.path: .*{message}") as error:
        list(read_documents(str(path)))
    assert "\n" not in str(error.value)


def test_read_documents_missing_empty_or_foreign_paths_say_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "paper.pdf").write_bytes(b"%PDF")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    for path, message in [
        ("", r"^corpus\.path is empty: set it to"),
        (str(tmp_path / "nowhere"), r"^corpus\.path: .*nowhere does not exist"),
        (str(tmp_path / "empty.jsonl"), r"^corpus\.path: .*empty\.jsonl is empty"),
        (str(tmp_path / "paper.pdf"), r"^corpus\.path: .*paper\.pdf is not a \.jsonl, \.txt or \.md file"),
        (str(tmp_path / "latin.txt"), r"^corpus\.path: .*latin\.txt is not UTF-8 \(byte 2\)"),
    ]:
        with pytest.raises(UserError, match=message):
            list(read_documents(path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"holds no \.txt or \.md documents"):
        list(read_documents(str(tmp_path / "folder")))


@pytest.mark.parametrize("block_bytes", [1, 700, 2000, 10**9])
def test_scan_corpus_blocks_of_any_size_give_back_every_document_in_order(tmp_path: Path, block_bytes: int) -> None:
    rows = [{"_id": str(n), "title": "", "text": "字" * (n * 13 % 97) + "x"} for n in range(40)]
    path = write(tmp_path / "corpus.jsonl", *[row if n % 5 else b"" for n, row in enumerate(rows)])
    folder = tmp_path / "folder"
    folder.mkdir()
    for row in rows:
        (folder / f"{row['_id']}.txt").write_text(str(row["text"]), encoding="utf-8")
    for corpus in (path, folder):
        scan = scan_corpus(str(corpus), seed=1, block_bytes=block_bytes)
        read = [document for block in scan.blocks for document in read_block(block)]
        assert read == list(read_documents(str(corpus)))
        assert scan.documents == len(read)
    assert len(scan.blocks) == {1: 40, 10**9: 1}.get(block_bytes, len(scan.blocks))


def test_scan_corpus_sample_is_bounded_and_follows_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", *({"_id": str(n), "text": f"t{n}"} for n in range(1000)))
    first, again, other = (scan_corpus(str(path), seed).sample for seed in (1, 1, 2))
    assert len(first) == 128
    assert first == again != other
    assert len(set(first)) == 128


def test_corpus_digest_changes_with_content_and_names_but_not_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one", encoding="utf-8")
    digests = [corpus_digest(str(tmp_path))]
    (tmp_path / "picture.png").write_bytes(b"x")
    assert corpus_digest(str(tmp_path)) == digests[0]
    (tmp_path / "a.md").write_text("two", encoding="utf-8")
    digests.append(corpus_digest(str(tmp_path)))
    (tmp_path / "a.md").rename(tmp_path / "b.md")
    digests.append(corpus_digest(str(tmp_path)))
    assert len(set(digests)) == 3
