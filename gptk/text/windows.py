"""Windows of block_size tokens; their order is a pure function of (seed, position)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class Windows:
    """x = tokens[s : s+T], y = tokens[s+1 : s+T+1] for s = 0, T, 2T, ...; each once per epoch.

    Args:
        tokens (n,): a list, an array or a memory map; arrays are not copied.
        block_size: T, tokens of one window; the targets need one token more.
        batch_size: windows of one batch.
        seed: of the order; each epoch has its own.

    Raises:
        ValueError: fewer than T + 1 tokens, or sizes below 1.
    """

    def __init__(
        self, tokens: Sequence[int] | np.ndarray, block_size: int, batch_size: int, seed: int
    ) -> None:
        if block_size < 1 or batch_size < 1:
            raise ValueError(
                f"block_size {block_size} and batch_size {batch_size}: must both be at least 1"
            )
        n = len(tokens)
        self.count = (n - 1) // block_size if n else 0
        if self.count < 1:
            raise ValueError(
                f"{'empty: ' if n == 0 else ''}{n} tokens are too few for block_size "
                f"{block_size}: one window needs {block_size + 1}"
            )
        self.tokens = np.asarray(tokens)
        self.T, self.B, self.seed = block_size, batch_size, seed % 2**64
        self._permutations: dict[int, np.ndarray] = {}
        self._span = np.arange(block_size + 1)  # (T+1,)

    def batch(self, cursor: int) -> tuple[Tensor, Tensor]:
        """Batch number `cursor` >= 0 of the endless, shuffled order: (x, y), each (B, T) int64.

        A batch at the end of an epoch takes its last windows from the next one.
        """
        return self._gather(self.indices(cursor))

    def indices(self, cursor: int) -> np.ndarray:
        """Numbers of the windows in that batch, (B,)."""
        if cursor < 0:
            raise ValueError(f"batch number {cursor}: must be at least 0")
        at, end = cursor * self.B, (cursor + 1) * self.B
        parts = []
        while at < end:
            epoch, first = divmod(at, self.count)
            part = self._order(epoch)[first : first + end - at]
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def ordered(self, batch_size: int, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `count` windows (None: all), each once, in order; the last batch may be
        short."""
        end = self.count if count is None else min(count, self.count)
        for start in range(0, end, batch_size):
            yield self._gather(np.arange(start, min(start + batch_size, end)))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # two epochs are kept: a batch may reach from one into the next
            self._permutations = {
                e: order for e, order in self._permutations.items() if e == epoch - 1
            }
            generator = np.random.default_rng((self.seed, epoch))
            self._permutations[epoch] = generator.permutation(self.count)
        return self._permutations[epoch]

    def _gather(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = self.tokens[windows[:, None] * self.T + self._span]  # (B, T+1)
        both = torch.from_numpy(rows.astype(np.int64, copy=False))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()
