"""What all workers of one index build know.

In: the recipe's settings, resolved by the driver. Out: a `BuildJob` that travels to every task. Imports no torch, ray
or faiss. Not covered: what is done with it (`embedding.py`, `rowplan.py`, `shard_files.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from cluster.errors import ArtifactError
from retrieval.config import ChunkingConfig
from retrieval.encoder import Encoder, EncoderSource, Precision
from retrieval.parts import Parts
from retrieval.shards import IndexFile, Mode, ShardReader, open_shards

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cluster.store import Artifact
    from retrieval.compaction import CompactionPolicy
    from retrieval.vectors import VectorPolicy

    Vectors = npt.NDArray[np.float32]

Merge = Literal["reuse", "sync", "delta"]


@dataclass(frozen=True)
class BaseVersion:
    """The version of the index that a build starts from; small, and picklable.

    `merge` says what becomes of its documents. `reuse`: none is kept, but equal texts keep their embeddings (a full
    build). `sync`: those that the corpus still holds unchanged are kept with their rows, and neither cut nor embedded
    again; all others are deleted. `delta`: all are kept but those in `deleted` and those that the blocks bring anew.
    """

    store_uri: str
    ref: str
    """`index/<name>/<version>`"""
    attempt: str = ""
    """Directory of its files when the build began: a purge replaces them."""
    merge: Merge = "reuse"
    deleted: tuple[str, ...] = ()
    """Document ids that a delta deletes."""
    mode: Mode = "dense"
    encoder_digest: str = ""
    precision: str = ""
    rows: int = 0
    """Deleted ones included."""

    def artifact(self) -> Artifact:
        """The version, with the files that it had when the build began.

        Raises:
            ArtifactError: missing or damaged, or a purge has replaced them since the build began.
        """
        from cluster.manifest import ArtifactRef
        from cluster.store import Store

        artifact = Store(self.store_uri).open_ref(ArtifactRef.parse(self.ref))
        if artifact.manifest.attempt != self.attempt:
            raise ArtifactError(f"{self.ref}: a document was purged from it meanwhile; run the same command again")
        return artifact

    def directory(self) -> Path:
        """Its files, verified (once per process); see `artifact`."""
        return self.artifact().directory()

    def open(self) -> tuple[IndexFile, list[ShardReader]]:
        """Its table of contents and shards."""
        return _open_base(self)


@functools.lru_cache(maxsize=2)
def _open_base(base: BaseVersion) -> tuple[IndexFile, list[ShardReader]]:
    return open_shards(base.directory())


class PassageEncoder(Protocol):
    """What phase C needs of an encoder."""

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors, (n, dim) float32."""


MakeEncoder = Callable[[EncoderSource, Precision, str, int | None], PassageEncoder]
"""(source, precision, device, threads) → encoder: `Encoder`, or a stand-in of a measurement."""


@dataclass(frozen=True)
class BuildJob:
    """What all workers of one build know; small, and picklable."""

    parts: Parts
    """Where unfinished work stands."""
    uri: str
    """Where the artifact's files go."""
    mode: Mode
    source: EncoderSource
    """Embeds the chunks; its tokenizer counts their tokens in both modes."""
    encoder_digest: str
    precision: Precision
    chunking: ChunkingConfig
    policy: VectorPolicy
    shard_chunks: int
    base: BaseVersion | None = None
    compaction: CompactionPolicy | None = None
    """When shards of the base version are written anew; none: never."""
    removed: Container[str] = frozenset()
    """Ids of documents to leave out; picklable."""
    make_encoder: MakeEncoder = field(default=Encoder)

    @property
    def keeps_rows(self) -> bool:
        """Whether rows of the base version stay, so that unchanged documents are passed over."""
        return self.base is not None and self.base.merge != "reuse"

    @property
    def reuses_embeddings(self) -> bool:
        """Whether the base version's embeddings are of this build's encoder and precision."""
        base = self.base
        return (
            base is not None
            and base.mode == self.mode == "dense"
            and (base.encoder_digest, base.precision) == (self.encoder_digest, self.precision)
        )
