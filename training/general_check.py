"""Has fine-tuning cost the model general ability? Forty short prompts, before and after.

In: `prompts/general_<language>.yaml`, written for rayft and about no collection: prompts by kind (arithmetic, common
knowledge, rewriting, translation, conversation, instructions) with a reference answer each. Out: how likely the
references, once begun, are through the plain chat template, without passages: mean loss per token of the base model
and of the tuned one, and their paired difference. It needs no generation: two forward passes over 2,000 tokens.
It is an alarm, not a benchmark: it sees that the model has grown strange to ordinary requests, not which skill is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.batching import TokenRow
from training.row_losses import Difference, RowLosses, difference


@dataclass(frozen=True)
class GeneralPrompt:
    """A request and a good answer to it."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class GeneralLosses:
    """Losses of the reference answers without and with the adapter."""

    base: RowLosses
    tuned: RowLosses

    def difference(self, seed: int) -> Difference:
        """How much less likely the tuned model finds the references: nats per token, above 0 is worse."""
        return difference(self.tuned, self.base, seed)


def load_general(language: str) -> list[GeneralPrompt]:
    """The prompts of a language, in file order."""
    path = Path(__file__).parent / "prompts" / f"general_{language}.yaml"
    kinds = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [GeneralPrompt(kind, row["prompt"], row["answer"]) for kind, rows in kinds.items() for row in rows]


def general_rows(tokenizer: Any, language: str) -> list[TokenRow]:
    """Prompt through the chat template and reference answer as token ids; scored is the answer after its first token.

    How an answer begins and when it ends is what fine-tuning is meant to change: `<ANSWER>:` instead of a first word
    cost the Factbook's closed-book adapter 15 nats, on answers of 11 tokens, where the rest lost 0.2 per token.
    """
    rows = []
    for number, asked in enumerate(load_general(language)):
        messages = [{"role": "user", "content": asked.prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, asked.answer))
        if len(answer) > 1:
            rows.append(TokenRow(f"general-{number}", tuple(prompt + answer), len(answer) - 1))
    return rows
