"""One Ray Train worker: base model, LoRA, DeepSpeed, the loop over steps, the adapter at the end.

In: a `WorkerConfig`, the same for every worker. Out: the PEFT directory, written by the first worker, and its
`WorkerReport`. Every worker follows the same plan of steps and takes its share of each, so that the loss of a step is
weighted by the target tokens of all workers, without asking them.
Not covered: starting workers, publishing (training/lora.py).
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import UserError
from training.base_model import base_model_directory, load_model, load_tokenizer, model_dtype
from training.batching import TokenRow, collate, plan_steps, share_of_step, summed_loss, tokenise
from training.config import LoraSection, TrainingRecipe
from training.format import PromptFormat

if TYPE_CHECKING:
    import torch

    from cluster.store import Artifact

Objective = Literal["raft", "dsf"]
GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class WorkerConfig:
    """What every worker is told."""

    recipe: dict[str, Any]
    prompt_format: PromptFormat
    samples: Artifact
    objective: Objective
    epochs: int
    batch_rows: int
    uri: str
    """Where the adapter is written; any worker can write there."""


@dataclass(frozen=True)
class WorkerReport:
    """What the first worker says of the run."""

    rows: int
    rows_too_long: int
    tokens: int
    target_tokens: int
    losses: tuple[float, ...]
    """Mean cross-entropy per target token of every step."""
    seconds: float
    padding_share: float
    trainable_parameters: int
    device: str
    precision: str


def run_worker(arguments: dict[str, Any]) -> None:
    """Entry point on a Ray Train worker."""
    import ray
    import ray.train

    config: WorkerConfig = arguments["config"]
    board = arguments["board"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    def tell(done: int, total: int, figures: dict[str, Any]) -> None:
        if rank == 0:
            board.set.remote(done, total, figures)

    report = train(config, rank, world_size, tell)
    if rank == 0:
        ray.get(board.finish.remote(report))


def train(config: WorkerConfig, rank: int, world_size: int, tell: Any) -> WorkerReport:
    """Trains; torch.distributed must be initialised.

    Args:
        config: The same on every worker.
        rank: This worker's number, from 0.
        world_size: Number of workers.
        tell: Called after every step with tokens done, tokens in all, and figures.

    Raises:
        UserError: No row fits `train.max_tokens`, or the loss is not finite.
    """
    import torch

    recipe = TrainingRecipe.model_validate(config.recipe)
    on_gpu = recipe.train.gpus_per_worker > 0
    if not on_gpu:
        torch.set_num_threads(recipe.train.threads_per_worker)
    rows, too_long = _load_rows(config, recipe)
    steps = plan_steps([len(row.input_ids) for row in rows], config.batch_rows, config.epochs, recipe.seed)
    torch.manual_seed(recipe.seed)
    dtype = model_dtype(recipe.model.precision)
    model = _with_lora(recipe, dtype)
    engine = _deepspeed_engine(model, recipe, config.batch_rows, dtype)
    device = engine.device
    pad = load_tokenizer(base_model_directory(recipe.model)).pad_token_id
    total_tokens = sum(len(rows[i].input_ids) for step in steps for i in step)
    done_tokens = padded_tokens = 0
    losses: list[float] = []
    tell(0, total_tokens, {})
    began = time.monotonic()
    for number, step in enumerate(steps):
        _set_learning_rate(engine, recipe, number, len(steps))
        target_tokens = sum(rows[i].target_tokens for i in step)
        share = share_of_step(step, rank, world_size)
        # A short last step can leave a worker without a row: it computes one and counts it as nothing, because every
        # worker must take part in the exchange of gradients.
        batch = collate([rows[i] for i in share or step[:1]], pad)
        loss = summed_loss(engine, _to_device(batch, device)) * (1.0 if share else 0.0)
        # DeepSpeed averages gradients over workers: `world_size` turns that mean into the sum over all target tokens.
        engine.backward(loss * world_size / target_tokens)
        engine.step()
        mean = _sum_over_workers(loss.detach(), world_size) / target_tokens
        if not math.isfinite(mean):
            raise UserError(f"train.learning_rate: the loss became {mean} at step {number + 1}; lower it")
        losses.append(mean)
        done_tokens += sum(len(rows[i].input_ids) for i in step)
        padded_tokens += batch.input_ids.numel() * len(step) // max(1, len(share or step[:1]))
        tell(done_tokens, total_tokens, {"loss": mean})
    seconds = time.monotonic() - began
    _save_adapter(engine, config.uri, rank, recipe.model.base, recipe.train.zero_stage)
    return WorkerReport(
        rows=len(rows),
        rows_too_long=too_long,
        tokens=done_tokens,
        target_tokens=sum(rows[i].target_tokens for step in steps for i in step),
        losses=tuple(losses),
        seconds=seconds,
        padding_share=1 - done_tokens / padded_tokens,
        trainable_parameters=sum(_full_size(p) for p in model.parameters() if p.requires_grad),
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        precision=str(dtype).removeprefix("torch."),
    )


def _load_rows(config: WorkerConfig, recipe: TrainingRecipe) -> tuple[list[TokenRow], int]:
    from training.samples import load_samples

    tokenizer = load_tokenizer(base_model_directory(recipe.model))
    rows = tokenise(load_samples(config.samples, config.objective), tokenizer, config.prompt_format)
    fitting = [row for row in rows if len(row.input_ids) <= recipe.train.max_tokens]
    if not fitting:
        raise UserError(
            f"train.max_tokens: none of {len(rows)} rows has at most {recipe.train.max_tokens} tokens; raise it"
        )
    return fitting, len(rows) - len(fitting)


def _with_lora(recipe: TrainingRecipe, dtype: torch.dtype) -> Any:
    model = load_model(base_model_directory(recipe.model), dtype)
    return with_lora(model, recipe.lora, recipe.train.gradient_checkpointing)


def with_lora(model: Any, lora: LoraSection, gradient_checkpointing: bool = False) -> Any:
    """The model with a fresh LoRA adapter, in training mode.

    The adapter keeps the model's dtype: float32 adapters inside a bfloat16 model halved the speed on CPU. Precision is
    kept where it matters, in the optimiser's float32 master weights.
    """
    from peft import LoraConfig, get_peft_model

    named = [name.strip() for name in lora.target_modules.split(",")]
    modules = lora.target_modules if lora.target_modules == "all-linear" else named
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if gradient_checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted.train()


def _deepspeed_engine(model: Any, recipe: TrainingRecipe, batch_rows: int, dtype: torch.dtype) -> Any:
    if recipe.train.gpus_per_worker == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import torch

    _compile_nothing()
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trainable,
        optimizer=torch.optim.AdamW(trainable, lr=recipe.train.learning_rate, weight_decay=0.0),
        config=deepspeed_config(recipe, batch_rows, bfloat16=dtype == torch.bfloat16),
        dist_init_required=False,
    )
    return engine


def _compile_nothing() -> None:
    """Tells DeepSpeed that none of its optional C++ ops can be built.

    On CPU its communication would compile a shared-memory all-reduce at first use, which takes a minute and a C++
    compiler, and of which only its inference makes use: training exchanges gradients through torch.distributed. This
    is the table that DeepSpeed itself consults for platforms without the op; filling it also saves the compiler runs
    with which it would be filled.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def deepspeed_config(recipe: TrainingRecipe, batch_rows: int, *, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for one micro-batch per step."""
    threshold = recipe.train.zero3_persistence_threshold
    persistence = {} if threshold is None else {"stage3_param_persistence_threshold": threshold}
    return {
        "train_micro_batch_size_per_gpu": math.ceil(batch_rows / recipe.train.workers),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": GRADIENT_CLIP,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": {"stage": recipe.train.zero_stage} | persistence,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def learning_rate_at(step: int, steps: int, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up to `peak`, then linear decay towards 0; `step` counts from 0."""
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / max(1, steps - warmup)


def _set_learning_rate(engine: Any, recipe: TrainingRecipe, step: int, steps: int) -> None:
    rate = learning_rate_at(step, steps, recipe.train.learning_rate, recipe.train.warmup_fraction)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def _to_device(batch: Any, device: Any) -> Any:
    moved = {name: getattr(batch, name).to(device) for name in type(batch).__dataclass_fields__}
    return type(batch)(**moved)


def _sum_over_workers(loss: torch.Tensor, world_size: int) -> float:
    import torch

    total = loss.clone()
    if world_size > 1:
        torch.distributed.all_reduce(total)
    return float(total)


def _full_size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _save_adapter(engine: Any, uri: str, rank: int, base: str, zero_stage: int) -> None:
    """Writes the PEFT directory from the first worker; under ZeRO-3 all workers gather the parameters first."""
    import contextlib

    import deepspeed
    from peft import get_peft_model_state_dict

    model = engine.module
    trainable = [p for p in model.parameters() if p.requires_grad]
    gathered = deepspeed.zero.GatheredParameters(trainable) if zero_stage == 3 else contextlib.nullcontext()
    with gathered:
        if rank != 0:
            return
        state = {
            name: value.detach().cpu().contiguous().clone() for name, value in get_peft_model_state_dict(model).items()
        }
    empty = [name for name, value in state.items() if value.numel() == 0]
    assert not empty, f"adapter weights were not gathered: {empty[:3]}"
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise UserError("train.learning_rate: the last step left weights that are not finite; lower it")
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), model, state, base)
        copy_directory(folder, uri)


def write_adapter(directory: Path, model: Any, state: dict[str, torch.Tensor], base: str) -> None:
    """The two files that plain PEFT loads; the base model goes by its recipe name, not by a path of this machine."""
    from safetensors.torch import save_file

    save_file(state, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(directory))


def copy_directory(folder: str, uri: str) -> None:
    """Copies a local folder below a directory that any worker can write to."""
    import pyarrow.fs as pafs

    from retrieval.documents import open_filesystem

    filesystem, inner = open_filesystem(uri)
    filesystem.create_dir(inner, recursive=True)
    pafs.copy_files(folder, inner, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)
