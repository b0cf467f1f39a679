import io
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrieval.config import CorpusConfig
from retrieval.conversion import INSTALL_HINT, Converter
from retrieval.converters import ConversionError, html_text
from retrieval.documents import read_block, scan_corpus

TIMEOUT_S = 60.0
LIMIT = 10_000_000


@pytest.fixture(scope="module")
def converter() -> Iterator[Converter]:
    shared = Converter()
    yield shared
    shared.close()


def stub(body: str) -> Converter:
    """A converter whose child runs `body` at each request, with `frame`, `data` and `reply` at hand."""
    script = (
        "import os, signal, sys, time\nfrom retrieval import converters as c\n"
        "requests, reply = sys.stdin.buffer, lambda row: c.write_frame(sys.stdout.buffer, row)\n"
        "reply({'ready': True})\n"
        f"while frame := c.read_frame(requests):\n    data = requests.read(frame['size'])\n    {body}\n"
    )
    return Converter(lambda: [sys.executable, "-c", script])


def pdf(pages: list[list[tuple[float, str]]]) -> bytes:
    """A PDF of lines of (type size, text) in Helvetica."""
    bodies = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for lines in pages:
        at, drawn = 760.0, ""
        for size, text in lines:
            at -= size * (1.2 if text else 3)
            drawn += f"BT /F1 {size} Tf 72 {at:.1f} Td ({text}) Tj ET\n" if text else ""
        bodies.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}endstream")
        content = len(bodies)
        bodies.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {content} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
    kids = " ".join(f"{number} 0 R" for number in range(5, len(bodies) + 1, 2))
    bodies[1] = f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"
    written, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(bodies, start=1):
        offsets.append(len(written))
        written += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    trailer = f"trailer << /Size {len(bodies) + 1} /Root 1 0 R >>\nstartxref\n{len(written)}\n%%EOF"
    return f"{written}xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()


def docx(*paragraphs: tuple[str, str]) -> bytes:
    """A Word document of (style or "", text)."""
    office = "http://schemas.openxmlformats.org"
    styled = '<w:pPr><w:pStyle w:val="{}"/></w:pPr>'
    body = "".join(
        f"<w:p>{styled.format(style) if style else ''}<w:r><w:t>{text}</w:t></w:r></w:p>" for style, text in paragraphs
    )
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    files = {
        "[Content_Types].xml": f'<Types xmlns="{office}/package/2006/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{kind}"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{office}/package/2006/relationships"><Relationship Id="r1" '
        f'Type="{office}/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/>'
        "</Relationships>",
        "word/document.xml": f'<w:document xmlns:w="{office}/wordprocessingml/2006/main"><w:body>{body}</w:body>'
        "</w:document>",
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, f'<?xml version="1.0"?>{content}')
    return packed.getvalue()


def test_convert_html_keeps_headings_tables_and_the_title_and_drops_scripts(converter: Converter) -> None:
    page = (
        "<html><head><title> The\n page </title><script>evil()</script></head><body><h2>Top</h2>"
        "<p>Hello <b>world</b></p><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table></body>"
    )
    text, title = converter.convert(page.encode(), ".html", TIMEOUT_S, LIMIT)
    assert text == "## Top\n\nHello **world**\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert title == "The page"


def test_convert_docx_and_pptx_headings_become_markdown(converter: Converter) -> None:
    from pptx import Presentation

    text, _ = converter.convert(docx(("Heading1", "Report"), ("", "Body text.")), ".docx", TIMEOUT_S, LIMIT)
    assert text == "# Report\n\nBody text."
    deck, saved = Presentation(), io.BytesIO()
    slide = deck.slides.add_slide(deck.slide_layouts[1])
    slide.shapes.title.text, slide.placeholders[1].text = "Slide title", "Point one"
    deck.save(saved)
    text, _ = converter.convert(saved.getvalue(), ".pptx", TIMEOUT_S, LIMIT)
    assert "# Slide title\nPoint one" in text


