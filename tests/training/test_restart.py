"""Training through Ray that is killed: the curve is that of the undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from cluster.store import Store
from tests.training.workers import changed, job_of
from training.ray_train import Teller, fit
from training.worker import WorkerConfig, WorkerReport, train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SETTINGS = {"dsf_epochs": 2, "dsf_batch_rows": 6, "checkpoint_minutes": 0, "validations_per_epoch": 1, "probe_rows": 0}
KILLED_AT = 3


class _Deadly:
    """A `Teller` whose worker dies once, at a step."""

    def __init__(self, tell: Teller, mark: Path) -> None:
        self._tell, self._mark, self._steps = tell, mark, 0

    def __call__(self, done: int, total: int, figures: dict[str, Any]) -> None:
        self._tell(done, total, figures)
        self._steps += 1
        if self._steps == KILLED_AT and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def begin(self, done: int, total: int) -> None:
        self._tell.begin(done, total)

    def say(self, line: str) -> None:
        self._tell.say(line)


def train_and_die(config: WorkerConfig, rank: int, world_size: int, tell: Teller) -> WorkerReport:
    """The last worker is killed after a step."""
    deadly = _Deadly(tell, Path(config.work) / "killed") if rank == world_size - 1 else tell
    return train(config, rank, world_size, deadly)


def assert_same_adapter(found: Path, expected: Path) -> None:
    left, right = (load_file(directory / "adapter_model.safetensors") for directory in (found, expected))
    assert set(left) == set(right)
    for name, value in right.items():
        assert value.numel() > 0
        assert (left[name] - value).abs().max() < 1e-3, name


def losses(path: Path) -> list[float]:
    rows = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def run(work: Any, config: WorkerConfig, recipe: Any) -> WorkerReport:
    report: WorkerReport = fit(
        work, config, recipe.train, label="train finetuned", unit="tokens", storage=f"{config.work}/ray-train"
    )
    return report


@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_is_replaced_and_the_curve_is_that_of_the_undisturbed_run(built, tmp_path, capsys):
    alone = changed(built.recipe, train={**SETTINGS, "workers": 1})
    undisturbed = job_of(built, tmp_path / "undisturbed", "dsf", **SETTINGS)
    expected = run(train, undisturbed, alone)
    pair = {**SETTINGS, "workers": 2, "zero_stage": 3, "zero3_persistence_threshold": 0, "micro_batch_tokens": 64}
    killed = job_of(built, tmp_path / "killed", "dsf", **pair)
    found = run(train_and_die, killed, changed(built.recipe, train=pair))
    assert (tmp_path / "killed" / "work" / "killed").exists()
    assert found.resumed_at in (KILLED_AT - 1, KILLED_AT)
    assert found.losses == pytest.approx(expected.losses, abs=1e-4)
    assert losses(tmp_path / "killed" / "adapter") == pytest.approx(list(expected.losses), abs=1e-4)
    assert_same_adapter(tmp_path / "killed" / "adapter", tmp_path / "undisturbed" / "adapter")
    assert "lost; new ones go on from the last checkpoint (restart 1 of 3)" in capsys.readouterr().out


def start(recipe: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rayft", "train", "lora", str(recipe), "--objective", "dsf"]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_checkpoint(root: Path, count: int, job: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + 240
    while time.monotonic() < ends and job.poll() is None:
        if len(list(root.glob("adapter/*/*/.work/checkpoints/*/progress.json"))) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint; exit status {job.poll()}")


@pytest.mark.usefixtures("local_ray")
def test_a_killed_job_goes_on_when_run_again_with_other_workers_and_another_stage(built, tmp_path):
    settings = {**SETTINGS, "dsf_epochs": 6}
    shutil.copytree(built.store.uri, tmp_path / "store")
    recipe = changed(built.recipe, train=settings, store={"uri": str(tmp_path / "store")})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    job = start(path)
    wait_for_checkpoint(tmp_path / "store", 2, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    again = start(path, "train.workers=2", "train.zero_stage=2")
    told, _ = again.communicate(timeout=400)
    assert again.returncode == 0, told
    assert "train: going on from step " in told
    artifact = Store(recipe.store.uri).open("adapter", "tiny-finetuned")
    undisturbed = job_of(built, tmp_path / "undisturbed", "dsf", **settings)
    expected = run(train, undisturbed, recipe)
    assert losses(artifact.directory()) == pytest.approx(list(expected.losses), abs=1e-4)
    assert_same_adapter(artifact.directory(), tmp_path / "undisturbed" / "adapter")
