import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from retrieval.contexts import find_contexts
from retrieval.records import Document, Golden
from tests.work import lines_run

TEXT = "The harbour of Oslo is deep and wide."


def documents(*texts: str) -> list[Document]:
    return [Document(f"d{number}", "", text) for number, text in enumerate(texts)]


def test_document_that_is_the_paragraph_comes_before_those_that_contain_it():
    inside = f"Norway. {TEXT} More."
    (found,) = find_contexts([TEXT], documents(inside, f"  {TEXT}\n", "Else.", TEXT))
    assert [place.golden(15, 19) for place in found] == [Golden("d1", 17, 21), Golden("d3", 15, 19)]
    (found,) = find_contexts([TEXT], documents(inside, f"Again: {TEXT}"))
    assert [place.golden(15, 19) for place in found] == [Golden("d0", 23, 27), Golden("d1", 22, 26)]


def test_paragraph_that_stands_twice_in_a_document_counts_once():
    (found,) = find_contexts([TEXT], documents(f"{TEXT} {TEXT}"))
    assert [place.golden(0, 3) for place in found] == [Golden("d0", 0, 3)]


def test_short_paragraphs_are_whole_documents_only():
    found = find_contexts(["See also.", "Yes"], documents("See also. Much more text here.", "See also.", "Yes"))
    assert [[place.doc_id for place in places] for places in found] == [["d1"], ["d2"]]
    assert find_contexts(["See also."], documents("See also. Much more text here.")) == [[]]


def test_other_white_space_and_unicode_forms_are_the_same_words():
    written = "Größe:\u00a0５５ km² ﬁt  for\tships."
    held = "A. Größe: 55 km2 fit for ships. B."
    (found,) = find_contexts([written], documents(held))
    start = written.index("for")
    golden = found[0].golden(start, len(written))
    assert held[golden.start : golden.end] == "for ships."
    golden = found[0].golden(written.index("km"), written.index("km") + 3)
    assert held[golden.start : golden.end] == "km2"
    golden = found[0].golden(start + 4, len(written) - 2)
    assert held[golden.start : golden.end] == "ship"
    golden = found[0].golden(start + 5, len(written))
    assert held[golden.start : golden.end] == "hips."


def test_chinese_paragraphs_are_found():
    paragraph = "奥斯陆是挪威的首都。港口很深。"
    found, missing = find_contexts([paragraph, "卑尔根在西部。"], documents(f"挪威\n{paragraph}\n更多。"))
    assert [place.golden(0, 3) for place in found] == [Golden("d0", 3, 6)]
    assert missing == []


words = st.lists(st.sampled_from(["a", "b", "½", "éx", "e\u0301x", "漢字"]), min_size=4, max_size=9)
spaces = st.sampled_from([" ", "\n", "  ", "\u3000"])


@given(words, st.data())
def test_any_word_of_a_paragraph_is_the_same_word_of_the_document(own, data):
    context = " ".join(own)
    held = "X " + "".join(
        unicodedata.normalize(data.draw(st.sampled_from(["NFC", "NFD"])), word) + data.draw(spaces) for word in own
    )
    (found,) = find_contexts([context], documents(held))
    start = 0
    for word in own:
        golden = found[0].golden(start, start + len(word))
        taken = held[golden.start : golden.end]
        assert unicodedata.normalize("NFKC", taken) == unicodedata.normalize("NFKC", word)
        start += len(word) + 1


def test_work_grows_linearly_with_paragraphs_and_documents():
    def work(count):
        texts = [f"The place number {n} lies by the river and has {n * 7} houses with gardens." for n in range(count)]
        held, found = documents(*(f"Of {text} End." for text in texts)), []
        lines = lines_run(lambda: found.extend(find_contexts(texts, held)))
        assert [len(places) for places in found] == [1] * count
        return lines

    assert work(800) < work(100) * 8 * 1.2
