"""vLLM as an engine: its AsyncLLM in this process, LoRA adapters beside one base model, the choice on GPUs.

In: a base model directory, plain PEFT adapter directories, `generation.vllm`. Out: completions and streams
(serving/engine.py). Prompts are made into tokens, and tokens into text, by the same code as in the embedded engine, so
both read the same prompts and end at the same stop strings. vLLM keeps what prompts begin with in its prefix cache: the
instructions for all requests of an adapter, worked examples, and the passages of a question that is asked again (they
stand before the question).
vLLM computes in a child process. `close`, garbage collection and the end of this process end it; where this process is
killed, serving/orphan_guard.py does.
Not covered: several nodes, vLLM's own HTTP server. `queue_ms` is 0: vLLM does not tell when a request starts, so
waiting counts as generation.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from cluster.errors import ArtifactError, UserError
from serving.adapter_fit import check_adapter
from serving.config import GenerationConfig, VllmConfig
from serving.decoding import TextAssembler
from serving.engine import Completion, ErrorCode, FinishReason, GenerationRequest, Ticket
from serving.prompt_tokens import PromptTokens, too_long
from training.base_model import model_dtype

Precision = Literal["auto", "float32", "bfloat16"]
logger = logging.getLogger(__name__)

CLOSE_S = 10.0
_request_numbers = itertools.count(1)


class _Run:
    """A request on its way through the engine."""

    def __init__(self, request: GenerationRequest, on_text: Callable[[str], None] | None) -> None:
        self.request = request
        self.on_text = on_text
        self.completion: Future[Completion] = Future()
        self.completion.set_running_or_notify_cancel()  # only `cancel` ends it early, never a waiter that goes
        self.queued_at = time.perf_counter()
        self.prompt_tokens = 0
        self.assembler: TextAssembler | None = None
        self.task: asyncio.Task[None] | None = None
        self.ended_by: ErrorCode = "cancelled"  # what it means when the task is cancelled

    def emit(self, piece: str) -> None:
        if piece and self.on_text is not None:
            self.on_text(piece)

    def end(self, reason: FinishReason, code: ErrorCode = "", error: str = "") -> None:
        if self.completion.done():
            return
        text, tokens = "", 0
        if self.assembler is not None:
            try:
                self.emit(self.assembler.finish())
            except Exception as failure:  # noqa: BLE001 - a reader that has gone
                logger.warning("a stream's reader failed at its end: %s", type(failure).__name__)
            text, tokens = self.assembler.text, self.assembler.text_tokens
        self.completion.set_result(
            Completion(
                request_id=self.request.request_id,
                text=text,
                finish_reason=reason,
                prompt_tokens=self.prompt_tokens,
                completion_tokens=tokens,
                generation_ms=(time.perf_counter() - self.queued_at) * 1000,
                error=error,
                error_code=code,
            )
        )


class _Stream:
    """Text pieces of one run, handed from the engine's loop to the reader's thread."""

    def __init__(self, ticket: Ticket, pieces: queue.SimpleQueue[str | None]) -> None:
        self._ticket = ticket
        self._pieces = pieces
        ticket.completion.add_done_callback(lambda _: pieces.put(None))

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece

    def result(self) -> Completion:
        return self._ticket.completion.result()

    def cancel(self) -> None:
        self._ticket.cancel()


class VllmEngine:
    """Generates with vLLM; see the module's docstring."""

    def __init__(
        self,
        base_directory: Path,
        adapters: Mapping[str, Path],
        generation: GenerationConfig,
        precision: Precision = "auto",
    ) -> None:
        """Starts vLLM and loads the adapters.

        Args:
            base_directory: A transformers model directory.
            adapters: Adapter name to PEFT adapter directory.
            generation: `batch_rows` requests generate together; the rest is in `vllm`.
            precision: auto, float32 or bfloat16.

        Raises:
            UserError: vLLM is not installed, or does not start with these settings.
            ArtifactError: An adapter does not fit.
        """
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "generation.engine: vllm is not installed here; install vllm 0.32 beside rayft, or set "
                "generation.engine: transformers"
            )
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM reports its use to its makers unless told not to
        self._base = base_directory
        self._config = generation.vllm
        self._tokens = PromptTokens(base_directory)
        self._runs: set[_Run] = set()
        self._loras: dict[str, Any] = {}  # adapter's name to vLLM's LoRARequest
        self._lora_numbers = itertools.count(1)
        self._places: set[int] = set()  # adapters that vLLM holds, also those that are being unloaded
        self._closed = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="vllm-engine", daemon=True)
        thread.start()
        guard = _guard()  # before vLLM: this process may be killed while it starts
        try:
            self._llm = self._wait(_start(_arguments(base_directory, generation, precision)))
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            guard.kill()
            guard.wait()
            raise
        self.window = int(self._llm.model_config.max_model_len)
        # The loop's thread must not keep the engine alive, or it would never be collected.
        self._finalizer = weakref.finalize(self, _shut_down, self._llm, self._loop, thread, guard)
        for name, directory in adapters.items():
            self.load_adapter(name, directory)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        return tuple(self._loras)

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests; not when vLLM's core has died."""
        return not self._closed and not self._llm.errored

    def submit(self, request: GenerationRequest, on_text: Callable[[str], None] | None = None) -> Ticket:
        """Queues a request; `on_text` is called on the engine's loop."""
        run = _Run(request, on_text)
        with self._lock:
            closed = self._closed
            if not closed:
                self._loop.call_soon_threadsafe(self._begin, run)
        if closed:
            run.end("error", "closed", "the engine is closed")
        return Ticket(run.completion, lambda: self._cancel(run))

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Generates all requests together; completions come in the order given."""
        tickets = [self.submit(request) for request in requests]
        return [ticket.completion.result() for ticket in tickets]

    def stream(self, request: GenerationRequest) -> _Stream:
        """Queues a request and hands its text out as it is generated."""
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        return _Stream(self.submit(request, pieces.put), pieces)

    def load_adapter(self, name: str, directory: Path) -> None:
        """Loads an adapter while requests go on; without effect where one of this name is loaded. An adapter that is
        being unloaded takes its place until its last request has ended.

        Raises:
            ArtifactError: The directory holds no LoRA adapter, it does not fit the base model, or its rank is too
                large.
            UserError: `generation.vllm.max_loras` adapters are loaded, or the engine is closed.
        """
        if name in self._loras:
            return
        rank = check_adapter(name, directory, self._base)
        if rank > self._config.max_lora_rank:
            raise ArtifactError(
                f"adapter `{name}` has rank {rank}, generation.vllm.max_lora_rank is {self._config.max_lora_rank}: "
                f"set it to {rank}"
            )
        self._change(self._load(name, directory))

    def unload_adapter(self, name: str) -> None:
        """Takes no more requests for an adapter, and frees it when the last one has ended."""
        if name in self._loras and not self._closed:
            self._change(self._unload(name))

    def close(self) -> None:
        """Ends what is under way with `error_code` closed, and vLLM's process."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first and self._loop.is_running():
            self._wait(self._end_all())
        self._finalizer()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _change(self, work: Coroutine[Any, Any, None]) -> None:
        with self._lock:
            if self._closed:
                work.close()
                raise UserError("the adapter was not changed: the engine is closed")
            done = asyncio.run_coroutine_threadsafe(work, self._loop)
        done.result()

    def _cancel(self, run: _Run) -> None:
        if not run.completion.done() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: run.task is not None and run.task.cancel())

    # Everything below runs on the engine's loop.

    def _begin(self, run: _Run) -> None:
        self._runs.add(run)
        run.task = self._loop.create_task(self._serve(run))
        run.task.add_done_callback(lambda _: self._finish(run))

    def _finish(self, run: _Run) -> None:
        self._runs.discard(run)
        # A task that is cancelled before it has begun runs no line of its own.
        run.end("error", run.ended_by, _ENDED[run.ended_by])

    async def _serve(self, run: _Run) -> None:
        try:
            await self._generate(run)
        except asyncio.CancelledError:
            raise  # ended in `_finish`
        except UserError as error:
            run.end("error", "internal", str(error))
        except Exception as error:  # noqa: BLE001 - one request must not end the engine
            logger.error("generation failed: %s", type(error).__name__)
            run.end("error", "internal", f"generation failed: {type(error).__name__}")

    async def _generate(self, run: _Run) -> None:
        request = run.request
        lora = self._loras.get(request.adapter) if request.adapter is not None else None
        if request.adapter is not None and lora is None:
            known = ", ".join(self._loras) or "none"
            run.end("error", "unknown_adapter", f"there is no adapter `{request.adapter}`; loaded: {known}")
            return
        prompt = await asyncio.to_thread(self._tokens.encode, request.messages)
        run.prompt_tokens = len(prompt)
        if reason := too_long(len(prompt), request.max_new_tokens, self.window):
            run.end("error", "context_length_exceeded", reason)
            return
        run.assembler = TextAssembler(self._tokens.decode, request.stop, incremental=run.on_text is not None)
        outputs = self._llm.generate(
            {"prompt_token_ids": prompt},
            _sampling(request, self._tokens.end_tokens),
            f"{request.request_id}-{next(_request_numbers)}",  # vLLM's must be unique, callers' need not
            lora_request=lora,
        )
        try:
            async for output in outputs:
                if not self._accept(run, output.outputs[0].token_ids):
                    return
            run.end("length")
        finally:
            await outputs.aclose()  # aborts what vLLM has not finished

    def _accept(self, run: _Run, tokens: Sequence[int]) -> bool:
        """Takes new tokens; False when they end the run."""
        assert run.assembler is not None, "a prompt is tokenised before it runs"
        for token in tokens:
            if token in self._tokens.end_tokens:
                run.end("stop")
                return False
            try:
                run.emit(run.assembler.push(token))
            except Exception as error:  # noqa: BLE001 - a reader that has gone must not end the others
                logger.warning("a stream's reader failed, its request is cancelled: %s", type(error).__name__)
                run.on_text = None
                run.end("error", "cancelled", _ENDED["cancelled"])
                return False
            if run.assembler.stopped:
                run.end("stop")
                return False
        return True

    async def _load(self, name: str, directory: Path) -> None:
        from vllm.lora.request import LoRARequest

        if name in self._loras:  # two may have loaded it at once
            return
        # Swapping adapters in and out would use the place that must stay empty on CPU (see `_places`).
        if len(self._places) >= self._config.max_loras:
            raise UserError(
                f"adapter `{name}` finds no place: generation.vllm.max_loras is {self._config.max_loras}; a release "
                "that is taken up needs places beside those of the one before it"
            )
        number = next(self._lora_numbers)
        self._places.add(number)
        # vLLM's prefix cache tells adapters apart by this name: what is loaded again must not meet its old entries.
        lora = LoRARequest(f"{name}#{number}", number, str(directory))
        try:
            await self._llm.add_lora(lora)
        except Exception as error:
            self._places.discard(number)
            raise ArtifactError(f"adapter `{name}` in {directory}: vLLM refuses it: {_last_line(error)}") from error
        self._loras = {**self._loras, name: lora}

    async def _unload(self, name: str) -> None:
        lora = self._loras.get(name)
        if lora is None:
            return
        self._loras = {other: kept for other, kept in self._loras.items() if other != name}
        using = [run.task for run in self._runs if run.request.adapter == name and run.task is not None]
        if using:
            await asyncio.wait(using)
        await self._llm.remove_lora(lora.lora_int_id)
        self._places.discard(lora.lora_int_id)

    async def _end_all(self) -> None:
        tasks = []
        for run in list(self._runs):
            run.ended_by = "closed"
            if run.task is not None:
                run.task.cancel()
                tasks.append(run.task)
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)


