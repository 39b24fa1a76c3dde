"""The schedule: within bounds, first step > 0, the maximum once, then down to min_lr."""

import math
from itertools import pairwise

import pytest

from gptk.train.schedule import learning_rate

SETTINGS = [
    (warmup, max_steps, min_lr)
    for warmup in (0, 1, 2, 5, 100, 10**6)
    for max_steps in (1, 2, 3, 4, 10, 101)
    for min_lr in (0.0, 1e-4, 1e-3)
]


def curve(warmup, max_steps, min_lr, max_lr=1e-3, beyond=5):
    return [
        learning_rate(step, max_lr=max_lr, min_lr=min_lr, warmup_steps=warmup, max_steps=max_steps)
        for step in range(max_steps + beyond)
    ]


@pytest.mark.parametrize("warmup,max_steps,min_lr", SETTINGS)
def test_rises_to_the_maximum_once_then_falls_and_stays(warmup, max_steps, min_lr):
    lrs = curve(warmup, max_steps, min_lr)
    assert lrs[0] > 0
    assert all(min_lr <= lr <= 1e-3 for lr in lrs)
    assert all(lr == min_lr for lr in lrs[max_steps:])
    peak = lrs.index(max(lrs))
    assert lrs[peak] == 1e-3
    if min_lr < 1e-3:
        assert lrs.count(1e-3) == 1
        assert all(a > b for a, b in pairwise(lrs[peak : max_steps + 1]))
        assert peak == max(0, min(warmup, max_steps) - 1)
    assert all(a <= b for a, b in pairwise(lrs[: peak + 1]))


def test_values_of_a_small_schedule():
    lrs = curve(2, 4, 0.0, max_lr=1.0, beyond=2)
    expected = [0.5, 1.0, 0.75, 0.25, 0.0, 0.0]
    assert lrs == pytest.approx(expected, rel=1e-12, abs=1e-16)


def test_far_past_the_end_is_min_lr():
    wrong = 1 - (64.5 - 0.5) / 0.5  # an extrapolated decay: a multiplier of -127
    lr = learning_rate(10**9, max_lr=1.0, min_lr=0.1, warmup_steps=0, max_steps=4)
    assert lr == 0.1 != wrong


@pytest.mark.parametrize(
    "settings",
    [
        {"min_lr": 2.0},
        {"min_lr": -1.0},
        {"max_lr": math.inf},
        {"max_lr": math.nan},
        {"warmup_steps": -1},
        {"step": -1},
    ],
)
def test_raises_on_impossible_settings(settings):
    good = {"step": 0, "max_lr": 1.0, "min_lr": 0.1, "warmup_steps": 0, "max_steps": 4}
    with pytest.raises(ValueError, match=next(iter(settings))):
        learning_rate(**{**good, **settings})
