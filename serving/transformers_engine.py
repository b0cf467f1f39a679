"""The embedded engine: one base model with all adapters beside it, on CPU or one GPU, in plain transformers and PEFT.

In: a base model directory (safetensors), PEFT adapter directories. Out: completions and streams (serving/engine.py).
One thread owns the model; requests wait in front of it, join the running batch between steps, and leave it when they
end. Rows that begin with the same tokens (instructions, worked examples) read them once. In float32 a row's greedy
tokens do not depend on its neighbours. Adapters come and go while requests run. Not covered: several GPUs, quantised
weights; that is vLLM's part.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from cluster.errors import UserError
from serving.adapted_model import AdaptedModel, Precision
from serving.adapters import AdapterFiles, first_line
from serving.decoding import TextAssembler, sample
from serving.engine import Completion, ErrorCode, FinishReason, GenerationRequest, Ticket
from serving.kv_batch import KVBatch, common_prefix
from serving.prompt_tokens import too_long

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 16_384  # padded tokens read in one forward pass; bounds the activations' memory


class _Row:
    """A request on its way through the engine."""

    def __init__(self, request: GenerationRequest, on_text: Callable[[str], None] | None) -> None:
        self.request = request
        self.on_text = on_text
        self.completion: Future[Completion] = Future()
        self.completion.set_running_or_notify_cancel()  # only `cancel` below ends it early, never a waiter that goes
        self.cancelled = False
        self.queued_at = time.perf_counter()
        self.started_at = self.queued_at
        self.slot: str | None = None  # the adapter as the model knows it, from tokenising to the end
        self.prompt: list[int] = []
        self.prefix_tokens = 0
        self.next_token = 0
        self.generator = torch.Generator().manual_seed(request.seed % 2**63)
        self.assembler: TextAssembler | None = None

    def cancel(self) -> None:
        self.cancelled = True


class _Change:
    """Work on the adapters that waits for the engine's thread, and for whoever asked for it."""

    def __init__(self, apply: Callable[[Future[None]], None]) -> None:
        """`apply` sets the future it is given, at once or when the work has ended."""
        self._apply = apply
        self.done: Future[None] = Future()

    def run(self) -> None:
        try:
            self._apply(self.done)
        except Exception as error:  # noqa: BLE001 - raised again where the change was asked for
            self.done.set_exception(error)


class _Stream:
    """Text pieces of one row, handed from the engine's thread to the reader's."""

    def __init__(self, row: _Row, pieces: queue.SimpleQueue[str | None]) -> None:
        self._row = row
        self._pieces = pieces
        row.completion.add_done_callback(lambda _: pieces.put(None))

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece

    def result(self) -> Completion:
        return self._row.completion.result()

    def cancel(self) -> None:
        self._row.cancel()


