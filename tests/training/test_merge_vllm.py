"""Adapter directory and merged model in vLLM; skipped where vLLM is not installed."""

import pytest
import torch
from peft import PeftModel

from cluster.model_source import model_digest
from cluster.store import Store
from tests.serving.tiny import make_adapter
from tests.training.test_merge import publish, recipe_of
from training.base_model import base_model_directory, load_model, load_tokenizer
from training.config import ModelConfig
from training.merge import merge

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

QUESTIONS = ("How large is Chile?", "What is copper?", "Name a river.", "Who eats cheese?", "Is it cold in Finland?")


def test_vllm_gives_the_same_greedy_answers_with_the_adapter_and_with_the_merged_model(tmp_path, monkeypatch):
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    base = base_model_directory(ModelConfig())
    adapter_path = make_adapter(base, tmp_path / "adapter", seed=5)
    store = Store(str(tmp_path / "store"))
    adapter = publish(store, adapter_path, model_digest(base))
    merge(recipe_of(store, "embedded:SmolLM2-135M-Instruct"), adapter, tmp_path / "merged")

    tokenizer = load_tokenizer(base)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
        for question in QUESTIONS
    ]
    model = PeftModel.from_pretrained(load_model(base, torch.float32), adapter_path).eval()
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
    sampling = vllm.SamplingParams(temperature=0, max_tokens=16)
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    for directory, adapted in ((base, True), (tmp_path / "merged", False)):
        engine = vllm.LLM(model=str(directory), enable_lora=adapted, **options)
        request = LoRARequest("raft", 1, str(adapter.directory())) if adapted else None
        found = engine.generate(asked, sampling, lora_request=request)
        assert [list(output.outputs[0].token_ids) for output in found] == expected
        del engine
