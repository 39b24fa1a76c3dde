"""What the benchmarks stage times, of each op the most important first."""

from typing import Any, NamedTuple

from benchmarks.gpu import shapes

Values = dict[str, Any]


class Case(NamedTuple):
    """sizes: what is timed; check: what replaces them where the answer is judged in float64."""

    name: str
    dtype: str
    sizes: Values
    check: Values


def _attention(D: int, T: int, causal: bool = True) -> Case:
    # as in FlashAttention's tables: 16k tokens, 2,048 channels
    sizes = dict(B=16384 // T, H=2048 // D, Tq=T, Tk=T, D=D, causal=causal)
    name = f"D{D} T{T}" + ("" if causal else " full")
    return Case(name, "bfloat16", sizes, dict(B=1, H=2, Tq=1024, Tk=1024))


def _norm(C: int, dtype: str = "bfloat16", residual: bool = False) -> Case:
    name = f"8192x{C}" + (" residual" if residual else "")
    return Case(name, dtype, dict(shape=(8192, C), residual=residual), dict(shape=(256, C)))


CASES: dict[str, tuple[Case, ...]] = {
    "attention": (
        _attention(64, 1024),
        _attention(128, 1024),
        _attention(64, 4096),
        _attention(128, 4096),
        _attention(64, 2048),
        _attention(128, 2048),
        _attention(64, 8192),
        _attention(128, 8192),
        _attention(64, 4096, causal=False),
        _attention(128, 4096, causal=False),
    ),
    "layer_norm": (
        *(_norm(C) for C in (768, 1600, 4096, 8192)),
        *(_norm(C, residual=True) for C in (768, 4096)),
        *(_norm(C, "float32") for C in (768, 4096)),
    ),
    "gelu": (
        Case(
            "8192x3072",
            "bfloat16",
            dict(shape=(8192, 3072), approximate="tanh"),
            dict(shape=(64, 3072)),
        ),
    ),
    "linear": (
        Case(
            "8192x768x3072 gelu",
            "bfloat16",
            dict(shape=(8192, 768), N=3072, activation="gelu_tanh"),
            dict(shape=(256, 768)),
        ),
    ),
    "mlp": (
        Case("8192x768", "bfloat16", dict(shape=(8192, 768)), dict(shape=(256, 768))),
        Case("4096x4096", "bfloat16", dict(shape=(4096, 4096)), dict(shape=(64, 4096))),
    ),
    "cross_entropy": (
        Case("8192x50304", "bfloat16", dict(N=8192, V=50304), dict(N=256)),
        Case("4096x128256", "bfloat16", dict(N=4096, V=128256), dict(N=128)),
    ),
    "linear_cross_entropy": (
        Case(
            "8192x768x50304", "bfloat16", dict(shape=(8192, 768), V=50304), dict(shape=(256, 768))
        ),
        Case(
            "4096x4096x128256",
            "bfloat16",
            dict(shape=(4096, 4096), V=128256),
            dict(shape=(128, 4096)),
        ),
    ),
    # all of GPT-2 124M's parameters
    "adamw": (Case("gpt2 124M", "float32", dict(shapes=shapes.parameters(12)), {}),),
}


def modes(op: str) -> tuple[str, ...]:
    """What is timed of each case."""
    if op == "adamw":
        return ("clip+step",)
    return ("forward", "backward" if op == "attention" else "forward+backward")
