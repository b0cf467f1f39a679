import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from ray.train import ControllerError, WorkerGroupError
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import training.lora
from cluster.errors import UserError
from training.base_model import load_tokenizer
from training.batching import plan_steps, tokenise
from training.format import PromptFormat
from training.lora import adapter_plan, batch_rows, epochs, train_adapter
from training.ray_train import blame
from training.samples import load_samples
from training.worker import learning_rate_at

pytestmark = pytest.mark.usefixtures("local_ray")


def changed(built, **sections):
    recipe = built.recipe
    for name, values in sections.items():
        recipe = recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=values)})
    return recipe


@pytest.fixture(scope="module")
def adapter(built, tmp_path_factory, local_ray):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return train_adapter(built.recipe, built.store, built.samples, "raft")


def plain_loop(built, recipe, objective: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """An independent second implementation: PyTorch and PEFT, one row at a time, transformers' own loss."""
    tokenizer = load_tokenizer(recipe.model.base)
    rows = tokenise(load_samples(built.samples, objective), tokenizer, PromptFormat.load(recipe.prompt, "en"))
    shape = (batch_rows(recipe, objective), epochs(recipe, objective), recipe.seed)
    steps = plan_steps([len(row.input_ids) for row in rows], *shape)
    torch.manual_seed(recipe.seed)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(recipe.model.base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0)
    losses = []
    for number, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = learning_rate_at(number, len(steps), recipe.train.learning_rate, 0.1)
        targets = sum(rows[i].target_tokens for i in step)
        total = 0.0
        for row in (rows[i] for i in step):
            ids = torch.tensor([row.input_ids])
            labels = ids.clone()
            labels[0, : -row.target_tokens] = -100
            loss = model(input_ids=ids, labels=labels).loss * row.target_tokens / targets
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return get_peft_model_state_dict(model), losses


def assert_is_that_of_a_plain_loop(built, recipe, objective: str, artifact) -> None:
    expected, losses = plain_loop(built, recipe, objective)
    found = load_file(artifact.path("adapter_model.safetensors"))
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    curve = json.loads(artifact.path("loss.json").read_text())["loss_per_target_token"]
    assert curve == pytest.approx(losses, abs=1e-3)


def test_train_adapter_is_what_a_plain_peft_loop_gives(built, adapter):
    assert_is_that_of_a_plain_loop(built, built.recipe, "raft", adapter)


def test_train_adapter_loads_in_plain_peft_and_changes_the_logits(built, adapter):
    base = LlamaForCausalLM.from_pretrained(built.recipe.model.base)
    ids = torch.arange(40)[None]
    before = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, adapter.directory())
    assert (adapted(input_ids=ids).logits - before).abs().max() > 0.05


def test_train_adapter_manifest_says_what_was_done(built, adapter):
    counts, measured = adapter.manifest.counts, adapter.manifest.measured
    assert (adapter.ref.kind, adapter.ref.name) == ("adapter", "tiny-raft")
    assert counts["rows"] == 24
    assert counts["steps"] == 6
    assert counts["rows_too_long"] == 0
    rows = load_samples(built.samples, "raft")
    assert counts["target_tokens"] == sum(len(row.target.encode()) + 1 for row in rows)
    assert counts["trainable_parameters"] == sum(
        value.numel() for value in load_file(adapter.path("adapter_model.safetensors")).values()
    )
    assert 0 <= measured["padding_share"] < 0.3
    assert (measured["workers"], measured["device"], measured["precision"]) == (1, "cpu", "float32")
    assert adapter.manifest.parents == {"samples": str(built.samples.ref)}
    assert adapter.manifest.config["base_digest"]


def test_train_adapter_again_is_skipped(built, adapter, monkeypatch):
    monkeypatch.setattr(training.lora, "_fit", lambda *_: pytest.fail("trained again"))
    assert train_adapter(built.recipe, built.store, built.samples, "raft").ref == adapter.ref
    more_workers = changed(built, train={"workers": 2, "zero_stage": 2, "threads_per_worker": 2})
    assert train_adapter(more_workers, built.store, built.samples, "raft").ref == adapter.ref


def test_adapter_plan_version_follows_what_affects_the_weights(built):
    def version(objective="raft", **sections) -> str:
        return adapter_plan(changed(built, **sections), built.samples, objective).ref.version

    before = version()
    assert version(train={"workers": 2, "gpus_per_worker": 1, "zero3_persistence_threshold": 0}) == before
    for section, values in (
        ("train", {"learning_rate": 1e-4}),
        ("train", {"epochs": 2}),
        ("train", {"batch_rows": 8}),
        ("train", {"max_tokens": 2000}),
        ("lora", {"rank": 8}),
        ("model", {"precision": "bfloat16"}),
    ):
        assert version(**{section: values}) != before
    assert version("dsf", train={"dsf_epochs": 5}) != version("dsf")
    assert version("dsf", train={"epochs": 5}) == version("dsf")


