"""Running training workers with Ray Train: claims, progress on the terminal, restarts, one clear error.

In: a function for every worker, its job, the recipe's `train` section. Out: what the first worker reports.
A worker tells its progress and its report to a `Board`, a Ray actor, because `fit` blocks until the end. Lost workers
are replaced `train.restarts` times; what a worker says of the user's input ends the run at once.
Not covered: what a worker does (training/worker.py, training/retriever_worker.py), where it goes on from.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.progress import Bar, say, track
from training.config import TrainConfig

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train import UserCallback

POLL_S = 0.5
NEVER_HEALS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, NotImplementedError)
"""What a worker raises that the next one would raise as well; a `UserError` is a `ValueError`."""


def refuse_impossible(train: TrainConfig) -> None:
    """Ray Train would wait for ever for workers that no node can hold, now or after the cluster has grown.

    Raises:
        UserError: naming `train.workers`.
    """
    import ray
    from ray._private.state import state

    has = ray.cluster_resources()
    may_grow = state.get_max_resources_from_cluster_config() or {}  # what an autoscaler has told the cluster, if any
    needs = {"CPU": train.workers * train.cpus_per_worker, "GPU": train.workers * train.gpus_per_worker}
    for resource, needed in needs.items():
        most = max(has.get(resource, 0), may_grow.get(resource, 0))
        if needed > most:
            raise UserError(
                f"train.workers: {train.workers} workers need {needed:g} {resource}s, the cluster has {most:g}; "
                f"lower train.workers or train.{resource.lower()}s_per_worker"
            )


class Teller:
    """What a worker tells the terminal; only the first worker is heard."""

    def __init__(self, board: ActorHandle, rank: int) -> None:
        self._board = board if rank == 0 else None

    def __call__(self, done: int, total: int, figures: Mapping[str, Any]) -> None:
        """Units done so far, units in all, figures to show."""
        if self._board is not None:
            self._board.set.remote(done, total, dict(figures))

    def begin(self, done: int, total: int) -> None:
        """Units that an earlier run did, which must not flatter the rate."""
        if self._board is not None:
            self._board.begin.remote(done, total)

    def say(self, line: str) -> None:
        """A line for the user."""
        if self._board is not None:
            self._board.say.remote(line)


def run_worker(arguments: dict[str, Any]) -> None:
    """Entry point on a Ray Train worker: `work(job, rank, world_size, tell)`."""
    import ray
    import ray.train

    board, job = arguments["board"], ray.get(arguments["job"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    report = arguments["work"](job, rank, world_size, Teller(board, rank))
    if rank == 0:
        ray.get(board.finish.remote(report))


def fit(
    work: Callable[[Any, int, int, Any], Any], job: Any, train: TrainConfig, *, label: str, unit: str, storage: str
) -> Any:
    """Runs `work(job, rank, world_size, tell)` on every worker; returns what the first one returns.

    Args:
        work: What a worker does; a function of a module. `tell` is a `Teller`.
        job: What it is told, the same for all.
        train: How many workers, what each claims, how often lost ones are replaced.
        label: What is being done, for the progress line.
        unit: Plural noun of what `tell` counts.
        storage: Directory for Ray Train's own files, which every node reaches.

    Raises:
        UserError: as a worker raised it, or naming `train.workers` where the cluster cannot hold them, or
            `train.restarts` where workers were lost too often.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    refuse_impossible(train)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    with _board() as board, _shown_progress(board, label, unit):
        trainer = TorchTrainer(
            run_worker,
            train_loop_config={"work": work, "job": ray.put(job), "board": board},
            scaling_config=ScalingConfig(
                num_workers=train.workers,
                use_gpu=train.gpus_per_worker > 0,
                resources_per_worker={"CPU": train.cpus_per_worker}
                | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {}),
            ),
            torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
            run_config=RunConfig(
                name=label.replace(" ", "-"),
                storage_path=storage,
                failure_config=FailureConfig(train.restarts),
                callbacks=[_judge(board, label, train.restarts)],
            ),
        )
        claimed_before = _claims()
        try:
            trainer.fit()
        except Exception as error:
            _free(_claims() - claimed_before)
            raise blame(error, train.restarts) from error
        return ray.get(board.report.remote())


def _claims() -> set[str]:
    """Ids of this job's placement groups that hold resources or wait for them."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # with which the ids of its placement groups end
    return {
        name for name, group in placement_group_table().items() if name.endswith(job) and group["state"] != "REMOVED"
    }


def _free(claims: set[str]) -> None:
    """Removes placement groups. Ray Train 2.60 leaves its own where a worker dies while its group starts, and the next
    run in the same job would wait for ever."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for claim in claims:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(claim))))


