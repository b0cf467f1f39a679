import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from retrieval.records import Question
from tests.serving.tiny import make_adapter
from tests.training.tiny import passage, prompt_format
from tests.training.workers import Told, changed, in_ranks, job_of, process_group
from training.batching import TokenRow
from training.final_checks import final_checks
from training.format import PromptFormat
from training.lora_engine import load_engine, with_lora
from training.records import RaftSample
from training.samples import load_questions, load_validation
from training.validation import EarlyStop, ProbeRow, Validator, _questions_of, choose_probe, validation_steps
from training.worker import train

LOSSES = st.lists(st.floats(0, 10), max_size=12)


@given(st.integers(1, 500), st.integers(1, 5), st.integers(0, 6))
def test_validation_steps_are_evenly_spread_and_include_the_last(steps, epochs, per_epoch):
    chosen = validation_steps(steps, epochs, per_epoch)
    assert chosen == tuple(sorted(set(chosen)))
    assert chosen[-1] == steps
    assert chosen[0] >= 1
    assert len(chosen) == min(steps, epochs * per_epoch or 1)
    gaps = [later - earlier for earlier, later in zip((0, *chosen), chosen, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def run(patience: int, losses: list[float]) -> EarlyStop:
    state = EarlyStop(patience)
    for step, loss in enumerate(losses, start=1):
        if state.stopped:
            break
        state = state.after(step, loss)
    return state


@given(LOSSES, st.integers(1, 4))
def test_early_stop_keeps_the_first_lowest_loss_before_patience_ends(losses, patience):
    seen = len(losses)
    for end in range(patience + 1, len(losses) + 1):
        if min(losses[end - patience : end]) >= min(losses[: end - patience]):
            seen = end
            break
    state = run(patience, losses)
    assert state.stopped == (seen > patience and min(losses[seen - patience : seen]) >= min(losses[: seen - patience]))
    assert state.best_step == (losses[:seen].index(min(losses[:seen])) + 1 if losses else 0)
    assert state.lowest == (min(losses[:seen]) if losses else None)


@given(LOSSES)
def test_early_stop_without_patience_runs_to_the_end_and_keeps_the_last(losses):
    state = run(0, losses)
    assert not state.stopped
    assert state.best_step == len(losses)


@given(LOSSES, st.integers(0, 4))
def test_early_stop_goes_through_json(losses, patience):
    state = run(patience, losses)
    assert EarlyStop(**json.loads(json.dumps(dataclasses.asdict(state)))) == state


def sample(number: int, *, golden: bool = True, objective: str = "raft") -> RaftSample:
    shown = (passage(f"Fact {number}."),) if objective == "raft" else ()
    return RaftSample(
        f"{objective}-{number}", f"q{number}", objective, "?", shown, (golden,) * len(shown), golden and bool(shown),
        "", (), f"answer {number}", f"<ANSWER>: answer {number}", "train",
    )  # fmt: skip


def test_choose_probe_takes_turns_between_kinds_and_shows_the_golden_passage():
    samples = [sample(number, golden=number != 0) for number in range(12)]
    kinds = ["a"] * 9 + ["b", "b", "c"]
    asked = {f"q{n}": Question(f"q{n}", "?", ("x",), (), "train", {"kind": kind}) for n, kind in enumerate(kinds)}
    chosen = choose_probe(samples, asked, 5, seed=3)
    assert chosen == sorted(set(chosen))
    assert [kinds[place] for place in chosen].count("b") == 2
    assert [kinds[place] for place in chosen].count("c") == 1
    assert 0 not in choose_probe(samples, asked, 12, seed=3)
    assert len(choose_probe(samples, asked, 12, seed=3)) == 11
    assert choose_probe(samples, asked, 5, seed=3) == chosen
    assert choose_probe(samples, asked, 0, seed=3) == []
    closed_book = [sample(number, golden=False, objective="dsf") for number in range(3)]
    assert choose_probe(closed_book, {}, 2, seed=1) != []


@pytest.fixture
def validator(built):
    recipe = changed(built.recipe, train={"probe_rows": 3, "micro_batch_tokens": 4000})
    found = Validator.open(recipe, built.samples, "raft", PromptFormat.load(recipe.prompt, recipe.language))
    assert found is not None
    return found


def test_validator_open_takes_the_validation_rows_that_fit(built, validator):
    rows = load_validation(built.samples, "raft")
    assert [row.sample_id for row in validator.rows] == [row.sample_id for row in rows]
    assert len(validator.probe) == 3
    for row in validator.probe:
        assert row.sample.golden_present
        text = validator.tokenizer.decode(row.prompt)
        assert text.endswith("<|im_start|>assistant\n")
        assert row.sample.target not in text
    tight = changed(built.recipe, train={"max_tokens": 64})
    assert Validator.open(tight, built.samples, "raft", validator.prompt_format) is None


def test_validator_measure_leaves_a_plain_model_as_it_was(built, validator, base_path):
    model = LlamaForCausalLM.from_pretrained(base_path).train()
    state = torch.get_rng_state()
    measured = validator.measure(model, 0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert measured.loss == pytest.approx(measured.rows.mean)
    assert set(measured.figures()) == {"validation_loss", "exact_match", "f1"}
    assert measured.seconds >= measured.probe_seconds > 0


def test_validator_accepts_the_answers_of_the_questions_file(built, validator):
    known = {question.question_id: question for question in load_questions(built.samples)}
    assert validator.probe
    for row in validator.probe:
        assert row.accepted == known[row.sample.question_id].answers
    rows = load_validation(built.samples, "raft")
    assert _questions_of(built.samples, rows) == {row.question_id: known[row.question_id] for row in rows}
    assert len({row.question_id for row in rows}) < len(known)


class Parrot(torch.nn.Module):
    """Generates what it is told to, and records what it was asked."""

    def __init__(self, completions: list[list[int]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.completions = completions
        self.asked: list[list[int]] = []

    def generate(self, input_ids, attention_mask, generation_config, synced_gpus):
        assert not self.training
        assert not synced_gpus
        assert not generation_config.do_sample
        written = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            assert mask == sorted(mask), "prompts are padded on the left"
            self.asked.append([token for token, real in zip(ids, mask, strict=True) if real])
            written.append(ids + self.completions[len(self.asked) - 1])
        width = max(map(len, written))
        return torch.tensor([ids + [generation_config.pad_token_id] * (width - len(ids)) for ids in written])


def test_validator_probe_scores_the_parsed_answers(built, validator):
    tokenizer, rows = validator.tokenizer, []
    for number, accepted in enumerate((("12 tons",), ("cheese",), ("roses", "red roses"))):
        prompt = tuple(tokenizer("x" * (5 + number))["input_ids"])
        rows.append(ProbeRow(prompt, sample(number), accepted, 30))
    told = [
        "##begin_quote##It was 12 tons.##end_quote##\n<ANSWER>: 12 tons",
        "<ANSWER>: wine",
        "<ANSWER>: red roses ok",
    ]
    parrot = Parrot([tokenizer(text)["input_ids"] for text in told])
    probe = Validator(validator.recipe, [TokenRow("r", (1, 2, 3), 1)], rows, prompt_format())
    exact, overlap = probe._answer(parrot, 0, 1)
    assert parrot.asked == [list(row.prompt) for row in rows]
    assert exact == pytest.approx(1 / 3)
    assert overlap == pytest.approx((1 + 0 + 0.8) / 3)


def test_train_with_validations_follows_the_same_curve_as_without(built, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "0")
    dropping = dataclasses.replace(
        built, recipe=changed(built.recipe, lora={"dropout": 0.3}, samples={"validation_rows": 24})
    )
    measured = job_of(dropping, tmp_path / "measured", probe_rows=1, validations_per_epoch=3)
    alone = job_of(dropping, tmp_path / "alone", validations_per_epoch=0)
    with process_group(tmp_path / "group"):
        curves = [train(config, 0, 1, Told()) for config in (measured, alone)]
    assert sum("validation_loss" in row for row in curves[0].history) == 3
    assert sum("validation_loss" in row for row in curves[1].history) == 1
    assert curves[0].losses == curves[1].losses
    assert curves[0].checks.validation.rows == curves[1].checks.validation.rows


@dataclasses.dataclass(frozen=True)
class Folder:
    """What `final_checks` needs of an adapter artifact."""

    path: Path

    def directory(self) -> Path:
        return self.path


def measure_in_rank(rank: int, world_size: int, recipe, samples, zero_stage: int, other: Folder):
    recipe = changed(recipe, train={"zero_stage": zero_stage, "zero3_persistence_threshold": 0, "probe_rows": 3})
    engine = load_engine(recipe, torch.float32)
    validator = Validator.open(recipe, samples, "raft", PromptFormat.load(recipe.prompt, recipe.language))
    assert validator is not None
    first = validator.measure(engine, rank, world_size)
    ids = torch.arange(20)[None]
    loss = engine(input_ids=ids, labels=ids).loss  # training goes on after it
    engine.backward(loss)
    engine.step()
    again = validator.measure(engine, rank, world_size)
    checks = final_checks(engine, validator, recipe, other, rank, world_size, again)
    assert validator.losses(engine.module, rank, world_size) == again.rows, "the trained adapter is not back"
    return first, float(loss.detach()), checks


@pytest.mark.parametrize("zero_stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_measures_on_two_workers_are_those_of_a_plain_model(built, validator, base_path, tmp_path, zero_stage):
    other = Folder(make_adapter(base_path, tmp_path / "other", seed=5))
    model = with_lora(LlamaForCausalLM.from_pretrained(base_path), built.recipe.lora)
    plain = validator.measure(model, 0, 1)
    expected = final_checks(model, validator, built.recipe, other, 0, 1, plain)
    recipe = changed(built.recipe, train={"micro_batch_tokens": 4000})
    first, loss, found = in_ranks(measure_in_rank, 2, tmp_path / "group", recipe, built.samples, zero_stage, other)
    assert first.rows.sample_ids == plain.rows.sample_ids
    assert first.rows.sums == pytest.approx(plain.rows.sums, rel=1e-5)
    assert (first.exact_match, first.f1) == (plain.exact_match, plain.f1)
    assert loss > 0
    assert found.validation.loss != pytest.approx(first.loss, abs=1e-9)
    assert found.general.base.sums == pytest.approx(expected.general.base.sums, rel=1e-4)
    assert found.general.tuned != found.general.base
    assert found.replaced.sums == pytest.approx(expected.replaced.sums, rel=1e-4)
    assert found.replaced.mean != pytest.approx(first.loss, rel=1e-2)
