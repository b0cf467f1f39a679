from __future__ import annotations

import errno

import pytest
import torch

import training.adapter_checkpoint
from cluster.errors import UserError
from cluster.storage import LocalStorage
from tests.cluster.stores import object_store
from training.adapter_checkpoint import (
    BEST,
    FOLDER,
    PROGRESS,
    STATE,
    Checkpoint,
    Progress,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def checkpoint(step: int, plan: str = "adapter/x/1") -> Checkpoint:
    history = tuple({"step": number + 1, "loss": 1 / 3 + number} for number in range(step))
    validated = ({"step": step, "validation_loss": 0.25},)
    progress = Progress(plan, step, 1, (*history, *validated), {"patience": 3, "lowest": 0.25}, 1.5, 10, 12, 4)
    return Checkpoint(progress, {"master.a": torch.full((2, 3), float(step))}, {"a": torch.ones(2).bfloat16()})


@pytest.fixture(params=["local", "object"])
def work(request, tmp_path, monkeypatch) -> str:
    storage = LocalStorage(tmp_path) if request.param == "local" else object_store().storage
    monkeypatch.setattr(training.adapter_checkpoint, "storage_at", lambda _: storage)
    return storage.uri


def storage() -> LocalStorage:
    return training.adapter_checkpoint.storage_at("")


def latest(work: str, plan: str = "adapter/x/1") -> tuple[int, list[str]]:
    said: list[str] = []
    return latest_checkpoint(work, plan, said.append), said


def test_a_checkpoint_comes_back_as_it_was(work):
    assert latest(work) == (0, [])
    save_checkpoint(work, checkpoint(2))
    number, said = latest(work)
    found = load_checkpoint(work, number)
    assert (number, said) == (1, [])
    assert found.progress == checkpoint(2).progress
    assert found.progress.losses == (1 / 3, 1 / 3 + 1)
    assert torch.equal(found.state["master.a"], torch.full((2, 3), 2.0))
    assert found.best["a"].dtype == torch.bfloat16


def test_the_last_two_are_kept_and_the_newest_counts(work):
    for step in range(1, 6):
        save_checkpoint(work, checkpoint(step))
    assert storage().folders(FOLDER) == ["000004", "000005"]
    assert load_checkpoint(work, latest(work)[0]).progress.step == 5


def test_a_checkpoint_of_another_plan_is_never_used(work):
    save_checkpoint(work, checkpoint(1, plan="adapter/x/2"))
    assert latest(work) == (0, [])
    assert latest(work, "adapter/x/2") == (1, [])


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (PROGRESS, None, "it was never finished"),
        (STATE, None, "it was never finished"),
        (PROGRESS, lambda data: data[:-9], "damaged progress.json"),
        (PROGRESS, lambda data: b"[]", "damaged progress.json"),
        (PROGRESS, lambda data: data.replace(b'"format": 1', b'"format": 9'), "format 9, expected 1"),
        (STATE, lambda data: data[:-1], "state.safetensors is not what was written"),
        (BEST, lambda data: data[:-1] + bytes([data[-1] ^ 1]), "best.safetensors is not what was written"),
    ],
)
def test_a_broken_checkpoint_is_passed_over_with_one_line(work, name, change, told):
    for step in (1, 2):
        save_checkpoint(work, checkpoint(step))
    key = f"{FOLDER}/000002/{name}"
    if change is None:
        storage().delete(key)
    else:
        storage().replace(key, change(storage().read(key)))
    number, said = latest(work)
    assert said == [f"train: {work}/checkpoints/000002 is passed over: {told}"]
    assert load_checkpoint(work, number).progress.step == 1
    with pytest.raises(UserError, match=told):
        load_checkpoint(work, 2)
    save_checkpoint(work, checkpoint(3))
    assert load_checkpoint(work, latest(work)[0]).progress.step == 3


@pytest.mark.parametrize("failing", [STATE, BEST, PROGRESS])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_good(tmp_path, monkeypatch, failing):
    save_checkpoint(str(tmp_path), checkpoint(1))
    before = LocalStorage.replace

    def full(self, key: str, data: bytes) -> None:
        if key.endswith(failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        before(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "replace", full)
        with pytest.raises(UserError) as caught:
            save_checkpoint(str(tmp_path), checkpoint(2))
    assert str(caught.value) == (
        f"store.uri: cannot write the checkpoint of step 2 to {tmp_path}: No space left on device; "
        "the checkpoint before it is kept: free some space there and run again"
    )
    assert latest(str(tmp_path)) == (1, [])
    save_checkpoint(str(tmp_path), checkpoint(2))
    assert load_checkpoint(str(tmp_path), latest(str(tmp_path))[0]).progress == checkpoint(2).progress
