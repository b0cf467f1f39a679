"""Restarts, errors and what the terminal shows; workers here train nothing."""

from __future__ import annotations

import os
import signal
import time
import types
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

import training.ray_train
from cluster.errors import UserError
from training.config import TrainConfig
from training.ray_train import Teller, _claims, blame, fit, refuse_impossible


def one_line(error: Exception, text: str) -> None:
    assert isinstance(error, UserError)
    assert str(error) == text


@pytest.mark.parametrize(
    "error",
    [
        WorkerGroupError("Worker 1 failed", {1: UserError("train.learning_rate: lower it")}),
        WorkerGroupError("both", {0: RuntimeError("peer is gone"), 1: UserError("train.learning_rate: lower it")}),
        ControllerError(UserError("train.learning_rate: lower it")),
    ],
)
def test_blame_finds_the_user_error_that_a_worker_raised(error):
    one_line(blame(error), "train.learning_rate: lower it")


def test_blame_leaves_other_errors_alone():
    error = WorkerGroupError("Worker 0 failed", {0: RuntimeError("out of memory")})
    assert blame(error) is error


def test_judge_tells_why_workers_ended_unless_one_was_killed():
    said: list[str] = []
    board = types.SimpleNamespace(say=types.SimpleNamespace(remote=said.append))
    judge = training.ray_train._judge(board, "train x", 2)
    judge.after_exception(None, {1: OSError(5, "no answer"), 0: RuntimeError("peer is gone\nat line 3")})
    judge.after_exception(None, {0: RuntimeError("peer is gone"), 1: ActorDiedError()})
    judge.after_exception(None, {0: OSError("no answer")})
    lost = "train x: worker 0, 1 was lost; new ones go on from the last checkpoint"
    assert said == [f"{lost} (restart 1 of 2): OSError: [Errno 5] no answer", f"{lost} (restart 2 of 2)"]
    with pytest.raises(UserError, match="lower it"):
        judge.after_exception(None, {0: UserError("train.learning_rate: lower it")})


@pytest.mark.parametrize(("restarts", "times"), [(0, "once"), (3, "4 times")])
def test_blame_says_that_workers_were_lost_too_often(restarts, times):
    error = WorkerGroupError("lost", {0: RuntimeError("connection closed by peer"), 1: ActorDiedError()})
    found = str(blame(error, restarts))
    assert found.startswith(f"train.restarts: workers were lost {times}, at last worker 1 (killed, or out of memory")
    assert "\n" not in found


def test_refuse_impossible_leaves_to_an_autoscaler_what_it_could_provide(monkeypatch):
    import ray
    from ray._private.state import state

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    refuse_impossible(TrainConfig(workers=2))
    with pytest.raises(
        UserError, match=r"^train\.workers: 3 workers need 3 CPUs, the cluster has 2; lower train\.workers"
    ):
        refuse_impossible(TrainConfig(workers=3))
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 64, "GPU": 2})
    refuse_impossible(TrainConfig(workers=3))
    refuse_impossible(TrainConfig(workers=2, gpus_per_worker=1))
    with pytest.raises(UserError, match=r"3 workers need 3 GPUs, the cluster has 2; .*gpus_per_worker$"):
        refuse_impossible(TrainConfig(workers=3, gpus_per_worker=1))


def killed_once(folder: str, rank: int, world_size: int, tell: Teller) -> dict[str, Any]:
    """Counts to 6 and remembers where it is; dies at 3."""
    mark = Path(folder) / "at"
    at = int(mark.read_text()) if mark.exists() else 0
    tell.begin(at, 6)
    for number in range(at + 1, 7):
        mark.write_text(str(number))
        tell(number, 6, {"loss": 1.0 / number})
        if number == 3 and not at:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
    return {"began": at, "rank": rank, "world_size": world_size}


def killed_always(folder: str, rank: int, world_size: int, tell: Teller) -> None:
    (Path(folder) / f"try-{time.time_ns()}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def refused_by_the_worker(folder: str, rank: int, world_size: int, tell: Teller) -> None:
    (Path(folder) / f"try-{time.time_ns()}").touch()
    raise UserError("train.learning_rate: lower it")


def broken(folder: str, rank: int, world_size: int, tell: Teller) -> None:
    (Path(folder) / f"try-{time.time_ns()}").touch()
    raise AttributeError("no such thing")


def run(work: Any, folder: Path, restarts: int) -> Any:
    train = TrainConfig(restarts=restarts)
    return fit(work, str(folder), train, label="train x", unit="steps", storage=str(folder / "ray"))


def tries(folder: Path) -> int:
    return len(list(folder.glob("try-*")))


@pytest.mark.usefixtures("local_ray")
def test_fit_replaces_a_killed_worker_and_the_bar_goes_on(tmp_path, capsys):
    assert run(killed_once, tmp_path, restarts=2) == {"began": 3, "rank": 0, "world_size": 1}
    shown = capsys.readouterr().out
    assert "train x: worker 0 was lost; new ones go on from the last checkpoint (restart 1 of 2)" in shown
    assert shown.count("train x: 6 steps") == 1


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("work", "restarts"), [(refused_by_the_worker, 3)])
def test_fit_never_repeats_what_the_user_must_mend(tmp_path, work, restarts):
    with pytest.raises(UserError, match=r"^train\.learning_rate: lower it$"):
        run(work, tmp_path, restarts)
    assert tries(tmp_path) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_fit_gives_up_on_workers_that_are_lost_too_often_with_one_line(tmp_path):
    # Ray finds a worker that is killed at once at its health check, or when it asks it what to run.
    lost = r"^train\.restarts: (workers were lost 2 times, at last worker 0|a worker was lost while .*) \(killed, or"
    with pytest.raises(UserError, match=lost):
        run(killed_always, tmp_path, 1)
    assert tries(tmp_path) <= 2
    assert not _claims(), "the next run finds the resources free"


@pytest.mark.usefixtures("local_ray")
def test_a_failed_run_leaves_no_placement_group_behind(tmp_path, monkeypatch):
    """As Ray Train leaves one where a worker dies while its group starts."""
    held = ray.util.placement_group([{"CPU": 0.1}])
    assert held.wait(60)

    def fail(_trainer: Any) -> None:
        assert ray.util.placement_group([{"CPU": 0.1}]).wait(60)
        raise OSError("lost")

    monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", fail)
    with pytest.raises(OSError, match="lost"):
        run(killed_always, tmp_path, 0)
    assert _claims() == {held.id.hex()}, "what the run claimed is free, what it found is left alone"
    ray.util.remove_placement_group(held)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_fit_never_repeats_a_mistake_of_ours(tmp_path):
    with pytest.raises(ControllerError, match="no such thing"):
        run(broken, tmp_path, 3)
    assert tries(tmp_path) == 1


def test_bar_waits_for_workers_that_go_on_from_behind():
    class Bar:
        done = 5

        def advance(self, n: int, **figures: float) -> None:
            advanced.append(n)
            self.done += n

    advanced: list[int] = []
    bar = Bar()
    for done in (3, 5, 7):
        training.ray_train._advance(bar, done, 9, {})
    assert advanced == [2]
