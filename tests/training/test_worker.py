import dataclasses
import errno
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from cluster.errors import UserError
from cluster.storage import LocalStorage
from tests.training.workers import Told, in_ranks, job_of, process_group
from training.adapter_checkpoint import FOLDER, PROGRESS, STATE
from training.batching import plan_steps
from training.lora_engine import learning_rate_at
from training.token_rows import TokenRows
from training.validation import Validator
from training.worker import train


@pytest.fixture(scope="module", autouse=True)
def one_worker(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
            patch.delenv(name, raising=False)
        with process_group(tmp_path_factory.mktemp("group") / "store"):
            yield


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(f"{config.uri}/adapter_model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **(tolerance or {"rtol": 1e-3, "atol": 1e-4}))


def plain_loop(config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """An independent second implementation: PyTorch and PEFT, one row at a time, transformers' own loss."""
    rows, recipe = TokenRows.open(config.tokens), config.recipe
    steps = plan_steps(rows.lengths, config.batch_rows, config.epochs, recipe["seed"])
    base = LlamaForCausalLM.from_pretrained(recipe["model"]["base"], dtype=torch.float32)
    torch.manual_seed(recipe["seed"])
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0)
    losses = []
    for number, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = learning_rate_at(number, len(steps), recipe["train"]["learning_rate"], 0.1)
        targets = sum(rows[i].target_tokens for i in step)
        total = 0.0
        for row in (rows[i] for i in step):
            ids = torch.tensor([row.input_ids])
            labels = ids.clone()
            labels[0, : -row.target_tokens] = -100
            loss = model(input_ids=ids, labels=labels).loss * row.target_tokens / targets
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return get_peft_model_state_dict(model), losses


@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        ({"micro_batch_tokens": 20_000}, False),
        ({"micro_batch_tokens": 64}, True),
        ({"micro_batch_tokens": 20_000, "packing": "best_fit", "gradient_checkpointing": True}, False),
        ({"micro_batch_tokens": 64, "zero_stage": 2}, True),
        ({"micro_batch_tokens": 64, "zero_stage": 3, "zero3_persistence_threshold": 0, "offload": "cpu"}, True),
    ],
)
def test_train_is_what_a_plain_peft_loop_gives_however_a_step_is_cut(built, tmp_path, settings, alone):
    config = job_of(built, tmp_path, **settings)
    report = train(config, 0, 1, Told())
    expected, losses = plain_loop(config)
    assert_same(weights(config), expected)
    assert report.losses == pytest.approx(losses, abs=1e-3)
    assert report.best_step == report.steps == len(losses)
    if alone:
        assert report.padding_share == 0


SMALL = {"checkpoint_minutes": 0, "validations_per_epoch": 0}


