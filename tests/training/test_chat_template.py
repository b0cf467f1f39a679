import shutil

import pytest

from cluster.errors import UserError
from cluster.model_source import model_digest
from tests.serving.tiny import set_chat_template
from training.base_model import base_model_directory, load_model, load_tokenizer
from training.chat_template import read_template, with_template
from training.config import ModelConfig
from training.format import Message

CONVERSATION = [
    Message(role="system", content="Answer."),
    Message(role="user", content="2+2?"),
    Message(role="assistant", content="4"),
    Message(role="user", content="3+3?"),
]


@pytest.fixture
def pretrained(tmp_path, base_path):
    """The tiny model as a plain language model: no chat template."""
    directory = shutil.copytree(base_path, tmp_path / "pretrained")
    set_chat_template(directory, None)
    return directory


def test_plain_template_shows_turns_leads_to_the_answer_and_ends_it(pretrained):
    tokenizer = load_tokenizer(base_model_directory(ModelConfig(base=str(pretrained), chat_template="plain")))
    shown = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert shown == f"Answer.\n\n2+2?\n4{tokenizer.eos_token}\n\n3+3?\n"


@pytest.mark.parametrize(
    ("bos", "begins"), [("<s>", True), ("<|im_end|>", False), (None, False)], ids=["own", "also the end", "none"]
)
def test_plain_template_marks_the_beginning_where_the_model_has_a_mark_of_its_own(pretrained, bos, begins):
    tokenizer = load_tokenizer(with_template(pretrained, "plain"))
    tokenizer.bos_token = bos
    shown = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert shown.startswith("<s>Answer." if begins else "Answer.")


def test_base_model_directory_with_a_template_is_the_same_model_and_another_fingerprint(pretrained):
    directory = base_model_directory(ModelConfig(base=str(pretrained), chat_template="plain"))
    assert directory == base_model_directory(ModelConfig(base=str(pretrained), chat_template="plain"))
    assert model_digest(directory) != model_digest(pretrained)
    import torch

    one, two = load_model(directory, torch.float32), load_model(pretrained, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not (pretrained / "chat_template.jinja").exists()  # the user's directory stays as it was


def test_base_model_directory_template_of_ones_own_replaces_the_models(tmp_path, base_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}", encoding="utf-8")
    config = ModelConfig(base=str(base_path), chat_template=str(mine))
    first = base_model_directory(config)
    assert load_tokenizer(first).apply_chat_template(CONVERSATION[:2], tokenize=False) == "[Answer.][2+2?]"
    mine.write_text("{% for m in messages %}({{ m.content }}){% endfor %}", encoding="utf-8")
    second = base_model_directory(config)
    assert load_tokenizer(second).apply_chat_template(CONVERSATION[:2], tokenize=False) == "(Answer.)(2+2?)"
    assert model_digest(first) != model_digest(second)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, r"cannot read .*mine\.jinja: No such file"),
        (b"\xff\xfe", r"is not UTF-8 \(byte 0\)"),
        (b"{% for m in messages %}", "does not render a system and a user message"),
        (b"{{ raise_exception('no system turns') }}", "does not render .*: no system turns"),
        (b"{{ messages[0].content }}", "leaves out what the user says"),
    ],
    ids=["missing", "not text", "not jinja", "refuses", "mute"],
)
def test_base_model_directory_template_that_does_not_serve_is_one_line(tmp_path, base_path, text, reason):
    mine = tmp_path / "mine.jinja"
    if text is not None:
        mine.write_bytes(text)
    with pytest.raises(UserError, match=rf"model\.chat_template: .*{reason}") as caught:
        base_model_directory(ModelConfig(base=str(base_path), chat_template=str(mine)))
    assert "\n" not in str(caught.value)


def test_with_template_moved_model_is_linked_anew(tmp_path, pretrained):
    before = with_template(pretrained, "plain")
    (pretrained / "model.safetensors").rename(pretrained / "model-00001-of-00001.safetensors")
    after = with_template(pretrained, "plain")
    assert after != before
    assert (after / "model-00001-of-00001.safetensors").is_file()


def test_read_template_plain_is_a_packaged_file():
    assert "message.content" in read_template("plain")
