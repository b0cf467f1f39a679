import dataclasses

import pytest

from cluster.releases import promote, publish_release
from cluster.stage import Plan
from tests.training.tiny import country_questions
from training.records import RaftSample
from training.replacement import LEAST_ROWS, Comparison, compare, find_served
from training.row_losses import RowLosses
from training.samples import load_samples, load_validation, write_table

CONFIG = {"objective": "raft", "train": {}, "base_digest": "b" * 64, "prompt_format": 1}


def publish_adapter(built, name: str, samples, **config):
    """An adapter artifact that holds no weights: what is compared stands in its manifest."""
    plan = Plan("adapter", name, {**CONFIG, **config}, {}, {"samples": samples})
    with built.store.attempt(plan.ref) as attempt:
        (attempt.directory / "adapter_config.json").write_text("{}", encoding="utf-8")
        return attempt.publish(plan)


def release_with(built, name: str, adapter) -> None:
    ref = publish_release(
        built.store, name, index=built.index.ref, adapters={"raft": adapter.ref}, base_digest="", prompt_format=0
    )
    promote(built.store, name, ref.version)


@pytest.fixture
def served(built):
    return publish_adapter(built, "served-raft", built.samples.ref)


NEW = Plan("adapter", "new-raft", CONFIG)


def test_find_served_without_a_release_or_a_role_is_nothing(built, served, monkeypatch):
    assert find_served(built.store, "nowhere", "raft", NEW) is None
    monkeypatch.setattr("cluster.releases._check", lambda *_: None)
    release_with(built, "has-raft", served)
    assert find_served(built.store, "has-raft", "finetuned", NEW) is None
    found = find_served(built.store, "has-raft", "raft", NEW)
    assert getattr(found, "ref", None) == served.ref


@pytest.mark.parametrize(("key", "value"), [("base_digest", "c" * 64), ("prompt_format", 2)])
def test_find_served_of_another_base_or_format_says_why_not(built, monkeypatch, key, value):
    monkeypatch.setattr("cluster.releases._check", lambda *_: None)
    name = f"other-{key.replace('_', '-')}"
    release_with(built, name, publish_adapter(built, f"{name}-raft", built.samples.ref, **{key: value}))
    told = find_served(built.store, name, "raft", NEW)
    assert isinstance(told, str)
    assert key in told
    assert "\n" not in told
    assert str(value)[:12] in told


def test_find_served_whose_samples_are_gone_says_why_not(built, monkeypatch):
    monkeypatch.setattr("cluster.releases._check", lambda *_: None)
    gone = dataclasses.replace(built.samples.ref, version="0" * 16)
    release_with(built, "gone", publish_adapter(built, "gone-raft", gone))
    assert "samples of adapter/gone-raft" in str(find_served(built.store, "gone", "raft", NEW))


def losses_on_validation(built, per_token: float, objective: str = "raft", *, noise: float = 0.0) -> RowLosses:
    rows = load_validation(built.samples, objective)
    tokens = tuple(10 + place for place in range(len(rows)))
    sums = tuple(count * (per_token + noise * (-1) ** place) for place, count in enumerate(tokens))
    return RowLosses(tuple(row.sample_id for row in rows), sums, tokens)


def compared(built, adapter, ours: float, theirs: float, noise: float = 0.0) -> Comparison:
    new, old = losses_on_validation(built, ours, noise=noise), losses_on_validation(built, theirs)
    found = compare(adapter, new, old, built.samples, "raft", seed=1)
    assert isinstance(found, Comparison)
    return found


def test_compare_is_worse_only_where_the_interval_says_so(built, served):
    rows = len(load_validation(built.samples, "raft"))
    worse = compared(built, served, 0.5, 0.4)
    assert worse.worse
    assert (worse.new, worse.served) == (pytest.approx(0.5), pytest.approx(0.4))
    assert (worse.difference.n, worse.left_out) == (rows, 0)
    assert not compared(built, served, 0.4, 0.5).worse
    assert not compared(built, served, 0.41, 0.4, noise=0.2).worse, "may be chance"
    assert str(served.ref) in worse.describe()
    assert worse.figures()["its_validation_loss"] == 0.4


def test_compare_leaves_out_questions_that_the_served_adapter_was_trained_on(built, served, monkeypatch, tmp_path):
    def trains_on(samples: list[RaftSample]) -> None:
        write_table(tmp_path / "rows.parquet", [row.to_row() for row in samples], RaftSample.schema())
        monkeypatch.setattr("training.replacement.sample_files", lambda *_: [tmp_path / "rows.parquet"])

    rows = load_validation(built.samples, "raft")
    known = [dataclasses.replace(rows[0], question=f"  {rows[0].question.upper()} ", sample_id="trained-0")]
    trains_on(known)
    found = compared(built, served, 0.5, 0.4)
    assert (found.left_out, found.difference.n) == (1, len(rows) - 1)
    most = [dataclasses.replace(row, sample_id="trained") for row in rows[: len(rows) - LEAST_ROWS + 1]]
    trains_on(most)
    told = compare(
        served, losses_on_validation(built, 9.0), losses_on_validation(built, 1.0), built.samples, "raft", seed=1
    )
    assert isinstance(told, str)
    assert f"fewer than {LEAST_ROWS} are left" in told


def test_compare_counts_what_a_mixture_was_trained_on(built, monkeypatch):
    asked = []
    monkeypatch.setattr("training.replacement.sample_files", lambda samples, objective: asked.append(objective) or [])
    mixed = publish_adapter(built, "mixed-raft", built.samples.ref, train={"mixture": {"raft": 0.8, "dsf": 0.2}})
    compared(built, mixed, 0.4, 0.5)
    assert sorted(asked) == ["dsf", "raft"]


def test_compare_without_rows_or_with_a_reason_says_why(built, served):
    rows = losses_on_validation(built, 0.4)
    assert compare(None, rows, None, built.samples, "raft", 1) is None
    assert compare("another base", rows, None, built.samples, "raft", 1) == "another base"
    assert compare(served, None, None, built.samples, "raft", 1) == "there are no validation rows"


def test_validation_rows_of_these_samples_were_trained_on_by_nobody(built):
    asked = {row.question for objective in ("raft", "dsf") for row in load_samples(built.samples, objective)}
    rows = load_validation(built.samples, "raft")
    assert len(rows) >= LEAST_ROWS
    assert not asked & {row.question for row in rows}
    assert {row.question for row in rows} <= {question.text for question in country_questions()}
