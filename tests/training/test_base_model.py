import shutil
from pathlib import Path

import pytest
import torch

import training.base_model
from cluster.errors import UserError
from tests.serving.tiny import set_chat_template
from training.base_model import base_model_directory, cpu_has_bfloat16, load_model, load_tokenizer, model_dtype
from training.config import ModelConfig


def test_base_model_directory_local_directory_is_itself(base_path):
    assert base_model_directory(ModelConfig(base=str(base_path))) == base_path


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/model", "not a model"])
def test_base_model_directory_that_is_none_is_one_line(base):
    with pytest.raises(UserError, match=r"model\.base: no such model directory"):
        base_model_directory(ModelConfig(base=base))


def test_load_model_directory_without_a_model_is_one_line(tmp_path, base_path):
    with pytest.raises(UserError, match=r"model\.base: .* does not hold a causal LM") as caught:
        load_model(tmp_path, torch.float32)
    assert "\n" not in str(caught.value)
    shutil.copy(base_path / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"model\.base: .* does not hold a causal LM") as caught:
        load_model(tmp_path, torch.float32)
    assert "\n" not in str(caught.value)


def test_load_model_damaged_weights_are_one_line(tmp_path, base_path):
    broken = shutil.copytree(base_path, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.base: .* does not hold a causal LM"):
        load_model(broken, torch.float32)


def test_load_model_has_the_dtype_and_does_not_train(base_path):
    model = load_model(base_path, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_load_tokenizer_without_tokenizer_or_chat_template_is_one_line(tmp_path, base_path):
    with pytest.raises(UserError, match=r"model\.base: no tokenizer in") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    pretrained = shutil.copytree(base_path, tmp_path / "pretrained")
    set_chat_template(pretrained, None)
    with pytest.raises(UserError, match=r"has no chat template; set model\.chat_template to `plain`"):
        load_tokenizer(pretrained)


def test_load_tokenizer_without_padding_token_pads_with_the_end(tmp_path, base_path):
    import json

    bare = shutil.copytree(base_path, tmp_path / "bare")
    path = bare / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token", None)
    path.write_text(json.dumps(config))
    (bare / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = load_tokenizer(bare)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_model_dtype_follows_the_recipe_and_the_processor(monkeypatch):
    assert model_dtype("float32") == torch.float32
    assert model_dtype("bfloat16") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(training.base_model, "cpu_has_bfloat16", lambda native=native: native)
        assert model_dtype("auto") == dtype


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 vaes", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd i8mm bf16 bti", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("", False),
    ],
)
def test_cpu_has_bfloat16_reads_the_processors_flags(monkeypatch, flags, native):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: flags)
    assert cpu_has_bfloat16() is native
