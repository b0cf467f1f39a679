"""Two workers of a gloo group: one reduction per step; the adapter's state gathered and put back, under all stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.workers import in_ranks
from training.adapter_state import (
    adapter_weights,
    all_finite,
    optimizer_state,
    set_adapter_weights,
    set_optimizer_state,
)
from training.config import LoraSection, TrainingRecipe
from training.lora_engine import deepspeed_engine, one_reduction, with_lora

STEPS, ROWS, MICRO = 4, 8, 2
CUT = 2
KINDS = [
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3, "zero3_persistence_threshold": 0},
    {"zero_stage": 1, "offload": "cpu"},
    {"zero_stage": 2, "offload": "cpu"},
    {"zero_stage": 3, "zero3_persistence_threshold": 0, "offload": "cpu"},
]
# Which kind goes on from another's state, by place in KINDS.
GOES_ON = {0: 3, 1: 2, 2: 6, 3: 0, 4: 1, 5: 3, 6: 5}


def model(dtype: torch.dtype) -> Any:
    """Odd sizes: no parameter of the adapter can be divided evenly between two workers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=28,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=35,
        max_position_embeddings=64,
    )
    base = LlamaForCausalLM(config).to(dtype)
    torch.manual_seed(1)
    return with_lora(base, LoraSection(rank=3, alpha=6, target_modules="v_proj, down_proj"))


def rows() -> torch.Tensor:
    return torch.randint(0, 64, (STEPS, ROWS, 10), generator=torch.Generator().manual_seed(5))


def engine(dtype: torch.dtype, kind: dict[str, Any]) -> Any:
    recipe = TrainingRecipe.model_validate({"name": "x", "train": {"learning_rate": 1e-2, **kind}})
    return deepspeed_engine(model(dtype), recipe, dtype)


def step(built: Any, number: int, rank: int, world_size: int, micro_batches: int) -> float:
    mine = rows()[number][rank::world_size].chunk(micro_batches)
    total = torch.zeros(())
    with one_reduction(built, micro_batches) as announce:
        for place, ids in enumerate(mine):
            announce(place)
            loss = built(input_ids=ids, labels=ids).loss.float() * len(ids) / ROWS
            built.backward(loss * world_size)
            total += loss.detach()
    built.step()
    torch.distributed.all_reduce(total)
    return float(total)


def every_kind(rank: int, world_size: int, dtype: torch.dtype, micro_batches: int) -> list[dict[str, Any]]:
    """Losses of each kind; of another that goes on from its state; its state after CUT steps; its last weights."""
    answers = []
    for place, kind in enumerate(KINDS):
        built = engine(dtype, kind)
        losses = [step(built, number, rank, world_size, micro_batches) for number in range(CUT)]
        state = optimizer_state(built)
        losses += [step(built, number, rank, world_size, micro_batches) for number in range(CUT, STEPS)]
        other = engine(dtype, KINDS[GOES_ON[place]])
        set_optimizer_state(other, state, CUT)
        again = optimizer_state(other)
        assert all(torch.equal(again[name], value) for name, value in state.items())
        went_on = [step(other, number, rank, world_size, 1) for number in range(CUT, STEPS)]
        weights = adapter_weights(built)
        set_adapter_weights(other, weights)
        assert all(torch.equal(weights[name], value) for name, value in adapter_weights(other).items())
        answers.append({"losses": losses, "went_on": went_on, "state": numpy_of(state), "weights": numpy_of(weights)})
    return answers


def numpy_of(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: value.float().numpy() for name, value in tensors.items()}


def plain_loop(dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, moments and weights after CUT steps, last weights; PyTorch alone, one row at a time."""
    plain = model(dtype)
    named = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, weight_decay=0.0)
    losses, state = [], {}
    for number in range(STEPS):
        total = 0.0
        for ids in rows()[number]:
            loss = plain(input_ids=ids[None], labels=ids[None]).loss / ROWS
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if number + 1 == CUT:
            for name, p in named.items():
                state[f"master.{name}"] = p.detach().clone()
                state |= {f"{kind}.{name}": optimizer.state[p][kind].clone() for kind in ("exp_avg", "exp_avg_sq")}
    return losses, state, {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("micro_batches", [MICRO])
def test_two_workers_under_every_stage_are_one_plain_loop_and_any_goes_on_from_any(tmp_path, micro_batches):
    losses, state, weights = plain_loop(torch.float32)
    answers = in_ranks(every_kind, 2, tmp_path / "group", torch.float32, micro_batches)
    assert len(answers) == len(KINDS)
    for kind, answer in zip(KINDS, answers, strict=True):
        assert answer["losses"] == pytest.approx(losses, abs=1e-5), kind
        assert answer["went_on"] == pytest.approx(losses[CUT:], abs=1e-5), kind
        assert set(answer["state"]) == set(state)
        for expected, found in ((state, answer["state"]), (weights, answer["weights"])):
            for name, value in expected.items():
                torch.testing.assert_close(torch.from_numpy(found[name]), value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, MICRO])
def test_bfloat16_keeps_its_master_weights_in_float32_under_every_stage(tmp_path, micro_batches):
    losses, _, _ = plain_loop(torch.bfloat16)
    answers = in_ranks(every_kind, 2, tmp_path / "group", torch.bfloat16, micro_batches)
    for kind, answer in zip(KINDS, answers, strict=True):
        assert answer["losses"] == pytest.approx(losses, abs=0.02), kind
        assert answer["went_on"] == pytest.approx(answer["losses"][CUT:], abs=2e-3), kind
        masters = [torch.from_numpy(value) for name, value in answer["state"].items() if name.startswith("master.")]
        assert any(not torch.equal(value, value.bfloat16().float()) for value in masters)


def test_all_finite_sees_one_value():
    assert all_finite({"a": torch.ones(3)})
    assert not all_finite({"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])})
    assert not all_finite({"b": torch.tensor([float("inf")])})
