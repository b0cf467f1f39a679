"""The data card of samples: what was made, what was left out and why, counted while the rows stream by.

In: rows with the hits they were made from, reasons of drops, places that questions touch. Out: a `Tally` of whole
numbers per block, which sum to the same total in any order and on any number of workers; the card as plain JSON for
the artifact's manifest. Not covered: making rows, showing the card (training/samples_view.py).
"""

from __future__ import annotations

import bisect
import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retrieval.records import Hit, Question
from training.format import MARKED_QUOTE
from training.records import RaftSample

TOKEN_EDGES = (0, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
"""Lower edges of the buckets of the token-length histogram; the last one is open."""
MICRO = 1_000_000
"""Scores are summed as whole millionths: sums of floats would depend on the order of the blocks."""

Key = tuple[str, ...]
Summary = Mapping[str, Any]


class Tally:
    """Whole numbers by key; what a block of rows adds to the card."""

    def __init__(self, counts: Iterable[tuple[Key, int]] = ()) -> None:
        self.counts: collections.Counter[Key] = collections.Counter(dict(counts))

    def add(self, *key: str, n: int = 1) -> None:
        """Count `n` more."""
        if n:
            self.counts[key] += n

    def merge(self, other: Tally) -> None:
        """Add another block's counts."""
        self.counts.update(other.counts)

    def to_json(self) -> str:
        """As text, for the way from a worker to the driver."""
        return json.dumps([[list(key), count] for key, count in sorted(self.counts.items())], ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Tally:
        """The inverse of `to_json`."""
        return cls((tuple(key), count) for key, count in json.loads(text))

    def under(self, *prefix: str) -> dict[str, int]:
        """The counts one level below `prefix`, sorted by key."""
        depth = len(prefix)
        return {
            key[depth]: count
            for key, count in sorted(self.counts.items())
            if len(key) == depth + 1 and key[:depth] == prefix
        }

    def add_drops(self, part: str, reasons: Mapping[str, int]) -> None:
        """Count questions that gave no row of `part`, by reason."""
        for reason, count in reasons.items():
            self.add("drops", part, reason, n=count)

    def add_maker(self, counts: Mapping[str, int]) -> None:
        """Take over what `RowMaker.raft` counted, such as `quote: kept` or `distractor: holds the answer`."""
        for name, count in counts.items():
            self.add("maker", *name.split(": ", 1), n=count)

    def add_row(self, part: str, kind: str) -> None:
        """Count a row of `part` (`raft`, `dsf`, `validation-raft`, `validation-dsf`) made from a `kind` of question."""
        self.add("rows", part)
        self.add("kinds", part, kind or "unnamed")

    def add_length(self, part: str, tokens: int) -> None:
        """Count the length of a whole row: prompt through the chat template, and target."""
        self.add("tokens", part, str(tokens))

    def add_passages(self, row: RaftSample, hits: Sequence[Hit]) -> None:
        """Count what a RAFT row shows: how many distractors, where the golden passage stands, and how alike they are.

        Scores are the index's own, of the passages that the search for the question found.
        """
        from training.passage_match import similarity

        golden = row.golden.index(True) if row.golden_present else None
        self.add("golden", "present" if row.golden_present else "absent")
        self.add("quoted", "yes" if row.quotes or MARKED_QUOTE.search(row.reasoning) else "no")
        self.add("distractors", str(len(row.passages) - (golden is not None)))
        if golden is not None:
            self.add("position", str(golden + 1))
        scores = {hit.passage.chunk_id: hit.score for hit in hits}
        for place, passage in enumerate(row.passages):
            name = "golden" if place == golden else "distractor"
            self.add("shown", name)
            if passage.chunk_id in scores:
                self.add("found", name)
                self.add("score", name, n=round(scores[passage.chunk_id] * MICRO))
            if golden is not None and place != golden:
                alike = similarity(row.passages[golden].text, passage.text)
                self.add("words", "pairs")
                self.add("words", "alike", n=round(alike * MICRO))


class Coverage:
    """Which documents and chunks the golden places of questions touch; a byte per chunk and split, no ids."""

    def __init__(self) -> None:
        self._marks: dict[tuple[str, str], bytearray] = collections.defaultdict(bytearray)

    def mark(self, touched: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Note the numbers of touched chunks, `{split: {"documents": […], "chunks": […]}}`, in any order."""
        for split, parts in touched.items():
            for part, numbers in parts.items():
                marks = self._marks[split, part]
                for number in numbers:
                    if number >= len(marks):
                        marks.extend(bytes(number + 1 - len(marks) + len(marks) // 4))
                    marks[number] = 1

    def summary(self, documents: int, chunks: int) -> dict[str, dict[str, float]]:
        """Per split, and over all: how many documents and chunks, and which share of the index's."""
        totals = {"documents": documents, "chunks": chunks}
        splits = sorted({split for split, _ in self._marks})
        found: dict[str, dict[str, float]] = {}
        for split in splits:
            counts = {part: self._marks[split, part].count(1) for part in totals}
            found[split] = _with_shares(counts, totals)
        union = {part: _count_union([self._marks[split, part] for split in splits]) for part in totals}
        return {**found, "all": _with_shares(union, totals)}


def _with_shares(counts: Mapping[str, int], totals: Mapping[str, int]) -> dict[str, float]:
    shares = {f"{part[:-1]}_share": round(counts[part] / total, 4) if total else 0.0 for part, total in totals.items()}
    return {**counts, **shares}


def _count_union(marks: Sequence[bytearray]) -> int:
    import numpy as np

    union = np.zeros(max(map(len, marks), default=0), dtype=bool)
    for one in marks:
        union[: len(one)] |= np.frombuffer(bytes(one), dtype=bool)
    return int(union.sum())


def count_kinds(questions: Iterable[Question]) -> dict[str, dict[str, int]]:
    """Questions by split and kind (`metadata.kind`)."""
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for question in questions:
        found[question.split][str(question.metadata.get("kind") or "unnamed")] += 1
    return {split: dict(sorted(kinds.items())) for split, kinds in sorted(found.items())}


def make_card(
    tally: Tally,
    *,
    questions: Mapping[str, Mapping[str, int]],
    dropped: Mapping[str, Mapping[str, int]],
    coverage: Summary,
    held_out_documents: int,
    tokenizer: str,
) -> dict[str, Any]:
    """The card as plain JSON.

    Args:
        tally: Of all blocks.
        questions: `count_kinds` of the questions that were kept.
        dropped: Questions that were left out before any row was made, step to reason to count.
        coverage: `Coverage.summary`.
        held_out_documents: Documents that no training row may show.
        tokenizer: Of which model the lengths are; empty where it could not be loaded.
    """
    parts = sorted({key[1] for key in tally.counts if key[0] == "drops"})
    shown = tally.under("golden")
    return {
        "questions": {split: dict(kinds) for split, kinds in questions.items()},
        "rows": tally.under("rows"),
        "kinds": {part: tally.under("kinds", part) for part in tally.under("rows")},
        "drops": {**{step: dict(reasons) for step, reasons in dropped.items() if reasons}}
        | {part: tally.under("drops", part) for part in parts},
        "golden_share": _share(shown.get("present", 0), sum(shown.values())),
        "golden_position": _by_number(tally.under("position")),
        "distractors_per_row": _by_number(tally.under("distractors")),
        "distractors_refused": tally.under("maker", "distractor"),
        "short_of_distractors": tally.counts["maker", "short of distractors"],
        "quotes": {name: tally.counts["maker", "quote", name] for name in ("kept", "repaired", "dropped", "none")},
        "quoted_share": _share(tally.counts["quoted", "yes"], sum(tally.under("quoted").values())),
        "reasoning_dropped": tally.counts["maker", "reasoning", "dropped with its quote"],
        "similarity": _similarity(tally),
        "tokenizer": tokenizer,
        "tokens": {part: _lengths(tally.under("tokens", part)) for part in tally.under("rows")} if tokenizer else {},
        "coverage": dict(coverage),
        "held_out_documents": held_out_documents,
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _by_number(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def _similarity(tally: Tally) -> dict[str, float | None]:
    """How alike passages are: to the question (mean score of the hits among them), and to the golden passage (words).

    `*_found` is the share of passages that the search found at all: random distractors mostly have no score.
    """
    card: dict[str, float | None] = {}
    for name in ("golden", "distractor"):
        found = tally.counts["found", name]
        card[f"{name}_found"] = _share(found, tally.counts["shown", name])
        card[f"{name}_score"] = round(tally.counts["score", name] / found / MICRO, 4) if found else None
    pairs = tally.counts["words", "pairs"]
    card["distractor_words_of_golden"] = round(tally.counts["words", "alike"] / pairs / MICRO, 4) if pairs else None
    return card


def _lengths(counts: Mapping[str, int]) -> dict[str, Any]:
    """A histogram of lengths, and what it rounds off: `counts[i]` rows have `edges[i]` tokens up to the next edge."""
    lengths = sorted((int(tokens), rows) for tokens, rows in counts.items())
    rows = sum(n for _, n in lengths)
    buckets = [0] * len(TOKEN_EDGES)
    for tokens, n in lengths:
        buckets[bisect.bisect_right(TOKEN_EDGES, tokens) - 1] += n
    return {
        "edges": list(TOKEN_EDGES),
        "counts": buckets,
        "total": sum(tokens * n for tokens, n in lengths),
        "mean": round(sum(tokens * n for tokens, n in lengths) / rows, 1) if rows else 0.0,
        "median": _quantile(lengths, rows, 0.5),
        "p95": _quantile(lengths, rows, 0.95),
        "longest": lengths[-1][0] if lengths else 0,
    }


def _quantile(lengths: Sequence[tuple[int, int]], rows: int, share: float) -> int:
    """The least length that at least `share` of the rows do not exceed."""
    seen = 0
    for tokens, n in lengths:
        seen += n
        if seen >= share * rows:
            return tokens
    return 0
