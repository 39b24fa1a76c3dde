"""Which configuration a kernel gets: the one that ships, unless another is right and faster.

A candidate is left out if it does not compile or run, spills registers, gives other bits the second
time, or differs from what the shipped configuration computes by more than rounding. The others are
timed in turns with it. One takes its place only if its median time is lower by more than the noise:
the largest of 2 % of the shipped median and the interquartile ranges of both. The fastest of those
is timed again, against the shipped one alone, and must be faster by more than the noise once more,
since the least of many noisy numbers is too low.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gptk.ops.tuning_file import Config

LEAST_GAIN = 0.02


class Refused(Exception):
    """A configuration that does not compile or run, or a row that cannot be measured; the message
    says why."""


@dataclass(frozen=True)
class Outcome:
    """Of one configuration, run twice."""

    results: list[Tensor]
    again: list[Tensor]
    spills: dict[str, int]  # kernel -> registers that its threads keep in memory


class Runner(Protocol):
    """Runs one kernel's work with a given configuration."""

    def run(self, config: Config) -> Outcome:
        """What it computes and needs; raises Refused."""

    def times(self, configs: Sequence[Config]) -> list[list[float]]:
        """Milliseconds of each, measured in turns."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, why not the others."""

    shipped: Config
    shipped_ms: float
    config: Config
    config_ms: float
    left_out: dict[Config, str] = field(default_factory=dict)


def choose(shipped: Config, candidates: Sequence[Config], runner: Runner) -> Choice:
    """The best of `shipped` and `candidates`.

    Raises:
        Refused: the shipped configuration does not run, or no time can be taken.
    """
    try:
        expected = runner.run(shipped).results
    except Refused as error:
        raise Refused(f"what ships does not run: {error}") from None
    left_out: dict[Config, str] = {}
    able = [shipped]
    for config in dict.fromkeys(candidates):
        if config == shipped:
            continue
        reason = _unfit(config, expected, runner)
        if reason is None:
            able.append(config)
        else:
            left_out[config] = reason
    times = dict(zip(able, runner.times(able), strict=True))
    kept = statistics.median(times[shipped])
    faster = [config for config in able[1:] if beats(times[config], times[shipped])]
    if faster:
        best = min(faster, key=lambda config: statistics.median(times[config]))
        ours, theirs = runner.times([shipped, best])
        kept = statistics.median(ours)
        if beats(theirs, ours):
            return Choice(shipped, kept, best, statistics.median(theirs), left_out)
    return Choice(shipped, kept, shipped, kept, left_out)


def _unfit(config: Config, expected: list[Tensor], runner: Runner) -> str | None:
    """Why a candidate cannot be taken, None if it can."""
    try:
        outcome = runner.run(config)
    except Refused as error:
        return str(error)
    spilling = [f"{kernel} spills {n} registers" for kernel, n in outcome.spills.items() if n]
    if spilling:
        return ", ".join(spilling)
    for got, again, wanted in zip(outcome.results, outcome.again, expected, strict=True):
        if not torch.equal(_bits(got), _bits(again)):
            return "gives other bits the second time"
        wrong = differs(got, wanted)
        if wrong:
            return wrong
    return None


def _bits(x: Tensor) -> Tensor:
    """Equal NaN are equal."""
    return x.contiguous().view(torch.uint8)


def differs(got: Tensor, expected: Tensor) -> str | None:
    """Whether two results of the same sums in another order differ by more than rounding.

    Relative to the largest and to the RMS of what is expected, the error may be 4 ulp of the
    result's dtype, and 256 of float32's where long float32 sums are the result.
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"wrong result ({tuple(got.shape)} {got.dtype})"
    if not got.numel():
        return None
    bound = 4 * torch.finfo(got.dtype).eps + 256 * torch.finfo(torch.float32).eps
    wide = expected.double()
    error = got.double() - wide
    for name, size in (("largest", _largest), ("RMS", _rms)):
        if not size(error) <= bound * size(wide):  # NaN is no less
            return f"wrong result ({name} error {size(error):.1e} of {size(wide):.1e})"
    return None


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def beats(theirs: Sequence[float], ours: Sequence[float]) -> bool:
    """Whether the median of `theirs` is lower than that of `ours` by more than the noise."""
    median = statistics.median(ours)
    noise = max(LEAST_GAIN * median, _spread(theirs), _spread(ours))
    return median - statistics.median(theirs) > noise


def _spread(times: Sequence[float]) -> float:
    """The interquartile range."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low
