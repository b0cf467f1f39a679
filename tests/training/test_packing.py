"""Packed against padded against alone, in float32, over tiny models made on the spot."""

import functools
import random

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from cluster.errors import UserError
from training.batching import PackedBatch, TokenRow, collate, collate_packed, make_batch, micro_batches, summed_loss
from training.config import LoraSection
from training.lora_engine import with_lora
from training.packing_check import refuse_unpackable

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WINDOW = 8
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=WINDOW)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SHAPE, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
        )
    ),
}


@functools.cache
def made(name: str):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def rows_of(lengths: list[int], seed: int = 0) -> list[TokenRow]:
    rng = random.Random(seed)
    return [
        TokenRow(f"row{i}", tuple(rng.randrange(2, 64) for _ in range(length)), rng.randint(1, length - 1))
        for i, length in enumerate(lengths)
    ]


def adapted(gradient_checkpointing: bool):
    """A model whose adapter already does something, so that gradients reach both of its matrices."""
    torch.manual_seed(0)
    model = with_lora(MODELS["llama"](), LoraSection(rank=4, alpha=8), gradient_checkpointing)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model, batches) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_packed_sample_has_the_logits_it_has_alone(name):
    """Also where a window is shorter than a sample: the window must not reach into the neighbour before it."""
    model = made(name)
    rows = rows_of([5, 2, 30, 12, 21])
    batch = collate_packed(rows, 0)
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        start = 0
        for row in rows:
            alone = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[start : start + len(row.input_ids)], alone, rtol=1e-4, atol=1e-4)
            start += len(row.input_ids)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lengths", [[17], [2, 2, 2], [5, 40, 11, 23], [64, 3, 64, 9, 31, 2]])
def test_packed_and_padded_give_the_same_loss_and_adapter_gradients(lengths, checkpointing):
    model = adapted(checkpointing)
    rows = rows_of(lengths, seed=len(lengths))
    packed_loss, packed = gradients(model, [collate_packed(rows, 0)])
    padded_loss, padded = gradients(model, [collate(rows, 0)])
    assert packed_loss == pytest.approx(padded_loss, rel=1e-5)
    assert packed.keys() == padded.keys()
    for name, gradient in packed.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, padded[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_micro_batches_of_any_budget_and_workers_add_up_to_the_step(packing):
    model = adapted(False)
    rows = rows_of([50, 20, 33, 7, 12, 20, 41])
    lengths = [len(row.input_ids) for row in rows]
    loss, whole = gradients(model, [collate(rows, 0)])
    for budget, world_size in ((1, 1), (64, 1), (64, 2), (90, 3), (10_000, 2), (10_000, 8)):
        batches = [
            make_batch([rows[i] for i in micro], 0, packing)
            for rank in range(world_size)
            for micro in micro_batches(range(len(rows)), lengths, rank, world_size, budget, packing)
        ]
        summed, parts = gradients(model, batches)
        assert summed == pytest.approx(loss, rel=1e-5)
        for name, gradient in parts.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_filler_has_no_loss_and_no_gradient(packing):
    loss, filler = gradients(adapted(False), [make_batch([], 0, packing)])
    assert loss == 0.0
    assert all(not gradient.any() for gradient in filler.values())


def test_packed_logits_are_computed_for_labels_only():
    rows = rows_of([9, 14, 4])
    model, shapes = made("llama"), []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape))
    batch = collate_packed(rows, 0)
    summed_loss(model, batch)
    hook.remove()
    assert shapes == [(1, sum(row.target_tokens for row in rows), 64)]
    targets = [token for row in rows for token in row.input_ids[-row.target_tokens :]]
    assert batch.labels.tolist() == targets


def test_collate_packed_restarts_positions_and_moves_whole():
    batch = collate_packed([TokenRow("a", (7, 8, 9), 1), TokenRow("b", (5, 6), 1)], 0).to("cpu")
    assert isinstance(batch, PackedBatch)
    assert batch.input_ids.tolist() == [[7, 8, 9, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.predictors.tolist() == [1, 3]
    assert batch.labels.tolist() == [9, 6]
    assert batch.tokens == 5


@pytest.mark.parametrize("name", list(MODELS))
def test_refuse_unpackable_accepts_attention_that_heeds_positions(name):
    model = made(name)
    refuse_unpackable(model, "best_fit")
    assert not model.training


def recurrent() -> torch.nn.Module:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    return MambaForCausalLM(config)


def convolutional() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key != "num_hidden_layers"}
    return Lfm2ForCausalLM(Lfm2Config(**shape, num_hidden_layers=2, layer_types=["conv", "full_attention"]))


@pytest.mark.parametrize("model", [recurrent, convolutional])
def test_refuse_unpackable_names_the_key_where_samples_see_each_other(model):
    with pytest.raises(UserError, match=r"train\.packing.*set train\.packing=none") as refusal:
        refuse_unpackable(model(), "best_fit")
    assert "\n" not in str(refusal.value)
    refuse_unpackable(model(), "none")
