"""English against SQuAD's published rules and Chinese against CMRC's, each written a second time here."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.text_match import contains, exact_match, f1, names, numbers, unsupported

WORDS = st.lists(
    st.sampled_from(["the", "a", "An", "Paris,", "River", "river", "1,250", "3.5%", "-", "km", "(2021)"]), max_size=7
).map(" ".join)
CHINESE = st.text(alphabet="黑豹队的防守丢了，。3分A b", max_size=12)


def squad_normalise(text: str) -> str:
    kept = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def squad_f1(prediction: str, truth: str) -> float:
    left, right = squad_normalise(prediction).split(), squad_normalise(truth).split()
    rest, same = list(right), 0
    for word in left:
        if word in rest:
            rest.remove(word)
            same += 1
    return 0.0 if same == 0 else 2 * (same / len(left)) * (same / len(right)) / (same / len(left) + same / len(right))


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_english_scores_agree_with_squad(prediction, accepted):
    assert exact_match(prediction, accepted, "en") == max(
        float(squad_normalise(prediction) == squad_normalise(answer)) for answer in accepted
    )
    assert f1(prediction, accepted, "en") == pytest.approx(max(squad_f1(prediction, answer) for answer in accepted))


def cmrc_segments(text: str) -> list[str]:
    segments, latin = [], ""
    for char in text.lower():
        if char in "，。 ":
            segments, latin = segments + ([latin] if latin else []), ""
        elif "\u4e00" <= char <= "\u9fa5":
            segments, latin = [*segments, *([latin] if latin else []), char], ""
        else:
            latin += char
    return segments + ([latin] if latin else [])


def cmrc_f1(prediction: str, truth: str) -> float:
    left, right = cmrc_segments(truth), cmrc_segments(prediction)
    lengths = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, first in enumerate(left):
        for j, second in enumerate(right):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if first == second else 0
    common = max(map(max, lengths))
    if common == 0:
        return 0.0
    precision, recall = common / len(right), common / len(left)
    return 2 * precision * recall / (precision + recall)


@given(CHINESE, st.lists(CHINESE, min_size=1, max_size=3))
def test_chinese_f1_agrees_with_cmrc(prediction, accepted):
    assert f1(prediction, accepted, "zh") == pytest.approx(max(cmrc_f1(prediction, answer) for answer in accepted))


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [("１３６ 次。", ["136次"], 1.0), ("卡万·肖特", ["卡万肖特"], 1.0), ("四次", ["三次"], 0.0), ("", ["四次"], 0.0)],
)
def test_chinese_exact_match_folds_width_and_punctuation(answer, accepted, expected):
    assert exact_match(answer, accepted, "zh") == expected


@pytest.mark.parametrize(
    ("text", "accepted", "language", "expected"),
    [
        ("The answer is the Mont Blanc.", ["Mont Blanc"], "en", 1.0),
        ("It has 15 ports.", ["5"], "en", 0.0),
        ("Blanc Mont", ["Mont Blanc"], "en", 0.0),
        ("anything", ["the"], "en", 0.0),
        ("防守丢了308分。", ["308"], "zh", 1.0),
        ("防守丢了3081分。", ["308"], "zh", 0.0),
    ],
)
def test_containment_wants_whole_words_in_order(text, accepted, language, expected):
    assert contains(text, accepted, language) == expected


def test_numbers_are_equal_whatever_their_separators_and_zeros():
    assert numbers("1,250.50 km and 7%, １２ in 2021") == {"1250.5", "7", "12", "2021"}
    assert numbers("3.10") == numbers("3.1")


def test_names_leave_out_words_that_only_start_a_sentence():
    assert names("The capital is Paris. Approximately half of Europe's people. However, no.") == {"paris", "europe"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Paris", False),
        ("Lyon", True),
        ("paris has 2 million people", False),
        ("3 million", True),
        ("The seat of France is Paris", False),
        ("", False),
    ],
)
def test_support_is_missing_when_a_number_or_name_is_in_no_source(answer, expected):
    sources = ["What is the capital of France?", "Paris: seat of government, 2 million people"]
    assert unsupported(answer, sources) is expected


def test_chinese_support_is_missing_when_most_character_pairs_are():
    sources = ["黑豹队的防守只丢了308分"]
    assert not unsupported("黑豹队的防守", sources)
    assert unsupported("丹佛野马队", sources)
    assert unsupported("309分", sources)
