"""Whether the driver's memory stays flat while the index grows.

    python -m benchmarks.driver_memory [--sizes 10000,50000,200000] [--chunks-per-document 20] [--set index.kind=flat]

Each size is built in a process of its own, from a generated corpus file, by the whole pipeline on a local Ray; the
encoder is a stand-in that derives a vector from each text's hash, so that the figures are about rows, not about the
model. Prints the driver's peak PSS and RSS (sampled every 50 ms during `build_index`, imports and Ray's start
included), and the ratio of each size to the first. PSS counts pages shared with other processes by their share.
Target: within ± 10%. Not measured: workers, raylet and object store.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.conditions import describe_conditions, describe_load
from cluster.session import ray_session
from cluster.store import Store
from rayft import load

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from retrieval.encoder import EncoderSource, Precision

PACKAGES = ("ray", "pyarrow", "numpy", "faiss-cpu", "bm25s")
DIMENSION = 384
WORDS_PER_CHUNK = 14
SAMPLE_EVERY_S = 0.05
MARK = "driver-memory "
VOCABULARY = 5000


class HashEncoder:
    """A stand-in for the encoder: equal texts get equal unit vectors, different texts get different ones."""

    def __init__(self, source: EncoderSource, precision: Precision, device: str, threads: int | None) -> None:
        """Takes what the real encoder takes, and loads nothing."""
        self.dimension = DIMENSION

    def encode_passages(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(n, 384) float32, rows of length 1."""
        import numpy as np

        vectors = np.empty((len(texts), DIMENSION), dtype=np.float32)
        for row, text in enumerate(texts):
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
            vectors[row] = np.random.Generator(np.random.SFC64(seed)).standard_normal(DIMENSION, dtype=np.float32)
        unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


def write_corpus(path: Path, chunks: int, per_document: int, seed: int) -> None:
    """A corpus.jsonl whose documents have `per_document` sections, each of them one chunk."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(0, chunks, per_document):
            sections = [
                f"## Section {place}\n\n{_sentence(rng)} {number + place}.\n"
                for place in range(min(per_document, chunks - number))
            ]
            row = {"_id": f"doc-{number}", "title": f"Report {number}", "text": "\n".join(sections)}
            file.write(json.dumps(row) + "\n")


def _sentence(rng: random.Random) -> str:
    return " ".join(f"w{rng.randrange(VOCABULARY)}" for _ in range(WORDS_PER_CHUNK))


class Peak:
    """Peak PSS and RSS of this process, in MiB, sampled by a thread while the block runs."""

    def __init__(self) -> None:
        self.pss = 0.0
        self.rss = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        """Start sampling."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            pss, rss = read_memory()
            self.pss, self.rss = max(self.pss, pss), max(self.rss, rss)


def read_memory() -> tuple[float, float]:
    """(PSS, RSS) of this process in MiB, from Linux's smaps_rollup."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:] if ":" in line
    )
    pss, rss = (int(fields[name].split()[0]) / 1024 for name in ("Pss", "Rss"))
    return pss, rss


def build_one(path: str, overrides: list[str], chunks: int, per_document: int) -> None:
    """Build one size in this process and print its figures as one JSON line."""
    from retrieval.index import build_index

    with tempfile.TemporaryDirectory(prefix="driver-memory-") as folder:
        corpus = Path(folder) / "corpus.jsonl"
        own = [f"corpus.path={corpus}", f"store.uri={folder}/store"]
        recipe = load(path, [*overrides, *own])
        write_corpus(corpus, chunks, per_document, recipe.seed)
        with ray_session(recipe.ray):
            before, _ = read_memory()
            began = time.perf_counter()
            with Peak() as peak:
                artifact = build_index(recipe, Store(recipe.store.uri), make_encoder=HashEncoder)
            seconds = time.perf_counter() - began
        built = int(artifact.manifest.counts["chunks"])
    figures = {"chunks": built, "before": before, "pss": peak.pss, "rss": peak.rss, "seconds": seconds}
    print(MARK + json.dumps(figures))


def main() -> None:
    """Builds every size in a child process and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,50000,200000")
    parser.add_argument("--chunks-per-document", type=int, default=20)
    parser.add_argument("--one", type=int, default=0, help="build this size in this process (used by itself)")
    parser.add_argument("--recipe", default="own_documents")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    if arguments.one:
        build_one(arguments.recipe, arguments.overrides, arguments.one, arguments.chunks_per_document)
        return
    print(describe_conditions(PACKAGES, load(arguments.recipe, arguments.overrides).seed), flush=True)
    found = []
    for size in arguments.sizes.split(","):
        options = [part for override in arguments.overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "benchmarks.driver_memory", "--one", size, "--recipe", arguments.recipe]
        command += ["--chunks-per-document", str(arguments.chunks_per_document), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not lines:
            sys.exit(f"{size} chunks failed:\n{done.stdout}\n{done.stderr}")
        figures = json.loads(lines[0].removeprefix(MARK))
        found.append(figures)
        ratio = figures["pss"] / found[0]["pss"]
        print(
            f"{figures['chunks']:>9,} chunks: peak PSS {figures['pss']:.0f} MiB ({ratio:.3f} of the first), peak RSS "
            f"{figures['rss']:.0f} MiB, PSS before the build {figures['before']:.0f} MiB, build "
            f"{figures['seconds']:.0f} s; load {describe_load()}",
            flush=True,
        )
    print(f"peak PSS, largest ÷ first size: {found[-1]['pss'] / found[0]['pss']:.3f} (target 0.9 to 1.1)")


if __name__ == "__main__":
    main()
