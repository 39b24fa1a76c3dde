"""Small calls of one op's kernels, for compute-sanitizer: python3 -m benchmarks.gpu.sample OP.

Odd sizes, several tiles each, and no matrix product of a vendor's library, whose own warnings would
be counted.
"""

import sys

import torch

from benchmarks.gpu import equivalence, rivals, shapes
from gptk.bench import gate

CASES: dict[str, tuple[dict[str, object], ...]] = {
    "attention": (
        dict(B=1, H=2, Hkv=1, Tq=150, Tk=150, D=64, causal=True),
        dict(B=1, H=1, Tq=70, Tk=133, D=80, window=40, causal=True, dropout_p=0.2),
        dict(B=1, H=2, Tq=1, Tk=301, D=128, causal=True),
        dict(B=1, H=2, Tq=99, Tk=99, D=32, causal=True, q_lengths=(40, 0, 59)),
    ),
    "layer_norm": (
        dict(shape=(37, 770), residual=True, dropout_p=0.2),
        dict(shape=(5, 9001)),
        dict(shape=(130, 33)),
    ),
    "gelu": (dict(shape=(7, 1003)), dict(shape=(7, 1003), approximate="tanh")),
    "cross_entropy": (dict(N=9, V=70001, ignored=0.3), dict(N=5, V=131, softcap=3.0, z_loss=0.1)),
    "adamw": (dict(shapes=((2051,), (5, 7), (0,), (1, 3)), max_grad_norm=0.5),),
}
DTYPES = ("bfloat16", "float32")


def run(op: str, device: str, dry: bool) -> int:
    """How many calls were made, each with its backward."""
    made = 0
    for options in CASES[op][:1] if dry else CASES[op]:
        for name in DTYPES[:1] if dry else DTYPES:
            dtype = shapes.DTYPES[name]
            sizes = {**options, **shapes.TINY[op]} if dry else options
            given = shapes.place(shapes.draw(op, sizes, dtype, "cpu"), device)
            if op == "adamw":
                equivalence.updated(given, "triton")
            else:
                gate.answer(op, rivals.ours(op), given)
            made += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return made


if __name__ == "__main__":
    print(f"{run(sys.argv[1], 'cuda', dry=False)} calls made")
