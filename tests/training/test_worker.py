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
from tests.training.workers import Told, job_of, process_group
from training.adapter_checkpoint import FOLDER, PROGRESS, STATE
from training.batching import plan_steps
from training.lora_engine import learning_rate_at
from training.token_rows import TokenRows
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
