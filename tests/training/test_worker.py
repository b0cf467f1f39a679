import importlib
import json

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from cluster.errors import UserError
from tests.training.tiny import prompt_format
from training.config import LoraSection, TrainingRecipe
from training.worker import (
    WorkerConfig,
    _compile_nothing,
    _load_rows,
    deepspeed_config,
    learning_rate_at,
    with_lora,
    write_adapter,
)


def recipe(**train: object) -> TrainingRecipe:
    return TrainingRecipe.model_validate({"name": "x", "train": train})


def test_learning_rate_warms_up_then_decays_towards_zero():
    rates = [learning_rate_at(step, 40, 1.0, 0.1) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 36)
    assert len(set(rates[4:])) == 36


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (1, 0.9), (2, 0.0), (3, 0.99)])
def test_learning_rate_of_a_short_run_is_never_zero(steps, warmup):
    assert all(0 < learning_rate_at(step, steps, 2.0, warmup) <= 2.0 for step in range(steps))


def test_deepspeed_config_counts_rows_per_worker():
    config = deepspeed_config(recipe(workers=3, zero_stage=2), 4, bfloat16=True)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["zero_optimization"] == {"stage": 2}
    assert config["bf16"] == {"enabled": True}


def test_deepspeed_config_persistence_threshold_reaches_deepspeed():
    config = deepspeed_config(recipe(zero_stage=3, zero3_persistence_threshold=0), 4, bfloat16=False)
    assert config["zero_optimization"] == {"stage": 3, "stage3_param_persistence_threshold": 0}


def test_with_lora_only_the_adapter_trains_and_starts_as_no_change(base_path):
    base = LlamaForCausalLM.from_pretrained(base_path)
    ids = torch.arange(20)[None]
    before = base(input_ids=ids).logits
    adapted = with_lora(base, LoraSection(rank=4, alpha=8))
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * 2 * 7  # A and B, two layers, seven linear modules each
    torch.testing.assert_close(adapted(input_ids=ids).logits, before)
    only = with_lora(LlamaForCausalLM.from_pretrained(base_path), LoraSection(target_modules="q_proj, v_proj"))
    named = {name.split(".")[-4] for name, parameter in only.named_parameters() if parameter.requires_grad}
    assert named == {"q_proj", "v_proj"}


def test_with_lora_gradient_checkpointing_gives_the_same_gradients(base_path):
    def gradient(checkpointing: bool) -> torch.Tensor:
        torch.manual_seed(5)
        model = with_lora(LlamaForCausalLM.from_pretrained(base_path), LoraSection(rank=4), checkpointing)
        ids = torch.arange(30)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        return next(p.grad for name, p in model.named_parameters() if "lora_B" in name)

    expected = gradient(False)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(gradient(True), expected)


def test_write_adapter_plain_peft_reads_it_and_no_path_of_this_machine_stands_in_it(base_path, tmp_path):
    from peft import get_peft_model_state_dict

    torch.manual_seed(1)
    adapted = with_lora(LlamaForCausalLM.from_pretrained(base_path), LoraSection(rank=4, alpha=8))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    write_adapter(tmp_path, adapted, get_peft_model_state_dict(adapted), "embedded:Some-Model")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "embedded:Some-Model"
    assert str(base_path) not in (tmp_path / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_path), tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)


def test_load_rows_leaves_out_what_is_too_long_and_refuses_when_nothing_is_left(built):
    def load(max_tokens: int):
        train = built.recipe.train.model_copy(update={"max_tokens": max_tokens})
        chosen = built.recipe.model_copy(update={"train": train})
        return _load_rows(WorkerConfig({}, prompt_format(), built.samples, "raft", 1, 4, ""), chosen)

    rows, too_long = load(4000)
    assert (len(rows), too_long) == (24, 0)
    lengths = sorted(len(row.input_ids) for row in rows)
    fitting, too_long = load(lengths[9])
    assert len(fitting) + too_long == 24
    assert max(len(row.input_ids) for row in fitting) == lengths[9]
    with pytest.raises(UserError, match=r"^train\.max_tokens: none of 24 rows has at most 64 tokens; raise it$"):
        load(64)


def test_compile_nothing_deepspeed_then_builds_no_op(monkeypatch):
    """Guards against a DeepSpeed that looks elsewhere: its own function must say that there is no such op."""
    import deepspeed.ops
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setattr(OpBuilder, "load", lambda *_, **__: pytest.fail("compiles"))
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", {"deepspeed_shm_comm": True})
    _compile_nothing()
    assert importlib.import_module("deepspeed.comm.torch").build_shm_op() is None
