"""Matrix products on the CPU: the extension's own (csrc/cpu/gemm.cpp) or torch's (oneDNN, MKL).

Which one is a committed, measured table, OWN. The extension's product does in the same pass what
would else be passes of their own: it rounds float32 operands to the compute dtype while it packs
them, adds the bias, applies the activation or its slope, and writes float32 sums of products of
16-bit values.
"""

import functools

import torch
from torch import Tensor

from gptk.native import ACC, ACTIVATION, DTYPE, alive, empty, isa, load, threads, workspace

OWN: dict[str, dict[torch.dtype, float]] = {
    "avx512": {torch.float32: 0.92, torch.float16: 0.89},
    "avx512_bf16": {torch.float32: 0.93, torch.float16: 0.86, torch.bfloat16: 0.98},
}
"""Instruction set -> compute dtype -> time of the extension's product over that of torch's, for
those that are the extension's: medians over the products of training steps, measured by
benchmarks/products.py (benchmarks/products.json: an AMD EPYC with AVX-512 BF16, 2 threads). A ratio
of about 1 pays, since the passes around a product fall away. bf16 without vdpbf16ps, and all
below AVX-512, stay torch's."""

FEW_ROWS = 4
"""Gradients with up to so many rows in 32 bits are torch's: the extension's sums are less exact
there. y = x weight^T reads the weight where it lies and sums in double."""


def owns(compute: torch.dtype) -> bool:
    """Are products in this dtype the extension's? Not bf16 where AMX is, which oneDNN uses."""
    return compute in OWN.get(isa(), ()) and not (compute == torch.bfloat16 and _has_amx())


@functools.cache
def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def explain() -> str:
    """Whose the products of each dtype are on this CPU, in one line."""
    whose = [
        f"{str(dtype).removeprefix('torch.')} {'by gptk' if owns(dtype) else 'by torch'}"
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ]
    return f"{', '.join(whose)} (measured: gptk/ops/cpp_product.py)"


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch should multiply matrices of `dtype` on this CPU.

    A product of 16-bit matrices runs in that dtype only where oneDNN has kernels for it. Elsewhere
    torch would loop over elements (measured on AVX2: 60 times slower than converting to float32).
    """
    if torch.backends.mkldnn.is_available():
        if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return dtype
        if dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return dtype
    return ACC[dtype]


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    compute: torch.dtype | None = None,
    out: torch.dtype | None = None,
    keep_pre: bool = False,
    slope_of: Tensor | None = None,
    keep_value: bool = False,
    into: Tensor | None = None,
    add: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """c = activation(a b + bias), or c = (a b) * activation'(slope_of), by the extension.

    Args:
        a: (M, K), b: (K, N); one stride of each is 1.
        compute: dtype that a and b are rounded to before they are multiplied (default a's).
        out: dtype of the results (default a's).
        keep_pre: also return a b + bias. keep_value: also return activation(slope_of).
        into: c, contiguous, instead of new memory; add: c += a b (float32, no epilogue).
    """
    M, K = a.shape
    N = b.shape[1]
    if b.shape[0] != K or (bias is not None and bias.shape[0] != N):
        found = f"{tuple(a.shape)} x {tuple(b.shape)}"
        raise ValueError(f"the product {found}, bias {None if bias is None else tuple(bias.shape)}")
    compute = a.dtype if compute is None else compute
    c = empty((M, N), out or a.dtype) if into is None else into
    other = empty((M, N), c.dtype) if keep_pre or keep_value else None
    address = 0 if other is None else other.data_ptr()
    extension, n_threads = load(), threads()
    scratch = workspace("product", extension.gemm_scratch(M, N, K, n_threads), ACC[compute])
    extension.gemm(
        c.data_ptr(),
        address if keep_pre else 0,
        address if keep_value else 0,
        scratch.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if slope_of is None else slope_of.data_ptr(),
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        add,
        ACTIVATION[activation],
        DTYPE[compute],
        DTYPE[c.dtype],
        DTYPE[a.dtype],
        DTYPE[b.dtype],
        0 if bias is None else DTYPE[bias.dtype],
        n_threads,
    )
    alive(a, b, bias, slope_of, scratch)
    return c, other
