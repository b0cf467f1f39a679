"""A counting stand-in for an OpenAI-compatible endpoint, chunks to ask about, and a job to run as a process.

Run as `python -m tests.training.teacher_stub FOLDER URL` it generates questions with the settings in FOLDER/job.json.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from retrieval.records import Chunk
from training.teacher import generate_questions
from training.teacher_config import TeacherConfig
from training.teacher_prompt import load_question_texts

KEY = "sk-very-secret"
METALS = ("copper", "silver", "cobalt", "nickel", "zinc", "lead", "iron", "tin", "gold", "platinum")


def chunk_text(place: int) -> str:
    return (
        f"The mine of Town{place} was opened in {1800 + place} by two brothers from the coast.\n"
        f"Every year it yields {place * 7 + 11} tons of {METALS[place % 10]}, more than its neighbour."
    )


def make_chunk(place: int, chunks_per_document: int = 2) -> Chunk:
    text = chunk_text(place)
    start = 1000 * (place % chunks_per_document)
    doc_id = f"doc{place // chunks_per_document}"
    return Chunk(f"chunk{place}", doc_id, f"Mines {doc_id}", "", text, start, start + len(text), 40)


def questions_about(place: int) -> list[dict[str, str]]:
    first, second = chunk_text(place).split("\n")
    return [
        {
            "kind": "fact",
            "question": f"When was the mine of Town{place} opened?",
            "answer": str(1800 + place),
            "quote": first,
        },
        {
            "kind": "fact",
            "question": f"How many tons does the mine of Town{place} yield every year?",
            "answer": str(place * 7 + 11),
            "quote": second,
        },
    ]


@dataclass
class Answer:
    """What the stub sends. `wait_s` before it; `hang` sends nothing until the server is closed."""

    status: int = 200
    content: str = ""
    finish_reason: str = "stop"
    headers: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    raw: bytes | None = None
    wait_s: float = 0.0
    hang: bool = False


def good(place: int, **options: Any) -> Answer:
    return Answer(content=json.dumps({"questions": questions_about(place)}), **options)


@dataclass
class Seen:
    place: int
    """Which chunk was asked about."""
    nth: int
    """How often before."""
    body: dict[str, Any]
    authorization: str


class Stub:
    """Answers with what `script(place, nth)` says, and remembers every request."""

    def __init__(self, script: Callable[[int, int], Answer]) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.paid: list[int] = []
        """Places of requests that were taken on and would be on the bill (all that end in a 200)."""
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                stub.answer(self, body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        found = re.search(r"The mine of Town(\d+) ", body["messages"][-1]["content"])
        place = int(found.group(1)) if found else -1
        with self.lock:
            nth = sum(1 for seen in self.seen if seen.place == place)
            self.seen.append(Seen(place, nth, body, handler.headers.get("Authorization", "")))
            answer = self.script(place, nth)
            if answer.status == 200 and not answer.hang and answer.raw is None:
                self.paid.append(place)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.closing.wait(60 if answer.hang else answer.wait_s)
            if not answer.hang:
                self.send(handler, answer)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.lock:
                self.in_flight -= 1
        if answer.hang:
            handler.close_connection = True

    def send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        message = {"role": "assistant", "content": answer.content}
        reply: dict[str, Any] = {
            "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 40},
        }
        if answer.status != 200 or answer.error:
            reply = {"error": answer.error or {"message": "no"}}
        data = answer.raw if answer.raw is not None else json.dumps(reply).encode()
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@contextmanager
def running(script: Callable[[int, int], Answer]) -> Iterator[Stub]:
    stub = Stub(script)
    thread = threading.Thread(target=stub.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.closing.set()
        stub.server.shutdown()
        stub.server.server_close()
        thread.join()


def teacher_config(folder: Path, **options: Any) -> TeacherConfig:
    """Fast waits, facts only."""
    values: dict[str, Any] = {
        "model": "stub-1",
        "kinds": ("fact",),
        "questions_per_chunk": 2,
        "directory": str(folder),
        "concurrency": 4,
        "request_timeout_s": 5,
        "backoff_s": 0.02,
        "longest_wait_s": 5,
    }
    return TeacherConfig.model_validate(values | options)


def run_job(folder: Path, url: str, chunks: int, limit: int | None = None, **options: Any) -> Any:
    """Generates questions about the first `chunks` chunks; files lie in `folder`."""
    from training.endpoint import Address, EndpointTeacher

    config = teacher_config(folder, **options)
    return generate_questions(
        config,
        load_question_texts(config, "en"),
        17,
        lambda: map(make_chunk, range(chunks)),
        EndpointTeacher(config, Address(url, KEY)),
        folder / "journal.jsonl",
        folder / "questions.jsonl",
        limit=limit,
    )


def stored(folder: Path) -> list[dict[str, Any]]:
    """The journal's whole rows."""
    lines = (folder / "journal.jsonl").read_bytes().split(b"\n")[:-1] if (folder / "journal.jsonl").exists() else []
    return [json.loads(line) for line in lines]


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.rejected.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    from cluster.errors import UserError

    job = json.loads((Path(sys.argv[1]) / "job.json").read_text())
    try:
        run_job(Path(sys.argv[1]), sys.argv[2], **job)
    except UserError as error:
        sys.exit(f"refused: {error}")
