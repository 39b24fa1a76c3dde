"""Windows of block_size tokens; their order is a pure function of (seed, position)."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


class Windows:
    """x = tokens[s : s+T], y = tokens[s+1 : s+T+1] for s = 0, T, 2T, ...; each once per epoch."""

    def __init__(self, tokens: list[int], block_size: int, batch_size: int, seed: int) -> None:
        self.count = (len(tokens) - 1) // block_size
        if self.count < 1:
            raise ValueError(
                f"{len(tokens)} tokens are too few for block_size {block_size}: "
                f"one window needs {block_size + 1}"
            )
        self.tokens = np.asarray(tokens, dtype=np.int64)
        self.T, self.B, self.seed = block_size, batch_size, seed

    def batch(self, cursor: int) -> tuple[Tensor, Tensor]:
        """Batch number `cursor` of the endless, shuffled order."""
        at = range(cursor * self.B, (cursor + 1) * self.B)
        return self._gather([int(self._order(i // self.count)[i % self.count]) for i in at])

    def ordered(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every window once, in order; the last batch may be short."""
        for start in range(0, self.count, batch_size):
            yield self._gather(list(range(start, min(start + batch_size, self.count))))

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return self._permutation

    def _gather(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        rows = np.asarray(windows)[:, None] * self.T + np.arange(self.T + 1)
        both = torch.from_numpy(self.tokens[rows])
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()
