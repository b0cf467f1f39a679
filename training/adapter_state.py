"""What a DeepSpeed engine knows of a LoRA adapter: weights, float32 master weights and Adam's moments, whole.

In and out: tensors of full shape on the CPU, gathered from ZeRO stages 0 to 3 with or without CPU offload, and put back
into an engine of any stage and any number of workers. Every function is collective: all workers call it alike.
Not covered: files (training/adapter_checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


def trainable_parameters(engine: Any) -> dict[str, torch.nn.Parameter]:
    """Name in the model and parameter, in the order in which the optimiser holds them."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


@contextmanager
def gathered(engine: Any, *, modifier: int | None = None) -> Iterator[None]:
    """Trainable parameters are whole inside the block; with `modifier`, what that rank writes to them stays."""
    import deepspeed

    if engine.zero_optimization_stage() != 3:
        yield
        return
    parameters = list(trainable_parameters(engine).values())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier):
        yield


def adapter_weights(engine: Any) -> Tensors:
    """The adapter as the model computes with it, in the model's precision, by parameter name."""
    with gathered(engine):
        weights = {name: plain(p) for name, p in trainable_parameters(engine).items()}
    empty = [name for name, value in weights.items() if value.numel() == 0]
    assert not empty, f"adapter weights were not gathered: {empty[:3]}"
    return weights


def set_adapter_weights(engine: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Let the model compute with these; the optimiser's state stays what it is."""
    import torch

    with gathered(engine, modifier=0), torch.no_grad():
        for name, parameter in trainable_parameters(engine).items():
            parameter.copy_(weights[name].to(parameter.device, parameter.dtype))


def optimizer_state(engine: Any) -> Tensors:
    """`master.<parameter>`, `exp_avg.<parameter>` and `exp_avg_sq.<parameter>` in float32, after at least one step."""
    return {f"{kind}.{name}": plain(value) for name, kind, value in _whole_states(engine)}


def _whole_states(engine: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        for name, master in _unsharded_masters(engine):
            state = engine.basic_optimizer.state[master]
            yield name, MASTER, master
            yield from ((name, moment, state[moment]) for moment in MOMENTS)
        return
    for name, parameter in trainable_parameters(engine).items():
        yield name, MASTER, safe_get_full_fp32_param(parameter)
        for moment in MOMENTS:
            yield name, moment, safe_get_full_optimizer_state(parameter, moment)


def _unsharded_masters(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Under stage 0 the optimiser holds the parameters themselves (float32) or a float32 copy of each (bfloat16)."""
    masters = [tensor for group in engine.basic_optimizer.param_groups for tensor in group["params"]]
    return zip(trainable_parameters(engine), masters, strict=True)


def set_optimizer_state(engine: Any, state: Mapping[str, torch.Tensor], steps: int) -> None:
    """Put back what `optimizer_state` gave after `steps` steps, and the model's weights that follow from it."""
    import torch

    set_adapter_weights(engine, {name: state[f"{MASTER}.{name}"] for name in trainable_parameters(engine)})
    with torch.no_grad():
        if engine.zero_optimization_stage() == 0:
            for name, master in _unsharded_masters(engine):
                master.copy_(state[f"{MASTER}.{name}"].to(master.device))
                moments = {kind: state[f"{kind}.{name}"].to(master.device, copy=True) for kind in MOMENTS}
                engine.basic_optimizer.state[master] = {"step": torch.tensor(float(steps)), **moments}
            return
        _create_sharded_moments(engine, steps)
        put = _put_stage_3 if engine.zero_optimization_stage() == 3 else _put_fragment
        for name, parameter in trainable_parameters(engine).items():
            put(parameter, state[f"{MASTER}.{name}"], None)
            for kind in MOMENTS:
                put(parameter, state[f"{kind}.{name}"], kind)


def _create_sharded_moments(engine: Any, steps: int) -> None:
    """Moments of zero for every shard of this worker: torch's Adam would only make them in its first step."""
    import torch

    optimizer = engine.optimizer
    third = engine.zero_optimization_stage() == 3
    shards = optimizer.fp32_partitioned_groups_flat if third else optimizer.single_partition_of_fp32_groups
    for shard in shards:
        moments = {kind: torch.zeros_like(shard, requires_grad=False) for kind in MOMENTS}
        optimizer.optimizer.state[shard] = {"step": torch.tensor(float(steps)), **moments}
    if not third:
        optimizer._lazy_init_hp_params_optimizer_state()


def _put_fragment(parameter: Any, value: torch.Tensor, kind: str | None) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if kind is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _put_stage_3(parameter: Any, value: torch.Tensor, kind: str | None) -> None:
    """This worker's shard of a value; DeepSpeed's own setter fails where shards do not divide a parameter evenly."""
    import torch
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    rank = parameter._z3_optimizer._get_param_partition_rank(parameter)
    shard = torch.zeros(size)
    mine = value.flatten()[rank * size : (rank + 1) * size]
    shard[: mine.numel()] = mine
    if kind is None:
        safe_set_local_fp32_param(parameter, shard)
    else:
        safe_set_local_optimizer_state(parameter, shard, kind)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU that nothing else holds."""
    return tensor.detach().cpu().contiguous().clone()


def all_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether no value is infinite or not a number."""
    return all(bool(value.isfinite().all()) for value in tensors.values())
