"""Passages, questions and a recipe for the training room's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrieval.questions import write_questions
from retrieval.records import Chunk, Golden, Hit, Passage, Question
from tests.retrieval.tiny import COUNTRIES, GOODS, country_text
from training.config import PromptConfig, TrainingRecipe
from training.format import PromptFormat

EXPORT_YEARS = (1990, 1995, 2000, 2005)
TEST_COUNTRIES = ("ghana", "hungary")


def prompt_format(language: str = "en", **options: bool) -> PromptFormat:
    return PromptFormat.load(PromptConfig(**options), language)


def passage(text: str, doc_id: str = "d1", start: int = 0, title: str = "Title", heading: str = "Heading") -> Passage:
    return Passage(f"{doc_id}-{start}", doc_id, title, heading, f"file:///{doc_id}", text, start, start + len(text))


def chunk(text: str, doc_id: str = "d1", start: int = 0) -> Chunk:
    return Chunk(f"{doc_id}-{start}", doc_id, doc_id.title(), "", text, start, start + len(text), len(text.split()))


def hits_of(chunks: list[Chunk]) -> list[Hit]:
    return [Hit(Passage.of(found), 1.0 / rank, rank) for rank, found in enumerate(chunks, start=1)]


def country_questions() -> list[Question]:
    """Three kinds of question about every country of the retrieval room's corpus, with spans, and their splits."""
    questions = []
    for place, title in enumerate(COUNTRIES):
        text, doc_id = country_text(place), title.lower()
        facts = [("area", f"What is the total area of {title}?", f"{83 + place},{871 - place} sq km", "total: ")]
        facts += [("goods", f"What is there in summer in {title}?", GOODS[place], "temperate; cold winters and ")]
        for year in EXPORT_YEARS:
            before = f"In year {year} it exported "
            facts.append(
                ("exports", f"How much did {title} export in {year}?", f"{year - 1990} tons of {GOODS[place]}", before)
            )
        for number, (kind, asked, answer, before) in enumerate(facts):
            start = text.index(before + answer)
            golden = (Golden(doc_id, start, start + len(before + answer)),)
            split = "test_new_documents" if doc_id in TEST_COUNTRIES else "train"
            questions.append(
                Question(f"{doc_id}-{number}", asked, (answer,), golden, split, {"kind": kind, "country": title})
            )
            if split == "train" and kind == "area":
                again = f"How large is {title} altogether?"
                questions.append(
                    Question(f"{doc_id}-again", again, (answer,), golden, "test_new_questions", {"kind": kind})
                )
    return questions


def training_recipe(folder: Path, corpus: Path, encoder: Path, base: Path, **sections: Any) -> TrainingRecipe:
    """A recipe over the retrieval room's tiny corpus, with questions about it, a tiny encoder and a tiny base model."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "questions.jsonl"
    if not questions.exists():
        write_questions(questions, country_questions())
    values: dict[str, Any] = {
        "name": "tiny",
        "store": {"uri": str(folder / "store")},
        "ray": {"num_cpus": 2},
        "corpus": {"path": str(corpus)},
        "encoder": {"model": str(encoder), "precision": "float32"},
        "chunking": {"max_tokens": 48},
        "questions": {"path": str(questions)},
        "samples": {"raft_rows": 24, "dsf_rows": 24},
        "model": {"base": str(base), "precision": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"max_tokens": 4000, "threads_per_worker": 1, "learning_rate": 3e-3},
    }
    for section, given in sections.items():
        values[section] = {**values.get(section, {}), **given} if isinstance(given, dict) else given
    return TrainingRecipe.model_validate(values)