def test_convert_pdf_large_type_is_a_heading_and_paragraphs_go_on_over_lines_and_pages(converter: Converter) -> None:
    bodies = [[(10.0, f"Patient {page}{n} has line {n * page} of the text.") for n in range(6)] for page in range(3, 6)]
    first = [(20.0, "The title"), (20.0, ""), (10.0, "An inter-"), (10.0, "national union of"), (10.0, "states")]
    second = [(10.0, "goes on here."), (10.0, ""), (14.0, "A section"), (14.0, ""), (10.0, "# of states: 5")]
    pages = [
        [(8.0, "A running head"), (8.0, ""), *lines, (8.0, ""), (8.0, f"Page {n} of 5")]
        for n, lines in enumerate([first, second, *bodies], start=1)
    ]
    text, _ = converter.convert(pdf(pages), ".pdf", TIMEOUT_S, LIMIT)
    assert text.split("\n\n") == [
        "A running head",
        "# The title",
        "An international union of states goes on here.",
        "## A section",
        r"\# of states: 5",
        *(" ".join(line for _, line in body) for body in bodies),
    ]


@pytest.mark.parametrize(
    ("suffix", "data", "reason"),
    [
        (".pdf", b"not a pdf", r"^cannot be converted: PDFSyntaxError: No /Root object"),
        (".pdf", pdf([[(10.0, "x")]])[:200], r"^cannot be converted: "),
        (".pdf", random.Random(1).randbytes(50_000), r"^cannot be converted: "),
        (".docx", docx(("", "x"))[:300], r"^cannot be converted: BadZipFile: File is not a zip file$"),
        (".pptx", b"PK\x03\x04" + bytes(99), r"^cannot be converted: "),
        (".html", "größe".encode("latin-1"), r"^is not UTF-8 \(byte 2\) and declares no other encoding$"),
        (".html", b"<p>" + b"x" * 2000, r"^has more than 0\.001 MB of text \(corpus\.max_file_mb\)$"),
    ],
)
def test_convert_malformed_file_is_one_line_and_the_child_goes_on(
    converter: Converter, suffix: str, data: bytes, reason: str
) -> None:
    converter.convert(b"<p>x", ".html", TIMEOUT_S, LIMIT)
    child = converter.pid
    with pytest.raises(ConversionError, match=reason) as error:
        converter.convert(data, suffix, TIMEOUT_S, 1000)
    assert "\n" not in str(error.value)
    assert converter.convert(b"<p>x", ".html", TIMEOUT_S, LIMIT) == ("x", "")
    assert converter.pid == child


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("<p>größe 标题".encode(), "<p>größe 标题"),
        ("<p>größe".encode("utf-16"), "<p>größe"),
        ('<meta charset="gb2312"><p>标题〇'.encode("gb18030"), '<meta charset="gb2312"><p>标题〇'),
        (
            b'<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">\x93gr\xf6\xdfe\x94',
            '<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">“größe”',
        ),
        (b'<?xml version="1.0" encoding="Shift_JIS"?>' + "日本".encode("shift-jis"), None),
    ],
)
def test_html_text_follows_marks_and_declarations(data: bytes, expected: str | None) -> None:
    assert html_text(data) == (expected or '<?xml version="1.0" encoding="Shift_JIS"?>日本')


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<meta charset=utf-8>\xff", r"is not UTF-8 \(byte 20\)"),
        (b"<meta charset=klingon>\xff", r"declares an unknown encoding \(klingon\)"),
        (b"<meta charset=gbk>\xff\xff\xff", r"is not gb18030, as it declares"),
        (b"<p>a\0b", r"is binary \(a zero byte at byte 4\)"),
    ],
)
def test_html_text_is_never_guessed(data: bytes, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        html_text(data)


def test_convert_child_that_hangs_is_stopped_in_time_and_replaced() -> None:
    hanging = stub("time.sleep(60 if data == b'hang' else 0); reply({'markdown': data.decode(), 'title': ''})")
    assert hanging.convert(b"first", ".pdf", 20, LIMIT) == ("first", "")
    child, began = hanging.pid, time.monotonic()
    with pytest.raises(ConversionError, match=r"^took more than 0\.5 s \(corpus\.convert_timeout_s\)$"):
        hanging.convert(b"hang", ".pdf", 0.5, LIMIT)
    assert time.monotonic() - began < 10
    assert child is not None
    assert not running(child)
    assert hanging.convert(b"after", ".pdf", 20, LIMIT) == ("after", "")
    hanging.close()


def test_convert_child_that_does_not_read_a_large_file_is_stopped_in_time() -> None:
    deaf = Converter(
        lambda: [
            sys.executable,
            "-c",
            "import sys, time\nfrom retrieval import converters as c\n"
            "c.write_frame(sys.stdout.buffer, {'ready': True}); time.sleep(60)",
        ]
    )
    with pytest.raises(ConversionError, match=r"^took more than 0\.5 s"):
        deaf.convert(bytes(5_000_000), ".pdf", 0.5, LIMIT)


def test_convert_child_that_dies_is_said_and_replaced() -> None:
    dying = stub("os.kill(os.getpid(), signal.SIGSEGV) if data == b'die' else reply({'markdown': 'x', 'title': ''})")
    with pytest.raises(ConversionError, match=r"^ended its converter: signal 11$"):
        dying.convert(b"die", ".pdf", 20, LIMIT)
    assert dying.convert(b"go", ".pdf", 20, LIMIT) == ("x", "")
    dying.close()


def test_convert_child_out_of_memory_is_said_and_replaced() -> None:
    script = (
        "import resource, sys\nfrom retrieval import converters as c\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "c.convert = lambda data, suffix: (str(bytearray(2 << 30))[:1] if data == b'big' else 'small', '')\n"
        "c.serve(sys.stdin.buffer, sys.stdout.buffer)\n"
    )
    small = Converter(lambda: [sys.executable, "-c", script])
    with pytest.raises(ConversionError, match=r"^cannot be converted in 4 GiB of memory$"):
        small.convert(b"big", ".pdf", 20, LIMIT)
    assert small.pid is None
    assert small.convert(b"", ".pdf", 20, LIMIT) == ("small", "")
    small.close()


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_convert_child_ends_with_its_parent_even_in_the_middle_of_a_file() -> None:
    script = (
        "from retrieval import conversion, converters\nc = conversion.Converter()\n"
        "c.convert(b'<p>x', '.html', 60, 1000)\nprint(c.pid, flush=True)\n"
        "c.convert(b'<b>' * 3_000_000, '.html', 60, 10**9)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    assert running(child)
    assert parent.poll() is None
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 15
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(child)


def test_read_folder_of_converted_files_titles_empty_ones_and_a_missing_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.docx").write_bytes(docx(("Heading1", "Report"), ("", "Body text.")))
    (tmp_path / "b.htm").write_text("<head><title>Page</title></head><body><p>x", encoding="utf-8")
    (tmp_path / "c.html").write_text("<p> </p>", encoding="utf-8")
    (tmp_path / "d.pdf").touch()
    scan = scan_corpus(CorpusConfig(path=str(tmp_path)), 1)
    assert set(scan.sample) == {"# Report\n\nBody text.", "x"}
    content = read_block(scan.blocks[0])
    assert [(document.doc_id, document.title) for document in content.documents] == [
        ("a.docx", "Report"),
        ("b.htm", "Page"),
    ]
    assert [item.describe() for item in content.rejected] == [
        "c.html: holds no text (a scan needs OCR first)",
        "d.pdf: is empty",
    ]
    monkeypatch.setattr("retrieval.conversion._converter", None)
    monkeypatch.setattr("retrieval.conversion.importlib.util.find_spec", lambda name: None)
    content = read_block(scan.blocks[0])
    assert content.documents == []
    assert [item.reason for item in content.rejected[:3]] == [INSTALL_HINT] * 3
