"""Bits per byte count raw bytes, and no special token on either side."""

import math

import pytest

from gptk.text.bits import bits_per_byte


def test_special_tokens_count_neither_above_nor_below(shown):
    case = shown.K4()
    given = case["inputs"]
    found = bits_per_byte(given["nll_nats"], given["token_bytes"])
    assert abs(found - case["expect"]["bpb"]) <= case["tol"]


def test_a_uniform_guess_of_bytes_costs_eight_bits():
    assert bits_per_byte([math.log(256)] * 5, [1] * 5) == pytest.approx(8)


def test_no_text_and_unequal_lengths():
    assert math.isnan(bits_per_byte([1.0], [0]))
    with pytest.raises(ValueError, match="shorter"):
        bits_per_byte([1.0, 2.0], [1])
