"""The C++ extension's matrix product (csrc/cpu/gemm.cpp).

No op takes it yet: measured on AVX2, float32 products take 0.9 to 1.5 times as long as torch's
(oneDNN or MKL), and its sums over one row are less exact than the gate asks for. Its AVX-512 paths
are compiled and have not run. tests/ops/test_product_cpp.py holds it to float64.
"""

import torch
from torch import Tensor

from gptk.native import ACC, ACTIVATION, DTYPE, load, threads


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
) -> tuple[Tensor, Tensor | None]:
    """c = activation(a b + bias), or c = (a b) * activation'(slope_of).

    Args:
        a: (M, K), b: (K, N); one stride of each is 1.
        compute: dtype that a and b are rounded to before they are multiplied (default a's).
        out: dtype of the results (default a's).
        keep_pre: also return a b + bias. keep_value: also return activation(slope_of).
    """
    M, K = a.shape
    N = b.shape[1]
    compute = a.dtype if compute is None else compute
    out = a.dtype if out is None else out
    c = torch.empty((M, N), dtype=out)
    other = torch.empty((M, N), dtype=out) if keep_pre or keep_value else None
    address = 0 if other is None else other.data_ptr()
    extension, n_threads = load(), threads()
    scratch = torch.empty(extension.gemm_scratch(M, N, K, n_threads), dtype=ACC[compute])
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
        0,
        ACTIVATION[activation],
        DTYPE[compute],
        DTYPE[out],
        DTYPE[a.dtype],
        DTYPE[b.dtype],
        0 if bias is None else DTYPE[bias.dtype],
        0 if slope_of is None else DTYPE[slope_of.dtype],
        n_threads,
    )
    return c, other
