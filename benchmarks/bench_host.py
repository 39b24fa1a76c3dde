"""What a call costs the host: each op's forward and backward with its kernels replaced by nothing,
against an autograd.Function that does nothing but call the same implementation.

The difference is the contract: argument checks, the choice of the backend, what makes tensors
readable, autocast's rules. The ids of targets are not read: that is a pass over the data, which
calls on a GPU leave out. Both allocate the same results and call the same entry points: those of
the extension, which return at once, or Triton's launcher up to where it would hand a kernel to the
driver. Interleaved, the best of many short runs, so that other work on the machine does not show.
No op should take more than 1.3 times the bare function.
Run: python -m benchmarks.bench_host [OP ...] [--backend cpp|triton] [--compiled]
"""

import argparse
import time
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import gptk.functional as GF
from gptk import native
from gptk.ops import contract
from gptk.ops import cross_entropy as class_loss
from gptk.ops.contract import implementation

CALLS = 20  # of one run


class NoKernels:
    """The extension without its kernels: each returns 0 at once."""

    NORM_BLOCK = 1

    def __getattr__(self, name: str) -> Any:
        def entry(*arguments: Any) -> int:
            return 0

        setattr(self, name, entry)
        return entry

    def isa(self) -> str:
        """Products by the extension, so that they fall away, too."""
        return "avx512_bf16"


def not_read(target: Tensor, V: int, ignore_index: int) -> None:
    """A Mock would take as long as some ops."""


@contextmanager
def no_kernels(backend: str) -> Any:
    """Kernels of the backend are replaced by nothing in this block, and so is reading ids."""
    with mock.patch.object(class_loss, "read_ids", not_read), HOLLOW[backend]():
        yield


def no_extension() -> Any:
    assert native.available() is None, native.available()
    return mock.patch.object(native, "_module", NoKernels())


