"""Compaction: which shards an update writes anew from their live rows, so that deleted rows and small shards go.

In: how full the shards of an index are and what the update adds. Out: the shards to merge; and, of a shard, the rows
of each of its documents, so that new shards never divide one. Vectors move with their rows: nothing is embedded.
As with Lucene's segments, full shards without many deletions are left as they are: rewriting all would make the cost of
every compaction that of the whole index.
Not covered: writing the merged shards (`shard_files.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from retrieval.config import IndexConfig
    from retrieval.shards import ShardReader

    Rows = npt.NDArray[np.int64]

SMALL_SHARE = 0.1
"""A shard filled to less than this is small."""


@dataclasses.dataclass(frozen=True)
class CompactionPolicy:
    """When an update compacts; picklable."""

    shard_chunks: int
    compact_above: float
    max_small_shards: int

    @classmethod
    def of(cls, config: IndexConfig) -> CompactionPolicy:
        """The policy of a recipe's `index` section."""
        return cls(config.shard_chunks, config.compact_above, config.max_small_shards)


@dataclasses.dataclass(frozen=True)
class Fill:
    """How full a shard is."""

    rows: int
    """Deleted ones included."""
    deleted: int

    @property
    def live(self) -> int:
        """Rows that are searched."""
        return self.rows - self.deleted


def shards_to_merge(policy: CompactionPolicy, shards: Sequence[Fill], new_rows: int) -> set[int]:
    """Places of the shards whose live rows go into new ones, together with the new rows; empty: no compaction.

    It is due when more than `compact_above` of all rows are deleted: then the shards go of which that holds themselves,
    so that it holds of none any more. It is also due when more than `max_small_shards` shards, the new one included,
    are small: then these go. Small ones go with any compaction.
    """
    least = SMALL_SHARE * policy.shard_chunks
    small = {place for place, shard in enumerate(shards) if shard.live < least}
    total = sum(shard.rows for shard in shards) + new_rows
    deleted = sum(shard.deleted for shard in shards)
    emptied: set[int] = set()
    if total and deleted > policy.compact_above * total:
        emptied = {place for place, shard in enumerate(shards) if shard.deleted > policy.compact_above * shard.rows}
    crowded = len(small) + (0 < new_rows < least) > policy.max_small_shards
    return emptied | small if emptied or crowded else set()


def document_rows(shard: ShardReader, rows: Rows) -> Rows:
    """Number of `rows` (sorted) of each document of a shard, in row order: (documents,) int64."""
    import numpy as np

    owners = shard.column("doc_id").combine_chunks().dictionary_encode().indices.to_numpy()[rows]
    begins = np.flatnonzero(np.diff(owners, prepend=-1))
    return np.diff(begins, append=len(owners)).astype(np.int64)
