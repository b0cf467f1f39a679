import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from training.batching import TokenRow
from training.row_losses import RowLosses, difference, looking_only, measure_rows, plan_batches


def losses(sums: list[float], tokens: list[int]) -> RowLosses:
    return RowLosses(tuple(f"row-{place}" for place in range(len(sums))), tuple(sums), tuple(tokens))


def rows_of(*lengths: int) -> list[TokenRow]:
    return [
        TokenRow(f"row-{i}", tuple((7 * i + 3 * j) % 250 for j in range(length)), max(1, length // 3))
        for i, length in enumerate(lengths)
    ]


def dropping(base_path) -> torch.nn.Module:
    """A model in training mode whose outputs change from call to call."""
    base = LlamaForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    shape = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, shape).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 800))
def test_plan_batches_holds_every_row_once_and_keeps_to_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget


def test_measure_rows_is_transformers_own_loss_of_each_row(base_path):
    rows = rows_of(40, 9, 25, 3, 31)
    model = LlamaForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    measured = measure_rows(model, rows, 0, 80, 0, 1)
    assert measured.sample_ids == tuple(row.sample_id for row in rows)
    for row, found in zip(rows, measured.sums, strict=True):
        ids = torch.tensor([row.input_ids])
        labels = ids.clone()
        labels[0, : -row.target_tokens] = -100
        with torch.no_grad():
            assert found == pytest.approx(float(model(input_ids=ids, labels=labels).loss) * row.target_tokens, rel=1e-4)
    assert measured.mean == pytest.approx(sum(measured.sums) / sum(row.target_tokens for row in rows))


def test_looking_only_leaves_modes_random_state_and_gradients_alone(base_path):
    model = dropping(base_path)
    model.base_model.model.model.layers[0].eval()  # a module may have a mode of its own
    ids = torch.arange(20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    modes = [module.training for module in model.modules()]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    with looking_only(model):
        first, again = model(input_ids=ids).logits, model(input_ids=ids).logits
        torch.rand(3)
        assert not first.requires_grad
    assert torch.equal(first, again), "dropout was on"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert gradients
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


def test_looking_only_restores_modes_after_an_error(base_path):
    model = dropping(base_path)
    with pytest.raises(RuntimeError, match="generation failed"), looking_only(model):
        raise RuntimeError("generation failed")
    assert all(module.training for module in model.modules())


def test_difference_is_weighted_by_tokens_and_its_interval_is_that_of_an_exhaustive_bootstrap():
    of, against = losses([6.0, 1.0, 9.0], [4, 1, 3]), losses([2.0, 2.0, 3.0], [4, 1, 3])
    found = difference(of, against, seed=1)
    assert found.value == pytest.approx(of.mean - against.mean)
    higher, tokens = np.array([4.0, -1.0, 6.0]), np.array([4.0, 1.0, 3.0])
    every = [higher[[i, j, k]].sum() / tokens[[i, j, k]].sum() for i in range(3) for j in range(3) for k in range(3)]
    assert found.low == pytest.approx(np.percentile(every, 2.5, method="inverted_cdf"))
    assert found.high == pytest.approx(np.percentile(every, 97.5, method="inverted_cdf"))
    assert found.n == 3


@settings(max_examples=20)  # an interval takes 2,000 resamples
@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50), st.integers(1, 40)), min_size=1, max_size=12),
    st.integers(0, 3),
)
def test_difference_turns_its_sign_with_its_sides_and_is_repeatable(rows, seed):
    ours, theirs, tokens = (list(column) for column in zip(*rows, strict=True))
    one = difference(losses(ours, tokens), losses(theirs, tokens), seed)
    other = difference(losses(theirs, tokens), losses(ours, tokens), seed)
    assert one == difference(losses(ours, tokens), losses(theirs, tokens), seed)
    assert one.value == pytest.approx(-other.value, abs=1e-9)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-6)
    assert one.low - 1e-9 <= one.value <= one.high + 1e-9 or len(rows) > 1


def test_difference_of_equal_losses_is_nothing():
    same = losses([3.0, 4.0], [2, 2])
    assert difference(same, same, 0) == type(difference(same, same, 0))(0.0, 0.0, 0.0, 2)


def test_difference_of_other_rows_is_refused():
    with pytest.raises(AssertionError, match="different rows"):
        difference(losses([1.0], [2]), losses([1.0], [3]), 0)


def test_row_losses_only_keeps_what_belongs_together():
    kept = losses([1.0, 2.0, 3.0], [1, 2, 4]).only([2, 0])
    assert (kept.sample_ids, kept.sums, kept.tokens) == (("row-2", "row-0"), (3.0, 1.0), (4, 1))
    assert math.isclose(kept.mean, 0.8)
