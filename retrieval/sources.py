"""Where a corpus lies: filesystems, listing folders and globs, and which files are documents.

In: a path, glob or URI (local, `s3://`, `gs://`, `file://`; whatever pyarrow opens). Out: the files that hold
documents, by name relative to one root, in the order in which they are read.
Not covered: what is in the files (`readers.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cluster.errors import UserError

if TYPE_CHECKING:
    import pyarrow.fs as pafs

MARKDOWN_SUFFIXES = (".md", ".markdown")
TEXT_SUFFIXES = (".txt", *MARKDOWN_SUFFIXES)
CONVERTED_SUFFIXES = (".html", ".htm", ".pdf", ".docx", ".pptx")
SQUAD_SUFFIX = ".json"
"""Read only where a path names such a file itself: a folder of documents may hold any JSON."""
ROW_SUFFIXES = (".jsonl", ".csv", ".parquet", SQUAD_SUFFIX)
FORMATS = ".txt .md .html .pdf .docx .pptx .jsonl .csv .parquet"
BEIR_CORPUS = "corpus.jsonl"


@dataclass(frozen=True)
class CorpusFile:
    """One file with documents; `name` is relative to the corpus's root."""

    name: str
    size: int


@dataclass(frozen=True)
class CorpusFiles:
    """The files of a corpus in reading order, below `root` (absolute, or a URI)."""

    root: str
    files: tuple[CorpusFile, ...]
    ignored: int
    """Files of other formats."""
    ignored_formats: str = ""
    """Their suffixes, in words."""


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem behind a local path or a URI, and the path inside it."""
    import pyarrow.fs as pafs

    if "://" in path:
        filesystem, inner = pafs.FileSystem.from_uri(path)
        return filesystem, inner
    return pafs.LocalFileSystem(), str(Path(path).expanduser().absolute())


def join_path(root: str, name: str) -> str:
    """`name` under `root`, for local paths and URIs alike."""
    return f"{root.rstrip('/')}/{name}" if name else root


def suffix(name: str) -> str:
    """The lower-case suffix of a file name, with its dot."""
    return PurePosixPath(name).suffix.lower()


def is_row_format(name: str) -> bool:
    """Whether a file of that name holds one document per row."""
    return suffix(name) in ROW_SUFFIXES


def one_line(error: BaseException) -> str:
    """An error's text without line breaks, at most 200 characters; its type where it has no text."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def list_files(path: str, key: str = "corpus.path") -> CorpusFiles:
    """The document files at `path`: a file, a folder (recursive), or a glob with `*`, `?`, `[…]` and `**`.

    Hidden files and folders are left out. A folder that holds a BEIR `corpus.jsonl` is that file.

    Raises:
        UserError: naming `key`, when nothing is there, or no file of a known format.
    """
    import pyarrow.fs as pafs

    if not path:
        raise UserError(f"{key} is empty: set it to a file, folder or glob of documents ({FORMATS}) (--set {key}=…)")
    try:
        base, pattern = _split_glob(path)
        filesystem, inner = open_filesystem(base)
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.NotFound:
            missing = base if pattern else path
            raise UserError(f"{key}: {missing} does not exist: give a file, folder or glob of documents ({FORMATS})")
        if info.type == pafs.FileType.File:
            return _single_file(base, inner, info.size, key)
        infos = filesystem.get_file_info(
            pafs.FileSelector(inner, recursive=not pattern or "**" in pattern or "/" in pattern)
        )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}: cannot read {path}: {one_line(error)}") from error
    prefix = inner.rstrip("/") + "/"
    found = [CorpusFile(info.path.removeprefix(prefix), info.size or 0) for info in infos if _may_be_read(info)]
    return _choose(path, base, pattern, found, key)


def corpus_root(path: str) -> str:
    """What the names of a corpus's files are relative to, whether or not it is there now; see `list_files`."""
    import pyarrow.fs as pafs

    base, pattern = _split_glob(path)
    filesystem, inner = open_filesystem(base)
    if pattern or filesystem.get_file_info(inner).type != pafs.FileType.File:
        return base
    return _single_file(base, inner, 0, "corpus.path").root


