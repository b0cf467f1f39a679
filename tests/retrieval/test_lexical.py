import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ArtifactError
from retrieval.lexical import K1, B, LexicalIndex, tokenize

TEXTS = ["黑豹队的防守只丢了308分", "卡罗来纳黑豹队赢得了比赛", "the Panthers' defense gave up 308 points", "", "。！"]


def bm25(texts: list[str], query: str) -> list[float]:
    """Lucene's BM25 written out, as an oracle: sum of idf · tf / (tf + k1 (1 − b + b · len / average))."""
    rows = [Counter(tokenize(text)) for text in texts]
    lengths = [sum(row.values()) for row in rows]
    average = sum(lengths) / len(lengths)
    scores = []
    for row, length in zip(rows, lengths, strict=True):
        score = 0.0
        for token in tokenize(query):
            holding = sum(token in other for other in rows)
            idf = math.log(1 + (len(rows) - holding + 0.5) / (holding + 0.5))
            score += idf * row[token] / (row[token] + K1 * (1 - B + B * length / average))
        scores.append(score)
    return scores


def test_tokenize_mixed_scripts_folds_words_and_cuts_unspaced_runs() -> None:
    assert tokenize("ＵＳＤ 308 Straße, 黑豹队！") == ["usd", "308", "strasse", "黑", "豹", "队", "黑豹", "豹队"]
    assert tokenize("カタ한국") == ["カ", "タ", "한", "국", "カタ", "タ한", "한국"]
    assert tokenize(" _ — ") == []


@pytest.mark.parametrize("query", ["黑豹队丢了多少分", "Panthers points", "308", "完全不相干的问题", "", "?!"])
def test_lexical_scores_any_query_equal_the_written_out_formula(tmp_path: Path, query: str) -> None:
    LexicalIndex.build(TEXTS).save(tmp_path)
    loaded = LexicalIndex.load(tmp_path)
    assert loaded.texts == len(TEXTS)
    np.testing.assert_allclose(loaded.scores(query), bm25(TEXTS, query), rtol=1e-4)


def test_lexical_files_hold_no_pickle(tmp_path: Path) -> None:
    LexicalIndex.build(TEXTS).save(tmp_path)
    for file in tmp_path.iterdir():
        assert file.suffix in (".npy", ".json")
        if file.suffix == ".npy":
            np.load(file, allow_pickle=False)


def test_lexical_index_of_texts_without_words_scores_zero() -> None:
    assert LexicalIndex.build(["", "!"]).scores("word").tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("written", "folded"),
    [
        ("exports", "export"),
        ("industries", "industry"),
        ("houses", "house"),
        ("gas", "gas"),
        ("glass", "glass"),
        ("campus", "campus"),
        ("shoes", "shoes"),
        ("größes", "grösses"),
    ],
)
def test_english_plurals_are_folded_and_other_words_kept(written: str, folded: str) -> None:
    assert tokenize(written) == [folded]


def test_damaged_lexical_files_are_refused_and_never_crash(tmp_path: Path) -> None:
    LexicalIndex.build([f"{text} {place}" for place in range(30) for text in TEXTS]).save(tmp_path)
    generator = random.Random(6)
    refused = 0
    for _ in range(150):
        file = generator.choice(sorted(tmp_path.iterdir()))
        content = file.read_bytes()
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        file.write_bytes(damaged[: generator.choice([len(damaged), generator.randrange(len(damaged))])])
        try:
            assert LexicalIndex.load(tmp_path).scores("Panthers 308").shape == (150,)
        except ArtifactError:
            refused += 1
        file.write_bytes(content)
    assert refused > 50
