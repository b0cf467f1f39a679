import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from training.flops import LoraShape, lora_shape, mfu, peak_flops

# One layer by hand: width 8, 2 heads of 4, 1 key/value head, feed-forward 16, vocabulary 32.
ATTENTION = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8
FEED_FORWARD = 3 * 8 * 16
# Rank 2 on all seven matrices: rank * (in + out).
ADAPTER = 2 * ((8 + 8) + (8 + 4) + (8 + 4) + (8 + 8) + (8 + 16) + (8 + 16) + (16 + 8))


def tiny(layers=3, tied=False):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("tied", [False, True])
def test_lora_shape_counts_by_hand(tied):
    assert lora_shape(tiny(tied=tied)) == LoraShape(
        frozen=3 * (ATTENTION + FEED_FORWARD), trainable=3 * ADAPTER, head=32 * 8, attention=3 * 2 * 4
    )


def test_lora_shape_counts_what_zero_3_keeps_elsewhere():
    whole = lora_shape(tiny())
    model = tiny()
    for weight in model.parameters():
        weight.ds_shape, weight.ds_numel = weight.shape, weight.numel()
        weight.data = torch.empty(0)
    assert lora_shape(model) == whole


def test_lora_shape_mixture_of_experts_is_not_counted():
    model = tiny()
    model.config.num_local_experts = 8
    assert lora_shape(model) is None


def test_flops_per_token_by_hand():
    shape = LoraShape(frozen=1000, trainable=10, head=200, attention=30)
    # 4 per frozen weight, 6 per adapter weight, 4 per head weight at a quarter of the tokens, 12 L H Q T.
    assert shape.flops_per_token(row_tokens=50, target_share=0.25) == 4000 + 60 + 200 + 12 * 30 * 50


def test_flops_of_frozen_matrices_are_two_thirds_of_full_training():
    shape = LoraShape(frozen=3_000_000, trainable=0, head=0, attention=0)
    assert shape.flops_per_token(1, 1) == pytest.approx(6 * 3_000_000 * 2 / 3)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
    ],
)
def test_peak_flops_follows_the_name(device, tflops):
    assert peak_flops(device, "bfloat16") == tflops * 1e12


@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "bfloat16"), ("Some GPU", "bfloat16"), ("NVIDIA H200", "float32")]
)
def test_mfu_without_an_honest_peak_is_none(device, precision):
    assert mfu(1e5, 1e9, device, precision) is None


def test_mfu_is_the_share_of_the_peak_of_all_gpus():
    # 10,000 tokens/s of 1 GFLOP each on two A100s: 1e13 of 6.24e14.
    assert mfu(10_000, 1e9, "NVIDIA A100-SXM4-40GB", "bfloat16", gpus=2) == pytest.approx(1e13 / 6.24e14)
