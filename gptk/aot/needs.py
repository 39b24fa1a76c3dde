"""What each Triton kernel must move and compute for one unit of its work.

The unit is what its code repeats: an iteration of its main loop, all of its sweeps over one block
of columns, or a program. Bytes and operations are those of the op's cases.py (`traffic`, `flops`)
for a problem of the unit's size. Lanes that a mask switches off count here and in the code, so that
the two compare; `used` says how many of them do work.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from gptk.ops.adamw import cases as adamw
from gptk.ops.attention import cases as attention
from gptk.ops.cross_entropy import cases as cross_entropy
from gptk.ops.gelu import cases as gelu
from gptk.ops.layer_norm import cases as layer_norm
from gptk.ops.linear import cases as linear
from gptk.ops.linear_cross_entropy import cases as linear_cross_entropy

Arguments = dict[str, Any]
"""Of a launch, by name; a tensor is an Array."""

TOKENS = 4096
"""Rows for which the share of DRAM in the traffic of attention and the logits is computed."""


class Array(NamedTuple):
    """A tensor argument."""

    shape: tuple[int, ...]
    itemsize: int


class Need(NamedTuple):
    """Of one unit."""

    unit: str  # "program", "loop": the main loop's iteration, "sweeps": one of every loop
    elements: int  # results that need not be masked off
    bytes: int  # of global memory, read and written
    products: int = 0  # operations of matrix products
    used: float = 1.0  # share of the tile's lanes that hold elements
    dram: float = 1.0  # share of the bytes that is neither masked off nor served by L2
    step: int = 0  # by how much the loop's counter grows in one iteration of the source
    trips: int = 1  # iterations of a loop with a fixed number, which the compiler may unroll


SCALARS = frozenset(("prepare_kernel", "factors_kernel"))
"""Kernels that work on a few numbers: they cost a launch, not bytes or operations."""


def _gelu(backward: bool) -> Callable[[Arguments], Need]:
    def found(a: Arguments) -> Need:
        n = a["BLOCK"]
        return Need("program", n, gelu.traffic((n,), a["x_ptr"].itemsize, backward))

    return found


def _layer_norm_forward(a: Arguments) -> Need:
    M, N = (a["BLOCK_M"], a["BLOCK_N"])
    size, columns = a["x_ptr"].itemsize, min(a["N"], N)
    rows = layer_norm.traffic((M, N), size, False, a["HAS_RESIDUAL"])
    weights = N * sum(a[name].itemsize for name in ("weight_ptr", "bias_ptr") if a[name])
    whole = a["ONE_BLOCK"]
    statistics = 2 * M * a["mean_ptr"].itemsize if whole else 0
    return Need(
        "program" if whole else "sweeps",
        M * columns,
        rows + weights + statistics,
        used=columns / N,
        dram=columns / N * rows / (rows + weights + statistics),
    )


def _layer_norm_backward(a: Arguments) -> Need:
    M, N = (a["BLOCK_M"], a["BLOCK_N"])
    size, columns = a["h_ptr"].itemsize, min(a["N"], N)
    whole = a["ONE_BLOCK"]
    statistics = 2 * M * a["mean_ptr"].itemsize if whole else 0
    rows = layer_norm.traffic((M, N), size, True, a["HAS_DH"], a["HAS_DROPOUT"])
    weights = 0 if whole or not a["weight_ptr"] else N * a["weight_ptr"].itemsize
    return Need(
        "loop" if whole else "sweeps",
        M * columns,
        rows + statistics + weights,
        used=columns / N,
        dram=columns / N * rows / (rows + statistics + weights),
    )


def _layer_norm_columns(a: Arguments) -> Need:
    M, N = a["BLOCK_M"], a["BLOCK_N"]
    return Need("loop", M * N, 2 * M * N * a["h_ptr"].itemsize + 2 * M * a["mean_ptr"].itemsize)


def _layer_norm_reduce(a: Arguments) -> Need:
    n = a["BLOCK_M"] * a["BLOCK_N"]
    sums = a["HAS_DWEIGHT"] + a["HAS_DBIAS"]
    return Need("loop", n, n * sums * a["partial_dweight_ptr"].itemsize, step=a["BLOCK_M"])


def _activation_backward(a: Arguments) -> Need:
    n = a["BLOCK_M"] * a["BLOCK_N"]
    size, y = a["dy_ptr"].itemsize, a["HAS_Y"]
    fused = linear.epilogue_traffic(a["BLOCK_M"], a["BLOCK_N"], size, True, y)
    moved = fused if a["HAS_ACTIVATION"] else n * size  # dy, for its column sums
    return Need("loop", n, moved, trips=a["ROWS"] // a["BLOCK_M"])


def _sum_partials(a: Arguments) -> Need:
    n = a["BLOCK_M"] * a["BLOCK_N"]
    return Need("loop", n, n * a["partial_ptr"].itemsize, step=a["BLOCK_M"])


def _cross_entropy_forward(a: Arguments) -> Need:
    V = a["BLOCK_V"]
    return Need("sweeps", V, cross_entropy.traffic(1, V, a["logits_ptr"].itemsize, False), step=V)


def _cross_entropy_backward(a: Arguments) -> Need:
    V = a["BLOCK_V"]
    read = cross_entropy.traffic(1, V, a["logits_ptr"].itemsize, False)
    return Need("sweeps", V, read + V * a["dlogits_ptr"].itemsize, step=V)


def _logits(a: Arguments) -> Need:
    M, V, C = a["BLOCK_M"], a["BLOCK_V"], a["BLOCK_C"]
    moved = (M + V) * C * a["x"].itemsize
    products = linear_cross_entropy.flops((M, C), V, False)
    whole = (TOKENS + a["V"]) / (TOKENS * a["V"])  # x and W read once, over all pairs
    return Need("loop", M * V, moved, products, dram=whole * M * V / (M + V))


def _loss(a: Arguments) -> Need:
    n = a["BLOCK_T"] * a["BLOCK_N"]
    return Need("loop", n, n * (2 + a["HAS_SMOOTHING"]) * 4)


def _attention_forward(a: Arguments) -> Need:
    Q, K, D, DV = a["BLOCK_Q"], a["BLOCK_K"], a["BLOCK_D"], a["BLOCK_DV"]
    moved = K * (D + DV) * a["k_ptr"].itemsize
    products = attention.flops(1, 1, Q, K, (D + DV) // 2, False)
    return Need("loop", Q * K, moved, products, dram=Q / TOKENS / a["GROUP"])


def _attention_delta(a: Arguments) -> Need:
    Q, DV = a["BLOCK_Q"], a["BLOCK_DV"]
    return Need("program", Q * DV, 2 * Q * DV * a["out_ptr"].itemsize + Q * a["delta_ptr"].itemsize)


def _attention_dq(a: Arguments) -> Need:
    Q, K, D, DV = a["BLOCK_Q"], a["BLOCK_K"], a["BLOCK_D"], a["BLOCK_DV"]
    moved = K * (D + DV) * a["k_ptr"].itemsize
    products = 2 * Q * K * (2 * D + DV)  # s, dq; dp
    return Need("loop", Q * K, moved, products, dram=Q / TOKENS / a["GROUP"])


def _attention_dkdv(a: Arguments) -> Need:
    Q, K, D, DV = a["BLOCK_Q"], a["BLOCK_K"], a["BLOCK_D"], a["BLOCK_DV"]
    moved = Q * (D + DV) * a["q_ptr"].itemsize + 2 * Q * a["lse_ptr"].itemsize
    products = 2 * Q * K * (2 * D + 2 * DV)  # s, dk; dp, dv
    return Need("loop", Q * K, moved, products, dram=K / TOKENS)


def _attention_part(a: Arguments) -> Need:
    rows, K, D, DV = a["GROUP"] * a["Tq"], a["BLOCK_K"], a["BLOCK_D"], a["BLOCK_DV"]
    moved = K * (D + DV) * a["k_ptr"].itemsize
    products = attention.flops(1, 1, rows, K, (D + DV) // 2, False)
    return Need("loop", rows * K, moved, products, used=rows / a["BLOCK_R"])


def _attention_join(a: Arguments) -> Need:
    parts, most, DV = a["parts"], a["MOST"], a["BLOCK_DV"]
    size = a["acc_ptr"].itemsize
    moved = most * (DV + 2) * size + DV * a["out_ptr"].itemsize + size
    return Need("program", parts * DV, moved, used=parts / most, dram=parts / most)


def _norm_partial(a: Arguments) -> Need:
    n = a["BLOCK"]
    return Need("program", n, n * a["GRAD"].itemsize + 8)


def _norm(a: Arguments) -> Need:
    return Need("loop", a["BLOCK"], a["BLOCK"] * 8)


def _update(a: Arguments) -> Need:
    n = a["BLOCK"]
    grad, param, state = (a[name].itemsize for name in ("GRAD", "PARAM", "EXP_AVG"))
    return Need("program", n, adamw.traffic(((n,),), grad, param, state, a["HAS_MASTER"]))


NEEDS: dict[str, Callable[[Arguments], Need]] = {
    "gelu_forward_kernel": _gelu(False),
    "gelu_backward_kernel": _gelu(True),
    "layer_norm_forward_kernel": _layer_norm_forward,
    "layer_norm_backward_kernel": _layer_norm_backward,
    "layer_norm_columns_kernel": _layer_norm_columns,
    "layer_norm_reduce_kernel": _layer_norm_reduce,
    "activation_backward_kernel": _activation_backward,
    "sum_partials_kernel": _sum_partials,
    "cross_entropy_forward_kernel": _cross_entropy_forward,
    "cross_entropy_backward_kernel": _cross_entropy_backward,
    "logits_forward_kernel": _logits,
    "logits_backward_kernel": _logits,
    "loss_kernel": _loss,
    "attention_forward_kernel": _attention_forward,
    "attention_delta_kernel": _attention_delta,
    "attention_dq_kernel": _attention_dq,
    "attention_dkdv_kernel": _attention_dkdv,
    "attention_part_kernel": _attention_part,
    "attention_join_kernel": _attention_join,
    "norm_partial_kernel": _norm_partial,
    "norm_kernel": _norm,
    "update_kernel": _update,
}
"""Kernel -> its need, given the arguments of a launch."""
