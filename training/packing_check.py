"""Whether a model keeps packed samples apart: tried out before training, because no configuration says it.

In: the model that is about to be trained. Out: nothing, or a `UserError`.
Not covered: packing itself (training/batching.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from training.batching import Packing, TokenRow, collate_packed, target_logits

if TYPE_CHECKING:
    import torch


def refuse_unpackable(model: Any, packing: Packing) -> None:
    """Refuses packing for a model whose samples would see each other: tries it, with two samples of which one changes.

    Not every architecture heeds restarting positions (recurrent layers carry their state on, older remote code builds
    its own mask), and nothing in a model's configuration says so.

    Raises:
        UserError: naming `train.packing`.
    """
    if packing == "none":
        return
    import torch

    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        logits = [_logits_beside(model, neighbour, device) for neighbour in (0, 1)]
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"train.packing: best_fit: the base model cannot: {reason}; set train.packing=none") from error
    finally:
        model.train(training)
    # Shapes are equal, so that nothing but the neighbour can make a difference.
    if not torch.allclose(*logits, rtol=0, atol=1e-3 * float(logits[0].abs().max())):
        raise UserError(
            f"train.packing: best_fit: in {type(model).__name__} packed samples see each other; set train.packing=none"
        )


def _logits_beside(model: Any, neighbour: int, device: torch.device) -> torch.Tensor:
    """Logits of a sample of fixed tokens, packed behind one of other tokens. (samples' tokens, vocabulary) float32"""
    import torch

    sample = TokenRow("", tuple(range(2, 18)), 15)
    other = TokenRow("", tuple(2 + (5 * place + 7 * neighbour) % 16 for place in range(16)), 1)
    batch = collate_packed([other, sample], 0).to(device)
    with torch.no_grad():
        return target_logits(model, batch)[0, 1:].float()
