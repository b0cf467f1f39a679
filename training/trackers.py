"""Where the curves of a training run go beside `history.jsonl`: TensorBoard, MLflow or Weights & Biases.

In: the recipe (`train.tracker`), a directory of this run, figures at a step. Out: TensorBoard event files in that
directory, or a run in MLflow or W&B, which take addresses and keys from their own environment variables.
A tracker never costs a run: what is missing is said before training starts; one that fails or hangs later is given up
with one line, and training goes on. Remote trackers write from a thread of their own, so that no step waits for them.
Not covered: `history.jsonl` and the plot beside the adapter (training/curve.py), which are always written.
"""

from __future__ import annotations

import importlib.util
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import UserError
from cluster.progress import complain
from training.config import TrainingRecipe

CLOSE_S = 30.0  # how long the end of training waits for figures that a remote tracker has not taken yet
_MODULES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
_SECTIONS = ("model", "lora", "train", "samples", "prompt")  # what a run is compared by

Figures = Mapping[str, Any]
Warn = Callable[[str], None]


class Tracker(Protocol):
    """Takes the figures of a run; no call raises, and none waits for a server."""

    def log(self, step: int, figures: Figures) -> None:
        """Record numbers at a step (counted from 1); values that are no finite numbers are left out."""

    def close(self) -> None:
        """Write what is outstanding, for at most `CLOSE_S` seconds."""


class _Writer(Protocol):
    """One kind of tracker; may raise and may be slow."""

    def write(self, step: int, figures: dict[str, float]) -> None: ...
    def finish(self) -> None: ...


def check_tracker(recipe: TrainingRecipe) -> None:
    """Say what `train.tracker` lacks, before anything is trained.

    Raises:
        UserError: Its package is not installed, or its environment variables do not say where runs go.
    """
    kind = recipe.train.tracker
    if kind == "none":
        return
    if importlib.util.find_spec(_MODULES[kind]) is None:
        raise UserError(
            f"train.tracker: {kind} is not installed; run `pip install 'rayft[trackers]'`, or set it to tensorboard"
        )
    # Without an address MLflow writes into the working directory, which on a worker is gone after the run.
    if kind == "mlflow" and not (os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("DATABRICKS_HOST")):
        raise UserError(
            "train.tracker: mlflow needs the environment variable MLFLOW_TRACKING_URI, your server's address"
        )
    if kind == "wandb" and not _wandb_is_set_up():
        raise UserError(
            "train.tracker: wandb needs the environment variable WANDB_API_KEY, or WANDB_MODE=offline to write to disk"
        )


def _wandb_is_set_up() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()  # where `wandb login` leaves the key
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    return netrc.is_file() and host in netrc.read_text(encoding="utf-8", errors="replace")


def open_tracker(
    recipe: TrainingRecipe, directory: Path, run_name: str, *, first_step: int = 0, warn: Warn = complain
) -> Tracker:
    """The tracker of a run; call it on the first worker only.

    Args:
        recipe: `train.tracker` chooses; its model, LoRA, training, sample and prompt settings are recorded.
        directory: Of this run alone, made if missing; event files go there, and the run's id in MLflow or W&B, so
            that a run that is taken up again goes on as the same one.
        run_name: What the run is called.
        first_step: Steps done before: TensorBoard then hides what a lost worker wrote beyond its last checkpoint.
        warn: Takes the one line that says a tracker was given up.

    Raises:
        UserError: As `check_tracker` does.
    """
    check_tracker(recipe)
    kind = recipe.train.tracker
    if kind == "none":
        return _NoTracker()
    directory.mkdir(parents=True, exist_ok=True)
    settings = _flat(recipe.model_dump(mode="json", include=set(_SECTIONS)) | {"seed": recipe.seed})
    if kind == "tensorboard":
        return _Guarded(lambda: _TensorBoard(directory, settings, first_step), _once(kind, warn))
    opened = _Mlflow if kind == "mlflow" else _Wandb
    return _Background(kind, lambda: opened(directory, run_name, settings), _once(kind, warn))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"lora": {"rank": 4}}` as `{"lora.rank": 4}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _numbers(figures: Figures) -> dict[str, float]:
    numbers = {n: float(v) for n, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


class _NoTracker:
    """`train.tracker: none`."""

    def log(self, step: int, figures: Figures) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _Guarded:
    """Opens, writes and finishes in the caller's thread; the first failure is the last call."""

    def __init__(self, opened: Callable[[], _Writer], give_up: Warn) -> None:
        self._give_up = give_up
        self._writer: _Writer | None = None
        self._try(lambda: setattr(self, "_writer", opened()))

    def log(self, step: int, figures: Figures) -> None:
        """Write now."""
        numbers = _numbers(figures)
        if numbers and self._writer is not None:
            writer = self._writer
            self._try(lambda: writer.write(step, numbers))

    def close(self) -> None:
        """Finish now."""
        if self._writer is not None:
            self._try(self._writer.finish)
            self._writer = None

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a tracker raises must not end a training
            self._writer = None
            first = (str(error).strip().splitlines() or [""])[0]
            self._give_up(f"{type(error).__name__}: {first[:200]}")


class _Background:
    """A `_Guarded` writer in a thread: MLflow retries a server that is away for minutes, and no step waits for that."""

    def __init__(self, kind: str, opened: Callable[[], _Writer], give_up: Warn) -> None:
        self._give_up = give_up
        self._waiting: queue.SimpleQueue[tuple[int, Figures] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(opened,), name=f"{kind}-tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Figures) -> None:
        """Leave the figures to the thread."""
        self._waiting.put((step, dict(figures)))

    def close(self) -> None:
        """Wait until the thread has written everything, or give up."""
        if self._closed:
            return
        self._closed = True
        self._waiting.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._give_up(f"it did not answer within {CLOSE_S:g} s at the end")

    def _run(self, opened: Callable[[], _Writer]) -> None:
        writer = _Guarded(opened, self._give_up)
        while (figures := self._waiting.get()) is not None:
            writer.log(*figures)
        writer.close()


def _once(kind: str, warn: Warn) -> Warn:
    """Takes the reason for giving up; only the first is said."""
    said = threading.Lock()

    def give_up(reason: str) -> None:
        if said.acquire(blocking=False):
            warn(f"train.tracker: {kind} is given up, training goes on without it: {reason}")

    return give_up


class _TensorBoard:
    def __init__(self, directory: Path, settings: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1, flush_secs=10)
        if not first_step:
            table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
            self._writer.add_text("recipe", f"| setting | value |\n|---|---|\n{table}")

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class _Mlflow:
    def __init__(self, directory: Path, run_name: str, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        known = _recall(directory / "mlflow_run_id")
        # The client's calls name the run; the fluent ones would attach to whatever run this process has open.
        self._client = mlflow.MlflowClient()
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rayft")
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
            known = self._client.create_run(number, run_name=run_name).info.run_id
            for setting, value in settings.items():
                self._client.log_param(known, setting, value)
            (directory / "mlflow_run_id").write_text(known, encoding="utf-8")
        self._run_id = known

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def finish(self) -> None:
        self._client.set_terminated(self._run_id)


class _Wandb:
    def __init__(self, directory: Path, run_name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        known = _recall(directory / "wandb_run_id")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rayft"),
            name=run_name,
            id=known,
            resume="allow",
            dir=str(directory),
            config=dict(settings),
        )
        (directory / "wandb_run_id").write_text(self._run.id, encoding="utf-8")

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def finish(self) -> None:
        self._run.finish()


def _recall(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None
