"""The model being trained: a base model with a LoRA adapter inside a DeepSpeed engine, and its learning rate.

In: the recipe. Out: an engine of any ZeRO stage, with or without CPU offload, whose micro-batches are of any size.
Not covered: the loop over steps (training/worker.py), the adapter's state (training/adapter_state.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from training.base_model import base_model_directory, load_model
from training.config import LoraSection, TrainingRecipe
from training.packing_check import refuse_unpackable

if TYPE_CHECKING:
    import torch

GRADIENT_CLIP = 1.0


def load_engine(recipe: TrainingRecipe, dtype: torch.dtype) -> Any:
    """The recipe's base model with a fresh adapter, ready to train; torch.distributed must be initialised.

    Raises:
        UserError: The base model does not load, is too large for the GPU, or lets packed samples see each other
            (`train.packing`).
    """
    import torch

    model = load_model(base_model_directory(recipe.model), dtype)
    torch.manual_seed(recipe.seed)
    adapted = with_lora(model, recipe.lora, recipe.train.gradient_checkpointing)
    refuse_unpackable(adapted, recipe.train.packing)
    try:
        return deepspeed_engine(adapted, recipe, dtype)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"train.zero_stage: the GPU's memory is too small to hold {recipe.model.base}; shard it over more workers "
            "with train.zero_stage=3, keep it in the host's memory with train.offload=cpu, or take a smaller model.base"
        ) from error


def with_lora(model: Any, lora: LoraSection, gradient_checkpointing: bool = False) -> Any:
    """The model with a fresh LoRA adapter, in training mode.

    The adapter keeps the model's dtype: float32 adapters inside a bfloat16 model halved the speed on CPU. Precision is
    kept where it matters, in the optimiser's float32 master weights.

    Raises:
        UserError: The model has no such modules (`lora.target_modules`).
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
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"lora.target_modules: {lora.target_modules} does not fit the base model: {reason}") from error
    if gradient_checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted.train()


def deepspeed_engine(model: Any, recipe: TrainingRecipe, dtype: torch.dtype) -> Any:
    """DeepSpeed around a model whose trainable parameters are the adapter's."""
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
        config=deepspeed_config(recipe, bfloat16=dtype == torch.bfloat16),
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


def deepspeed_config(recipe: TrainingRecipe, *, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. It counts no rows: how many a micro-batch has changes with their length, and the
    gradient's scale is the worker's own affair."""
    train = recipe.train
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero3_persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = train.zero3_persistence_threshold
    if train.offload == "cpu":
        place = {"device": "cpu", "pin_memory": train.gpus_per_worker > 0}
        zero["offload_optimizer"] = place
        if train.zero_stage == 3:
            zero["offload_param"] = place
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": GRADIENT_CLIP,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


@contextmanager
def one_reduction(engine: Any, micro_batches: int) -> Iterator[Callable[[int], None]]:
    """Gradients of the block's micro-batches add up and are exchanged once, before `engine.step()`.

    Left alone, DeepSpeed exchanges them after every micro-batch under stages 2 and 3.

    Yields:
        To be called with each micro-batch's number, from 0, before its forward pass.
    """
    if engine.zero_optimization_stage() == 0:
        yield lambda number: engine.set_gradient_accumulation_boundary(number == micro_batches - 1)
        return
    with engine.coalesce_grad_reduction() if micro_batches > 1 else nullcontext():
        yield lambda _: None


def learning_rate_at(step: int, steps: int, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up to `peak`, then linear decay towards 0; `step` counts from 0."""
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / max(1, steps - warmup)


def set_learning_rate(engine: Any, rate: float) -> None:
    """The rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
