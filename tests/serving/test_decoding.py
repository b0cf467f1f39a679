import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.decoding import TextAssembler, sample


def decode_bytes(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def run(text, stop=(), incremental=True):
    """Pieces and assembler after feeding `text` byte by byte, as a byte-level model would."""
    assembler = TextAssembler(decode_bytes, stop, incremental=incremental)
    pieces = []
    for byte in text.encode():
        pieces.append(assembler.push(byte))
        if assembler.stopped:
            break
    pieces.append(assembler.finish())
    return pieces, assembler


@given(st.text(max_size=40))
def test_assembler_any_text_pieces_join_to_it_in_whole_characters(text):
    pieces, assembler = run(text)
    assert "".join(pieces) == text == assembler.text
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


def test_assembler_multibyte_character_is_held_until_complete():
    assembler = TextAssembler(decode_bytes, (), incremental=True)
    pieces = [assembler.push(byte) for byte in "é首".encode()]
    assert pieces == ["", "é", "", "", "首"]


@given(st.text(alphabet="abS", max_size=25), st.lists(st.text(alphabet="abS", min_size=1, max_size=4), max_size=3))
def test_assembler_stop_strings_cut_where_the_first_begins(text, stops):
    pieces, assembler = run(text, stops)
    # The oracle walks the text as it grows and cuts at the earliest stop string that is complete.
    expected = text
    for end in range(1, len(text) + 1):
        places = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if places:
            expected = text[: min(places)]
            break
    assert "".join(pieces) == expected
    assert assembler.stopped == (expected != text)


def test_assembler_possible_stop_string_is_not_shown_before_it_is_ruled_out():
    assembler = TextAssembler(decode_bytes, ("\nQ:",), incremental=True)
    assert [assembler.push(byte) for byte in b"a\nQx"] == ["a", "", "", "\nQx"]
    assert not assembler.stopped


def test_assembler_without_reader_or_stop_decodes_once():
    calls = []

    def decode(tokens):
        calls.append(len(tokens))
        return decode_bytes(tokens)

    assembler = TextAssembler(decode, (), incremental=False)
    for byte in b"hello":
        assembler.push(byte)
    assert assembler.finish() == "hello"
    assert calls == [5]


def draws(temperature, top_p, seed, n=400):
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    generator = torch.Generator().manual_seed(seed)
    return [sample(logits, temperature, top_p, generator) for _ in range(n)]


def test_sample_same_seed_same_draws_other_seed_others():
    assert draws(1.0, 1.0, 3) == draws(1.0, 1.0, 3)
    assert draws(1.0, 1.0, 3) != draws(1.0, 1.0, 4)


def test_sample_follows_the_probabilities():
    drawn = draws(1.0, 1.0, 0, n=4000)
    assert [abs(drawn.count(token) / 4000 - p) < 0.03 for token, p in enumerate((0.6, 0.3, 0.1))] == [True] * 3


def test_sample_nucleus_keeps_the_fewest_tokens_that_reach_top_p():
    assert set(draws(1.0, 0.5, 0)) == {0}
    assert set(draws(1.0, 0.85, 0)) == {0, 1}
    assert set(draws(1.0, 0.95, 0)) == {0, 1, 2}


def test_sample_low_temperature_approaches_greedy():
    assert set(draws(0.01, 1.0, 0)) == {0}
