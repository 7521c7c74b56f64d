"""Laws of TextStream: streamed text is the text up to its first stop string, and no safe text is held."""

import codecs
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiloq.engine.stops import TextStream, find_stop


class Utf8Decoder:
    """Ids index pieces of bytes; half characters wait, as in the tokenizer's own stream decoder."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._pieces[token_id])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def stream(pieces: list[bytes], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    text = TextStream(Utf8Decoder(pieces), stop)
    shown = []
    for token_id in range(len(pieces)):
        shown.append(text.push(token_id))
        if text.stopped:
            break
    shown.append(text.flush())
    return shown, text.stopped


def naive_cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Reads the text one character longer at a time until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        for word in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(word):
                return text[: end - len(word)], True
    return text, False


letters = st.text(alphabet="ab\n好🙂", max_size=24)
stops = st.lists(st.text(alphabet="ab\n好🙂", min_size=1, max_size=5), max_size=4).map(tuple)


@given(text=letters, stop=stops, cuts=st.lists(st.integers(0, 60), max_size=12))
def test_any_cut_into_tokens_gives_the_naive_cut_of_the_whole_text(
    text: str, stop: tuple[str, ...], cuts: list[int]
) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    shown, stopped = stream(pieces, stop)
    assert ("".join(shown), stopped) == naive_cut(text, stop)


@given(text=letters, stop=stops.filter(len))
def test_only_a_possible_beginning_of_a_stop_string_is_held(text: str, stop: tuple[str, ...]) -> None:
    view = TextStream(Utf8Decoder([c.encode() for c in text]), stop)
    shown = ""
    for i in range(len(text)):
        shown += view.push(i)
        if view.stopped:
            return
        held = text[: i + 1].removeprefix(shown)
        assert text[: i + 1] == shown + held
        assert not held or any(word.startswith(held) and word != held for word in stop)
        longer = [text[j : i + 1] for j in range(len(shown))]
        assert not any(word.startswith(part) for part in longer for word in stop)


def test_the_first_complete_stop_string_wins_whatever_the_tokens() -> None:
    assert stream([b"abcd"], ("abcd", "bc"))[0] == ["a", ""]
    assert stream([b"a", b"b", b"c", b"d"], ("abcd", "bc"))[0] == ["", "", "a", ""]


def test_the_longest_of_several_that_end_together_is_cut() -> None:
    assert find_stop("x\nObservation:", ("Observation:", "\nObservation:")) == 1


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_an_unfinished_character_is_flushed_as_the_replacement_mark(stop: tuple[str, ...]) -> None:
    assert "".join(stream([b"a", "好".encode()[:2]], stop)[0]) == "a\ufffd"


def test_a_stop_string_found_in_the_flush_still_cuts() -> None:
    shown, stopped = stream([b"ok \xe5\xa5"], ("\ufffd",))
    assert ("".join(shown), stopped) == ("ok ", True)
