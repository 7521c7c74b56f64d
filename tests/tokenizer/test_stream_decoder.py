"""Laws of decoding an answer as it comes."""

import sys
from types import FrameType

from hypothesis import given, settings
from hypothesis import strategies as st

from kiloq.tokenizer import Tokenizer

fuzz = settings(derandomize=True, deadline=None, max_examples=200)
# All ids of the small vocabulary, some of its control tokens, and spare ids; half of the draws are single bytes.
any_ids = st.lists(st.one_of(st.integers(0, 255), st.integers(0, 605)), max_size=40)


@fuzz
@given(ids=any_ids, skip_special=st.booleans(), errors=st.sampled_from(["replace", "ignore"]))
def test_the_pieces_joined_are_the_full_decode(
    small: Tokenizer, ids: list[int], skip_special: bool, errors: str
) -> None:
    decoder = small.stream_decoder(skip_special=skip_special, errors=errors)
    streamed = "".join(map(decoder.push, ids)) + decoder.flush()
    assert streamed == small.decode(ids, skip_special=skip_special, errors=errors)


@fuzz
@given(text=st.text(max_size=30))
def test_no_piece_holds_half_a_character(small: Tokenizer, text: str) -> None:
    text = small.decode(small.encode(text)).replace("\ufffd", "")
    decoder = small.stream_decoder()
    shown = ""
    for token_id in small.encode(text):
        shown += decoder.push(token_id)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


def test_a_character_is_shown_with_its_last_byte(small: Tokenizer) -> None:
    decoder = small.stream_decoder()
    single = [small.vocabulary.ranks[bytes([byte])] for byte in "🦙".encode()]
    assert [decoder.push(i) for i in single] == ["", "", "", "🦙"]


def test_a_broken_character_is_shown_at_the_end_and_the_decoder_starts_anew(small: Tokenizer) -> None:
    decoder = small.stream_decoder()
    first_byte = small.vocabulary.ranks["🦙".encode()[:1]]
    assert decoder.push(first_byte) == ""
    assert decoder.flush() == "\ufffd"
    assert "".join(map(decoder.push, small.encode("the cat"))) == "the cat"


def test_skipped_control_tokens_do_not_part_a_character(small: Tokenizer) -> None:
    decoder = small.stream_decoder()
    ranks = small.vocabulary.ranks
    ids = [ranks[b"\xc3"], small.im_end_id, ranks[b"\xa9"]]
    assert "".join(map(decoder.push, ids)) == small.decode(ids, skip_special=True) == "é"


def test_each_token_costs_the_same_however_long_the_answer_is(small: Tokenizer) -> None:
    decoder = small.stream_decoder()
    ids = small.encode("the cat 猫 sat on 🦙 한\n" * 500)
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    costs = []
    for token_id in ids:
        calls = 0
        sys.setprofile(count)
        decoder.push(token_id)
        sys.setprofile(None)
        costs.append(calls)
        held_back, _ = decoder._utf8.getstate()
        assert len(held_back) <= 3  # the work inside a call is bounded too: no text is kept
    assert max(costs[-1000:]) <= max(costs[:1000]) <= 10
