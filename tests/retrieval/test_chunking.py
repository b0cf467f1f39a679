import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from retrieval.chunking import SEGMENT_CHARS, Chunker, chunk_document, embedding_text
from retrieval.config import ChunkingConfig
from retrieval.records import Document
from retrieval.sections import first_heading


def one_token_per_word() -> Tokenizer:
    """Words and single Chinese characters are one token each, so that token counts can be read off the text."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def byte_pairs() -> Tokenizer:
    """Byte-level BPE, whose counts do not add up: a space joins the word after it, and a character is 1 to 4 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        ["the total area and the population of the country | Title\n# People > Area"], trainer
    )
    return tokenizer


TOKENIZER = one_token_per_word()
BYTE_PAIRS = byte_pairs()

words = st.sampled_from(
    [
        "total",
        "1,234",
        "km²",
        "Österreich",
        "naïve",
        "面积",
        "人口众多。",
        "首都是维也纳，",
        "😀",
        "e\u0301",
        "ﷺ",
        "| a | b |",
    ]
)
lines = st.lists(words, min_size=1, max_size=30).map(" ".join)
chinese = st.lists(st.sampled_from("面积人口首都国家。！？，"), min_size=1, max_size=120).map("".join)
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=40)
headings = st.tuples(st.integers(1, 5), st.sampled_from(["Area", "Geography", "气候", "People " * 12, "x" * 80])).map(
    lambda pair: "#" * pair[0] + " " + pair[1]
)
fences = st.sampled_from(
    ["```\n# not a heading\n## nor this\n```", "~~~\n" + "code line 1\n\n" * 9 + "~~~", "```\nopen"]
)
table_rows = st.integers(1, 12).map(
    lambda rows: (
        "| Country | Area |\n| --- | ---: |\n" + "\n".join(f"| name {row} | {row} km² |" for row in range(rows))
    )
)
titles = st.sampled_from(
    ["", "Title", "A title of more words than sixteen " * 4, "没有空格的很长很长的标题" * 5, "y" * 200]
)
documents = st.tuples(
    titles,
    st.lists(st.one_of(lines, chinese, headings, fences, table_rows, anything), max_size=14),
    st.sampled_from(["\n\n", "\n", "\r\n\r\n", "\n \n\u3000\n"]),
).map(lambda parts: Document("d", parts[0], parts[2].join(parts[1])))
configs = st.builds(
    ChunkingConfig,
    max_tokens=st.integers(16, 60),
    overlap_tokens=st.sampled_from([0, 0, 5]),
    merge=st.booleans(),
)
tokenizers = st.sampled_from([TOKENIZER, BYTE_PAIRS])


def heading_places(text: str, levels: set[str]) -> list[tuple[int, int]]:
    """Character spans of ATX heading lines, by an independent Markdown parser."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    tokens = MarkdownIt().disable("lheading").disable("code").parse(text)
    return [
        (starts[token.map[0]], starts[token.map[1]])
        for token, inside in itertools.pairwise(tokens)
        if token.type == "heading_open" and token.tag in levels and token.map and inside.content.strip()
    ]


@settings(max_examples=120, deadline=None)
@given(documents, configs, tokenizers)
def test_chunk_offsets_any_document_are_the_text(
    document: Document, config: ChunkingConfig, tokenizer: Tokenizer
) -> None:
    chunks = chunk_document(document, tokenizer, config)
    for chunk in chunks:
        assert document.text[chunk.start : chunk.end] == chunk.text
        assert chunk.text.strip()
    assert [(chunk.start, chunk.end) for chunk in chunks] == sorted((chunk.start, chunk.end) for chunk in chunks)
    assert len({chunk.chunk_id for chunk in chunks}) == len(chunks)
    assert chunk_document(document, tokenizer, config) == chunks


@settings(max_examples=120, deadline=None)
@given(documents, configs, tokenizers)
def test_chunks_any_document_cover_all_text_outside_headings(
    document: Document, config: ChunkingConfig, tokenizer: Tokenizer
) -> None:
    covered = [False] * len(document.text)
    for chunk in chunk_document(document, tokenizer, config):
        covered[chunk.start : chunk.end] = [True] * len(chunk.text)
    for start, end in heading_places(document.text, {"h1", "h2", "h3", "h4", "h5", "h6"}):
        covered[start:end] = [True] * (min(end, len(document.text)) - start)
    missed = [at for at, done in enumerate(covered) if not done and not document.text[at].isspace()]
    assert missed == []


@settings(max_examples=120, deadline=None)
@given(documents, configs)
def test_chunks_any_document_cross_no_heading_of_level_one_or_two(document: Document, config: ChunkingConfig) -> None:
    borders = [start for start, _ in heading_places(document.text, {"h1", "h2"})]
    for chunk in chunk_document(document, TOKENIZER, config):
        assert not any(chunk.start <= border < chunk.end for border in borders)


@settings(max_examples=120, deadline=None)
@given(documents, configs, tokenizers)
def test_chunk_tokens_any_document_stay_within_max_tokens(
    document: Document, config: ChunkingConfig, tokenizer: Tokenizer
) -> None:
    for chunk in chunk_document(document, tokenizer, config):
        whole = embedding_text(chunk.title, chunk.heading, chunk.text)
        assert chunk.tokens == len(tokenizer.encode(whole).ids)
        assert chunk.tokens <= config.max_tokens
        assert len(chunk.text) <= 16 * config.max_tokens


FACTS = """# Austria

