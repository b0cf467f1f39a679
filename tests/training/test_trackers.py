import math
import sys
import threading
import time
import types

import pytest

import training.trackers
from cluster.errors import UserError
from training.config import TrainingRecipe
from training.trackers import check_tracker, open_tracker

VARIABLES = ("MLFLOW_TRACKING_URI", "DATABRICKS_HOST", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def recipe(tracker):
    return TrainingRecipe.model_validate({"name": "tiny", "lora": {"rank": 4}, "train": {"tracker": tracker}})


def scalars(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def next_second() -> None:
    """Event files are read in the order of their names, which begin with the second in which they were opened; then
    comes a counter of the process, as text: `10` before `9`. Runs that follow each other are further apart."""
    time.sleep(1.01 - time.time() % 1)


def test_tensorboard_event_files_hold_numbers_and_nothing_else(tmp_path):
    tracker = open_tracker(recipe("tensorboard"), tmp_path / "tb", "tiny-raft")
    tracker.log(1, {"loss": 2.5, "epoch": 1, "f1": None, "device": "cpu", "gap": math.nan})
    tracker.log(2, {"loss": 1.5})
    tracker.close()
    tracker.log(3, {"loss": 1.0})  # after the end: nothing, and no error
    assert scalars(tmp_path / "tb") == {"loss": [(1, 2.5), (2, 1.5)], "epoch": [(1, 1.0)]}


def test_tensorboard_resumed_run_replaces_what_was_written_past_the_checkpoint(tmp_path):
    lost = open_tracker(recipe("tensorboard"), tmp_path, "tiny-raft")
    for step in (1, 2, 3):
        lost.log(step, {"loss": 9.0})
    lost.close()
    next_second()
    resumed = open_tracker(recipe("tensorboard"), tmp_path, "tiny-raft", first_step=1)
    resumed.log(2, {"loss": 1.0})
    resumed.close()
    assert scalars(tmp_path)["loss"] == [(1, 9.0), (2, 1.0)]


def test_tensorboard_run_killed_before_its_first_checkpoint_is_replaced(tmp_path):
    for loss in (9.0, 1.0):
        tracker = open_tracker(recipe("tensorboard"), tmp_path, "tiny-raft")
        tracker.log(1, {"loss": loss})
        tracker.close()
        next_second()
    assert scalars(tmp_path)["loss"] == [(1, 1.0)]


def test_tensorboard_full_disk_is_one_line_and_never_an_error(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    lines = []
    tracker = open_tracker(recipe("tensorboard"), tmp_path, "tiny-raft", warn=lines.append)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert len(lines) == 1
    assert "tensorboard is given up, training goes on without it" in lines[0] and "No space left" in lines[0]


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_tracker_missing_package_is_one_line_with_the_command(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(training.trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"train\.tracker: {kind} is not installed; run `pip install 'rayft\[track"
    ) as e:
        open_tracker(recipe(kind), tmp_path, "tiny-raft")
    assert "\n" not in str(e.value)


def test_tracker_without_an_address_or_key_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(training.trackers.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"mlflow needs the environment variable MLFLOW_TRACKING_URI"):
        check_tracker(recipe("mlflow"))
    with pytest.raises(UserError, match=r"wandb needs the environment variable WANDB_API_KEY"):
        check_tracker(recipe("wandb"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    check_tracker(recipe("mlflow"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    check_tracker(recipe("wandb"))


def test_tracker_none_writes_nothing(tmp_path):
    tracker = open_tracker(recipe("none"), tmp_path / "tb", "tiny-raft")
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert not (tmp_path / "tb").exists()


class FakeMlflow(types.ModuleType):
    """The part of mlflow 3's client that was tried against mlflow-skinny 3.17 with a file store."""

    def __init__(self):
        super().__init__("mlflow")
        self.calls = []
        self.log_metric_fails = False
        self.log_metric_hangs = None
        module = self

        class MlflowClient:
            def get_experiment_by_name(self, name):
                return None

            def create_experiment(self, name):
                module.calls.append(("experiment", name))
                return "7"

            def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
                module.calls.append(("run", experiment_id, run_name))
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run1"))

            def log_param(self, run_id, key, value, synchronous=None):
                module.calls.append(("param", run_id, key, value))

            def log_metric(self, run_id, key, value, timestamp=None, step=None):
                if module.log_metric_hangs is not None:
                    module.log_metric_hangs.wait()
                if module.log_metric_fails:
                    raise ConnectionError("the server is away")
                module.calls.append(("metric", run_id, key, value, step))

            def set_terminated(self, run_id, status=None, end_time=None):
                module.calls.append(("end", run_id))

        self.MlflowClient = MlflowClient


@pytest.fixture
def mlflow(monkeypatch):
    fake = FakeMlflow()
    fake.__spec__ = types.SimpleNamespace(name="mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    return fake


def test_mlflow_run_gets_settings_and_figures_and_goes_on_as_the_same_run(mlflow, tmp_path):
    tracker = open_tracker(recipe("mlflow"), tmp_path, "tiny-raft")
    tracker.log(1, {"loss": 2.5, "f1": None})
    tracker.close()
    assert ("run", "7", "tiny-raft") in mlflow.calls
    assert ("param", "run1", "lora.rank", 4) in mlflow.calls
    assert mlflow.calls[-2:] == [("metric", "run1", "loss", 2.5, 1), ("end", "run1")]
    resumed = open_tracker(recipe("mlflow"), tmp_path, "tiny-raft", first_step=1)
    resumed.log(2, {"loss": 1.5})
    resumed.close()
    assert [call for call in mlflow.calls if call[0] == "run"] == [("run", "7", "tiny-raft")]
    assert mlflow.calls[-2:] == [("metric", "run1", "loss", 1.5, 2), ("end", "run1")]


def test_mlflow_server_that_goes_away_is_one_line_and_never_an_error(mlflow, tmp_path):
    lines = []
    tracker = open_tracker(recipe("mlflow"), tmp_path, "tiny-raft", warn=lines.append)
    mlflow.log_metric_fails = True
    for step in range(5):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert len(lines) == 1
    assert lines[0].endswith("mlflow is given up, training goes on without it: ConnectionError: the server is away")
    assert not [call for call in mlflow.calls if call[0] == "metric"]


def test_mlflow_server_that_hangs_holds_up_neither_steps_nor_the_end(mlflow, tmp_path, monkeypatch):
    monkeypatch.setattr(training.trackers, "CLOSE_S", 0.2)
    mlflow.log_metric_hangs = threading.Event()
    lines = []
    tracker = open_tracker(recipe("mlflow"), tmp_path, "tiny-raft", warn=lines.append)
    for step in range(1000):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert len(lines) == 1 and "did not answer within 0.2 s" in lines[0]
    mlflow.log_metric_fails = True
    mlflow.log_metric_hangs.set()
    tracker._thread.join(10)
    assert len(lines) == 1  # what the thread meets later is not said again


@pytest.fixture
def wandb(monkeypatch):
    """The part of wandb that was tried against wandb 0.31 in offline mode."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    fake.calls = []

    class Run:
        id = "abc"

        def log(self, data, step=None):
            fake.calls.append(("log", data, step))

        def finish(self):
            fake.calls.append(("finish",))

    def init(*, project, name, id, resume, dir, config):
        if fake.fails:
            raise SystemExit("api key refused")
        fake.calls.append(("init", project, name, id, resume, dir, config["lora.rank"]))
        return Run()

    fake.init, fake.fails = init, False
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return fake


def test_wandb_run_gets_settings_and_figures_and_goes_on_as_the_same_run(wandb, tmp_path):
    for given in (None, "abc"):
        tracker = open_tracker(recipe("wandb"), tmp_path, "tiny-raft")
        tracker.log(1, {"loss": 2.5, "device": "cpu"})
        tracker.close()
        assert wandb.calls == [
            ("init", "rayft", "tiny-raft", given, "allow", str(tmp_path), 4),
            ("log", {"loss": 2.5}, 1),
            ("finish",),
        ]
        wandb.calls.clear()


def test_wandb_that_does_not_open_is_one_line_and_never_an_error(wandb, tmp_path):
    wandb.fails = True
    lines = []
    tracker = open_tracker(recipe("wandb"), tmp_path, "tiny-raft", warn=lines.append)
    tracker.log(1, {"loss": 2.5})
    tracker.close()
    assert lines == ["train.tracker: wandb is given up, training goes on without it: SystemExit: api key refused"]
