"""Workers of a training run without Ray: in this process, or as the ranks of a gloo group in processes of their own."""

from __future__ import annotations

import atexit
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a rank imports this module, and should not wait for what it does not use
    from tests.training.conftest import Built
    from training.config import TrainingRecipe
    from training.records import Objective
    from training.worker import WorkerConfig

RANKS_TIMEOUT_S = 600


class Told:
    """What a worker told; `at` is called with the number of progress calls so far."""

    def __init__(self, at: Callable[[int], None] = lambda _: None) -> None:
        self.lines: list[str] = []
        self.done: list[int] = []
        self.began: list[int] = []
        self._at = at

    def __call__(self, done: int, total: int, figures: dict[str, Any]) -> None:
        assert done <= total
        self.done.append(done)
        self._at(len(self.done))

    def begin(self, done: int, total: int) -> None:
        self.began.append(done)

    def say(self, line: str) -> None:
        self.lines.append(line)


def changed(recipe: TrainingRecipe, **sections: dict[str, Any]) -> TrainingRecipe:
    from training.config import TrainingRecipe

    values = recipe.model_dump()
    for section, given in sections.items():
        values[section] = {**values[section], **given}
    return TrainingRecipe.model_validate(values)


def job_of(built: Built, folder: Path, objective: Objective = "raft", patience: int = 0, **train: Any) -> WorkerConfig:
    """What a worker is told, with its token rows written."""
    from training.format import PromptFormat
    from training.token_rows import write_token_rows
    from training.worker import WorkerConfig

    recipe = changed(built.recipe, train={"tracker": "none", "probe_rows": 0, **train})
    prompt_format = PromptFormat.load(recipe.prompt, recipe.language)
    write_token_rows(recipe, built.samples, objective, prompt_format, str(folder / "work" / "tokens"))
    return WorkerConfig(
        recipe=recipe.model_dump(),
        prompt_format=prompt_format,
        samples=built.samples,
        objective=objective,
        epochs=recipe.train.epochs if objective == "raft" else recipe.train.dsf_epochs,
        batch_rows=recipe.train.batch_rows if objective == "raft" else recipe.train.dsf_batch_rows,
        patience=patience,
        tokens=str(folder / "work" / "tokens"),
        work=str(folder / "work"),
        plan="adapter/tiny/0000",
        uri=str(folder / "adapter"),
    )


@contextmanager
def process_group(path: Path, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """A gloo group. That of this process alone is made once and left: DeepSpeed remembers the first it meets."""
    import torch

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    if world_size == 1:
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            atexit.register(torch.distributed.destroy_process_group)
        yield
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def in_ranks(work: Callable[..., Any], world_size: int, path: Path, *arguments: Any) -> Any:
    """`work(rank, world_size, *arguments)` in `world_size` processes of one gloo group; what rank 0 returns."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(work, rank, world_size, str(path), answers, arguments))
        for rank in range(world_size)
    ]
    for one in ranks:
        one.start()
    try:
        ends = time.monotonic() + RANKS_TIMEOUT_S
        while time.monotonic() < ends:
            try:
                return answers.get(timeout=0.5)
            except queue.Empty:
                failed = [one.exitcode for one in ranks if one.exitcode]
                assert not failed, f"a rank ended with {failed}"
        raise AssertionError(f"ranks did not answer within {RANKS_TIMEOUT_S} s")
    finally:
        for one in ranks:
            one.join(timeout=20)
            one.kill()


def _rank(work: Callable[..., Any], rank: int, world_size: int, path: str, answers: Any, arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    with process_group(Path(path), rank, world_size):
        answer = work(rank, world_size, *arguments)
        torch.distributed.barrier()
    if rank == 0:
        answers.put(answer)
    sys.stdout.flush()
