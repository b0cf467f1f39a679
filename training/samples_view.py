"""Samples as a person reads them: rows with their passages, golden marks, quotes where they stand, and the data card.

In: a samples artifact, or its rows; the card of its manifest. Out: text. Quotes are set in ⟪ ⟫, and in bold on a
terminal. Not covered: making either (training/sample_writer.py, training/data_card.py).
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.text_table import WIDTH, render_table
from training.format import find_quote
from training.records import RaftSample

if TYPE_CHECKING:
    import pyarrow as pa

OPEN, CLOSE = "⟪", "⟫"
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"
BAR = 40
"""Characters of the longest bar of a histogram."""
_INDENT = " " * 6


def pick_rows(
    files: Sequence[Path], count: int, seed: int, *, question: str = "", without_golden: bool = False
) -> list[RaftSample]:
    """Rows drawn from the seed, in their order in the files; only the question's, or those without a golden passage.

    Reads ids and flags of all rows, and whole rows only of those that it picks.
    """
    import pyarrow.parquet as pq

    wanted: list[tuple[Path, int]] = []
    for path in files:
        flags = pq.read_table(path, columns=["question_id", "golden_present"])
        wanted += [(path, row) for row in _matching(flags, question, without_golden)]
    drawn = sorted(random.Random(f"{seed}/show").sample(range(len(wanted)), min(count, len(wanted))))
    return list(_read([wanted[place] for place in drawn]))


def _matching(flags: pa.Table, question: str, without_golden: bool) -> Iterator[int]:
    for row, (question_id, present) in enumerate(zip(*(column.to_pylist() for column in flags.columns), strict=True)):
        if (not question or question_id == question) and not (without_golden and present):
            yield row


def _read(places: Sequence[tuple[Path, int]]) -> Iterator[RaftSample]:
    import pyarrow.parquet as pq

    for path in dict.fromkeys(path for path, _ in places):
        table = pq.read_table(path).take([row for other, row in places if other == path])
        yield from map(RaftSample.from_row, table.to_pylist())


def describe_sample(sample: RaftSample, *, bold: bool = False) -> str:
    """A row as a person reads it: question, passages with the golden one marked and quotes set off, target."""
    lines = [f"--- {sample.sample_id}{_summary(sample)}", f"question: {sample.question}"]
    golden = sample.golden or (False,) * len(sample.passages)
    for number, (passage, is_golden) in enumerate(zip(sample.passages, golden, strict=True), start=1):
        mark = "golden    " if is_golden else "distractor"
        title = f"{passage.title} | {passage.heading}" if passage.heading else passage.title
        lines.append(f"  {number} {mark} {title}")
        lines.append(_wrap(mark_quotes(passage.text, sample.quotes)))
    lines.append("target:")
    lines += [_INDENT + line for line in sample.target.splitlines()]
    text = "\n".join([*lines, ""])
    return text.replace(OPEN, BOLD + OPEN).replace(CLOSE, CLOSE + PLAIN) if bold else text


def _summary(sample: RaftSample) -> str:
    if sample.objective != "raft":
        return " (closed book)"
    return f" ({len(sample.passages)} passages, {'with' if sample.golden_present else 'without'} the golden one)"


def mark_quotes(text: str, quotes: Sequence[str]) -> str:
    """`text` with each quote that stands in it between ⟪ and ⟫; overlapping quotes as one."""
    spans = sorted(span for span in (find_quote(quote, text) for quote in quotes) if span)
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    for start, end in reversed(joined):
        text = f"{text[:start]}{OPEN}{text[start:end]}{CLOSE}{text[end:]}"
    return text


def _wrap(text: str) -> str:
    flat = " ".join(text.split())
    return textwrap.fill(flat, WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False)


def describe_card(card: Mapping[str, Any], name: str) -> str:
    """The data card as text for a terminal.

    Raises:
        UserError: there is no card.
    """
    if not card:
        raise UserError(f"{name} has no data card: build the samples again with this version")
    sections: list[Callable[[Mapping[str, Any]], str]] = [
        _questions, _rows, _drops, _passages, _distractors, _coverage, _tokens,
    ]  # fmt: skip
    return "\n\n".join([f"Data card of {name}", *(text for text in (section(card) for section in sections) if text)])


def _questions(card: Mapping[str, Any]) -> str:
    rows = [
        [split, str(sum(kinds.values())), ", ".join(f"{kind} {count}" for kind, count in kinds.items())]
        for split, kinds in card["questions"].items()
    ]
    held_out = f"{card['held_out_documents']} documents are held out: no row shows them"
    return render_table("Questions", ["split", "questions", "kinds"], rows, held_out)


def _rows(card: Mapping[str, Any]) -> str:
    rows = [
        [part, str(count), ", ".join(f"{kind} {n}" for kind, n in card["kinds"][part].items())]
        for part, count in card["rows"].items()
    ]
    return render_table("Rows", ["part", "rows", "kinds"], rows)


def _drops(card: Mapping[str, Any]) -> str:
    rows = [[step, reason, str(count)] for step, reasons in card["drops"].items() for reason, count in reasons.items()]
    return render_table("Left out", ["step", "reason", "questions"], rows) if rows else "Left out: nothing"


def _passages(card: Mapping[str, Any]) -> str:
    quotes, alike = card["quotes"], card["similarity"]
    found = {
        name: f"{alike[f'{name}_found']:.1%}, mean score {_score(alike[f'{name}_score'])}"
        for name in ("golden", "distractor")
    }
    rows = [
        ["rows that show the golden passage", f"{card['golden_share']:.1%}"],
        ["rows with a quote", f"{card['quoted_share']:.1%}"],
        ["quotes kept, repaired, dropped", f"{quotes['kept']}, {quotes['repaired']}, {quotes['dropped']}"],
        ["rows with the golden passage but no quote", str(quotes["none"])],
        ["distractors per row: rows", _pairs(card["distractors_per_row"])],
        ["place of the golden passage: rows", _pairs(card["golden_position"])],
        ["rows short of distractors", str(card["short_of_distractors"])],
        ["golden passages that the search found", found["golden"]],
        ["distractors that the search found", found["distractor"]],
        ["words that a distractor shares with the golden passage", _score(alike["distractor_words_of_golden"])],
    ]
    return render_table("RAFT rows", ["", ""], rows)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{key}: {count}" for key, count in counts.items()) or "none"


def _distractors(card: Mapping[str, Any]) -> str:
    rows = [[reason, str(count)] for reason, count in card["distractors_refused"].items()]
    return render_table("Passages refused as distractors", ["reason", "times"], rows) if rows else ""


def _coverage(card: Mapping[str, Any]) -> str:
    rows = [
        [
            split,
            f"{found['documents']} ({found['document_share']:.1%})",
            f"{found['chunks']} ({found['chunk_share']:.1%})",
        ]
        for split, found in card["coverage"].items()
    ]
    return render_table("What the questions cover of the index", ["split", "documents", "chunks"], rows)


def _tokens(card: Mapping[str, Any]) -> str:
    """Histograms as bars, one per part of the rows."""
    blocks = []
    for part, found in card["tokens"].items():
        title = (
            f"Tokens of {part} rows ({card['tokenizer']}): mean {found['mean']:g}, median {found['median']}, "
            f"95% up to {found['p95']}, longest {found['longest']}"
        )
        blocks.append("\n".join([title, *_bars(found["edges"], found["counts"])]))
    return "\n\n".join(blocks) or "Tokens: not counted, because the base model's tokenizer was not at hand"


def _bars(edges: Sequence[int], counts: Sequence[int]) -> list[str]:
    """A line per bucket, from the first that holds rows to the last."""
    held = [place for place, count in enumerate(counts) if count]
    if not held:
        return []
    ends = [f"{edge - 1}" for edge in edges[1:]] + ["…"]
    most = max(counts)
    return [
        f"{edges[place]:>6} – {ends[place]:<5} {'█' * round(counts[place] / most * BAR):<{BAR}} {counts[place]}"
        for place in range(held[0], held[-1] + 1)
    ]
