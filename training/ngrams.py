"""Character n-grams as features of short texts: for languages that the encoder does not know, and without any encoder.

In: texts. Out: per text the hashed n-grams and their weights, tf-idf with logarithmic counts, of unit length.
Words are taken between blanks, one blank at each end, so that a Chinese sentence is one long word. The hash is CRC-32,
which is the same everywhere. Imports numpy alone.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.format import fold

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SHORTEST, LONGEST = 1, 4
"""Characters of an n-gram: one Chinese character is a word or part of one, four Latin ones are most of a stem."""
MAX_CHARACTERS = 2000
"""A longer text is cut here: what an intent is recognised by stands early, and hashing must not take milliseconds."""


def count_ngrams(text: str) -> Counter[int]:
    """Hash (32 bits) to how often an n-gram with it occurs."""
    found: Counter[int] = Counter()
    for word in fold(text[:MAX_CHARACTERS])[0].casefold().split():
        padded = f" {word} "
        for length in range(SHORTEST, LONGEST + 1):
            grams = (padded[start : start + length] for start in range(len(padded) - length + 1))
            found.update(zlib.crc32(gram.encode("utf-8", "surrogatepass")) for gram in grams if gram != " ")
    return found


def learn_vocabulary(counted: Sequence[Counter[int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Hashes that occur, ascending (n,) int64, and their inverse document frequencies (n,) float32: ln((1+N)/(1+df))+1,
    as scikit-learn smooths them."""
    import numpy as np

    frequency = Counter(key for counts in counted for key in counts)
    keys = sorted(frequency)
    idf = [math.log((1 + len(counted)) / (1 + frequency[key])) + 1 for key in keys]
    return np.array(keys, dtype=np.int64), np.array(idf, dtype=np.float32)


def weigh(
    counts: Counter[int], hashes: npt.NDArray[np.int64], idf: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Places in `hashes` of the n-grams that are known, and their weights, of unit length; both empty where none is."""
    import numpy as np

    keys = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
    times = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
    places = np.searchsorted(hashes, keys)
    places[places == len(hashes)] = 0
    known = hashes[places] == keys if len(hashes) else np.zeros(len(keys), dtype=bool)
    places = places[known].astype(np.int64)
    weights = ((1 + np.log(times[known])) * idf[places]).astype(np.float32)
    norm = float(np.linalg.norm(weights))
    return places, weights / np.float32(norm) if norm else weights
