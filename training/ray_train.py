"""Running training workers with Ray Train: claims, progress on the terminal, one clear error.

In: a function for every worker, its arguments, the recipe's `train` section. Out: what the first worker reports.
A worker tells its progress and its report to a `Board`, a Ray actor, because `fit` blocks until the end.
Not covered: what a worker does (training/worker.py, training/retriever_worker.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.progress import track
from training.config import TrainConfig

if TYPE_CHECKING:
    from ray.actor import ActorHandle

POLL_S = 0.5


def refuse_impossible(train: TrainConfig) -> None:
    """Ray Train would wait for ever for workers that no node can hold.

    Raises:
        UserError: naming `train.workers`.
    """
    import ray

    has = ray.cluster_resources()
    needs = {"CPU": train.workers * train.cpus_per_worker, "GPU": train.workers * train.gpus_per_worker}
    for resource, needed in needs.items():
        if needed > has.get(resource, 0):
            raise UserError(
                f"train.workers: {train.workers} workers need {needed:g} {resource}s, the cluster has "
                f"{has.get(resource, 0):g}; lower train.workers or train.{resource.lower()}s_per_worker"
            )


def fit(
    run_worker: Callable[[dict[str, Any]], None],
    arguments: Mapping[str, Any],
    train: TrainConfig,
    *,
    label: str,
    unit: str,
    storage: str,
) -> Any:
    """Runs `run_worker({**arguments, "board": board})` on every worker; returns the first one's `board.finish`.

    Args:
        run_worker: Entry point of a worker.
        arguments: What it is told, the same for all.
        train: How many workers, and what each claims.
        label: What is being done, for the progress line.
        unit: Plural noun of what `board.set` counts.
        storage: Directory for Ray Train's own files.

    Raises:
        UserError: as a worker raised it, or naming `train.workers` where the cluster cannot hold them.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    refuse_impossible(train)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    with _board() as board, _shown_progress(board, label, unit):
        trainer = TorchTrainer(
            run_worker,
            train_loop_config={**arguments, "board": board},
            scaling_config=ScalingConfig(
                num_workers=train.workers,
                use_gpu=train.gpus_per_worker > 0,
                resources_per_worker={"CPU": train.cpus_per_worker}
                | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {}),
            ),
            torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
            run_config=RunConfig(name=label.replace(" ", "-"), storage_path=storage, failure_config=FailureConfig(0)),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise blame(error) from error
        return ray.get(board.report.remote())


def blame(error: Exception) -> Exception:
    """The `UserError` that a worker raised, inside what Ray Train makes of it; any other error as it is."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    failures.append(getattr(error, "controller_failure", None) or error)
    for failure in failures:
        seen: BaseException | None = failure
        while seen is not None:
            # Ray's own wrapper is a `UserError` as well, but its text is the traceback.
            original = getattr(seen, "cause", None) or seen
            if isinstance(original, UserError):
                return original
            seen = seen.__cause__
    return error


class Board:
    """Where workers leave their progress, and the first worker its report; a Ray actor."""

    def __init__(self) -> None:
        self._done: tuple[int, int, dict[str, Any]] = (0, 0, {})
        self._report: Any = None

    def set(self, done: int, total: int, figures: dict[str, Any]) -> None:
        """Units done so far, units in all, figures to show."""
        self._done = (done, total, figures)

    def done(self) -> tuple[int, int, dict[str, Any]]:
        """What `set` was last told."""
        return self._done

    def finish(self, report: Any) -> None:
        """The first worker's report."""
        self._report = report

    def report(self) -> Any:
        """What `finish` was told."""
        return self._report


@contextmanager
def _board() -> Iterator[ActorHandle]:
    import ray

    board = ray.remote(Board).options(num_cpus=0).remote()
    try:
        yield board
    finally:
        ray.kill(board)


@contextmanager
def _shown_progress(board: ActorHandle, label: str, unit: str) -> Iterator[None]:
    """Shows units done, rate, ETA and figures while the block runs; the trainer itself blocks until the end."""
    import ray

    ended = threading.Event()

    def show() -> None:
        done, total = 0, 0
        while not total and not ended.is_set():
            time.sleep(POLL_S)
            _, total, _ = ray.get(board.done.remote())
        if not total:
            return
        with track(label, total, unit) as bar:
            while done < total:
                stop = ended.is_set()
                now, _, figures = ray.get(board.done.remote())
                if now > done:
                    bar.advance(now - done, **figures)
                    done = now
                if stop:
                    break
                time.sleep(POLL_S)

    watcher = threading.Thread(target=show, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=10)
