"""The TRL side of `benchmarks.train_against_trl`, run by a Python that has TRL: `python -m benchmarks.trl_sft JOB OUT`.

In: a `Job` as a JSON file. Out: seconds of the loop and the losses, as a JSON file. Imports nothing of rayft, so that
its time is TRL's own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What the TRL process is told, as JSON."""

    base: str
    dtype: str
    lora: dict[str, Any]
    learning_rate: float
    warmup_fraction: float
    batch_rows: int
    epochs: int
    gradient_clip: float
    threads: int
    seed: int
    rows: list[list[int]]
    target_tokens: list[int]
    settings: dict[str, Any]
    bfloat16_adapter: bool


def run_trl(job: Job, out: Path) -> None:
    """The TRL process: trains, and writes seconds and losses to `out`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=getattr(torch, job.dtype))
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    lora = LoraConfig(**job.lora, task_type="CAUSAL_LM")
    if job.bfloat16_adapter:
        model, lora = get_peft_model(model, lora, autocast_adapter_dtype=False), None
    masks = [
        [0] * (len(ids) - targets) + [1] * targets for ids, targets in zip(job.rows, job.target_tokens, strict=True)
    ]
    settings = dict(job.settings)
    batch_rows, longest = job.batch_rows, max(map(len, job.rows))
    if settings.get("packing"):  # one packed row per step, with about as many tokens as the others' rows have
        longest = max(longest, batch_rows * sum(map(len, job.rows)) // len(job.rows))
        batch_rows = 1
    steps = -(-len(job.rows) // job.batch_rows) * job.epochs
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=batch_rows,
            num_train_epochs=job.epochs,
            learning_rate=job.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=round(job.warmup_fraction * steps),
            weight_decay=0.0,
            max_grad_norm=job.gradient_clip,
            max_length=settings.pop("max_length", longest),
            completion_only_loss=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            seed=job.seed,
            **settings,
        )
        stamps: list[float] = []

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: object, **__: object) -> None:
                stamps.append(time.perf_counter())

            def on_step_end(self, *_: object, **__: object) -> None:
                stamps.append(time.perf_counter())

        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": job.rows, "completion_mask": masks}),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[Clock()],
        )
        trainer.train()
        trainer.save_model(folder)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    out.write_text(json.dumps({"loop_s": stamps[-1] - stamps[0], "losses": losses}))


if __name__ == "__main__":
    run_trl(Job(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
