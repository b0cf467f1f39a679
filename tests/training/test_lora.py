import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import training.lora
from cluster.errors import NotBetterError, UserError
from cluster.releases import promote, publish_release
from tests.training.workers import Told, changed, process_group
from training.batching import TokenRow
from training.final_checks import final_checks
from training.format import PromptFormat
from training.lora import adapter_plan, train_adapter, train_adapters
from training.lora_engine import with_lora
from training.replacement import Comparison
from training.row_losses import Difference, measure_rows
from training.samples import load_samples, load_validation
from training.validation import Validator
from training.worker import train

on_ray = training.lora._fit


@pytest.fixture(scope="module", autouse=True)
def in_process(tmp_path_factory):
    """One worker in this process instead of Ray's, which takes its time to start one; see test_ray_train.py."""

    def fit_here(recipe, config, storage):
        return train(config, 0, 1, Told())

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
            patch.delenv(name, raising=False)
        patch.setattr(training.lora, "_fit", fit_here)
        patch.setattr(training.lora, "ray_session", lambda config: contextlib.nullcontext())
        with process_group(tmp_path_factory.mktemp("group") / "store"):
            yield


@pytest.fixture(scope="module")
def trained(built, tmp_path_factory, in_process):
    """A recipe, and its adapter after a pass over the rows with three validations."""
    recipe = changed(built.recipe, train={"probe_rows": 1, "validations_per_epoch": 3, "patience": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return recipe, train_adapter(recipe, built.store, built.samples, "raft")


@pytest.fixture(scope="module")
def adapter(trained):
    return trained[1]


def history(artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in artifact.path("history.jsonl").read_text(encoding="utf-8").splitlines()]


def test_train_adapter_loads_in_plain_peft_and_has_the_validation_loss_that_it_states(built, adapter):
    base = LlamaForCausalLM.from_pretrained(built.recipe.model.base)
    validator = Validator.open(built.recipe, built.samples, "raft", PromptFormat.load(built.recipe.prompt, "en"))
    assert validator is not None
    before = validator.losses(base, 0, 1).mean
    adapted = PeftModel.from_pretrained(base, adapter.directory())
    stated = adapter.manifest.measured["validation_loss"]
    assert validator.losses(adapted, 0, 1).mean == pytest.approx(stated, abs=1e-3)
    assert stated < before - 0.05


def test_train_adapter_manifest_says_what_was_done(built, adapter):
    counts, measured = adapter.manifest.counts, adapter.manifest.measured
    assert (adapter.ref.kind, adapter.ref.name) == ("adapter", "tiny-raft")
    rows = load_samples(built.samples, "raft")
    assert counts["rows"] == len(rows)
    assert counts["steps"] == measured["planned_steps"] == -(-len(rows) // 4)
    assert counts["rows_too_long"] == 0
    assert counts["target_tokens"] == sum(len(row.target.encode()) + 1 for row in rows)
    assert counts["trainable_parameters"] == sum(
        value.numel() for value in load_file(adapter.path("adapter_model.safetensors")).values()
    )
    assert 0 <= measured["padding_share"] < 0.1
    assert (measured["workers"], measured["zero_stage"]) == (1, 0)
    assert (measured["device"], measured["precision"], measured["mfu"]) == ("cpu", "float32", None)
    assert (measured["best_step"], measured["stopped_early"], measured["resumed_at_step"]) == (
        counts["steps"],
        False,
        0,
    )
    assert measured["validation_rows"] == len(load_validation(built.samples, "raft"))
    gap = measured["validation_loss"] - measured["final_loss"]
    assert measured["train_validation_gap"] == pytest.approx(gap, abs=1e-3)
    assert 0 <= measured["probe_exact_match"] <= measured["probe_f1"] <= 1
    general = measured["general"]
    assert general["difference"]["n"] == 40
    assert general["difference"]["value"] == pytest.approx(general["tuned_loss"] - general["base_loss"], abs=1e-3)
    assert (measured["replaces"], measured["worse_than_served"]) == (None, False)
    assert adapter.manifest.parents == {"samples": str(built.samples.ref)}
    assert adapter.manifest.config["base_digest"]


def test_train_adapter_leaves_its_history_and_its_picture(adapter):
    steps = [row for row in history(adapter) if "loss" in row]
    validations = [row for row in history(adapter) if "validation_loss" in row]
    assert [row["step"] for row in steps] == list(range(1, adapter.manifest.counts["steps"] + 1))
    assert len(validations) == 3
    assert validations[-1]["validation_loss"] == pytest.approx(adapter.manifest.measured["validation_loss"], abs=1e-3)
    assert adapter.path("curve.png").read_bytes().startswith(b"\x89PNG")


def test_train_adapter_again_is_skipped(built, trained, monkeypatch):
    recipe, adapter = trained
    monkeypatch.setattr(training.lora, "_fit", lambda *_: pytest.fail("trained again"))
    assert train_adapter(recipe, built.store, built.samples, "raft").ref == adapter.ref
    other = {"workers": 2, "zero_stage": 2, "threads_per_worker": 2, "packing": "best_fit", "probe_rows": 4}
    assert train_adapter(changed(recipe, train=other), built.store, built.samples, "raft").ref == adapter.ref


def test_adapter_plan_version_follows_what_affects_the_weights(built):
    def version(objective="raft", **sections) -> str:
        return adapter_plan(changed(built.recipe, **sections), built.samples, objective).ref.version

    before = version()
    for same in (
        {"workers": 2, "gpus_per_worker": 1, "zero_stage": 3, "zero3_persistence_threshold": 0, "offload": "cpu"},
        {"micro_batch_tokens": 100, "packing": "best_fit", "gradient_checkpointing": True, "tracker": "none"},
        {"checkpoint_minutes": 0, "restarts": 0, "probe_rows": 0, "cpus_per_worker": 2, "mixture": {"raft": 1}},
    ):
        assert version(train=same) == before
    for section, values in (
        ("train", {"learning_rate": 1e-4}),
        ("train", {"epochs": 2}),
        ("train", {"batch_rows": 8}),
        ("train", {"max_tokens": 2000}),
        ("train", {"patience": 1}),
        ("train", {"validations_per_epoch": 5}),
        ("train", {"mixture": {"raft": 0.8, "dsf": 0.2}}),
        ("lora", {"rank": 8}),
        ("model", {"precision": "bfloat16"}),
    ):
        assert version(**{section: values}) != before
    assert version("dsf", train={"dsf_epochs": 5}) != version("dsf")
    assert version("dsf", train={"epochs": 5, "mixture": {"raft": 1, "dsf": 1}}) == version("dsf")
    assert version("dsf", train={"validations_per_epoch": 5}) == version("dsf"), "dsf keeps its last state"


def released(built, adapter, name: str) -> None:
    """Makes `adapter` the one that the promoted release of `name` serves."""
    plan = adapter.manifest.config
    ref = publish_release(
        built.store,
        name,
        index=built.index.ref,
        samples=built.samples.ref,
        adapters={"raft": adapter.ref},
        base_digest=plan["base_digest"],
        prompt_format=plan["prompt_format"],
    )
    promote(built.store, name, ref.version)


def test_train_adapter_worse_than_the_served_one_is_refused_until_forced(built, trained, monkeypatch, capsys):
    recipe, adapter = trained
    recipe = changed(recipe, train={"learning_rate": 1e-9}).model_copy(update={"name": "worse"})
    released(built, adapter, "worse")
    promoted = built.store.current("release", "worse")
    with pytest.raises(NotBetterError, match=r"^train raft: not published, it is worse: validation loss") as caught:
        train_adapter(recipe, built.store, built.samples, "raft")
    told = str(caught.value)
    assert "\n" not in told
    found = re.search(r"loss ([\d.]+) against ([\d.]+) of the promoted (\S+) on (\d+) rows", told)
    assert found is not None
    assert float(found[2]) == pytest.approx(adapter.manifest.measured["validation_loss"], abs=2e-3)
    assert float(found[1]) > float(found[2])
    assert (found[3], int(found[4])) == (str(adapter.ref), len(load_validation(built.samples, "raft")))
    assert built.store.versions("adapter", "worse-raft") == []
    assert built.store.current("release", "worse") == promoted
    forced = train_adapter(recipe, built.store, built.samples, "raft", force=True)
    assert forced.manifest.measured["resumed_at_step"] == forced.manifest.counts["steps"], "trained again"
    assert forced.manifest.measured["worse_than_served"] is True
    replaces = forced.manifest.measured["replaces"]
    assert replaces["adapter"] == str(adapter.ref)
    assert replaces["difference"]["low"] > 0
    assert "worse, and published by force" in capsys.readouterr().out
    assert built.store.current("release", "worse") == promoted


@pytest.mark.parametrize(("objective", "force"), [("dsf", False), ("raft", True)])
def test_refuse_worse_lets_a_closed_book_adapter_pass_with_a_warning(objective, force, capsys):
    low = Comparison("adapter/old/1", 0.5, 0.4, Difference(0.1, 0.05, 0.2, 9), left_out=0)
    assert training.lora._refuse_worse(objective, low, force=force)
    out, err = capsys.readouterr()
    assert "validation loss 0.500 against 0.400 of the promoted adapter/old/1 on 9 rows" in (err if not force else out)
    with pytest.raises(NotBetterError):
        training.lora._refuse_worse("raft", low, force=False)
    chance = dataclasses.replace(low, difference=Difference(0.1, -0.05, 0.2, 9))
    assert not training.lora._refuse_worse("raft", chance, force=False)
    assert not training.lora._refuse_worse("raft", "another base", force=False)
    assert "not compared with the promoted release's adapter: another base" in capsys.readouterr().out


def test_final_checks_measure_another_adapter_and_leave_the_trained_one_in_place(built, adapter):
    base = LlamaForCausalLM.from_pretrained(built.recipe.model.base)
    validator = Validator.open(built.recipe, built.samples, "raft", PromptFormat.load(built.recipe.prompt, "en"))
    assert validator is not None
    fresh = with_lora(base, built.recipe.lora)
    alone = validator.measure(fresh, 0, 1)
    checks = final_checks(fresh, validator, built.recipe, adapter, 0, 1, alone)
    assert checks.validation is alone
    assert checks.replaced is not None
    assert checks.replaced.mean == pytest.approx(adapter.manifest.measured["validation_loss"], abs=1e-3)
    assert checks.general.base == checks.general.tuned, "a fresh adapter changes nothing"
    assert validator.losses(fresh, 0, 1) == alone.rows
    assert fresh.active_adapters == ["default"]
    assert list(fresh.peft_config) == ["default"]
    without = final_checks(fresh, None, built.recipe, adapter, 0, 1)
    assert (without.validation, without.replaced) == (None, None)


def test_final_checks_tell_base_from_tuned(built, adapter):
    base = LlamaForCausalLM.from_pretrained(built.recipe.model.base)
    row = TokenRow("r", tuple(range(40)), 20)
    expected = measure_rows(base, [row], 0, 999, 0, 1).mean
    adapted = PeftModel.from_pretrained(base, adapter.directory())
    general = final_checks(adapted, None, built.recipe, None, 0, 1).general
    assert general.base.mean != pytest.approx(general.tuned.mean, abs=1e-3)
    with adapted.disable_adapter():
        assert measure_rows(adapted, [row], 0, 999, 0, 1).mean == pytest.approx(expected)
    assert general.tuned.mean == pytest.approx(adapter.manifest.measured["general"]["tuned_loss"], abs=1e-3)
    assert general.base.mean == pytest.approx(adapter.manifest.measured["general"]["base_loss"], abs=1e-3)


def test_train_adapters_trains_all_before_it_tells_of_the_refused(built, monkeypatch):
    asked = []

    def refuse_raft(recipe, store, samples, objective, *, force):
        asked.append(objective)
        if objective == "raft":
            raise NotBetterError("train raft: worse")
        return built.samples

    monkeypatch.setattr(training.lora, "train_adapter", refuse_raft)
    with pytest.raises(NotBetterError, match="train raft: worse"):
        train_adapters(built.recipe, built.store, built.samples, ["raft", "dsf"])
    assert asked == ["raft", "dsf"]
    assert train_adapters(built.recipe, built.store, built.samples, ["dsf"]) == {"finetuned": built.samples}


def refused(built, objective="raft", **sections) -> str:
    recipe = changed(built.recipe, **sections).model_copy(update={"name": "refused"})
    with pytest.raises(UserError) as caught:
        train_adapter(recipe, built.store, built.samples, objective)
    assert "\n" not in str(caught.value)
    assert built.store.current("adapter", f"refused-{training.lora.ROLES[objective]}") is None
    assert built.store.versions("adapter", f"refused-{training.lora.ROLES[objective]}") == []
    return str(caught.value)


def test_train_adapter_impossible_workers_are_refused_before_waiting(built, local_ray, monkeypatch):
    monkeypatch.setattr(training.lora, "_fit", on_ray)
    assert "3 workers need 3 CPUs, the cluster has 2" in refused(built, train={"workers": 3})
    assert "1 workers need 1 GPUs, the cluster has 0" in refused(built, train={"gpus_per_worker": 1})


def test_train_adapter_more_workers_than_rows_in_a_step_are_refused(built):
    assert "train.workers is 5 but train.batch_rows is 4" in refused(built, train={"workers": 5})
    told = refused(built, "dsf", train={"workers": 5, "dsf_batch_rows": 3})
    assert "train.dsf_batch_rows is 3" in told


def test_train_adapter_without_validation_rows_says_so_before_training(built, monkeypatch, capsys):
    def interrupted(recipe, config, storage):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.lora, "_fit", interrupted)
    monkeypatch.setattr(training.lora, "load_validation", lambda samples, objective: [])
    recipe = changed(built.recipe, train={"learning_rate": 8e-3})
    with pytest.raises(KeyboardInterrupt):
        train_adapter(recipe, built.store, built.samples, "dsf")
    assert capsys.readouterr().out.count("train finetuned: there are no validation rows") == 1


def test_train_adapter_interrupted_leaves_nothing_readable(built, monkeypatch):
    def interrupted(recipe, config, storage):
        assert dataclasses.is_dataclass(config)
        (Path(config.uri) / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(training.lora, "_fit", interrupted)
    recipe = changed(built.recipe, train={"learning_rate": 7e-3})
    ref = adapter_plan(recipe, built.samples, "raft").ref
    current = built.store.current("adapter", "tiny-raft")
    with pytest.raises(KeyboardInterrupt):
        train_adapter(recipe, built.store, built.samples, "raft")
    assert not built.store.exists(ref)
    assert built.store.current("adapter", "tiny-raft") == current
    assert list((built.store.storage.root / str(ref)).rglob("adapter_model.safetensors")) == []


def test_train_adapter_prompt_edited_after_the_samples_is_refused(built, tmp_path):
    text = (Path(__file__).parents[2] / "training/prompts/en.yaml").read_text(encoding="utf-8")
    (tmp_path / "prompt.yaml").write_text(text.replace("do not say", "are silent"), encoding="utf-8")
    told = refused(built, prompt={"path": str(tmp_path / "prompt.yaml")})
    assert told.startswith("prompt.path: ")
    assert "run `rayft samples build RECIPE`" in told


@pytest.mark.slow
def test_train_adapter_two_workers_under_zero_3_are_no_different(built, trained, local_ray, monkeypatch):
    monkeypatch.setattr(training.lora, "_fit", on_ray)
    recipe, adapter = trained
    train = {"workers": 2, "zero_stage": 3, "zero3_persistence_threshold": 0}
    recipe = changed(recipe, train=train).model_copy(update={"name": "zero3"})
    released(built, adapter, "zero3")
    artifact = train_adapter(recipe, built.store, built.samples, "raft")
    expected, found = (load_file(one.path("adapter_model.safetensors")) for one in (adapter, artifact))
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    measured, before = artifact.manifest.measured, adapter.manifest.measured
    assert measured["workers"] == 2
    assert measured["general"]["base_loss"] == pytest.approx(before["general"]["base_loss"], abs=1e-3)
    assert measured["general"]["tuned_loss"] == pytest.approx(before["general"]["tuned_loss"], abs=1e-3)
    assert measured["replaces"]["its_validation_loss"] == pytest.approx(before["validation_loss"], abs=1e-3)
    assert measured["replaces"]["difference"]["value"] == pytest.approx(0, abs=1e-3)
