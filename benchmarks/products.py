"""Matrix products by the extension and by torch (oneDNN, MKL): the numbers of cpp_product.OWN.

The shapes are those of training steps of nano, shakespeare and GPT-2: a layer's output (x w^T), its
input's gradient (dy w) and its weight's (dy^T x). For every instruction set of this CPU and every
dtype: seconds of the extension over seconds of torch, in turns, over several operands. torch's own
instruction set cannot be chosen here: below avx512 the ratio is that of the extension's kernel for
an older CPU to torch's for this one.

Run on an idle machine: python benchmarks/products.py [--json benchmarks/results/products.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gptk import native
from gptk.bench.measure import facts
from gptk.ops.cpp_product import product, product_dtype

SHAPES = {  # tokens, inputs, outputs of a layer
    "nano": ((768, 128, 384), (768, 128, 128), (768, 128, 512), (768, 512, 128)),
    "shakespeare": ((4096, 384, 1152), (4096, 384, 384), (4096, 384, 1536), (4096, 1536, 384)),
    "gpt2": ((1024, 768, 2304), (1024, 768, 768), (1024, 768, 3072), (1024, 3072, 768)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPERANDS = 4
"""Sets of operands, taken in rotation."""


def torchs(a: Tensor, b: Tensor) -> Tensor:
    """The product as gptk takes it from torch: in a dtype that torch is fast at, and back."""
    wide = product_dtype(a.dtype)
    return torch.mm(a.to(wide), b.to(wide)).to(a.dtype)


def layouts(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, list]:
    """What is multiplied -> OPERANDS pairs (a, b)."""
    made: dict[str, list] = {"x w^T": [], "dy w": [], "dy^T x": []}
    for _ in range(OPERANDS):
        x = torch.randn(tokens, inputs).to(dtype)
        dy = torch.randn(tokens, outputs).to(dtype)
        w = torch.randn(outputs, inputs).to(dtype)
        made["x w^T"].append((x, w.t()))
        made["dy w"].append((dy, w))
        made["dy^T x"].append((dy.t(), x))
    return made


def ratio(pairs: list[tuple[Tensor, Tensor]], repeats: int) -> float:
    """Median seconds of the extension over torch's."""
    ways: dict[str, Callable[[Tensor, Tensor], object]] = {"own": product, "torch": torchs}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(repeats + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way(*pairs[n % len(pairs)])
            if n >= 2:
                seconds[name].append(time.perf_counter() - start)
    return statistics.median(seconds["own"]) / statistics.median(seconds["torch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    rows = []
    for level in native.isa_levels():
        native.load().select_isa(level)
        for name, dtype in DTYPES.items():
            for size, shapes in SHAPES.items():
                for shape in shapes:
                    for what, pairs in layouts(*shape, dtype).items():
                        found = ratio(pairs, options.repeats)
                        rows.append(
                            {"isa": level, "dtype": name, "size": size, "shape": shape,
                             "product": what, "ratio": round(found, 3)}
                        )  # fmt: skip
            of_level = [r["ratio"] for r in rows if (r["isa"], r["dtype"]) == (level, name)]
            print(f"{level:12} {name:9} median {statistics.median(of_level):.2f}, "
                  f"from {min(of_level):.2f} to {max(of_level):.2f} of torch's time")  # fmt: skip
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        options.json.write_text(
            f'{{"facts": {json.dumps(facts("cpu"))},\n "rows": [\n{lines}\n]}}\n'
        )


if __name__ == "__main__":
    main()
