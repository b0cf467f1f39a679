import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

import training.base_model
from cluster.errors import UserError
from tests.serving.tiny import set_chat_template
from training.base_model import (
    EMBEDDED,
    _convert_gguf,
    base_model_directory,
    cpu_has_bfloat16,
    load_model,
    load_tokenizer,
    model_dtype,
)
from training.config import ModelConfig


def test_base_model_directory_local_directory_is_itself(base_path):
    assert base_model_directory(ModelConfig(base=str(base_path))) == base_path


def test_base_model_directory_unknown_embedded_name_lists_the_known(monkeypatch):
    with pytest.raises(UserError, match=r"model\.base: no embedded model 'GPT-9'; there is SmolLM2-135M-Instruct"):
        base_model_directory(ModelConfig(base="embedded:GPT-9"))


def test_base_model_directory_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path))
    monkeypatch.setattr(training.base_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.base: the package with SmolLM2.*\.gguf is not installed") as caught:
        base_model_directory(ModelConfig())
    assert "\n" not in str(caught.value)


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
    with pytest.raises(UserError, match=r"has no chat template; use an instruction-tuned model"):
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


@pytest.fixture
def fake_gguf(monkeypatch, base_path, tmp_path):
    """A GGUF file that transformers 'dequantises' to the tiny model, remembering its quantisation as it does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_path)

    def dequantised(folder, *, gguf_file, dtype):
        assert Path(folder, gguf_file).is_file()
        model = LlamaForCausalLM.from_pretrained(base_path, dtype=dtype)
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", dequantised)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder, *, gguf_file: tokenizer)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    return gguf


def test_convert_gguf_gives_a_plain_directory(fake_gguf, tmp_path, base_path, monkeypatch):
    directory = tmp_path / "cache" / "tiny"
    _convert_gguf(fake_gguf, directory)
    monkeypatch.undo()
    converted, original = load_model(directory, torch.bfloat16), load_model(base_path, torch.bfloat16)
    assert not hasattr(converted.config, "quantization_config")
    for (name, value), (_, expected) in zip(converted.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(value, expected), name
    assert load_tokenizer(directory).chat_template == load_tokenizer(base_path).chat_template
    assert [path.name for path in directory.parent.iterdir()] == ["tiny"]


def test_convert_gguf_interrupted_leaves_nothing_and_can_be_repeated(fake_gguf, tmp_path, monkeypatch):
    directory = tmp_path / "cache" / "tiny"
    with monkeypatch.context() as patch:
        patch.setattr(
            transformers.PreTrainedTokenizerFast, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            _convert_gguf(fake_gguf, directory)
    assert list(directory.parent.iterdir()) == []
    _convert_gguf(fake_gguf, directory)
    assert (directory / "config.json").is_file()


def test_convert_gguf_second_of_two_takes_what_the_first_made(fake_gguf, tmp_path):
    directory = tmp_path / "cache" / "tiny"
    _convert_gguf(fake_gguf, directory)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    _convert_gguf(fake_gguf, directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in directory.parent.iterdir()] == ["tiny"]


@pytest.mark.slow
def test_base_model_directory_embedded_model_is_converted_once_and_speaks(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path))
    directory = base_model_directory(ModelConfig())
    assert directory == tmp_path / "models" / next(iter(EMBEDDED))
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert base_model_directory(ModelConfig()) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    tokenizer, model = load_tokenizer(directory), load_model(directory, torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    asked = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
