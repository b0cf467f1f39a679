"""A picklable stand-in for the encoder: 8 dimensions from a hash of the text; a file lists what it embedded."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def stub_vector(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(8).astype(np.float32)
    return vector / np.linalg.norm(vector)


@dataclasses.dataclass(frozen=True)
class StubEncoder:
    """`make_encoder`: one line per embedded text goes to `log`; SIGKILL comes instead of call `killed_at`."""

    log: str
    killed_at: int = -1

    def __call__(self, *_: object) -> _Loaded:
        return _Loaded(self)

    def embedded(self) -> list[str]:
        """What was embedded since the last time this was asked."""
        file = Path(self.log)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line.encode().decode("unicode_escape") for line in lines]


class _Loaded:
    def __init__(self, stub: StubEncoder) -> None:
        self._stub = stub
        self._calls = 0

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        if self._calls == self._stub.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._calls += 1
        with Path(self._stub.log).open("a", encoding="utf-8") as file:
            file.writelines(text.encode("unicode_escape").decode() + "\n" for text in texts)
        return np.stack([stub_vector(text) for text in texts])