A country in Europe.

## Geography

### Area

total: 83,871 sq km

### Climate

temperate

## People

### Population

8,913,088
"""


def test_chunk_document_small_subsections_share_a_chunk_with_the_common_heading() -> None:
    chunks = chunk_document(Document("at", "Austria", FACTS), TOKENIZER, ChunkingConfig(max_tokens=40))
    assert [(chunk.heading, chunk.text) for chunk in chunks] == [
        ("", "A country in Europe."),
        ("Geography", "### Area\n\ntotal: 83,871 sq km\n\n### Climate\n\ntemperate"),
        ("People > Population", "8,913,088"),
    ]


def test_chunk_document_without_merging_gives_each_subsection_its_own_heading() -> None:
    config = ChunkingConfig(max_tokens=40, merge=False)
    chunks = chunk_document(Document("at", "Austria", FACTS), TOKENIZER, config)
    assert [(chunk.heading, chunk.text) for chunk in chunks[1:3]] == [
        ("Geography > Area", "total: 83,871 sq km"),
        ("Geography > Climate", "temperate"),
    ]


def test_chunk_document_section_intro_and_subsection_start_without_the_section_line() -> None:
    text = "## Geography\nIn the Alps.\n### Area\n83,871\n"
    (chunk,) = chunk_document(Document("at", "Austria", text), TOKENIZER, ChunkingConfig(max_tokens=40))
    assert (chunk.heading, chunk.text) == ("Geography", "In the Alps.\n### Area\n83,871")


def test_chunk_document_long_section_splits_and_every_piece_keeps_the_heading() -> None:
    text = "## People\n\n### Languages\n\n" + " ".join(f"word{n}" for n in range(100))
    chunks = chunk_document(Document("at", "Austria", text), TOKENIZER, ChunkingConfig(max_tokens=24))
    # Austria, |, People, >, Languages leave 19 of 24 tokens, and 5 × 19 < 100 < 6 × 19.
    assert [len(chunk.text.split()) for chunk in chunks] == [19] * 5 + [5]
    assert {chunk.heading for chunk in chunks} == {"People > Languages"}


def test_chunk_document_overlap_repeats_the_end_of_the_piece_before() -> None:
    text = " ".join(f"word{n}" for n in range(60))
    config = ChunkingConfig(max_tokens=20, overlap_tokens=5)
    chunks = chunk_document(Document("d", "", text), TOKENIZER, config)
    assert all(later.start < earlier.end for earlier, later in itertools.pairwise(chunks))


def test_chunk_document_repeated_text_gets_ids_of_its_own() -> None:
    text = "## A\n\nsame\n\n## B\n\nsame\n"
    chunks = chunk_document(Document("d", "", text), TOKENIZER, ChunkingConfig())
    assert [chunk.text for chunk in chunks] == ["same", "same"]
    assert chunks[0].chunk_id != chunks[1].chunk_id


def test_chunk_document_edited_heading_keeps_the_ids_of_untouched_text() -> None:
    before = chunk_document(Document("d", "", FACTS), TOKENIZER, ChunkingConfig())
    after = chunk_document(Document("d", "", FACTS.replace("People", "Persons")), TOKENIZER, ChunkingConfig())
    assert [chunk.chunk_id for chunk in before] == [chunk.chunk_id for chunk in after]


def test_chunk_document_headings_only_gives_no_chunks() -> None:
    assert chunk_document(Document("d", "T", "# T\n\n## Empty\n"), TOKENIZER, ChunkingConfig()) == []


def test_chunk_document_title_longer_than_the_limit_leaves_half_for_the_text() -> None:
    document = Document("d", "very " * 50, " ".join(["word"] * 40))
    chunks = chunk_document(document, TOKENIZER, ChunkingConfig(max_tokens=16))
    assert [len(chunk.text.split()) for chunk in chunks] == [8] * 5
    assert {chunk.title for chunk in chunks} == {"very very very very very very very…"}


def test_chunk_document_long_heading_path_loses_its_top_first() -> None:
    text = "## One two three four\n\n### Five six\n\n#### Seven\n\n" + "word " * 40
    chunks = chunk_document(Document("d", "Title", text), TOKENIZER, ChunkingConfig(max_tokens=16))
    # Of 16 tokens the header may take 8: Title, |, Five, six, >, Seven are 6; with "One two three four >" it has 11.
    assert {(chunk.title, chunk.heading) for chunk in chunks} == {("Title", "Five six > Seven")}
    assert [len(chunk.text.split()) for chunk in chunks] == [10] * 4


def test_chunk_document_small_table_and_fence_stay_whole() -> None:
    table = "| Country | Area |\n| --- | --- |\n| Austria | 83 |\n| Chile | 756 |"
    fence = "```\nfirst line\n\n## no heading\n\nlast line\n```"
    text = "\n\n".join(["word " * 20, table, "word " * 20, fence, "word " * 20])
    chunks = chunk_document(Document("d", "", text), TOKENIZER, ChunkingConfig(max_tokens=40))
    assert sum(table in chunk.text for chunk in chunks) == 1
    assert sum(fence in chunk.text for chunk in chunks) == 1


def test_chunk_document_divided_table_pieces_are_whole_rows_headed_by_the_columns() -> None:
    rows = [f"| place{n} | {n} |" for n in range(30)]
    table = "\n".join(["| Country | Area in km² |", "|---|---:|", *rows])
    text = f"## Areas\n\nBefore the table.\n\n{table}\n\nAfter the table."
    chunks = chunk_document(Document("d", "", text), TOKENIZER, ChunkingConfig(max_tokens=40))
    inside = [chunk for chunk in chunks if "place" in chunk.text]
    assert {chunk.heading for chunk in inside} == {"Areas > Country | Area in km²"}
    assert [line for chunk in inside for line in chunk.text.splitlines() if "place" in line] == rows
    assert [(chunk.heading, chunk.text) for chunk in chunks if chunk not in inside] == [
        ("Areas", "Before the table."),
        ("Areas", "After the table."),
    ]


def test_chunk_document_chinese_is_cut_at_the_ends_of_sentences() -> None:
    text = "".join(f"这是第{number}个国家的首都。它的面积很大！人口多吗？" for number in "一二三四五六七八九")
    chunks = chunk_document(Document("d", "", text), TOKENIZER, ChunkingConfig(max_tokens=30))
    assert len(chunks) > 5
    assert {chunk.text[-1] for chunk in chunks} <= set("。！？")


def test_chunk_document_word_that_the_tokenizer_calls_one_token_is_cut_by_characters() -> None:
    blob = "QUJD" * 2000
    chunks = chunk_document(Document("d", "", f"before {blob} after"), TOKENIZER, ChunkingConfig(max_tokens=16))
    assert max(len(chunk.text) for chunk in chunks) == 256
    assert "".join(chunk.text for chunk in chunks).replace(" ", "") == f"before{blob}after"


def test_chunk_document_long_section_is_cut_at_blank_lines_between_segments() -> None:
    paragraph = "word " * 12
    text = "\n\n".join([paragraph.strip()] * 4000)
    chunks = chunk_document(Document("d", "", text), TOKENIZER, ChunkingConfig(max_tokens=16))
    assert len(text) > 10 * SEGMENT_CHARS
    assert [chunk.text for chunk in chunks] == [paragraph.strip()] * 4000


@pytest.mark.parametrize(
    "line", ["# a" + " \t" * 40_000 + "b", "|" + " " * 40_000 + "\n|-", "# " + "a#" * 400, "`" * 2000]
)
def test_chunk_document_hostile_line_does_not_hold_the_patterns_up(line: str) -> None:
    began = time.process_time()
    chunk_document(Document("d", "", f"{line}\n" * 3), TOKENIZER, ChunkingConfig(max_tokens=60))
    assert time.process_time() - began < 10  # a pattern that backtracks takes minutes


def test_chunker_truncating_tokenizer_counts_whole_texts_and_is_left_as_it_was() -> None:
    tokenizer = one_token_per_word()
    tokenizer.enable_truncation(4)
    assert Chunker(tokenizer, ChunkingConfig()).count_tokens("a b c d e f") == 6
    assert tokenizer.truncation is not None


def test_first_heading_in_a_code_fence_is_not_the_title() -> None:
    assert first_heading("~~~sh\n# comment\n~~~\n# Title ##\n") == "Title"
    assert first_heading("# About C#\n") == "About C#"


def test_chunking_config_overlap_of_half_the_limit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"chunking\.overlap_tokens must be less than half of max_tokens \(32\), got 16"
    ):
        ChunkingConfig(max_tokens=32, overlap_tokens=16)
