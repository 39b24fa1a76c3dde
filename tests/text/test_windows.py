"""Windows: none is lost, targets are shifted by one, the order is a function of the position."""

from collections import Counter

import numpy as np
import pytest
import torch

from gptk.text import token_file
from gptk.text.windows import Windows


def test_every_full_window_is_read(shown):
    case = shown.D1()
    tokens, T = case["inputs"]["tokens"], case["inputs"]["block"]
    windows = Windows(tokens, T, 1, 0)
    assert windows.count == case["expect"]["windows"]
    x, y = zip(*windows.ordered(4), strict=True)
    x, y = torch.cat(x), torch.cat(y)  # (18, 5)
    assert torch.equal(x.flatten(), torch.arange(90))
    assert torch.equal(y, x + 1)
    assert (int(x[-1, 0]), int(x[-1, -1]) + 1) == case["expect"]["last_window"]
    assert int(y[-1, -1]) == case["expect"]["last_target"]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_too_few_tokens_are_refused_with_both_numbers(n):
    with pytest.raises(ValueError, match=f"{n} tokens are too few for block_size 5.* needs 6"):
        Windows(list(range(n)), 5, 1, 0)
    if n == 0:
        with pytest.raises(ValueError, match=r"^empty"):
            Windows([], 5, 1, 0)


def test_one_token_more_than_a_block_is_one_window():
    windows = Windows(list(range(6)), 5, 1, 0)
    x, y = windows.batch(0)
    assert windows.count == 1
    assert x.tolist() == [[0, 1, 2, 3, 4]]
    assert y.tolist() == [[1, 2, 3, 4, 5]]


def test_sizes_below_one_are_refused():
    for block_size, batch_size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must both be at least 1"):
            Windows([1, 2, 3], block_size, batch_size, 0)
    with pytest.raises(ValueError, match="batch number -1"):
        Windows([1, 2, 3], 1, 1, 0).batch(-1)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 25])
def test_each_window_comes_once_in_every_epoch(batch_size):
    windows = Windows(np.arange(51), 5, batch_size, 1337)
    seen = np.concatenate([windows.indices(cursor) for cursor in range(30)])
    for epoch in range(len(seen) // 10):
        assert sorted(seen[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert seen[:10].tolist() != seen[10:20].tolist()


def test_a_resumed_order_is_the_uninterrupted_one(shown):
    case = shown.C2()
    n, epochs = case["inputs"]["windows"], case["inputs"]["epochs"]
    tokens = np.arange(n * 4 + 1)
    whole = [Windows(tokens, 4, 1, 7).batch(c) for c in range(n * epochs)]
    assert Counter(int(x[0, 0]) // 4 for x, _ in whole) == case["expect"]["counts"]
    for stop in case["inputs"]["stop_after"]:
        resumed = Windows(tokens, 4, 1, 7)
        for cursor in range(stop, n * epochs):
            for got, want in zip(resumed.batch(cursor), whole[cursor], strict=True):
                assert torch.equal(got, want)


def test_the_order_does_not_depend_on_what_was_read_before():
    windows, fresh = Windows(np.arange(100), 3, 7, -5), {}
    for cursor in (9, 0, 4, 5, 400, 4, 9):
        fresh[cursor] = Windows(np.arange(100), 3, 7, -5).batch(cursor)[0]
        assert torch.equal(windows.batch(cursor)[0], fresh[cursor])
    other = Windows(np.arange(100), 3, 7, 6).batch(0)[0]
    assert not torch.equal(other, fresh[0])


def test_lists_arrays_and_maps_give_the_same(tmp_path):
    ids = [3, 65_535, 0, 40_000, 5, 6, 7]
    token_file.write(tmp_path / "t", ids, 65_536)
    kinds = [ids, np.array(ids, np.uint16), np.array(ids), token_file.read(tmp_path / "t")]
    batches = [Windows(tokens, 2, 2, 0).batch(1) for tokens in kinds]
    for x, y in batches:
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, batches[0][0])
        assert torch.equal(y, batches[0][1])
        assert x.is_contiguous()
