"""Converting .html, .pdf, .docx and .pptx files to Markdown in a child process.

In: a file's bytes. Out: Markdown and a title, or a `ConversionError` in one line. A crafted file may hang or exhaust
memory; the child has a time limit per file and a memory limit, and is replaced when it dies or is stopped. There is one
child per process, started at the first file, and it ends with its parent.
Not covered: the conversion itself (`converters.py`).
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from retrieval.converters import ConversionError

START_TIMEOUT_S = 180.0
"""Importing the converters takes 1 s here, and minutes on a machine that swaps."""
INSTALL_HINT = "no converter is installed: pip install 'rayft[documents]'"


class ConverterGoneError(RuntimeError):
    """The child has ended, or did not answer in time."""


class Converter:
    """One child process and the conversation with it; safe to call from several threads, which take turns."""

    def __init__(self, command: Callable[[], list[str]] | None = None) -> None:
        """`command` replaces the child's command line, for tests."""
        self._command = command or _child_command
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def convert(self, data: bytes, suffix: str, timeout_s: float, max_bytes: int) -> tuple[str, str]:
        """(Markdown, title or "") of a file.

        Args:
            data: The file's content.
            suffix: What it is, by its name (`.pdf`).
            timeout_s: Seconds after which the child is stopped.
            max_bytes: Most characters of Markdown.

        Raises:
            ConversionError: what is wrong with the file, in one line.
        """
        with self._lock:
            child = self._running()
            header = {"suffix": suffix, "size": len(data), "cpu_s": 4 * timeout_s + 5, "max_bytes": max_bytes}
            try:
                reply = self._exchange(child, header, data, time.monotonic() + timeout_s)
            except TimeoutError as error:
                self._stop()
                raise ConversionError(f"took more than {timeout_s:g} s (corpus.convert_timeout_s)") from error
            except ConverterGoneError as error:
                self._stop()
                raise ConversionError(f"ended its converter: {error}") from error
            if reply.get("last"):
                self._stop()
        if "error" in reply:
            raise ConversionError(reply["error"])
        return reply["markdown"], reply["title"]

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._stop()

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._child.pid if self._child else None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child and self._child.poll() is None:
            return self._child
        self._stop()
        if importlib.util.find_spec("markitdown") is None:
            raise ConversionError(INSTALL_HINT)
        paths = [path for path in sys.path if path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        assert self._child.stdin and self._child.stdout, "both are pipes"
        os.set_blocking(self._child.stdin.fileno(), False)
        try:
            _read_frame(self._child, time.monotonic() + START_TIMEOUT_S)
        except (ConverterGoneError, TimeoutError) as error:
            self._stop()
            raise ConversionError(f"its converter does not start ({error}): {INSTALL_HINT}") from error
        return self._child

    def _exchange(
        self, child: subprocess.Popen[bytes], header: dict[str, Any], data: bytes, deadline: float
    ) -> dict[str, Any]:
        head = json.dumps(header).encode()
        try:
            for part in (struct.pack(">I", len(head)) + head, data):
                _write(child, memoryview(part), deadline)
        except BrokenPipeError as error:
            raise ConverterGoneError(_exit_reason(child)) from error
        return _read_frame(child, deadline)

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    pipe.close()


def _child_command() -> list[str]:
    return [sys.executable, "-m", "retrieval.converters", str(os.getpid())]


def _wait(pipe: Any, event: int, deadline: float) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, event)
        if not selector.select(max(0.0, deadline - time.monotonic())):
            raise TimeoutError("no answer in time")


def _write(child: subprocess.Popen[bytes], rest: memoryview, deadline: float) -> None:
    assert child.stdin, "a pipe"
    while rest:
        _wait(child.stdin, selectors.EVENT_WRITE, deadline)
        rest = rest[os.write(child.stdin.fileno(), rest[: 1 << 16]) :]


def _read_exactly(child: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
    assert child.stdout, "a pipe"
    data = bytearray()
    while len(data) < size:
        _wait(child.stdout, selectors.EVENT_READ, deadline)
        part = os.read(child.stdout.fileno(), min(size - len(data), 1 << 20))
        if not part:
            raise ConverterGoneError(_exit_reason(child))
        data += part
    return bytes(data)


def _read_frame(child: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
    (size,) = struct.unpack(">I", _read_exactly(child, 4, deadline))
    frame: dict[str, Any] = json.loads(_read_exactly(child, size, deadline))
    return frame


def _exit_reason(child: subprocess.Popen[bytes]) -> str:
    try:
        code = child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    return f"signal {-code}" if code < 0 else f"exit status {code}"


_converter: Converter | None = None


def convert_file(data: bytes, suffix: str, timeout_s: float, max_bytes: int) -> tuple[str, str]:
    """`Converter.convert` with this process's own child."""
    global _converter  # noqa: PLW0603 - one child per process, whoever asks
    if _converter is None:
        _converter = Converter()
        atexit.register(_converter.close)
    return _converter.convert(data, suffix, timeout_s, max_bytes)
