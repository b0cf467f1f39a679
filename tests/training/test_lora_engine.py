import importlib

import pytest
import torch
from transformers import LlamaForCausalLM

from cluster.errors import UserError
from training.config import LoraSection, TrainingRecipe
from training.lora_engine import _compile_nothing, deepspeed_config, learning_rate_at, with_lora


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


def test_deepspeed_config_persistence_threshold_and_precision_reach_deepspeed():
    config = deepspeed_config(recipe(zero_stage=3, zero3_persistence_threshold=0), bfloat16=True)
    assert config["zero_optimization"] == {"stage": 3, "stage3_param_persistence_threshold": 0}
    assert config["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("stage", "moved"),
    [(1, {"offload_optimizer"}), (2, {"offload_optimizer"}), (3, {"offload_optimizer", "offload_param"})],
)
def test_deepspeed_config_offload_moves_what_the_stage_can_move(stage, moved):
    zero = deepspeed_config(recipe(zero_stage=stage, offload="cpu"), bfloat16=False)["zero_optimization"]
    assert {name for name, value in zero.items() if value == {"device": "cpu", "pin_memory": False}} == moved


def test_train_offload_without_a_stage_that_shards_is_refused():
    with pytest.raises(ValueError, match="offload: cpu moves what ZeRO shards: set zero_stage"):
        recipe(offload="cpu")


def test_with_lora_modules_that_the_model_has_not_are_one_line(base_path):
    with pytest.raises(UserError, match=r"^lora\.target_modules: q_prj does not fit the base model: ") as caught:
        with_lora(LlamaForCausalLM.from_pretrained(base_path), LoraSection(target_modules="q_prj"))
    assert "\n" not in str(caught.value)


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


def test_compile_nothing_deepspeed_then_builds_no_op(monkeypatch):
    """Guards against a DeepSpeed that looks elsewhere: its own function must say that there is no such op."""
    import deepspeed.ops
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setattr(OpBuilder, "load", lambda *_, **__: pytest.fail("compiles"))
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", {"deepspeed_shm_comm": True})
    _compile_nothing()
    assert importlib.import_module("deepspeed.comm.torch").build_shm_op() is None