_ENDED: dict[str, str] = {
    "cancelled": "the request was cancelled",
    "closed": "the engine was closed before the request ended",
}


def _arguments(base_directory: Path, generation: GenerationConfig, precision: Precision) -> dict[str, Any]:
    """What vLLM's AsyncEngineArgs are given; under its names."""
    config = generation.vllm
    return {
        "model": str(base_directory),
        "dtype": _dtype(precision),
        "max_num_seqs": generation.batch_rows,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        "enable_lora": True,
        "max_loras": _places(config),
        "max_cpu_loras": _places(config),
        "max_lora_rank": _allowed_rank(config),
        "generation_config": "vllm",  # sampling is the request's alone
        "disable_log_stats": True,
        **({"max_model_len": config.max_model_len} if config.max_model_len else {}),
        **({"quantization": config.quantization} if config.quantization else {}),
    }


def _dtype(precision: Precision) -> str:
    """bfloat16 on a GPU: asking the device itself would make a CUDA context in this process, which only waits."""
    if precision == "auto" and torch.cuda.is_available():
        return "bfloat16"
    return str(model_dtype(precision)).removeprefix("torch.")


def _places(config: VllmConfig) -> int:
    """Adapter places that vLLM is given. On CPU one more than the recipe's, never used: vLLM 0.32 marks a base model's
    row with place -1, which its CPU code reads as the last place. Where that held an adapter once, base rows in a batch
    with adapters answered with it (3 of 3, in a batch of 12)."""
    return config.max_loras + (not torch.cuda.is_available())


