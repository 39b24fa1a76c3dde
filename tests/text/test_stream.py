"""Streamed text: whole characters, no part of a stop string, nothing lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptk.text.stream import StreamDecoder
from gptk.text.tokenizer import Tokenizer

BYTES = Tokenizer.make("byte", "")
QUICK = settings(derandomize=True, max_examples=300, deadline=None, database=None)


def run(chunks, stops):
    """(pieces up to the stop, flush, stopped), as the reference gives them."""
    decoder = StreamDecoder(BYTES, stops)
    pieces = []
    for chunk in chunks:
        pieces.append(decoder.push_bytes(chunk))
        if decoder.stopped:
            break
    return pieces, decoder.flush(), decoder.stopped


@pytest.mark.parametrize("part", ["a", "b", "c"])
def test_the_reported_streams(shown, part):
    case = shown.W2()
    assert run(*case["inputs"][part]) == case["expect"][part]


CHUNKS = st.lists(st.sampled_from([b"a", b"b", b"ab", b"ba", b"c", "\u00e9".encode(), b""]))
BROKEN = st.lists(st.binary(max_size=3))
CUT = st.text(max_size=9).map(lambda text: [bytes([b]) for b in text.encode()])


@QUICK
@given(
    chunks=CHUNKS | CUT | BROKEN, stops=st.lists(st.text("abc\u00e9\ufffd", max_size=4), max_size=3)
)
def test_any_stream_is_that_of_the_reference(shown, chunks, stops):
    assert run(chunks, stops) == shown.R.stream_deltas(chunks, stops)


@QUICK
@given(chunks=CUT | BROKEN)
def test_pieces_and_flush_are_the_whole_text(chunks):
    pieces, rest, stopped = run(chunks, ())
    assert "".join(pieces) + rest == b"".join(chunks).decode("utf-8", "replace")
    assert not stopped


def test_tokens_are_pushed_by_id_and_nothing_follows_a_stop():
    decoder = StreamDecoder(BYTES, ["cd"])
    assert [decoder.push(i) for i in b"abcdef"] == ["a", "b", "", "", "", ""]
    assert decoder.stopped
    assert decoder.flush() == ""


def test_a_character_comes_when_it_is_whole():
    decoder = StreamDecoder(BYTES)
    assert [decoder.push(i) for i in "\U0001f415".encode()] == ["", "", "", "\U0001f415"]
    assert decoder.push(0xE2) == ""
    assert decoder.flush() == "\ufffd"
