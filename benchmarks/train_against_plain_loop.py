"""How much Ray Train and DeepSpeed cost: the training stage against a plain PEFT loop over the same rows.

    python -m benchmarks.train_against_plain_loop [--rounds 3] [--recipe factbook] [--set samples.raft_rows=60]

Both sides train the recipe's base model with the same LoRA, precision, rows, batches and learning rates; the plain
loop is PyTorch and PEFT in this process. Sides alternate. Needs the recipe's samples (`rayft samples build`).
Prints seconds of the training loop and of the whole (with starting Ray, workers and the model), and the ratios
stage ÷ plain: below 1 the stage is faster. The loop's seconds are those of optimiser steps, without validations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.session import ray_session
from cluster.store import Artifact, Store
from rayft import load
from retrieval.index import build_index
from training.base_model import base_model_directory, load_model, load_tokenizer, model_dtype
from training.batching import TokenRow, make_batch, micro_batches, plan_steps, summed_loss, tokenise
from training.config import TrainingRecipe
from training.format import PromptFormat
from training.lora import train_adapter
from training.lora_engine import GRADIENT_CLIP, learning_rate_at, with_lora
from training.samples import build_samples, load_samples


@dataclass(frozen=True)
class Run:
    """Seconds of the loop and of everything, tokens trained on, and the last losses' mean."""

    loop_s: float
    whole_s: float
    tokens: int
    final_loss: float
    padding_share: float | None = None


def sample_rows(recipe: TrainingRecipe) -> tuple[Artifact, list[TokenRow]]:
    """The recipe's samples, built where they are not there yet, and the token rows of the RAFT adapter."""
    store = Store(recipe.store.uri)
    with ray_session(recipe.ray):
        samples = build_samples(recipe, store, build_index(recipe, store))
    tokenizer = load_tokenizer(base_model_directory(recipe.model))
    rows = tokenise(load_samples(samples, "raft"), tokenizer, PromptFormat.load(recipe.prompt, recipe.language))
    return samples, [row for row in rows if len(row.input_ids) <= recipe.train.max_tokens]


def train_plain(recipe: TrainingRecipe, rows: Sequence[TokenRow]) -> Run:
    """The peer: AdamW over the adapter's weights, nothing else."""
    import torch

    began = time.perf_counter()
    torch.set_num_threads(recipe.train.threads_per_worker)
    torch.manual_seed(recipe.seed)
    base = base_model_directory(recipe.model)
    model = with_lora(load_model(base, model_dtype(recipe.model.precision)), recipe.lora)
    pad = load_tokenizer(base).pad_token_id
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.train.learning_rate, weight_decay=0.0)
    train, lengths = recipe.train, [len(row.input_ids) for row in rows]
    steps = plan_steps(lengths, train.batch_rows, train.epochs, recipe.seed)
    losses, tokens = [], 0
    loop_began = time.perf_counter()
    for number, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(number, len(steps), train.learning_rate, train.warmup_fraction)
        mean = 0.0
        for micro in micro_batches(step, lengths, 0, 1, train.micro_batch_tokens, train.packing):
            batch = make_batch([rows[i] for i in micro], pad, train.packing)
            loss = summed_loss(model, batch) / sum(rows[i].target_tokens for i in step)
            loss.backward()
            mean += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trainable, GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean)
        tokens += sum(lengths[i] for i in step)
    ended = time.perf_counter()
    last = losses[-max(1, len(losses) // 10) :]
    return Run(ended - loop_began, ended - began, tokens, statistics.mean(last))


def train_stage(recipe: TrainingRecipe, samples: Artifact) -> Run:
    """Our side: the whole stage, into a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        store = _StoreWithoutParents(folder)
        with ray_session(recipe.ray):
            adapter = train_adapter(recipe, store, samples, "raft")
        ended = time.perf_counter()
        history = [json.loads(line) for line in adapter.path("history.jsonl").read_text().splitlines()]
        measured = adapter.manifest.measured
    steps = [row for row in history if "loss" in row]
    tokens = [after["tokens"] - before["tokens"] for before, after in zip([{"tokens": 0}, *steps], steps, strict=False)]
    return Run(
        sum(count / row["tokens_per_second"] for count, row in zip(tokens, steps, strict=True)),
        ended - began,
        sum(tokens),
        float(measured["final_loss"]),
        float(measured["padding_share"]),
    )


class _StoreWithoutParents(Store):
    """An empty store that takes the samples' existence elsewhere for granted, so that nothing is ever up to date."""

    def exists(self, ref: object) -> bool:
        return getattr(ref, "kind", "") == "samples" or super().exists(ref)  # type: ignore[arg-type]


def main() -> None:
    """Alternates the two sides and prints their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="factbook")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    recipe = load(arguments.recipe, arguments.overrides)
    samples, rows = sample_rows(recipe)
    plain, stage = [], []
    for number in range(arguments.rounds):
        plain.append(train_plain(recipe, rows))
        stage.append(train_stage(recipe, samples))
        for name, run in (("plain", plain[-1]), ("stage", stage[-1])):
            print(
                f"round {number + 1} {name}: loop {run.loop_s:.1f} s ({run.tokens / run.loop_s:.0f} tokens/s), "
                f"whole {run.whole_s:.1f} s, {run.tokens} tokens, final loss {run.final_loss:.3f}"
            )
    loop = [ours.loop_s / peer.loop_s for ours, peer in zip(stage, plain, strict=True)]
    whole = [ours.whole_s / peer.whole_s for ours, peer in zip(stage, plain, strict=True)]
    print(f"stage ÷ plain, loop:  median {statistics.median(loop):.3f} ({min(loop):.3f} to {max(loop):.3f})")
    print(f"stage ÷ plain, whole: median {statistics.median(whole):.3f} ({min(whole):.3f} to {max(whole):.3f})")


if __name__ == "__main__":
    main()