class TransformersEngine:
    """Generates with transformers and PEFT; see the module's docstring."""

    def __init__(
        self,
        base_directory: Path,
        adapters: Mapping[str, Path],
        precision: Precision = "auto",
        batch_rows: int = 16,
        threads: int = 2,
        device: str | None = None,
    ) -> None:
        """Loads the base model once and every adapter beside it.

        Args:
            base_directory: A transformers model directory with safetensors weights and a tokenizer.
            adapters: Adapter name to PEFT adapter directory.
            precision: auto, float32 or bfloat16.
            batch_rows: Most rows that generate together.
            threads: Torch threads on CPU.
            device: A torch device; none takes a GPU where there is one.

        Raises:
            ArtifactError: A directory holds no such model, or an adapter does not fit the base model.
        """
        self._model = AdaptedModel(base_directory, precision, device)
        # Name to slot; replaced as a whole, so that every thread may read it.
        self._slots = {name: self._model.add(self._model.read(name, path)) for name, path in adapters.items()}
        self._leaving: list[tuple[str, Future[None]]] = []  # slots that are freed when no row uses them any more
        self._batch_rows = batch_rows
        self._threads = threads
        self._inbox: queue.SimpleQueue[list[_Row] | _Change | None] = queue.SimpleQueue()
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row | None] = []  # None: a row that has ended and whose columns still stand in the batch
        self._batch: KVBatch | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="transformers-engine", daemon=True)
        self._thread.start()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        return tuple(self._slots)

    def submit(self, request: GenerationRequest, on_text: Callable[[str], None] | None = None) -> Ticket:
        """Queues a request; `on_text` is called on the engine's thread."""
        row = _Row(request, on_text)
        self._enqueue([row])
        return Ticket(row.completion, row.cancel)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Generates all requests together; completions come in the order given."""
        rows = [_Row(request, None) for request in requests]
        self._enqueue(rows)
        return [row.completion.result() for row in rows]

    def stream(self, request: GenerationRequest) -> _Stream:
        """Queues a request and hands its text out as it is generated."""
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        row = _Row(request, pieces.put)
        stream = _Stream(row, pieces)
        self._enqueue([row])
        return stream

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_alive() and not self._closed

    def load_adapter(self, name: str, directory: Path) -> None:
        """Loads an adapter while requests go on; without effect where one of this name is loaded, as a name stands for
        one content. Not to be called on the engine's own thread.

        Raises:
            ArtifactError: The directory holds no LoRA adapter, or it does not fit the base model; all else serves on.
            UserError: The engine is closed.
        """
        if name in self._slots:
            return
        files = self._model.read(name, directory)
        change = _Change(lambda done: self._add(files, done))
        if not self._enqueue(change):
            raise UserError(f"adapter `{name}` was not loaded: the engine is closed")
        change.done.result()

    def unload_adapter(self, name: str) -> None:
        """Takes no more requests for an adapter, and frees it when the last one has ended."""
        change = _Change(lambda done: self._leave(name, done))
        if self._enqueue(change):
            change.done.result()

    def close(self) -> None:
        """Ends what is under way with `error_code` closed, and frees the model."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()

    def _enqueue(self, item: list[_Row] | _Change) -> bool:
        """Hands something to the engine's thread; False, and rows fail, when the engine is closed."""
        with self._lock:
            if not self._closed:
                self._inbox.put(item)
                return True
        for row in item if isinstance(item, list) else ():
            self._fail(row, "closed", "the engine is closed")
        return False

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        if self._model.device.type == "cpu":
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while True:
                try:
                    if not self._take_in():
                        break
                    self._free_left()
                    self._admit()
                    self._step()
                except Exception as error:  # noqa: BLE001 - one bad batch must not end the engine
                    logger.error("generation failed for %d requests: %s", len(self._active()), type(error).__name__)
                    for row in self._active():
                        self._fail(row, "internal", f"generation failed: {first_line(error)}")
                    self._running, self._batch = [], None
        for row in [*self._active(), *self._waiting]:
            self._fail(row, "closed", "the engine was closed before the request ended")
        for _, freed in self._leaving:
            freed.set_result(None)
        self._batch = None

    def _active(self) -> list[_Row]:
        return [row for row in self._running if row is not None]

    def _take_in(self) -> bool:
        """Moves arrivals to the waiting line, sleeping while there is nothing to do; False when closed."""
        while True:
            idle = not self._waiting and not self._active() and not self._leaving
            try:
                arrived = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if isinstance(arrived, _Change):
                arrived.run()
                continue
            if arrived is None:
                self._turn_away()
                return False
            ready = [row for row in arrived if self._tokenise(row)]
            self._waiting.extend(sorted(ready, key=lambda row: -len(row.prompt)))

    def _turn_away(self) -> None:
        """Ends what came in beside the word that the engine is closed."""
        while not self._inbox.empty():
            late = self._inbox.get()
            if isinstance(late, _Change):
                late.done.set_exception(UserError("the adapter was not changed: the engine is closed"))
            else:
                self._waiting.extend(late or [])

    def _add(self, files: AdapterFiles, added: Future[None]) -> None:
        if files.name not in self._slots:  # two may have loaded it at once
            self._slots = {**self._slots, files.name: self._model.add(files)}
        added.set_result(None)

    def _leave(self, name: str, freed: Future[None]) -> None:
        slot = self._slots.get(name)
        if slot is None:
            freed.set_result(None)
            return
        self._slots = {other: kept for other, kept in self._slots.items() if other != name}
        self._leaving.append((slot, freed))

    def _free_left(self) -> None:
        """Frees the adapters that were unloaded, once no row uses them."""
        if not self._leaving:
            return
        used = {row.slot for row in [*self._active(), *self._waiting]}
        for slot, freed in [left for left in self._leaving if left[0] not in used]:
            self._compact()  # rows that have ended still stand in the batch under their adapter
            self._leaving.remove((slot, freed))
            self._model.drop(slot)
            freed.set_result(None)

    def _tokenise(self, row: _Row) -> bool:
        """Reads the prompt into tokens; a request that cannot be served ends here."""
        request = row.request
        if request.adapter is not None:
            row.slot = self._slots.get(request.adapter)
            if row.slot is None:
                known = ", ".join(self._slots) or "none"
                self._fail(row, "unknown_adapter", f"there is no adapter `{request.adapter}`; loaded: {known}")
                return False
        try:
            row.prompt, row.prefix_tokens = self._model.tokenise(request.messages)
        except UserError as error:
            self._fail(row, "internal", str(error))
            return False
        except Exception as error:  # noqa: BLE001 - chat templates raise what they like about messages they refuse
            logger.error("a prompt could not be tokenised: %s", type(error).__name__)
            self._fail(row, "internal", f"the prompt could not be tokenised: {type(error).__name__}")
            return False
        if reason := too_long(len(row.prompt), request.max_new_tokens, self._model.tokens.window):
            self._fail(row, "context_length_exceeded", reason)
            return False
        incremental = row.on_text is not None
        row.assembler = TextAssembler(self._model.tokens.decode, request.stop, incremental=incremental)
        return True

    def _admit(self) -> None:
        """Lets waiting rows join when enough slots are free: each joining costs a pause and a copy of the cache."""
        for row in [row for row in self._waiting if row.cancelled]:
            self._waiting.remove(row)
            self._end(row, "error", "cancelled", "the request was cancelled")
        active = len(self._active())
        free = self._batch_rows - active
        if not self._waiting or (active and free < min(len(self._waiting), max(1, self._batch_rows // 4))):
            return
        joining = self._next_rows(free)
        try:
            batch, logits = self._prefill(joining)
        except Exception as error:  # noqa: BLE001 - the rows that were running go on
            logger.error("prefill failed for %d requests: %s", len(joining), type(error).__name__)
            for row in joining:
                self._fail(row, "internal", f"generation failed: {first_line(error)}")
            return
        self._compact()
        self._running += joining
        self._batch = batch if self._batch is None else self._batch.joined(batch)
        self._accept(logits, len(self._running) - len(joining))

    def _next_rows(self, free: int) -> list[_Row]:
        """The first waiting rows that fit: into the free slots, one forward pass, and the adapters that may mix."""
        rows: list[_Row] = []
        now = time.perf_counter()
        while self._waiting and len(rows) < free:
            row = self._waiting[0]
            neighbours = self._active() + rows
            widest = max([len(other.prompt) for other in rows] + [len(row.prompt)])
            if rows and widest * (len(rows) + 1) > PREFILL_TOKENS:
                break
            if neighbours and not self._model.may_mix(row.slot, neighbours[0].slot):
                break
            row.started_at = now
            rows.append(self._waiting.popleft())
        return rows

    def _prefill(self, rows: list[_Row]) -> tuple[KVBatch, torch.Tensor]:
        prompts = [row.prompt for row in rows]
        shared = min(common_prefix(prompts), *(row.prefix_tokens for row in rows))
        return self._model.prefill(prompts, [row.slot for row in rows], shared)

    def _compact(self) -> None:
        """Takes the rows that have ended out of the batch."""
        kept = [place for place, row in enumerate(self._running) if row is not None]
        if len(kept) == len(self._running):
            return
        self._batch = self._batch.keep(kept) if kept and self._batch is not None else None
        self._running = [self._running[place] for place in kept]

    def _step(self) -> None:
        active = len(self._active())
        if active <= len(self._running) * 3 // 4:  # a copy of the cache, so not for every row that ends
            self._compact()
        if self._batch is None or not active:
            return
        tokens = [0 if row is None else row.next_token for row in self._running]
        logits = self._batch.step(self._model.forward, torch.tensor(tokens, device=self._model.device))
        self._accept(logits, 0)

    def _accept(self, logits: torch.Tensor, first: int) -> None:
        """Chooses the next token of the rows from `first` on, and ends those that are done."""
        greedy = logits.argmax(dim=-1).tolist()
        for place, row in enumerate(self._running[first:]):
            if row is None:
                continue
            request = row.request
            if request.temperature > 0:
                token = sample(logits[place], request.temperature, request.top_p, row.generator)
            else:
                token = greedy[place]
            if not self._extend(row, token):
                self._running[first + place] = None

    def _extend(self, row: _Row, token: int) -> bool:
        """Adds a token to a row; False when that ends it."""
        assert row.assembler is not None, "a row is tokenised before it runs"
        if row.cancelled:
            self._end(row, "error", "cancelled", "the request was cancelled")
            return False
        if token in self._model.tokens.end_tokens:
            self._end(row, "stop")
            return False
        row.next_token = token
        self._emit(row, row.assembler.push(token))
        if row.assembler.stopped:
            self._end(row, "stop")
            return False
        if len(row.assembler.tokens) >= row.request.max_new_tokens:
            self._end(row, "length")
            return False
        return True

    def _emit(self, row: _Row, piece: str) -> None:
        if not piece or row.on_text is None:
            return
        try:
            row.on_text(piece)
        except Exception as error:  # noqa: BLE001 - a reader that has gone must not end the others' batch
            logger.warning("a stream's reader failed, its request is cancelled: %s", type(error).__name__)
            row.cancelled = True

    def _end(self, row: _Row, reason: FinishReason, code: ErrorCode = "", error: str = "") -> None:
        now = time.perf_counter()
        text, tokens = "", 0
        if row.assembler is not None:
            self._emit(row, row.assembler.finish())
            text, tokens = row.assembler.text, row.assembler.text_tokens
        started = row.started_at if row.started_at > row.queued_at else now
        row.completion.set_result(
            Completion(
                request_id=row.request.request_id,
                text=text,
                finish_reason=reason,
                prompt_tokens=len(row.prompt),
                completion_tokens=tokens,
                queue_ms=(started - row.queued_at) * 1000,
                generation_ms=(now - started) * 1000,
                error=error,
                error_code=code,
            )
        )

    def _fail(self, row: _Row, code: ErrorCode, error: str) -> None:
        if not row.completion.done():
            self._end(row, "error", code, error)
