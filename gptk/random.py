"""Counter-based randomness: dropout masks, stochastic rounding and seeds as pure functions.

A random word depends only on (seed, row, column, last): Philox4x32-10 (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405) with key = the 64-bit seed and counter =
(column // 4, row low 32 bits, row high 32 bits, last), lane column % 4. Every backend and device
draws the same words; nothing is stored.

    dropout               last = 0; (row, column) is kept iff its word is >= round(p * 2**32)
    stochastic rounding   last = t >= 1, the number of the update; row = the parameter's place,
                          column = the element; the low 16 bits of the word are what is added
"""

import torch
from torch import Tensor

from gptk.ops.tensors import tracing

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # Philox multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
Seed = int | Tensor
"""A seed: an int of up to 64 bits (taken mod 2**64) or a 0-dim int64 tensor."""


def philox4x32(key: tuple, counter: tuple) -> tuple:
    """Ten rounds of Philox4x32 on int64 tensors (or ints) that hold 32-bit words."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def keep_mask(
    seed: Seed, rows: int, cols: int, p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """The dropout keep mask, bool (rows, cols): True with probability 1 - p.

    Args:
        seed: 64-bit seed, an int or a 0-dim int64 tensor.
        rows, cols: the shape; element (r, c) does not depend on it.
        p: probability of dropping, in [0, 1].
        device: where the mask is made; the bits are the same everywhere.
    """
    check_probability(p)
    device = torch.device(device)
    if device.type == "cpu" and isinstance(seed, int) and not tracing():
        from gptk import native

        if native.available() is None:
            return native.keep_mask(seed, rows, cols, p)
    return keep_mask_definition(seed, rows, cols, p, device)


def keep_mask_definition(
    seed: Seed, rows: int, cols: int, p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """`keep_mask` in plain PyTorch: the definition that every backend is tested against."""
    if tracing():
        seed = seed_tensor(seed)
    row = torch.arange(rows, device=device, dtype=torch.int64)[:, None]
    return random_words(seed, row, cols) >= round(p * 2**32)


def random_words(seed: Seed, row: Tensor, cols: int, last: int = 0) -> Tensor:
    """The 32-bit random words of the rows `row` (rows, 1), int64: (rows, cols), int64."""
    low, high = seed & _MASK32, (seed >> 32) & _MASK32
    block = torch.arange((cols + 3) // 4, device=row.device, dtype=torch.int64)[None, :]
    fourth = torch.full((), last & _MASK32, device=row.device, dtype=torch.int64)
    words = philox4x32((low, high), (block + 0 * row, row & _MASK32, (row >> 32) & _MASK32, fourth))
    lanes = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # (rows, blocks, 4)
    return lanes.flatten(1)[:, :cols]


def round_stochastically(input: Tensor, seed: int, row: int, t: int) -> Tensor:
    """input in bfloat16: one of its two neighbours, the nearer the likelier, so that E[y] = x.

    y = truncate(x + r), r = 16 random bits below those that bfloat16 keeps: the rounding of
    Zamirai et al. 2020, "Revisiting BFloat16 training", https://arxiv.org/abs/2010.06192.

    Args:
        input: float32, any shape; what bfloat16 holds exactly, infinities included, stays as it
            is, NaN stays NaN. Above the largest finite bfloat16 plain rounding decides, so
            nothing becomes infinite that it would not make so.
        seed, row, t: with an element's row-major index, what its random bits are a function of.
    """
    bits = input.contiguous().view(torch.int32).long() & _MASK32
    magnitude = bits & 0x7FFFFFFF
    at = torch.full((1, 1), row, device=input.device, dtype=torch.int64)
    random = random_words(seed, at, input.numel(), t).view(input.shape) & 0xFFFF
    # from the largest finite value on, half an ulp: to nearest, and infinity stays itself
    added = torch.where(magnitude < 0x7F7F0000, random, 0x8000)
    kept = torch.where(magnitude > 0x7F800000, bits >> 16 | 0x40, bits + added >> 16)
    return kept.to(torch.uint16).view(torch.bfloat16)


def dropout(input: Tensor, p: float, seed: Seed) -> Tensor:
    """input * keep / (1 - p), the mask being that of (seed, flattened leading index, last index).

    p = 0 returns the input itself; p = 1 returns zeros.
    """
    if check_probability(p) == 0.0:
        return input
    cols = input.shape[-1] if input.dim() else 1
    rows = input.numel() // max(cols, 1)
    keep = keep_mask(seed, rows, cols, p, input.device).view(input.shape)
    return torch.where(keep, input * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)


def check_probability(p: float) -> float:
    """Return p if it is a probability, else raise ValueError."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability {p} is not in [0, 1]")
    return p


def draw_seed() -> Seed:
    """One 64-bit seed from torch's default CPU generator (so torch.manual_seed governs it).

    Traced (torch.compile, torch.export) it is a tensor, drawn anew at each call; compiled by
    Inductor the numbers are those of Inductor's generator, which torch.manual_seed governs too.
    """
    words = torch.randint(0, 2**32, (2,), dtype=torch.int64, device="cpu")
    if tracing():
        return (words[1] << 32) | words[0]
    low, high = words.tolist()
    return (high << 32) | low


def seed_tensor(seed: Seed) -> Tensor:
    """The seed as a 0-dim int64 tensor of the same bits: a traced program keeps no int's value."""
    if isinstance(seed, Tensor):
        return seed
    seed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((), seed, dtype=torch.int64, device="cpu")


def derive_seed(base: Seed, *path: int) -> Seed:
    """A 64-bit seed for the place `path` (step, layer, site, ...) below `base`.

    SplitMix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195), one round per path
    element. A tensor base gives a tensor (int64, same bits), so a traced program does not
    specialise on the seed.
    """
    state = seed_tensor(base) if tracing() else base
    for part in (-1, *path):
        state = _mix_tensor(state, part) if isinstance(state, Tensor) else _mix(state, part)
    return state


def _mix(state: int, part: int) -> int:
    z = (state + 0x9E3779B97F4A7C15 * (part + 2)) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _mix_tensor(state: Tensor, part: int) -> Tensor:
    z = state + _signed(0x9E3779B97F4A7C15 * (part + 2))
    z = (z ^ ((z >> 30) & (_MASK64 >> 30))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & (_MASK64 >> 27))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & (_MASK64 >> 31))


def _signed(word: int) -> int:
    word &= _MASK64
    return word - 2**64 if word >= 2**63 else word
