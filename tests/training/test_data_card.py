from tests.training.tiny import passage
from training.data_card import Tally
from training.format import BEGIN_QUOTE, END_QUOTE
from training.records import RaftSample


def row(quotes: tuple[str, ...] = (), reasoning: str = "") -> RaftSample:
    shown = (passage("Oslo is in Norway."), passage("Bergen is in Norway too.", "d2"))
    return RaftSample(
        "raft-q", "q", "raft", "Where?", shown, (True, False), True, reasoning, quotes, "Norway", "", "train"
    )


def test_quoted_rows_are_those_with_a_quote_beside_the_reasoning_or_inside_it():
    tally = Tally()
    for made in (
        row(("Oslo is in Norway.",)),
        row(reasoning=f"It says {BEGIN_QUOTE}Oslo is in Norway.{END_QUOTE}"),
        row(reasoning="Oslo is."),
        row(),
    ):
        tally.add_passages(made, [])
    assert tally.under("quoted") == {"no": 2, "yes": 2}
    assert tally.under("distractors") == {"1": 4}
