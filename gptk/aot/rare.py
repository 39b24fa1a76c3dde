"""Configurations that are legal and seldom: head sizes that are no power of two, flags that few use
together, widths between the usual ones. `python -m gptk.aot --rare` compiles them.

They are not stored: there are too many. What is asked of them is that the loop over tiles keeps its
numbers in registers. Attention may keep some in memory outside it, where tiles with a mask are.
"""

from functools import partial
from itertools import product

import torch

from gptk.aot import shipping
from gptk.aot.sass import Instruction, parse
from gptk.aot.shipping import SHORT, Launches, Named

BF16, FP32 = torch.bfloat16, torch.float32


def cases() -> dict[str, Launches]:
    """Name -> launches; names start with the op."""
    found: dict[str, Launches] = {}
    for part in (_attention(), _layer_norm(), _cross_entropy(), _linear_cross_entropy()):
        found |= dict(part)
    return found


def spills_in_loop(sass: str) -> int:
    """Accesses of local memory in the innermost loop that does most: that over whole tiles."""
    graph = parse(sass)
    loops = [graph.code(body) for body in graph.innermost()]
    if not loops:
        loops = [graph.code(graph.blocks)]

    def products(code: list[Instruction]) -> tuple[int, int]:
        return sum("MMA" in one.name for one in code), len(code)

    return sum(one.name in ("STL", "LDL") for one in max(loops, key=products))


def _attention() -> Named:
    masks = {
        "": (False, None, False),
        " causal": (True, None, False),
        " window": (True, 1024, False),
        " packed": (True, None, True),
        " packed, not causal": (False, None, True),
    }
    for dtype, D, dropout, (name, mask), group in product(
        (BF16, FP32), (64, 80, 96, 128, 160, 192, 256), (0.0, 0.1), masks.items(), (1, 4)
    ):
        if group == 1 and (dtype == FP32 or mask[2]):
            continue  # the kernels differ little
        causal, window, packed = mask
        words = " dropout" * bool(dropout) + ", 4 heads share k, v" * (group == 4)
        launches = partial(
            shipping.attend, D, dtype, causal=causal, dropout_p=dropout, window=window,
            group=group, packed=packed,
        )  # fmt: skip
        yield f"attention D {D}{name}{words} {SHORT[dtype]}", launches


def _layer_norm() -> Named:
    widths = (96, 128, 384, 512, 768, 1024, 1536, 1600, 2048, 3072, 4096, 5120, 6400, 8192)
    for N, dtype in product((*widths, 12288, 16384, 32768, 65536, 100000), (BF16, FP32)):
        for residual, dropout in ((False, 0.0), (True, 0.0), (True, 0.1)):
            words = " residual" * residual + " dropout" * bool(dropout)
            launches = partial(shipping.normalise, N, dtype, residual, dropout)
            yield f"layer_norm N {N}{words} {SHORT[dtype]}", launches


def _terms() -> dict[str, tuple[float, float | None, float]]:
    return {
        f"smoothing {smoothing}, softcap {softcap}, z-loss {z_loss}": (smoothing, softcap, z_loss)
        for smoothing, softcap, z_loss in product((0.0, 0.1), (None, 30.0), (0.0, 1e-4))
    }


def _cross_entropy() -> Named:
    vocabularies = (10, 256, 1000, 32000, 50257, 50304, 65536, 128256, 262144)
    for V, dtype, (name, terms) in product(vocabularies, (BF16, FP32), _terms().items()):
        launches = partial(shipping.class_loss, V, dtype, *terms)
        yield f"cross_entropy V {V} {name} {SHORT[dtype]}", launches


def _linear_cross_entropy() -> Named:
    for C, has_bias, (name, terms) in product((768, 776), (False, True), _terms().items()):
        words = " bias" * has_bias
        launches = partial(shipping.linear_loss, C, BF16, terms, has_bias)
        yield f"linear_cross_entropy C {C}{words} {name} bf16", launches
