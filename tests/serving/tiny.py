"""Tiny models made on the spot: a random Llama with a byte-level tokenizer and chat template, and LoRA adapters."""

import itertools
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WINDOW = 4096


def make_base(directory: Path, seed: int = 0, *, window: int = WINDOW, head_dim: int = 16) -> Path:
    """A two-layer Llama with grouped-query attention over bytes; its greedy text is noise, and long."""
    make_tokenizer(directory)
    torch.manual_seed(seed)
    save_model(LlamaForCausalLM(tiny_config(window, head_dim)), directory)
    return directory


def make_speaker(directory: Path, text: str) -> Path:
    """A model that answers everything with `text` and ends its turn: every token leads to its one successor, whatever
    stood before. No byte may stand twice in `text`, nor be the newline that ends every prompt."""
    make_tokenizer(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    said = tokenizer(text, add_special_tokens=False)["input_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    path = [*newline, *said, tokenizer.eos_token_id]
    assert len(set(path)) == len(path), "every token needs one successor"
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(WINDOW, 32))
    with torch.no_grad():
        for layer in model.model.layers:  # nothing is added to the embedding on its way up
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, successor in itertools.pairwise(path):
            model.lm_head.weight[successor] = model.model.embed_tokens.weight[token]
    save_model(model, directory)
    return directory


def save_model(model: LlamaForCausalLM, directory: Path) -> None:
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(directory)


def make_tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes, two control tokens, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    )
    fast.save_pretrained(directory)


def tiny_config(window: int, head_dim: int) -> LlamaConfig:
    """For the tokenizer of `make_tokenizer`: 256 bytes, then the token that opens a turn and the one that ends it."""
    return LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=window,
        eos_token_id=257,
        pad_token_id=257,
        bos_token_id=None,
        initializer_range=0.3,  # wide, so that the best token leads clearly and rarely repeats
        dtype="float32",
    )


def make_adapter(base: Path, directory: Path, seed: int, rank: int = 4) -> Path:
    """A LoRA adapter whose random B matrices change what the base model says."""
    torch.manual_seed(seed)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory


def set_chat_template(base: Path, template: str | None) -> None:
    """Replaces a saved tokenizer's chat template."""
    (base / "chat_template.jinja").unlink(missing_ok=True)
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = template
    path.write_text(json.dumps(config))
