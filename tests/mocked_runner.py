"""A runner of `gptk tune` without a GPU, and a file's words on where it was measured."""

import torch

from gptk.tune.choose import Outcome, Refused

X = torch.linspace(-3, 3, 1000)
HEADER = {"format": 1, "gpu": "a GPU", "arch": 90, "gptk": "1", "torch": "2", "triton": "3"}
HEADER |= {"date": "today"}


def about(median, spread=0.0):
    """Five times with this median and interquartile range."""
    return [median - spread, median - spread / 2, median, median + spread / 2, median + spread]


class Mocked:
    """A runner whose kernels are a table: config -> times, and what is unusual about it."""

    def __init__(self, times, results=None, again=None, spills=None, refused=None):
        self.table, self.results, self.again = times, results or {}, again or {}
        self.spills, self.refused = spills or {}, refused or {}
        self.timed = []

    def run(self, config):
        if config in self.refused:
            raise Refused(self.refused[config])
        results = [self.results.get(config, X)]
        again = [self.again[config]] if config in self.again else results
        return Outcome(results, again, {"k": self.spills.get(config, 0), "other": 0})

    def times(self, configs):
        """Those of the table; of a list of lists, one after the other."""
        self.timed.append(list(configs))
        found = [self.table[config] for config in configs]
        return [times.pop(0) if isinstance(times[0], list) else times for times in found]
