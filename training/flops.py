"""Model FLOPs of LoRA training, and how much of a GPU's peak they are (MFU).

In: a model with its adapter, the mean length of rows, tokens per second. Out: FLOPs per token; a share of the peak,
or None where there is no honest peak to divide by (CPU, unknown GPU, float32).
Formula: PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) counts 6 N + 12 L H Q T per token of full training:
of the 6 N, 2 N go forward, 2 N back to the activations and 2 N to the weights' gradients. Frozen weights have no
gradients: 4 N. Adapter weights have: 6 N. Attention has no weights, so its 12 L H Q T stand whole. The head is counted
where logits are computed: at target tokens. Recomputed activations (gradient checkpointing) are not model FLOPs.
Not covered: mixtures of experts, of whose weights a token meets a part only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# Dense bfloat16 TFLOP/s of the makers' data sheets (without sparsity); the first name that fits counts.
PEAK_TFLOPS = (
    (r"\bB200\b", 2250.0),
    (r"\bH200\b", 989.0),
    (r"\bH100 NVL\b", 835.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH100\b", 989.0),
    (r"\bA100\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bL4\b", 121.0),
    (r"\bA10G\b", 70.0),
    (r"\bA10\b", 125.0),
    (r"\bA40\b", 149.7),
    (r"\bRTX 4090\b", 165.2),
    (r"\bMI300X\b", 1307.0),
)


@dataclass(frozen=True)
class LoraShape:
    """What the count depends on."""

    frozen: int
    """Weights of the frozen matrices that every token passes; without embeddings (a look-up) and head."""
    trainable: int
    """Weights of the adapter."""
    head: int
    """Weights of the output head: vocabulary times width, also where it shares the embeddings' memory."""
    attention: int
    """L H Q: attention layers times heads times head width."""

    def flops_per_token(self, row_tokens: float, target_share: float) -> float:
        """Model FLOPs of one training token, forward and backward.

        Args:
            row_tokens: Mean tokens of a row, T in the formula.
            target_share: Share of tokens that carry loss, and so pass the head.
        """
        attended = 12.0 * self.attention * row_tokens
        return 4.0 * self.frozen + 6.0 * self.trainable + 4.0 * self.head * target_share + attended


def lora_shape(model: Any) -> LoraShape | None:
    """Counts a PEFT model's weights, also those that ZeRO-3 keeps elsewhere; None for mixtures of experts."""
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    looked_up = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer]
    apart = {id(weight) for weight in looked_up}
    frozen = trainable = 0
    for weight in model.parameters():
        if weight.requires_grad:
            trainable += _size(weight)
        elif id(weight) not in apart and len(getattr(weight, "ds_shape", weight.shape)) > 1:  # norms multiply nothing
            frozen += _size(weight)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LoraShape(frozen, trainable, _size(looked_up[-1]), config.num_hidden_layers * heads * width)


def _size(weight: Any) -> int:
    return int(getattr(weight, "ds_numel", weight.numel()))


def peak_flops(device: str, precision: str) -> float | None:
    """Dense peak FLOP/s of a GPU.

    Args:
        device: As `torch.cuda.get_device_name` gives it; `cpu` has no peak.
        precision: Of the weights; only bfloat16 has a peak in the table.
    """
    if precision != "bfloat16":
        return None
    for pattern, tflops in PEAK_TFLOPS:
        if re.search(pattern, device):
            return tflops * 1e12
    return None


def mfu(tokens_per_second: float, flops_per_token: float, device: str, precision: str, gpus: int = 1) -> float | None:
    """Model FLOPs utilisation in [0, 1], or None where the device has no known peak.

    Args:
        tokens_per_second: Of all workers together, without padding.
        flops_per_token: `LoraShape.flops_per_token`.
        device: GPU name.
        precision: Of the weights.
        gpus: How many work.
    """
    peak = peak_flops(device, precision)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * gpus)
