"""The converter's child process: .html, .pdf, .docx and .pptx to Markdown, one file at a time.

In (standard input): frames of a 4-byte big-endian length and JSON `{"suffix", "size", "cpu_s", "max_bytes"}`, followed
by `size` bytes of the file. Out (standard output): one such frame when it is ready, `{"ready": true}`, and per file one
with `{"markdown", "title"}` or `{"error"}`. It ends when its input ends, when its parent is gone (also in the middle of
a file), when it uses more processor time than it was given, or at a `MemoryError`.
Not covered: who starts, times and replaces it (`conversion.py`).
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import struct
import sys
import threading
import time
from typing import IO, Any

MEMORY_LIMIT_BYTES = 4 * 1024**3
"""Address space of the child; importing the converters takes 0.5 GB of it, a 17-page PDF 10 MB more."""
PARENT_CHECK_S = 0.5
_DECLARED = re.compile(rb"<(?:meta[^>]+charset|\?xml[^>]+encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


class ConversionError(ValueError):
    """Why a file cannot be converted, in one line."""


def convert(data: bytes, suffix: str) -> tuple[str, str]:
    """(Markdown, title or "") of a file; raises ConversionError, or whatever the library raises."""
    if suffix == ".pdf":
        from retrieval.pdf import pdf_markdown

        return pdf_markdown(data), ""
    if suffix in (".html", ".htm"):
        return _convert_with("HtmlConverter", html_text(data).encode(), ".html", "utf-8")
    return _convert_with({".docx": "DocxConverter", ".pptx": "PptxConverter"}[suffix], data, suffix, None)


def _convert_with(converter: str, data: bytes, suffix: str, charset: str | None) -> tuple[str, str]:
    from markitdown import StreamInfo, converters

    info = StreamInfo(extension=suffix, charset=charset)
    result = getattr(converters, converter)().convert(io.BytesIO(data), info)
    return result.markdown, " ".join((result.title or "").split())


def html_text(data: bytes) -> str:
    """HTML as text: by its byte-order mark, as UTF-8, or by the encoding that it declares; never guessed."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return _decode(data, encoding)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        declared = _DECLARED.search(data[:4096])
        name = declared[1].decode("ascii").lower() if declared else ""
        if name in ("", "utf-8", "utf8"):
            raise ConversionError(f"is not UTF-8 (byte {error.start}) and declares no other encoding") from error
        # What browsers do (WHATWG Encoding Standard): Latin-1 is read as Windows-1252, GB 2312 and GBK as GB 18030.
        names = {
            "iso-8859-1": "cp1252",
            "latin1": "cp1252",
            "us-ascii": "cp1252",
            "gb2312": "gb18030",
            "gbk": "gb18030",
        }
        text = _decode(data, names.get(name, name))
    if "\0" in text:
        raise ConversionError(f"is binary (a zero byte at byte {data.index(0)})")
    return text


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ConversionError(f"is not {encoding}, as it declares (byte {error.start})") from error
    except LookupError as error:
        raise ConversionError(f"declares an unknown encoding ({encoding[:40]})") from error


def reply_to(data: bytes, suffix: str, max_bytes: int) -> dict[str, Any]:
    """What the parent is told of one file; a MemoryError is raised."""
    try:
        markdown, title = convert(data, suffix)
    except ConversionError as error:
        return {"error": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - parsers raise anything for a malformed file; the parent counts it
        detail = " ".join(str(error).split())[:160]
        return {"error": f"cannot be converted: {type(error).__name__}{': ' + detail if detail else ''}"}
    markdown = markdown.replace("\r\n", "\n").replace("\0", "").encode("utf-8", "replace").decode()
    if len(markdown) > max_bytes:
        return {"error": f"has more than {max_bytes / 1e6:g} MB of text (corpus.max_file_mb)"}
    return {"markdown": markdown, "title": title.encode("utf-8", "replace").decode()}


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer requests until they end."""
    write_frame(replies, {"ready": True})
    while header := read_frame(requests):
        data = requests.read(header["size"])
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + header["cpu_s"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            write_frame(replies, reply_to(data, header["suffix"], header["max_bytes"]))
        except MemoryError:
            gigabytes = MEMORY_LIMIT_BYTES / 1024**3
            write_frame(replies, {"error": f"cannot be converted in {gigabytes:g} GiB of memory", "last": True})
            return


def read_frame(file: IO[bytes]) -> dict[str, Any] | None:
    """The next JSON frame, or None at the end."""
    head = file.read(4)
    if len(head) < 4:
        return None
    frame: dict[str, Any] = json.loads(file.read(struct.unpack(">I", head)[0]))
    return frame


def write_frame(file: IO[bytes], content: dict[str, Any]) -> None:
    """Write one JSON frame and flush it."""
    data = json.dumps(content).encode()
    file.write(struct.pack(">I", len(data)) + data)
    file.flush()


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def main(parent: int) -> None:
    """Run as the child of process `parent`."""
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()
    replies = os.fdopen(os.dup(1), "wb")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)  # a library that prints must not break a frame
    os.dup2(silent, 2)
    import markitdown.converters  # noqa: F401 - seconds of imports, before the memory limit and the first file's time

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main(int(sys.argv[1]))