def _judge(board: ActorHandle, label: str, restarts: int) -> UserCallback:
    """Asked by Ray Train's controller when workers fail: an exception that it raises ends the run instead of
    replacing the workers."""
    from ray.train import UserCallback

    class Judge(UserCallback):  # type: ignore[misc]  # Ray is untyped
        lost = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            causes = [root_cause(error) for error in worker_exceptions.values()]
            for cause in causes:
                if isinstance(cause, NEVER_HEALS):
                    raise cause
            self.lost += 1
            if self.lost <= restarts:
                which = ", ".join(map(str, sorted(worker_exceptions)))
                board.say.remote(
                    f"{label}: worker {which} was lost; new ones go on from the last checkpoint "
                    f"(restart {self.lost} of {restarts}){_why(causes)}"
                )

    return Judge()


def _why(causes: Sequence[BaseException]) -> str:
    """What ended the workers where none was killed: what the others raise when one is killed explains nothing."""
    from ray.exceptions import RayActorError

    if any(isinstance(cause, RayActorError) for cause in causes):
        return ""
    return f": {type(causes[0]).__name__}: {(str(causes[0]).strip().splitlines() or [''])[0][:200]}"


def root_cause(error: BaseException) -> BaseException:
    """What was raised first: the `UserError` where there is one, otherwise the end of the chain of causes."""
    seen: BaseException | None = error
    last = error
    while seen is not None:
        # Ray's own wrapper is a `UserError` as well, but its text is the traceback; a killed worker is found at its
        # next health check.
        last = getattr(seen, "cause", None) or getattr(seen, "health_check_failure", None) or seen
        if isinstance(last, UserError):
            return last
        seen = last.__cause__
    return last


def blame(error: Exception, restarts: int = 0) -> Exception:
    """The `UserError` that a worker raised, inside what Ray Train makes of it, or one about workers that were lost
    too often; any other error as it is."""
    from ray.exceptions import RayActorError

    failures = dict(getattr(error, "worker_failures", None) or {})
    controller = getattr(error, "controller_failure", None)
    for failure in [*failures.values(), controller or error]:
        if isinstance(found := root_cause(failure), UserError):
            return found
    lost = [rank for rank, failure in failures.items() if isinstance(root_cause(failure), RayActorError)]
    if lost:
        times = "once" if restarts == 0 else f"{restarts + 1} times"
        what = f"workers were lost {times}, at last worker {lost[0]}"
    elif controller is not None and isinstance(root_cause(controller), RayActorError):
        what = "a worker was lost while it was started or ended"
    else:
        return error
    return UserError(
        f"train.restarts: {what} (killed, or out of memory: lower train.micro_batch_tokens then); run the same command "
        "again to go on from the last checkpoint"
    )


class Board:
    """Where workers leave their progress, and the first worker its report; a Ray actor."""

    def __init__(self) -> None:
        self._done: tuple[int, int, dict[str, Any]] = (0, 0, {})
        self._earlier = 0
        self._lines: list[str] = []
        self._report: Any = None

    def begin(self, done: int, total: int) -> None:
        """Units that an earlier run did, units in all."""
        self._earlier = done
        self._done = (done, total, {})

    def earlier(self) -> int:
        """Of `begin`."""
        return self._earlier

    def say(self, line: str) -> None:
        """Keep a line for the terminal."""
        self._lines.append(line)

    def take_lines(self) -> list[str]:
        """Lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

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
    """On the driver's own node: one that it shares with a worker may be lost."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
    try:
        yield board
    finally:
        ray.kill(board)


@contextmanager
def _shown_progress(board: ActorHandle, label: str, unit: str) -> Iterator[None]:
    """Shows units done, rate, ETA and figures while the block runs, and what workers say; the trainer itself blocks
    until the end."""
    ended = threading.Event()
    watcher = threading.Thread(target=_show, args=(board, label, unit, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=10)


def _show(board: ActorHandle, label: str, unit: str, ended: threading.Event) -> None:
    import ray

    def look() -> tuple[int, int, dict[str, Any]]:
        for line in ray.get(board.take_lines.remote()):
            say(line)
        found: tuple[int, int, dict[str, Any]] = ray.get(board.done.remote())
        return found

    total = 0
    while not total and not ended.wait(POLL_S):
        _, total, _ = look()
    if not total:
        look()
        return
    with track(label, total, unit) as bar:
        bar.skip(ray.get(board.earlier.remote()))
        stop = False
        while not stop:
            stop = ended.is_set()
            _advance(bar, *look())
            if not stop:
                ended.wait(POLL_S)


def _advance(bar: Bar, done: int, total: int, figures: Mapping[str, Any]) -> None:
    """Workers that go on from a checkpoint are behind for a while: the bar waits for them."""
    if done > bar.done:
        bar.advance(done - bar.done, **figures)
