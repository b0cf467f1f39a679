import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import training.merge
from cluster.errors import ArtifactError, UserError
from cluster.model_source import model_digest
from cluster.releases import publish_release
from cluster.stage import Plan
from cluster.store import Store
from tests.serving.tiny import make_adapter, make_base
from training.base_model import base_model_directory
from training.cli import train_app
from training.config import TrainingRecipe
from training.merge import chosen_adapter, merge

IDS = torch.arange(60)[None]


def recipe_of(store, base, **model):
    return TrainingRecipe.model_validate(
        {"name": "tiny", "store": {"uri": store.uri}, "model": {"base": str(base), "precision": "float32", **model}}
    )


def publish(store, source, base_digest, name="tiny-raft"):
    """An adapter artifact with the files of `source`."""
    config = {"base_digest": base_digest, "prompt_format": 1, "lora": {"rank": 4}, "files": source.name}
    plan = Plan("adapter", name, config)
    with store.attempt(plan.ref) as attempt:
        for file in source.iterdir():
            if file.is_file():
                shutil.copy(file, attempt.directory)
        artifact = attempt.publish(plan)
    store.set_current(plan.ref)
    return artifact


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def adapter_path(tmp_path, base_path):
    return make_adapter(base_path, tmp_path / "adapter", seed=5)


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits.float()


def test_merge_logits_are_those_of_base_and_adapter(store, tmp_path, base_path, adapter_path):
    adapter = publish(store, adapter_path, model_digest(base_path))
    out = tmp_path / "deep" / "merged"
    agreement = merge(recipe_of(store, base_path), adapter, out)
    base = LlamaForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter_path))
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    assert (expected - plain).abs().max() > 0.5  # the adapter does change the model
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert agreement.max_difference < 1e-3 and agreement.same_best_token == 1


def test_merge_directory_is_a_whole_model_with_its_lineage(store, tmp_path, base_path, adapter_path):
    base = shutil.copytree(base_path, tmp_path / "base")
    (base / "NOTICE").write_text("terms that go with the weights\n")
    adapter = publish(store, adapter_path, model_digest(base))
    out = tmp_path / "merged"
    out.mkdir()  # empty, so not taken
    merge(recipe_of(store, base), adapter, out)
    assert (out / "NOTICE").read_text() == (base / "NOTICE").read_text()
    assert not list(out.glob("adapter*")) and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    messages = [{"role": "user", "content": "hello"}]
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(
        messages, tokenize=False
    ) == AutoTokenizer.from_pretrained(base).apply_chat_template(messages, tokenize=False)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] is not None
    lineage = json.loads((out / "rayft.json").read_text())
    assert lineage["adapter"] == str(adapter.ref)
    assert lineage["base_digest"] == model_digest(base)
    assert lineage["precision"] == "float32"
    assert lineage["prompt_format"] == 1


def test_merge_brings_the_chat_template_that_the_recipe_chose(store, tmp_path, base_path, adapter_path):
    recipe = recipe_of(store, base_path, chat_template="plain")
    adapter = publish(store, adapter_path, model_digest(base_model_directory(recipe.model)))
    merge(recipe, adapter, tmp_path / "merged")
    shown = AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert shown == "hello\n"


