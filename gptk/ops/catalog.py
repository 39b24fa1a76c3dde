"""The catalog: every op, every backend, where each runs. Read it as the support matrix.

A row names the module that holds an implementation; nothing is imported until a call needs it.
The backend `cpp` is the native extension; the tensor's device decides whether its CPU or its
CUDA kernel runs. `torch` is the reference: the op's definition in plain PyTorch.
"""

from typing import NamedTuple

BACKENDS = ("torch", "triton", "cpp")
"""Every backend; `auto` is a choice among them, not one of them."""

PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")}
"""What `auto` tries, in order, by device type; other devices take torch. Triton's interpreter
runs on a CPU but is a debugger, not a fast path: it must be asked for by name."""

FLOATS = ("float32", "bfloat16", "float16", "float64")


class Impl(NamedTuple):
    """One implementation of one op."""

    op: str
    backend: str
    module: str  # below gptk.ops
    devices: tuple[str, ...]  # device types; () means every device
    dtypes: tuple[str, ...]
    vendor: str = ""  # the part that is deliberately a vendor library's, if any


MM = "matrix products by torch (cuBLAS on a GPU, oneDNN or MKL on a CPU)"
MM_CPP = (
    "matrix products by the extension with AVX-512, by torch (oneDNN or MKL) below and with AMX"
)

CATALOG = (
    Impl("layer_norm", "torch", "layer_norm.reference", (), FLOATS),
    Impl("layer_norm", "triton", "layer_norm.triton_impl", ("cuda", "cpu"), FLOATS),
    Impl("layer_norm", "cpp", "layer_norm.cpp_impl", ("cpu",), FLOATS),
    Impl("attention", "torch", "attention.reference", (), FLOATS),
    Impl("attention", "triton", "attention.triton_impl", ("cuda", "cpu"), FLOATS),
    Impl("attention", "cpp", "attention.cpp_impl", ("cpu",), FLOATS),
    Impl("gelu", "torch", "gelu.reference", (), FLOATS),
    Impl("gelu", "triton", "gelu.triton_impl", ("cuda", "cpu"), FLOATS),
    Impl("gelu", "cpp", "gelu.cpp_impl", ("cpu",), FLOATS),
    Impl("linear", "torch", "linear.reference", (), FLOATS),
    Impl("linear", "triton", "linear.triton_impl", ("cuda", "cpu"), FLOATS, MM),
    Impl("linear", "cpp", "linear.cpp_impl", ("cpu",), FLOATS, MM_CPP),
    Impl("mlp", "torch", "mlp.reference", (), FLOATS),
    Impl("mlp", "triton", "mlp.triton_impl", ("cuda", "cpu"), FLOATS, MM),
    Impl("mlp", "cpp", "mlp.cpp_impl", ("cpu",), FLOATS, MM_CPP),
    Impl("cross_entropy", "torch", "cross_entropy.reference", (), FLOATS),
    Impl("cross_entropy", "triton", "cross_entropy.triton_impl", ("cuda", "cpu"), FLOATS),
    Impl("cross_entropy", "cpp", "cross_entropy.cpp_impl", ("cpu",), FLOATS),
    Impl("linear_cross_entropy", "torch", "linear_cross_entropy.reference", (), FLOATS),
    Impl(
        "linear_cross_entropy",
        "triton",
        "linear_cross_entropy.triton_impl",
        ("cuda", "cpu"),
        FLOATS,
        MM,
    ),
    Impl("linear_cross_entropy", "cpp", "linear_cross_entropy.cpp_impl", ("cpu",), FLOATS, MM_CPP),
    Impl("adamw", "torch", "adamw.reference", (), FLOATS),
    Impl("adamw", "triton", "adamw.triton_impl", ("cuda", "cpu"), FLOATS),
    Impl("adamw", "cpp", "adamw.cpp_impl", ("cpu",), FLOATS),
)

OPS = tuple(dict.fromkeys(row.op for row in CATALOG))
ROWS = {(row.op, row.backend): row for row in CATALOG}

CROSSOVER: dict[tuple[str, str, str], int] = {
    ("layer_norm", "cpp", "cpu"): 294_913,
    ("linear", "cpp", "cpu"): 16_385,
    ("mlp", "cpp", "cpu"): 17,
    ("cross_entropy", "cpp", "cpu"): 294_913,
    ("linear_cross_entropy", "cpp", "cpu"): 98_305,
}
"""(op, backend, device type) -> the fewest elements of the input from which that backend beats
torch; `auto` takes torch below it. An absent entry means from one element up: the rest wins at
every size. Measured by benchmarks/crossover.py: fp32, forward and backward, 2 cores with AVX-512
BF16 (linear_cross_entropy: above the suite's case "char", which torch wins). With dropout the
kernel always wins: the reference draws its masks in 64-bit integer arithmetic."""
