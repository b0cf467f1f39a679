"""One contrastive step over all workers, with cached gradients; and how texts are embedded while training.

In: a sentence-transformers model, this worker's share of a batch. Out: gradients on the parameters, the loss.
The loss is InfoNCE with in-batch negatives (sentence-transformers' MultipleNegativesRankingLoss): a softmax over the
golden passages and hard negatives of *all* rows of *all* workers. The gradient is GradCache's (Gao et al. 2021, arXiv
2101.06983): texts are embedded without a graph, the loss is taken of the gathered embeddings, and a second pass
carries their gradients back, a few texts at a time. It is exact: neither the number of workers nor the size of a part
changes it, so a batch may be as large as the loss wants, not as memory allows. The library's own cached loss needs
equal shares on every worker; a plan that is the same for any number of workers cannot promise them.
Not covered: dropout, which is off: both passes must see the same network. Where to step (training/retriever_worker.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

Task = Literal["query", "document"]
SORTED_TEXTS = 32  # texts of like length that are padded together
_PROMPTS: dict[Task, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}


def embed(model: SentenceTransformer, texts: Sequence[str], task: Task) -> torch.Tensor:
    """Embeds texts as `encode_query` and `encode_document` do, with a graph: (n, dim) float32, rows of length 1."""
    import torch
    from sentence_transformers.util import batch_to_device

    prompt = next((model.prompts[name] for name in _PROMPTS[task] if name in model.prompts), None)
    if prompt is None and model.default_prompt_name is not None:
        prompt = model.prompts.get(model.default_prompt_name)
    features = batch_to_device(model.preprocess(list(texts), prompt=prompt or None, task=task), model.device)
    embeddings: torch.Tensor = model(features, task=task)["sentence_embedding"]
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)


def embed_all(model: SentenceTransformer, texts: Sequence[str], task: Task) -> torch.Tensor:
    """Embeds any number of texts in parts of like length: (n, dim) float32 in the order of the texts."""
    import torch

    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    parts = [order[start : start + SORTED_TEXTS] for start in range(0, len(order), SORTED_TEXTS)]
    embedded = [embed(model, [texts[place] for place in part], task) for part in parts]
    if not embedded:
        return torch.zeros(0, model.get_embedding_dimension() or 0)
    return torch.cat(embedded)[torch.tensor(order).argsort()]


def info_nce(queries: torch.Tensor, passages: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over queries of the cross-entropy of the golden passage among all passages.

    Args:
        queries: (n, dim) unit vectors.
        passages: (n, 1 + negatives, dim) unit vectors, the golden passage of each query first.
        temperature: Divides the cosine similarities.
    """
    import torch

    n, width, _ = passages.shape
    scores = queries @ passages.flatten(0, 1).T / temperature  # (n, n * width)
    return torch.nn.functional.cross_entropy(scores, torch.arange(0, n * width, width, device=scores.device))


def contrastive_step(
    model: SentenceTransformer,
    rows: Sequence[tuple[str, Sequence[str]]],
    rank: int,
    world_size: int,
    temperature: float,
    cached_texts: int,
) -> float:
    """Adds the gradient of a step's loss to the parameters, the same on every worker, and returns the loss.

    Args:
        model: In evaluation mode (no dropout), with the same weights on every worker.
        rows: All rows of the step: a question, and its passages with the golden one first; equally many in each.
        rank: This worker's number; it computes every `world_size`-th row.
        world_size: Number of workers.
        temperature: Of the softmax.
        cached_texts: Texts whose graph is held at once; a share of no more texts takes one pass instead of two.
    """
    import torch

    mine = list(range(rank, len(rows), world_size))
    parts = _parts(rows, mine, cached_texts)
    held = len(parts) == 1
    with torch.set_grad_enabled(held):
        embedded = [_embed_rows(model, rows, part) for part in parts]
    dimension = model.get_embedding_dimension() or 0
    width = 1 + len(rows[0][1])
    every = torch.zeros(len(rows), width, dimension, device=model.device)
    for part, values in zip(parts, embedded, strict=True):
        every[part] = values.detach()
    if world_size > 1:  # each row is filled in by one worker and zero elsewhere: the sum gathers them
        torch.distributed.all_reduce(every)
    every.requires_grad_()
    loss = info_nce(every[:, 0], every[:, 1:], temperature)
    loss.backward()
    gradient = every.grad
    assert gradient is not None, "the loss does not depend on the embeddings"
    for place, part in enumerate(parts):
        values = embedded[place] if held else _embed_rows(model, rows, part)
        values.backward(gradient[part])
    if world_size > 1:
        _sum_gradients(model)
    return float(loss.detach())


def _parts(rows: Sequence[tuple[str, Sequence[str]]], mine: Sequence[int], cached_texts: int) -> list[list[int]]:
    """This worker's rows in parts of at most `cached_texts` texts."""
    size = max(1, cached_texts // (1 + len(rows[0][1])))
    return [list(mine[start : start + size]) for start in range(0, len(mine), size)]


def _embed_rows(
    model: SentenceTransformer, rows: Sequence[tuple[str, Sequence[str]]], part: Sequence[int]
) -> torch.Tensor:
    """Embeddings of some rows: (rows, 1 + passages, dim), the question first."""
    import torch

    queries = embed_all(model, [rows[number][0] for number in part], "query")
    passages = embed_all(model, [text for number in part for text in rows[number][1]], "document")
    return torch.cat([queries[:, None], passages.view(len(part), -1, queries.shape[1])], dim=1)


def _sum_gradients(model: SentenceTransformer) -> None:
    """Sums gradients over workers, as one vector: a worker without rows in a step has none, which counts as zero."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in trained if parameter.grad is not None])
    torch.distributed.all_reduce(flat)
    place = 0
    for parameter in trained:
        size = parameter.numel()
        parameter.grad = flat[place : place + size].view_as(parameter).clone()
        place += size