def refused(built, objective="raft", **sections) -> str:
    recipe = changed(built, **sections).model_copy(update={"name": "refused"})
    with pytest.raises(UserError) as caught:
        train_adapter(recipe, built.store, built.samples, objective)
    assert "\n" not in str(caught.value)
    assert built.store.current("adapter", f"refused-{training.lora.ROLES[objective]}") is None
    assert built.store.versions("adapter", f"refused-{training.lora.ROLES[objective]}") == []
    return str(caught.value)


def test_train_adapter_loss_that_is_not_finite_is_one_line(built):
    told = refused(built, "dsf", train={"learning_rate": 1e30})
    assert re.fullmatch(r"train\.learning_rate: the loss became nan at step \d; lower it", told)


def test_train_adapter_impossible_workers_are_refused_before_waiting(built):
    assert "3 workers need 3 CPUs, the cluster has 2" in refused(built, train={"workers": 3})
    assert "1 workers need 1 GPUs, the cluster has 0" in refused(built, train={"gpus_per_worker": 1})
    assert "train.workers is 5 but train.batch_rows is 4" in refused(built, train={"workers": 5})
    told = refused(built, "dsf", train={"workers": 5, "dsf_batch_rows": 3})
    assert "train.dsf_batch_rows is 3" in told


def test_train_adapter_interrupted_leaves_nothing_readable(built, monkeypatch):
    def interrupted(recipe, config, storage):
        (Path(config.uri) / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(training.lora, "_fit", interrupted)
    recipe = changed(built, train={"learning_rate": 7e-3})
    ref = adapter_plan(recipe, built.samples, "raft").ref
    current = built.store.current("adapter", "tiny-raft")
    with pytest.raises(KeyboardInterrupt):
        train_adapter(recipe, built.store, built.samples, "raft")
    assert not built.store.exists(ref)
    assert built.store.current("adapter", "tiny-raft") == current
    assert list((built.store.storage.root / str(ref)).rglob("*.safetensors")) == []


def test_train_adapter_prompt_edited_after_the_samples_is_refused(built, tmp_path):
    text = (Path(__file__).parents[2] / "training/prompts/en.yaml").read_text(encoding="utf-8")
    (tmp_path / "prompt.yaml").write_text(text.replace("do not say", "are silent"), encoding="utf-8")
    told = refused(built, prompt={"path": str(tmp_path / "prompt.yaml")})
    assert told.startswith("prompt.path: ")
    assert "run `rayft samples build RECIPE`" in told


@pytest.mark.parametrize(
    "error",
    [
        WorkerGroupError("Worker 1 failed", {1: UserError("train.learning_rate: lower it")}),
        ControllerError(UserError("train.learning_rate: lower it")),
    ],
)
def test_blame_finds_the_user_error_that_a_worker_raised(error):
    blamed = blame(error)
    assert isinstance(blamed, UserError)
    assert str(blamed) == "train.learning_rate: lower it"


def test_blame_leaves_other_errors_alone():
    error = WorkerGroupError("Worker 0 failed", {0: RuntimeError("out of memory")})
    assert blame(error) is error


@pytest.mark.slow
def test_train_adapter_two_workers_under_zero_3_are_no_different(built):
    train = {"workers": 2, "zero_stage": 3, "zero3_persistence_threshold": 0}
    recipe = changed(built, train=train).model_copy(update={"name": "zero3"})
    artifact = train_adapter(recipe, built.store, built.samples, "raft")
    assert_is_that_of_a_plain_loop(built, recipe, "raft", artifact)
    assert artifact.manifest.measured["workers"] == 2


@pytest.mark.slow
def test_train_adapter_two_workers_under_zero_2_are_no_different_and_learn(built):
    # 24 rows in steps of 7: the last step of an epoch has 3 rows, two for one worker and one for the other.
    train = {"workers": 2, "zero_stage": 2, "dsf_epochs": 8, "dsf_batch_rows": 7, "learning_rate": 1e-2}
    recipe = changed(built, train=train).model_copy(update={"name": "zero2"})
    artifact = train_adapter(recipe, built.store, built.samples, "dsf")
    assert artifact.ref.name == "zero2-finetuned"
    assert_is_that_of_a_plain_loop(built, recipe, "dsf", artifact)
    curve = json.loads(artifact.path("loss.json").read_text())["loss_per_target_token"]
    assert len(curve) == 32
    assert sum(curve[-4:]) < 0.7 * sum(curve[:4])
