"""Useful training tokens per second: `rayft train lora` against TRL's SFTTrainer on the same rows.

    python -m benchmarks.train_against_trl --trl-python DIR/bin/python [--rounds 3] [--recipe factbook] [--set …]

Our side is the whole stage (token files, Ray Train, DeepSpeed, one worker); TRL runs as a process of its own with the
same base model, LoRA, learning rate and token rows, each rows-per-step alike, its loss on completions only. TRL's
settings are first tried on a few rows, and the fastest is what rounds alternate with. TRL is no dependency of rayft:
`python -m venv DIR`, `DIR/bin/pip install --no-deps trl==1.16.0`, and a `.pth` file in DIR's site-packages that names
this environment's. Prints tokens per second of the loops (padding does not count), seconds of the whole (TRL's with
Python's start, ours with Ray's), our padding share, and the ratio ours ÷ TRL: above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.train_against_plain_loop import Run, sample_rows, train_stage
from benchmarks.trl_sft import Job
from cluster.errors import UserError
from rayft import load
from training.base_model import base_model_directory, model_dtype
from training.config import TrainingRecipe
from training.lora_engine import GRADIENT_CLIP

# Settings of SFTConfig that could make it faster on one device, and the dtype its weights are loaded in. Without
# `bf16` there is no autocast: weights and activations stay in the dtype that was loaded.
BASE = {"gradient_checkpointing": False, "bf16": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "TRL's defaults": {},
    "no checkpointing": {**BASE},
    "no checkpointing, grouped by length": {**BASE, "train_sampling_strategy": "group_by_length"},
    "no autocast": {**BASE, "bf16": False},
    "no autocast, grouped by length": {**BASE, "bf16": False, "train_sampling_strategy": "group_by_length"},
    "no autocast, padding-free": {**BASE, "bf16": False, "padding_free": True, "max_length": None},
    "no autocast, packed": {**BASE, "bf16": False, "packing": True},
}
ADAPTER_IN_BFLOAT16 = "adapter in bfloat16 by hand"
TRIAL_ROWS = 12
HOW_TO_INSTALL = (
    "TRL is not there: run `python -m venv DIR`, `DIR/bin/pip install --no-deps trl==1.16.0`, write the path of this "
    "environment's site-packages into a .pth file in DIR's, and pass --trl-python DIR/bin/python"
)


def train_trl(python: str, job: Job) -> Run:
    """The peer, as a process of its own.

    Raises:
        UserError: TRL is not installed there.
    """
    with tempfile.TemporaryDirectory() as folder:
        told, out = Path(folder) / "job.json", Path(folder) / "out.json"
        told.write_text(json.dumps(vars(job)))
        began = time.perf_counter()
        command = [python, "-m", "benchmarks.trl_sft", str(told), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
        whole = time.perf_counter() - began
        if done.returncode:
            if "No module named 'trl'" in done.stderr:
                raise UserError(HOW_TO_INSTALL)
            raise UserError(f"TRL: {(done.stderr.strip().splitlines() or ['it ended'])[-1]}")
        found = json.loads(out.read_text())
    last = found["losses"][-max(1, len(found["losses"]) // 10) :]
    return Run(found["loop_s"], whole, sum(map(len, job.rows)) * job.epochs, statistics.mean(last))


def job_for(recipe: TrainingRecipe, rows: Sequence[Any], settings: Mapping[str, Any], *, by_hand: bool = False) -> Job:
    """What TRL is to train on these rows, with these settings."""
    modules = recipe.lora.target_modules
    return Job(
        base=str(base_model_directory(recipe.model)),
        dtype=str(model_dtype(recipe.model.precision)).removeprefix("torch."),
        lora={
            "r": recipe.lora.rank,
            "lora_alpha": recipe.lora.alpha,
            "lora_dropout": recipe.lora.dropout,
            "target_modules": modules if modules == "all-linear" else [name.strip() for name in modules.split(",")],
        },
        learning_rate=recipe.train.learning_rate,
        warmup_fraction=recipe.train.warmup_fraction,
        batch_rows=recipe.train.batch_rows,
        epochs=recipe.train.epochs,
        threads=recipe.train.threads_per_worker,
        gradient_clip=GRADIENT_CLIP,
        seed=recipe.seed,
        rows=[list(row.input_ids) for row in rows],
        target_tokens=[row.target_tokens for row in rows],
        settings=dict(settings),
        bfloat16_adapter=by_hand,
    )


def best_settings(python: str, recipe: TrainingRecipe, rows: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    """Tries TRL's settings on a few rows; the fastest, by name, and prints them all."""
    tried = {}
    few = sorted(rows, key=lambda row: row.sample_id)[:TRIAL_ROWS]
    for name, settings in SETTINGS.items():
        try:
            run = train_trl(python, job_for(recipe, few, settings))
        except UserError as error:
            if str(error) == HOW_TO_INSTALL:
                raise
            print(f"TRL, {name}: refused: {error}", flush=True)
            continue
        tried[name] = run.tokens / run.loop_s
        print(f"TRL, {name}: {tried[name]:.0f} tokens/s on {len(few)} rows", flush=True)
    if not tried:
        raise UserError("TRL ran with none of its settings; see above")
    best = max(tried, key=lambda name: tried[name])
    return best, SETTINGS[best]


def describe(name: str, run: Run) -> str:
    """One line about a run."""
    rate = run.tokens / run.loop_s
    padding = f", padding {run.padding_share:.1%}" if run.padding_share is not None else ""
    return (
        f"{name}: loop {run.loop_s:.1f} s ({rate:.0f} tokens/s), whole {run.whole_s:.1f} s "
        f"({run.tokens / run.whole_s:.0f} tokens/s), final loss {run.final_loss:.3f}{padding}"
    )


def main() -> None:
    """Alternates the two sides and prints their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--recipe", default="factbook")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl-settings", choices=SETTINGS, help="skips the trial")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    try:
        compare(arguments)
    except UserError as error:
        sys.exit(str(error))


def compare(arguments: argparse.Namespace) -> None:
    """Tries TRL's settings, then alternates."""
    recipe = load(arguments.recipe, ["samples.raft_rows=64", *arguments.overrides])
    samples, rows = sample_rows(recipe)
    name, settings = arguments.trl_settings, SETTINGS.get(arguments.trl_settings)
    if settings is None:
        name, settings = best_settings(arguments.trl_python, recipe, rows)
    sides: dict[str, list[Run]] = {"rayft": [], f"TRL ({name})": [], f"TRL ({name}, {ADAPTER_IN_BFLOAT16})": []}
    rayft, trl, by_hand = sides.values()
    for number in range(arguments.rounds):
        rayft.append(train_stage(recipe, samples))
        trl.append(train_trl(arguments.trl_python, job_for(recipe, rows, settings)))
        by_hand.append(train_trl(arguments.trl_python, job_for(recipe, rows, settings, by_hand=True)))
        for side, runs in sides.items():
            print(f"round {number + 1}, {describe(side, runs[-1])}", flush=True)
    for side, runs in list(sides.items())[1:]:
        loop = [peer.loop_s / ours.loop_s for ours, peer in zip(rayft, runs, strict=True)]
        whole = [peer.whole_s / ours.whole_s for ours, peer in zip(rayft, runs, strict=True)]
        print(
            f"rayft ÷ {side}: loop median {statistics.median(loop):.2f} ({min(loop):.2f} to {max(loop):.2f}), "
            f"whole median {statistics.median(whole):.2f} ({min(whole):.2f} to {max(whole):.2f})"
        )


if __name__ == "__main__":
    main()