def stop_at(step: int) -> Told:
    def stop(done: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return Told(stop)


def test_train_interrupted_goes_on_under_another_zero_stage_to_the_same_curve_and_weights(built, tmp_path):
    whole = job_of(built, tmp_path / "whole", dsf_epochs=2, dsf_batch_rows=6, objective="dsf", **SMALL)
    expected = train(whole, 0, 1, Told())
    cut = job_of(built, tmp_path / "cut", dsf_epochs=2, dsf_batch_rows=6, objective="dsf", **SMALL)
    with pytest.raises(KeyboardInterrupt):
        train(cut, 0, 1, stop_at(3))
    assert not (tmp_path / "cut" / "adapter").exists()
    recipe = {**cut.recipe, "train": {**cut.recipe["train"], "zero_stage": 2, "micro_batch_tokens": 64}}
    told = Told()
    found = train(dataclasses.replace(cut, recipe=recipe), 0, 1, told)
    assert (found.resumed_at, expected.resumed_at) == (3, 0)
    assert told.lines == [f"train: going on from step 3 of {expected.steps}"]
    assert told.began == [found.history[2]["tokens"]]
    assert len(told.done) == expected.steps - 3
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert [row["step"] for row in found.history if "loss" in row] == list(range(1, expected.steps + 1))
    assert (found.tokens, found.target_tokens) == (expected.tokens, expected.target_tokens)
    assert_same(weights(cut), weights(whole))


def test_train_finished_before_takes_no_step_again_but_writes_the_adapter(built, tmp_path):
    config = job_of(built, tmp_path, objective="dsf", **SMALL)
    expected = train(config, 0, 1, Told())
    again = dataclasses.replace(config, uri=str(tmp_path / "again"))
    told = Told()
    found = train(again, 0, 1, told)
    assert told.done == []
    assert (found.resumed_at, found.history) == (expected.steps, expected.history)
    assert_same(weights(again), weights(config), rtol=0, atol=0)


def test_train_loss_that_is_not_finite_is_one_line_and_the_last_good_checkpoint_stays(built, tmp_path):
    config = job_of(built, tmp_path, learning_rate=1e30, **SMALL)
    with pytest.raises(UserError) as caught:
        train(config, 0, 1, Told())
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("train.learning_rate: ")
    assert "at step 2, at a rate of 1e+30; lower it" in text
    assert f"the checkpoint of step 1 is kept in {tmp_path}/work" in text
    assert not (tmp_path / "adapter").exists()
    assert [path.name for path in (tmp_path / "work" / FOLDER).iterdir()] == ["000001"]


def test_train_full_disk_is_one_line_and_the_run_goes_on_from_the_checkpoint_before(built, tmp_path, monkeypatch):
    config = job_of(built, tmp_path, **SMALL)
    before, written = LocalStorage.replace, []

    def full(self, key: str, data: bytes) -> None:
        written.append(key)
        if sum(key.endswith(STATE) for key in written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        before(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "replace", full)
        with pytest.raises(UserError, match=r"^store\.uri: cannot write the checkpoint of step 3 .* No space left"):
            train(config, 0, 1, Told())
    found = train(config, 0, 1, Told())
    assert found.resumed_at == 2
    assert len(found.losses) == found.steps
    assert len(list((tmp_path / "work" / FOLDER).glob(f"*/{PROGRESS}"))) == 2


def test_train_stops_early_and_leaves_the_state_with_the_lowest_validation_loss(built, tmp_path, monkeypatch):
    measure, told = Validator.measure, iter([0.9, 0.5, 0.7, 0.6])

    def measure_as_told(*it):
        measured, loss = measure(*it), next(told)
        rows = dataclasses.replace(measured.rows, sums=tuple(loss * tokens for tokens in measured.rows.tokens))
        return dataclasses.replace(measured, rows=rows)

    settings = {"validations_per_epoch": 6}
    config = job_of(built, tmp_path / "stopped", patience=2, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Validator, "measure", measure_as_told)
        report = train(config, 0, 1, Told())
    assert report.best_step == 2
    assert report.stopped_early
    losses = {row["step"]: row["validation_loss"] for row in report.history if "validation_loss" in row}
    assert report.best_step == min(losses, key=lambda step: losses[step])
    assert len(report.losses) == report.best_step + 2 < report.steps
    until_best = job_of(built, tmp_path / "best", **settings, checkpoint_minutes=0)
    with pytest.raises(KeyboardInterrupt):
        train(until_best, 0, 1, stop_at(report.best_step))
    state = load_file(tmp_path / "best" / "work" / FOLDER / f"{report.best_step:06d}" / STATE)
    saved = weights(config)
    assert len(saved) * 3 == len(state)
    for name, value in saved.items():
        master = state["master." + name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(value, master, rtol=1e-4, atol=1e-6)
    history = [
        json.loads(line) for line in (tmp_path / "stopped" / "adapter" / "history.jsonl").read_text().splitlines()
    ]
    assert history == list(report.history)
    assert report.checks.validation.loss == pytest.approx(losses[report.best_step], abs=1e-4)


def test_train_dropout_follows_from_the_step_not_from_how_the_run_came_to_it(built, tmp_path):
    def with_dropout(folder):
        config = job_of(built, folder, objective="dsf", dsf_batch_rows=6, **SMALL)
        return dataclasses.replace(config, recipe={**config.recipe, "lora": {**config.recipe["lora"], "dropout": 0.3}})

    whole, cut = with_dropout(tmp_path / "whole"), with_dropout(tmp_path / "cut")
    expected = train(whole, 0, 1, Told())
    with pytest.raises(KeyboardInterrupt):
        train(cut, 0, 1, stop_at(2))
    assert train(cut, 0, 1, Told()).losses == pytest.approx(expected.losses, abs=1e-6)
    assert_same(weights(cut), weights(whole))


def test_train_out_of_gpu_memory_is_one_line(built, tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("training.worker.summed_loss", exhausted)
    with pytest.raises(UserError, match=r"^train\.micro_batch_tokens: the GPU's memory is too small for 3072 tokens"):
        train(job_of(built, tmp_path), 0, 1, Told())


def two_ranks(rank, world_size, config):
    return train(config, rank, world_size, Told())


def test_train_begun_by_one_worker_goes_on_with_two_under_zero_3_with_offload(built, tmp_path):
    config = job_of(built, tmp_path, objective="dsf", dsf_batch_rows=5, validations_per_epoch=1, dsf_epochs=1)
    config = dataclasses.replace(config, recipe={**config.recipe, "train": {**config.recipe["train"], **SMALL}})
    with pytest.raises(KeyboardInterrupt):
        train(config, 0, 1, stop_at(2))
    sharded = {
        "workers": 2,
        "zero_stage": 3,
        "zero3_persistence_threshold": 0,
        "offload": "cpu",
        "micro_batch_tokens": 300,
    }
    recipe = {**config.recipe, "train": {**config.recipe["train"], **sharded}}
    # 24 rows in steps of 5: the last has 4, and a worker may have fewer micro-batches than the other.
    report = in_ranks(two_ranks, 2, tmp_path / "group", dataclasses.replace(config, recipe=recipe))
    expected, losses = plain_loop(config)
    assert report.resumed_at == 2
    assert report.losses == pytest.approx(losses, abs=1e-3)
    assert_same(weights(config), expected)
    assert all(value.numel() > 0 for value in weights(config).values())
