import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from retrieval.records import Golden, Question
from tests.training.tiny import chunk, hits_of, prompt_format
from training.base_model import load_tokenizer
from training.batching import Batch, TokenRow, collate, micro_batches, plan_steps, summed_loss, tokenise
from training.config import SamplesConfig
from training.raft_rows import RowMaker


@pytest.fixture(scope="module")
def model(base_path):
    return LlamaForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


def random_rows(count: int, seed: int = 0) -> list[TokenRow]:
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        target = rng.randint(1, 12)
        ids = tuple(rng.randrange(256) for _ in range(target + rng.randint(1, 40)))
        rows.append(TokenRow(f"row{i}", ids, target))
    return rows


def unpadded_loss(model, row: TokenRow) -> float:
    """The independent oracle: transformers' own loss over one row's labels, which is a mean over its targets."""
    ids = torch.tensor([row.input_ids])
    labels = ids.clone()
    labels[0, : len(row.input_ids) - row.target_tokens] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * row.target_tokens


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=150),
    batch_rows=st.integers(1, 9),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_plan_steps_every_row_once_per_epoch_and_the_same_for_all(lengths, batch_rows, epochs, seed):
    steps = plan_steps(lengths, batch_rows, epochs, seed)
    assert steps == plan_steps(lengths, batch_rows, epochs, seed)
    assert all(1 <= len(step) <= batch_rows for step in steps)
    per_epoch = -(-len(lengths) // batch_rows)
    assert len(steps) == per_epoch * epochs
    for epoch in range(epochs):
        rows = sorted(row for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for row in step)
        assert rows == list(range(len(lengths)))


lengths_of_a_step = st.lists(st.integers(1, 600), min_size=1, max_size=24)


@given(
    lengths=lengths_of_a_step,
    world_size=st.integers(1, 5),
    budget=st.integers(1, 4000),
    packing=st.sampled_from(["none", "best_fit"]),
)
def test_micro_batches_workers_take_every_row_once_in_equally_many_within_the_budget(
    lengths, world_size, budget, packing
):
    step = [row + 7 for row in range(len(lengths))]
    all_lengths = [0] * 7 + lengths
    cuts = [micro_batches(step, all_lengths, rank, world_size, budget, packing) for rank in range(world_size)]
    assert sorted(row for cut in cuts for micro in cut for row in micro) == step
    assert len({len(cut) for cut in cuts}) == 1
    assert any(all(cut) for cut in cuts), "no worker has real work in every micro-batch"
    for micro in (micro for cut in cuts for micro in cut if len(micro) > 1):
        sizes = [all_lengths[row] for row in micro]
        if packing == "none":
            assert max(sizes) * len(sizes) <= budget
            assert 1 - sum(sizes) / (max(sizes) * len(sizes)) <= 0.05
        else:
            assert sum(sizes) <= budget


@given(lengths=lengths_of_a_step, world_size=st.integers(1, 5))
def test_micro_batches_workers_get_about_equally_many_tokens(lengths, world_size):
    step = range(len(lengths))
    loads = [
        sum(lengths[row] for micro in micro_batches(step, lengths, rank, world_size, 10**6) for row in micro)
        for rank in range(world_size)
    ]
    assert max(loads) - min(loads) <= max(lengths)
    assert min(loads) > 0 or len(lengths) < world_size


def test_micro_batches_best_fit_needs_few_micro_batches():
    rng = random.Random(3)
    lengths = [rng.randint(40, 700) for _ in range(300)]
    packs = micro_batches(range(300), lengths, 0, 1, 2048, "best_fit")
    assert len(packs) <= 1.03 * sum(lengths) / 2048 + 1


def test_micro_batches_padded_rows_are_cut_where_that_pads_least():
    lengths = [100, 99, 98, 60, 59, 58]
    assert micro_batches(range(6), lengths, 0, 1, 10_000) == [[0, 1, 2], [3, 4, 5]]
    assert micro_batches(range(3), lengths, 0, 1, 200) == [[0], [1, 2]]
    assert micro_batches([0], lengths, 0, 1, 64) == [[0]]
    assert micro_batches([4], lengths, 1, 2, 64) == [[]]


def test_plan_steps_neighbours_of_like_length_pad_little():
    rng = random.Random(1)
    lengths = [rng.randint(20, 700) for _ in range(400)]
    steps = plan_steps(lengths, 4, 1, 17)
    padded = sum(max(lengths[row] for row in step) * len(step) for step in steps)
    unsorted = sum(max(lengths[i : i + 4]) * 4 for i in range(0, 400, 4))
    assert 1 - sum(lengths) / padded < 0.08
    assert 1 - sum(lengths) / unsorted > 0.25
    means = [sum(lengths[row] for row in step) / len(step) for step in steps]
    assert means != sorted(means)


def test_plan_steps_epochs_and_seeds_give_other_orders():
    steps = plan_steps([1] * 64, 4, 2, 17)
    assert steps[:16] != steps[16:]
    assert plan_steps([1] * 64, 4, 1, 18) != steps[:16]


@pytest.mark.parametrize("seed", [0, 1])
def test_summed_loss_of_a_padded_batch_is_the_sum_over_rows_alone(model, tokenizer, seed):
    rows = random_rows(5, seed)
    with torch.no_grad():
        together = float(summed_loss(model, collate(rows, tokenizer.pad_token_id)))
        alone = [float(summed_loss(model, collate([row], tokenizer.pad_token_id))) for row in rows]
    oracle = [unpadded_loss(model, row) for row in rows]
    assert alone == pytest.approx(oracle, rel=1e-5)
    assert together == pytest.approx(sum(oracle), rel=1e-5)


def test_summed_loss_gradient_is_that_of_the_rows_alone(model, tokenizer):
    rows = random_rows(3, 4)

    def gradient(batches: list[Batch]) -> torch.Tensor:
        model.zero_grad()
        for batch in batches:
            summed_loss(model, batch).backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    pad = tokenizer.pad_token_id
    together, alone = gradient([collate(rows, pad)]), gradient([collate([row], pad) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    model.zero_grad()


def test_collate_labels_are_the_targets_and_nothing_else(tokenizer):
    rows = [TokenRow("a", (1, 2, 3, 4, 5), 2), TokenRow("b", (6, 7, 8), 1)]
    batch = collate(rows, 99)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [99, 99, 6, 7, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert batch.labels.tolist() == [[4, 5], [-100, 8]]


def test_summed_loss_padding_carries_none(model, tokenizer):
    rows = random_rows(4, 7)
    losses = []
    for pad in (0, 17, 255):
        with torch.no_grad():
            losses.append(float(summed_loss(model, collate(rows, pad))))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_summed_loss_prompt_tokens_are_read_but_not_predicted(model, tokenizer):
    """Per position: the gradient of the logits is zero exactly where the next token is not a target."""
    row = random_rows(1, 9)[0]
    batch = collate([row], tokenizer.pad_token_id)
    caught = {}

    class Recorder(torch.nn.Module):
        def forward(self, **inputs):
            output = model(**{**inputs, "logits_to_keep": 0})  # all positions, to see where gradients arrive
            output.logits.retain_grad()
            caught["logits"] = output.logits
            output["logits"] = output.logits[:, -inputs["logits_to_keep"] :]
            return output

    summed_loss(Recorder(), batch).backward()
    touched = caught["logits"].grad.abs().sum(-1)[0] > 0
    length = len(row.input_ids)
    expected = [length - row.target_tokens - 1 <= place < length - 1 for place in range(length)]
    assert touched.tolist() == expected
    model.zero_grad()


@pytest.mark.parametrize("objective", ["raft", "dsf"])
def test_tokenise_targets_are_what_a_completion_is_parsed_from(tokenizer, objective):
    found = chunk("It is blue.", "a")
    made = RowMaker(SamplesConfig(golden_fraction=1), prompt_format(), 1, {"a": [found]}, frozenset(), ["a"])
    question = Question("q", "Which colour?", ("blue",), (Golden("a"),))
    sample = made.raft(question, hits_of([found])) if objective == "raft" else made.dsf(question)
    (row,) = tokenise([sample], tokenizer, prompt_format())
    prompt, target = row.input_ids[: -row.target_tokens], row.input_ids[-row.target_tokens :]
    assert tokenizer.decode(target) == sample.target + "<|im_end|>"
    asked = tokenizer.decode(prompt)
    assert asked.endswith("Question: Which colour?<|im_end|>\n<|im_start|>assistant\n")
    assert ("It is blue." in asked) == (objective == "raft")
    assert prompt_format().parse(tokenizer.decode(target[:-1]), sample.passages).answer == "blue"
    # The prompt is token for token what generation is given.
    messages = prompt_format().messages(sample.question, sample.passages if objective == "raft" else None)
    given_at_use = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert list(prompt) == list(given_at_use["input_ids"])
