"""The part of the recipe's `router` section that `rayft train router` reads; the rest is in serving/router_config.py.

Imports no torch, ray or faiss.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import Section


class IntentTraining(Section):
    """Labelled utterances, and how the intent classifier is fitted to them."""

    examples: str = ""
    """Labelled utterances for `rayft train router`: JSON Lines, CSV or Parquet with the columns `text` and `intent`."""
    out_of_scope: str = "oos"
    """Intent of the utterances among the examples that belong to none."""
    features: Literal["auto", "embedding", "ngrams"] = "auto"
    """What the classifier reads: the query embedding, or character n-grams (`auto`: where the encoder does not know
    the language, or the index has no embeddings)."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of each intent's utterances that the reported figures are measured on; they are never fitted to."""
