"""From how many elements on a backend beats torch: the numbers of catalog.CROSSOVER.

For each op, cases from tiny to GPT-2's width run forward and backward by PyTorch's own op, by
gptk's torch backend (what `auto` takes below the crossover) and by the backend, interleaved. A row
per case gives the median times; the last line of an op the fewest elements from which the backend
never loses to gptk's torch by more than the noise (5 %).
Run on an idle machine: python benchmarks/crossover.py [OP ...] [--backend cpp]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import gptk.functional as GF

SIZES = ((1, 16), (4, 32), (16, 64), (64, 64), (128, 128), (512, 128), (768, 384), (1024, 768))
"""(rows, columns): elements of the input from 16 to 786,432."""

OWN = "PyTorch"


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def cases(op: str, rows: int, cols: int) -> tuple[Callable[[str], Tensor], list[Tensor], int]:
    """(forward of a backend, leaves, elements of the input) of one op at one size."""
    x, w, b = leaf(rows, cols), leaf(cols), leaf(cols)
    if op == "layer_norm":
        return (
            lambda which: (
                F.layer_norm(x, (cols,), w, b)
                if which == OWN
                else GF.layer_norm(x, (cols,), w, b, backend=which)
            ),
            [x, w, b],
            x.numel(),
        )
    if op == "gelu":
        return (
            lambda which: (
                F.gelu(x, approximate="tanh") if which == OWN else GF.gelu(x, "tanh", backend=which)
            ),
            [x],
            x.numel(),
        )
    W, V = leaf(4 * cols, cols), leaf(cols, 4 * cols)
    if op == "linear":
        c = leaf(4 * cols)
        return (
            lambda which: F.linear(x, W, c) if which == OWN else GF.linear(x, W, c, backend=which),
            [x, W, c],
            x.numel(),
        )
    if op == "mlp":
        c = leaf(4 * cols)
        return (
            lambda which: (
                F.linear(F.gelu(F.linear(x, W, c), approximate="tanh"), V, b)
                if which == OWN
                else GF.mlp(x, W, c, V, b, backend=which)
            ),
            [x, W, c, V, b],
            x.numel(),
        )
    target = torch.randint(0, cols, (rows,))
    if op == "cross_entropy":
        return (
            lambda which: (
                F.cross_entropy(x, target)
                if which == OWN
                else GF.cross_entropy(x, target, backend=which)
            ),
            [x],
            x.numel(),
        )
    if op == "linear_cross_entropy":
        labels = torch.randint(0, 4 * cols, (rows,))
        return (
            lambda which: (
                F.cross_entropy(F.linear(x, W), labels)
                if which == OWN
                else GF.linear_cross_entropy(x, W, labels, backend=which)
            ),
            [x, W],
            x.numel(),
        )
    H, D = max(1, cols // 32), min(cols, 32)
    q, k, v = (leaf(1, H, rows, D) for _ in range(3))
    return (
        lambda which: (
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if which == OWN
            else GF.attention(q, k, v, causal=True, backend=which)
        ),
        [q, k, v],
        q.numel(),
    )


def times(
    op: str, rows: int, cols: int, backend: str, repeats: int
) -> tuple[int, dict[str, float]]:
    """(elements, provider -> median microseconds of forward and backward)."""
    forward, leaves, elements = cases(op, rows, cols)
    found: dict[str, list[float]] = {OWN: [], "torch": [], backend: []}
    for n in range(repeats + 3):
        for which, seconds in found.items():
            start = time.perf_counter()
            y = forward(which)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
            if n >= 3:
                seconds.append(time.perf_counter() - start)
    return elements, {which: statistics.median(s) * 1e6 for which, s in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ops = ["layer_norm", "gelu", "linear", "mlp", "cross_entropy", "linear_cross_entropy"]
    ops.append("attention")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default all: {', '.join(ops)}")
    parser.add_argument("--backend", default="cpp")
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    for op in options.ops or ops:
        least = 0
        for rows, cols in SIZES:
            elements, micros = times(op, rows, cols, options.backend, options.repeats)
            row = "  ".join(f"{which} {spent:9.1f} us" for which, spent in micros.items())
            ratio = micros[options.backend] / micros["torch"]
            print(f"{op:20} {rows:4} x {cols:3}  {row}  {ratio:.2f}")
            if ratio > 1.05:
                least = elements + 1
        print(f"{op:22} wins from {least} elements on")


if __name__ == "__main__":
    main()