def _single_file(base: str, inner: str, size: int, key: str) -> CorpusFiles:
    name = PurePosixPath(inner).name
    if suffix(name) not in (*TEXT_SUFFIXES, *CONVERTED_SUFFIXES, *ROW_SUFFIXES):
        raise UserError(f"{key}: {base} is of no known format: give one of {FORMATS}")
    head, query = _split_query(base)
    return CorpusFiles((head.rstrip("/").rpartition("/")[0] or "/") + query, (CorpusFile(name, size),), 0)


def _choose(path: str, base: str, pattern: str, found: list[CorpusFile], key: str) -> CorpusFiles:
    shown = [file for file in found if not any(part.startswith(".") for part in file.name.split("/"))]
    if pattern:
        matches = _glob_regex(pattern)
        shown = [file for file in shown if matches.fullmatch(file.name)]
    if not pattern and any(file.name == BEIR_CORPUS for file in shown):
        shown = [file for file in shown if file.name == BEIR_CORPUS]
    known = {*TEXT_SUFFIXES, *CONVERTED_SUFFIXES, *ROW_SUFFIXES}
    if suffix(pattern) != SQUAD_SUFFIX:
        known.remove(SQUAD_SUFFIX)
    files = sorted((file for file in shown if suffix(file.name) in known), key=lambda file: file.name)
    if not files:
        others = f"; it holds {_suffixes(shown)}" if shown else ""
        raise UserError(
            f"{key}: {path} {'matches' if pattern else 'holds'} no file of a known format ({FORMATS}){others}"
        )
    ignored = [file for file in shown if suffix(file.name) not in known]
    return CorpusFiles(base, tuple(files), len(ignored), _suffixes(ignored))


def _suffixes(files: Iterable[CorpusFile]) -> str:
    names = sorted({suffix(file.name) or "files without a suffix" for file in files})
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _may_be_read(info: pafs.FileInfo) -> bool:
    """Also what has no type, such as a broken link: reading it says why it cannot be read."""
    import pyarrow.fs as pafs

    return bool(info.type != pafs.FileType.Directory)


def _split_query(path: str) -> tuple[str, str]:
    head, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return head, mark + query


def _split_glob(path: str) -> tuple[str, str]:
    """(folder or file, glob below it or ""); a path that exists under its literal name is no glob."""
    head, query = _split_query(path)
    special = "*[" if "://" in path else "*?["
    if not any(char in head for char in special) or ("://" not in path and Path(path).expanduser().exists()):
        return (head.rstrip("/") or "/") + query if "://" in path else open_filesystem(path)[1], ""
    parts = head.split("/")
    first = next(place for place, part in enumerate(parts) if any(char in part for char in special))
    base = "/".join(parts[:first])
    if "://" not in path:
        base = open_filesystem(base or ("/" if head.startswith("/") else "."))[1]
    return base + query, "/".join(parts[first:])


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """`**` stands for any number of folders; `*`, `?` and `[…]` stay within one name."""
    written = ""
    parts = [part for part in pattern.split("/") if part]
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if part == "**":
            written += ".*" if last else "(?:[^/]+/)*"
            continue
        written += _name_regex(part) + ("" if last else "/")
    return re.compile(written, re.DOTALL)


def _name_regex(part: str) -> str:
    written, place = "", 0
    while place < len(part):
        char = part[place]
        place += 1
        if char == "*":
            written += "[^/]*"
        elif char == "?":
            written += "[^/]"
        elif char == "[" and (end := part.find("]", place + 1)) > 0:
            inside = part[place:end].replace("\\", r"\\").replace("[", r"\[")
            written += f"(?!/)[{'^' + inside[1:] if inside[0] in '!^' else inside}]"
            place = end + 1
        else:
            written += re.escape(char)
    return written
