"""Fine-tuning of causal LMs of other families than the embedded one, made tiny on the spot."""

import math

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cluster.model_source import model_digest
from serving.engine import GenerationRequest
from serving.transformers_engine import TransformersEngine
from tests.serving.tiny import set_chat_template
from training.base_model import base_model_directory
from training.lora import train_adapter
from training.merge import merge

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def make_qwen2(directory, tokenizer):
    """Biases on queries, keys and values; embeddings shared with the head; a chat template of its own, no bos."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **SHAPE, **ends)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_gemma3(directory, tokenizer):
    """Pretrained: no chat template, a bos of its own; a window that slides over 32 tokens in one of two layers."""
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    ends = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, "head_dim": 8}
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(tokenizer), **SHAPE, **ends, **layers))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    set_chat_template(directory, None)


@pytest.mark.parametrize(("make", "template"), [(make_qwen2, ""), (make_gemma3, "plain")], ids=["qwen2", "gemma3"])
def test_train_adapter_of_another_family_trains_serves_and_merges(built, base_path, tmp_path, make, template):
    torch.manual_seed(0)
    make(tmp_path / "base", AutoTokenizer.from_pretrained(base_path))
    model = built.recipe.model.model_copy(update={"base": str(tmp_path / "base"), "chat_template": template})
    train = built.recipe.train.model_copy(update={"probe_rows": 2, "validations_per_epoch": 0})
    recipe = built.recipe.model_copy(update={"model": model, "train": train, "name": f"tiny-{make.__name__[5:]}"})
    adapter = train_adapter(recipe, built.store, built.samples, "raft")
    base = base_model_directory(recipe.model)
    assert adapter.manifest.config["base_digest"] == model_digest(base)
    assert math.isfinite(adapter.manifest.measured["final_loss"])
    assert adapter.manifest.measured["final_loss"] < math.log(260)  # a random model's loss: that of a guess

    ids = torch.arange(80)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain(input_ids=ids).logits
    tuned = PeftModel.from_pretrained(plain, adapter.directory()).eval()
    assert (tuned(input_ids=ids).logits - before).abs().max() > 1e-3

    engine = TransformersEngine(base, {"raft": adapter.directory()}, "float32", 2, 1)
    try:
        asked = [{"role": "user", "content": "How large is Chile?"}]
        completion = engine.generate([GenerationRequest("1", asked, "raft", 12, 0.0, seed=1)])[0]
    finally:
        engine.close()
    assert not completion.error
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    expected = tuned.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)

    assert merge(recipe, adapter, tmp_path / "merged").same_best_token == 1