def _allowed_rank(config: VllmConfig) -> int:
    """The smallest of vLLM's rank limits that holds the recipe's."""
    from vllm.config.lora import MaxLoRARanks

    allowed = [rank for rank in get_args(MaxLoRARanks) if rank >= config.max_lora_rank]
    if not allowed:
        raise UserError(
            f"generation.vllm.max_lora_rank is {config.max_lora_rank}, vLLM serves up to {max(get_args(MaxLoRARanks))}"
        )
    return int(min(allowed))


def _sampling(request: GenerationRequest, end_tokens: frozenset[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_p=max(request.top_p, 1e-6) if request.temperature > 0 else 1.0,  # vLLM takes no 0; the best token stays
        seed=request.seed % 2**63 if request.temperature > 0 else None,
        stop_token_ids=sorted(end_tokens),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


async def _start(arguments: dict[str, Any]) -> Any:
    """AsyncLLM, made on the loop that will run it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except Exception as error:
        raise UserError(
            f"generation.vllm: vLLM does not start with {arguments['model']}: {_last_line(error)}; its log says why"
        ) from error


def _guard() -> subprocess.Popen[bytes]:
    """A process that ends vLLM's when this one is killed."""
    script = Path(__file__).with_name("orphan_guard.py")
    return subprocess.Popen([sys.executable, str(script), str(os.getpid())], stdin=subprocess.DEVNULL)


def _shut_down(
    llm: Any, loop: asyncio.AbstractEventLoop, thread: threading.Thread, guard: subprocess.Popen[bytes]
) -> None:
    llm.shutdown(timeout=CLOSE_S)
    loop.call_soon_threadsafe(_stop, loop)
    if thread is not threading.current_thread():
        thread.join(CLOSE_S)
    guard.terminate()
    guard.wait()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    """Ends vLLM's own tasks with the loop, which would complain of them otherwise."""
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.call_later(0.1, loop.stop)


def _last_line(error: Exception) -> str:
    """The end of an error that vLLM carried over from its process, where what went wrong stands."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