def test_merge_large_model_is_cut_into_shards_that_load(store, tmp_path, base_path, adapter_path, monkeypatch):
    monkeypatch.setattr(training.merge, "SHARD_SIZE", "100KB")
    adapter = publish(store, adapter_path, model_digest(base_path))
    merge(recipe_of(store, base_path), adapter, tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    expected = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_path), adapter_path))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_merge_in_bfloat16_keeps_the_precision_of_the_base_and_says_how_near(store, tmp_path, base_path, adapter_path):
    half = tmp_path / "half"
    LlamaForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(base_path).save_pretrained(half)
    adapter = publish(store, adapter_path, model_digest(half))
    agreement = merge(recipe_of(store, half, precision="auto"), adapter, tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert 0 < agreement.max_difference < 0.05 * agreement.logit_range


@pytest.mark.parametrize("taken", ["directory", "file"])
def test_merge_refuses_a_taken_place_before_it_loads_anything(
    store, tmp_path, base_path, adapter_path, monkeypatch, taken
):
    monkeypatch.setattr(training.merge, "load_model", lambda *_: pytest.fail("loaded"))
    adapter = publish(store, adapter_path, model_digest(base_path))
    out = tmp_path / "merged"
    if taken == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .*merged is (not empty|a file)"):
        merge(recipe_of(store, base_path), adapter, out)
    assert (out if taken == "file" else out / "mine").read_text() == "mine"


def test_merge_refuses_an_adapter_of_another_base(store, tmp_path, base_path, adapter_path):
    other = make_base(tmp_path / "other", seed=9)
    adapter = publish(store, adapter_path, model_digest(other))
    with pytest.raises(
        ArtifactError, match=rf"{model_digest(other)[:12]}, but model\.base .* is {model_digest(base_path)[:12]}"
    ):
        merge(recipe_of(store, base_path), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merge_refuses_weights_that_are_not_finite(store, tmp_path, base_path, adapter_path):
    path = adapter_path / "adapter_model.safetensors"
    weights = load_file(path)
    weights[min(weights)] *= float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    adapter = publish(store, adapter_path, model_digest(base_path))
    with pytest.raises(ArtifactError, match="cannot be merged"):
        merge(recipe_of(store, base_path), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merge_refuses_a_head_that_shares_the_embeddings_weights(store, tmp_path, base_path):
    tied = tmp_path / "tied"
    model = LlamaForCausalLM.from_pretrained(base_path)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    AutoTokenizer.from_pretrained(base_path).save_pretrained(tied)
    model = LlamaForCausalLM.from_pretrained(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = publish(store, tmp_path / "adapter", model_digest(tied))
    with pytest.raises(UserError, match=r"merge: the adapter changes .*lm_head, which this base model uses both"):
        merge(recipe_of(store, tied), adapter, tmp_path / "merged")


def test_merge_interrupted_leaves_nothing(store, tmp_path, base_path, adapter_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
    adapter = publish(store, adapter_path, model_digest(base_path))
    place = tmp_path / "place"
    with pytest.raises(KeyboardInterrupt):
        merge(recipe_of(store, base_path), adapter, place / "merged")
    assert list(place.iterdir()) == []


def test_chosen_adapter_is_the_current_one_or_the_releases(store, tmp_path, base_path, adapter_path):
    digest = model_digest(base_path)
    recipe = recipe_of(store, base_path)
    with pytest.raises(ArtifactError, match="no adapter named `tiny-raft`"):
        chosen_adapter(recipe, store, "raft", None)
    released = publish(store, adapter_path, digest)
    index = Plan("index", "tiny")
    with store.attempt(index.ref) as attempt:
        (attempt.directory / "x").write_text("x")
        attempt.publish(index)
    ref = publish_release(
        store, "tiny", index=index.ref, adapters={"raft": released.ref}, base_digest=digest, prompt_format=1
    )
    newer = publish(store, make_adapter(base_path, tmp_path / "newer", seed=6), digest)
    assert chosen_adapter(recipe, store, "raft", None).ref == newer.ref != released.ref
    assert chosen_adapter(recipe, store, "raft", ref.version).ref == released.ref
    with pytest.raises(ArtifactError, match="has no finetuned adapter; it has raft"):
        chosen_adapter(recipe, store, "dsf", ref.version)


def test_train_merge_names_the_directory_after_the_adapter(store, tmp_path, base_path, adapter_path, monkeypatch):
    adapter = publish(store, adapter_path, model_digest(base_path), name="tiny-finetuned")
    recipe = recipe_of(store, base_path)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(train_app(lambda *_: recipe), ["merge", "mine.yaml", "--objective", "dsf"])
    assert result.exit_code == 0, result.output
    lineage = json.loads((tmp_path / f"tiny-finetuned-{adapter.ref.version}-merged" / "rayft.json").read_text())
    assert lineage["adapter"] == str(adapter.ref)