@contextmanager
def no_gpu() -> Any:
    """Triton's launcher for tensors on the CPU: each call finds a kernel, which does nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernel = SimpleNamespace(
        launch_metadata=lambda *_: None, function=0, packed_metadata=0, run=lambda *_: None
    )
    target = GPUTarget("cuda", 90, 32)

    def compiled(function: Any, key: Any, *_: Any) -> Any:
        return function.device_caches[0][0].setdefault(key, kernel)

    def chosen(op: str, *_: Any) -> Any:
        return [(implementation(op, "triton"), 0)]

    active = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    before = driver._active
    driver.set_active(active)
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", compiled),
            mock.patch.object(contract, "_resolve", chosen),
            mock.patch.dict(contract._candidates, clear=True),
        ):
            yield
    finally:
        driver.set_active(before)


HOLLOW = {"cpp": no_extension, "triton": no_gpu}


def bare(forward: Callable[..., Any], backward: Callable[..., Any], leaves: int) -> Any:
    """An autograd.Function without a contract: `forward` gives (results, saved), `backward` the
    gradients of the leaves."""

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            results, saved = forward(*inputs)
            ctx.save_for_backward(*saved)
            return results

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> Any:
            found = backward(*upstream, *ctx.saved_tensors, ctx.needs_input_grad[:leaves])
            return *found, *(None,) * (len(ctx.needs_input_grad) - leaves)

    return Bare


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def pairs(backend: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], list[Tensor]]]:
    """op -> (its call, the bare function's, the leaves); backend: cpp or triton."""
    f32 = torch.float32
    x, r, w, b = leaf(4, 8), leaf(4, 8), leaf(8), leaf(8)
    W, W2, c, c2 = leaf(16, 8), leaf(8, 16), leaf(16), leaf(8)
    q, k, v = leaf(1, 2, 4, 8), leaf(1, 2, 4, 8), leaf(1, 2, 4, 8)
    target = torch.zeros(4, dtype=torch.int64)
    norm, linear, mlp, gelu, attention, ce, lce = (
        implementation(op, backend)
        for op in (
            "layer_norm", "linear", "mlp", "gelu", "attention", "cross_entropy",
            "linear_cross_entropy",
        )
    )  # fmt: skip

    def norm_forward(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        y, h, mean, rstd = norm.forward(x, w, b, 1e-5, r, 0.0, 0)
        return (y, h), (h, w, mean, rstd)

    def norm_backward(dy: Tensor, dh: Tensor, h: Tensor, w: Tensor, *rest: Any) -> Any:
        *statistics, needs = rest
        return norm.backward(dy, dh, h, w, *statistics, f32, f32, 0.0, 0, needs)

    def linear_forward(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return linear.forward(x, w, b, None)[0], (x, w)

    def linear_backward(dy: Tensor, x: Tensor, w: Tensor, needs: Any) -> Any:
        return linear.backward(dy, x, w, None, None, f32, f32, needs)

    def mlp_forward(x: Tensor, *parameters: Tensor) -> Any:
        y, pre = mlp.forward(x, *parameters, "gelu_tanh")
        return y, (x, pre, parameters[0], parameters[2])

    def mlp_backward(dy: Tensor, *saved: Any) -> Any:
        *tensors, needs = saved
        return mlp.backward(dy, *tensors, "gelu_tanh", (f32,) * 4, needs)

    def attention_forward(*qkv: Tensor) -> Any:
        out, lse = attention.forward(*qkv, True, 0.35, 0.0, 0, None)
        return out, (*qkv, out, lse)

    def attention_backward(dout: Tensor, *saved: Any) -> Any:
        *tensors, needs = saved
        return attention.backward(dout, *tensors, True, 0.35, 0.0, 0, None, needs)

    def ce_forward(x: Tensor, target: Tensor) -> Any:
        loss, lse = ce.forward(x, target, -100, 0.0)
        return loss, (x, target, lse)

    def ce_backward(dloss: Tensor, *saved: Any) -> Any:
        *tensors, needs = saved
        return (ce.backward(dloss, *tensors, -100, 0.0),)

    def lce_forward(x: Tensor, w: Tensor, target: Tensor) -> Any:
        loss, lse = lce.forward(x, w, None, target, -100, 0.0)
        return loss, (x, w, target, lse)

    def lce_backward(dloss: Tensor, x: Tensor, w: Tensor, *rest: Any) -> Any:
        target, lse, needs = rest
        needs = (*needs, False)
        found = lce.backward(dloss, x, w, None, target, lse, f32, None, needs, -100, 0.0)
        return found[:2]

    norm_bare = bare(norm_forward, norm_backward, 4)
    linear_bare = bare(linear_forward, linear_backward, 3)
    mlp_bare = bare(mlp_forward, mlp_backward, 5)
    gelu_bare = bare(
        lambda x: (gelu.forward(x, "tanh"), (x,)),
        lambda dy, x, needs: (gelu.backward(dy, x, "tanh"),),
        1,
    )
    attention_bare = bare(attention_forward, attention_backward, 3)
    ce_bare, lce_bare = bare(ce_forward, ce_backward, 1), bare(lce_forward, lce_backward, 2)
    return {
        "layer_norm": (
            lambda: GF.layer_norm(x, (8,), w, b, residual=r, backend=backend),
            lambda: norm_bare.apply(x, r, w, b),
            [x, r, w, b],
        ),
        "attention": (
            lambda: GF.attention(q, k, v, causal=True, backend=backend),
            lambda: attention_bare.apply(q, k, v),
            [q, k, v],
        ),
        "gelu": (lambda: GF.gelu(x, "tanh", backend=backend), lambda: gelu_bare.apply(x), [x]),
        "linear": (
            lambda: GF.linear(x, W, c, backend=backend),
            lambda: linear_bare.apply(x, W, c),
            [x, W, c],
        ),
        "mlp": (
            lambda: GF.mlp(x, W, c, W2, c2, backend=backend),
            lambda: mlp_bare.apply(x, W, c, W2, c2),
            [x, W, c, W2, c2],
        ),
        "cross_entropy": (
            lambda: GF.cross_entropy(x, target, reduction="none", backend=backend),
            lambda: ce_bare.apply(x, target),
            [x],
        ),
        "linear_cross_entropy": (
            lambda: GF.linear_cross_entropy(x, W, target, reduction="none", backend=backend),
            lambda: lce_bare.apply(x, W, target),
            [x, W],
        ),
    }


def microseconds(calls: list[Callable[[], Any]], leaves: list[Tensor], runs: int) -> list[float]:
    """Of one forward and backward of each, the best of interleaved runs."""
    ones = []
    for call in calls:
        result = call()
        outputs = result if isinstance(result, tuple) else (result,)
        ones.append([torch.ones_like(o) for o in outputs])
    best = [float("inf")] * len(calls)
    for _ in range(runs):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            for _ in range(CALLS):
                result = call()
                outputs = result if isinstance(result, tuple) else (result,)
                torch.autograd.grad(outputs, leaves, ones[i])
            best[i] = min(best[i], (time.perf_counter() - begin) / CALLS * 1e6)
    return best


def main() -> None:
    """One line for each op."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all")
    parser.add_argument("--backend", choices=HOLLOW, default="cpp")
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile (aot_eager)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with no_kernels(arguments.backend):
        for op, (call, function, leaves) in pairs(arguments.backend).items():
            if arguments.ops and op not in arguments.ops:
                continue
            calls = [function, call]
            if arguments.compiled:
                calls.append(torch.compile(call, backend="aot_eager", fullgraph=True))
            least, ours, *traced = microseconds(calls, leaves, arguments.runs)
            line = f"{op:22}{least:7.1f} us bare{ours:8.1f} us gptk{ours / least:6.2f}x"
            print(line + "".join(f"{t:8.1f} us compiled" for t in traced))


if __name__ == "__main__":
    main()
