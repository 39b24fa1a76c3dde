"""Bits per byte: a loss that can be compared between tokenizers."""

import math
from collections.abc import Iterable


def bits_per_byte(nats: Iterable[float], token_bytes: Iterable[int]) -> float:
    """sum(nats) / ln 2 / sum(token_bytes), over the tokens that stand for text.

    Args:
        nats: loss of each target token.
        token_bytes: bytes of text in each of them; 0 marks a special token, whose loss does not
            count either, for it is no loss on text.

    Returns:
        NaN where no token stands for text.

    Raises:
        ValueError: the two differ in length.
    """
    text = [(loss, size) for loss, size in zip(nats, token_bytes, strict=True) if size > 0]
    n_bytes = sum(size for _, size in text)
    return math.fsum(loss for loss, _ in text) / math.log(2) / n_bytes if text else math.nan
