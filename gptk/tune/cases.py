"""What `gptk tune` measures: for each row of the tuning file the work, and what to try for it.

`timed` is the usual call of the row. `also` are its other calls (flags that share the row), which
are not timed but must be right and free of spills, too. Widths and head sizes are real ones; the
number of rows is large on a GPU, and small where only the results count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from gptk.ops.tuning_file import NO_LIMIT, Config, Key, bucket

SEED = 2**40 + 77
TOKENS = 16384
"""Rows of a training step that fills a GPU."""
Results = list[Tensor | None]


@dataclass(frozen=True)
class Case:
    """One row to measure, at `width` (head size, row width, vocabulary, columns)."""

    kernel: str
    dtype: torch.dtype
    width: int
    kind: str
    quick: bool

    @property
    def op(self) -> str:
        return self.kernel.partition(".")[0]

    @property
    def key(self) -> Key:
        return self.kernel, 8 * self.dtype.itemsize, bucket(self.kernel, self.width), self.kind


@dataclass(frozen=True)
class Work:
    """Calls that give the results of a case."""

    timed: Callable[[], Results]
    also: Callable[[], Results]


def cases(half: torch.dtype) -> list[Case]:
    """All cases; `half` stands for both dtypes of 16 bits."""
    return [case for dtype in (half, torch.float32) for case in _cases(dtype)]


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    half = dtype.itemsize == 2
    for part, D, kind in product(
        ("forward", "dq", "dkdv"), (64, 128, 256), ("plain", "packed", "dropout")
    ):
        quick = half and D < 256 and kind == "plain"
        yield Case(f"attention.{part}", dtype, D, kind, quick)
    for part, N, kind in product(
        ("forward", "backward"), (128, 384, 768, 1600, 4096, 8192, 65536), ("plain", "dropout")
    ):
        quick = half and N in (768, 1600, 4096) and kind == "plain"
        yield Case(f"layer_norm.{part}", dtype, N, kind, quick)
    for part, V, kind in product(
        ("forward", "backward"), (256, 50304, 128256), ("plain", "softcap")
    ):
        quick = half and V == 50304 and kind == "plain"
        yield Case(f"cross_entropy.{part}", dtype, V, kind, quick)
    for part, kind in product(("forward", "backward"), ("gelu", "gelu_tanh")):
        yield Case(f"gelu.{part}", dtype, 0, kind, half and kind == "gelu_tanh")
    if half:
        for part, kind in product(("forward", "backward"), ("plain", "extras", "softcap")):
            yield Case(f"linear_cross_entropy.{part}", dtype, 0, kind, kind == "plain")
    for N, kind in product((768, 3072), ("none", "gelu", "gelu_tanh")):
        yield Case("linear.epilogue", dtype, N, kind, half and kind == "gelu_tanh")


def shipped(case: Case, arch: int) -> Config:
    """The configuration that ships; call it inside `tuning.trial({})`."""
    from gptk.ops.attention import triton_dkdv, triton_dq
    from gptk.ops.attention import triton_impl as attention
    from gptk.ops.cross_entropy import triton_impl as cross_entropy
    from gptk.ops.gelu import triton_impl as gelu
    from gptk.ops.layer_norm import triton_backward
    from gptk.ops.layer_norm import triton_impl as layer_norm
    from gptk.ops.linear import triton_impl as linear
    from gptk.ops.linear_cross_entropy import triton_logits

    if case.op == "attention":
        modules = {"forward": attention, "dq": triton_dq, "dkdv": triton_dkdv}
        module = modules[case.kernel.partition(".")[2]]
        return module.launch_config(case.width, case.dtype, case.kind, arch)
    if case.kernel == "layer_norm.forward":
        return layer_norm.launch_config(case.width, 4)
    if case.kernel == "layer_norm.backward":
        crowded = triton_backward.is_crowded(case.kind == "dropout", case.dtype.itemsize, arch)
        return triton_backward.launch_config(case.width, 4, crowded)
    if case.op == "cross_entropy":
        return tuple(cross_entropy.launch_config(case.width, case.kind == "softcap").values())
    if case.op == "linear_cross_entropy":
        part = case.kernel.partition(".")[2]
        return triton_logits.launch_config(part, arch, case.kind)
    if case.op == "gelu":
        return tuple(gelu.launch_config(case.dtype).values())
    return tuple(linear.launch_config(case.width).values())


def candidates(case: Case) -> list[Config]:
    """What to try; some of it will not fit a GPU."""
    half, size = case.dtype.itemsize == 2, case.key[2]
    if case.op == "attention":
        if not half:
            return list(product((16, 32, 64), (16, 32), (4, 8), (1, 2), (NO_LIMIT,)))
        own = (64, 128) if size <= 128 else (32, 64, 128)  # the side that a program owns
        sides = (own, (32, 64, 128))
        q, k = sides[::-1] if case.kernel == "attention.dkdv" else sides
        return [tile + pipeline for tile in product(q, k) for pipeline in _pipelines(2, 3)]
    if case.op == "layer_norm":
        tiles = [(m, size) for m in (1, 2, 4, 8, 16) if size <= 8192 and m * size <= 8192]
        tiles += [(1, n) for n in (1024, 2048, 4096, 8192) if n < size]
        return [(m, n, w) for m, n in tiles for w in (2, 4, 8, 16) if 2 <= m * n // (32 * w) <= 64]
    if case.op == "cross_entropy":
        widths = (128, 256) if size <= 256 else (1024, 2048, 4096, 8192, 16384)
        return [(n, w) for n in widths for w in (1, 2, 4, 8, 16) if 2 <= n // (32 * w) <= 64]
    if case.op == "linear_cross_entropy":
        squares = product((64, 128), (64, 128, 256))
        return [(m, v, 64, *pipeline) for m, v in squares for pipeline in _pipelines(3, 4)]
    if case.op == "gelu":
        pairs = product((512, 1024, 2048, 4096), (2, 4, 8))
        return [(n, w) for n, w in pairs if 4 <= n // (32 * w) <= 32]
    shapes = product((4, 8, 16, 32), (32, 64, 128, 256))
    return [(m, n, w) for m, n in shapes for w in (2, 4, 8) if 512 <= m * n <= 4096 and n <= size]


def _pipelines(*stages: int) -> list[Config]:
    """num_warps, num_stages, maxnreg: of 128 registers, two programs of 8 warps fit a processor."""
    return [*product((4, 8), stages, (NO_LIMIT,)), *product((8,), stages, (128,))]


def work(case: Case, device: str, tokens: int = TOKENS) -> Work:
    """The calls of a case over `tokens` rows, fewer where they are wide; inside `tuning.trial({})`,
    since what a backward reads is computed here by the configurations that ship."""
    torch.manual_seed(0)  # the answers of all candidates are those of one input
    if case.op == "attention":
        return _attention(case, device, tokens)
    if case.op == "layer_norm":
        return _layer_norm(case, device, max(2, min(tokens, tokens * 1024 // case.width)))
    if case.op == "cross_entropy":
        return _cross_entropy(case, device, max(2, min(tokens, tokens * 2048 // case.width)))
    if case.op == "linear_cross_entropy":
        return _linear_cross_entropy(case, device, tokens)
    if case.op == "gelu":
        return _gelu(case, device, tokens * 3072 if tokens >= 1024 else 37 * tokens)
    return _epilogue(case, device, tokens)


def _attention(case: Case, device: str, tokens: int) -> Work:
    from gptk.ops.attention import triton_impl as attention
    from gptk.ops.attention.ranges import Ranges, ranges

    D, dtype = case.width, case.dtype
    B, T = max(1, tokens // 2048), min(tokens, 2048)
    H = max(2, 1024 // D) if tokens >= 2048 else 2
    q, k, v, dout = (torch.randn((B, T, H, D), device=device).to(dtype) for _ in range(4))
    q, k, v, dout = (t.transpose(1, 2) for t in (q, k, v, dout))
    ends = torch.tensor([0, T // 5, T // 2, T], device=device)
    packed = case.kind == "packed"
    p = 0.1 if case.kind == "dropout" else 0.0

    documents: dict[object, Ranges] = {}

    def seen_by(causal: bool, window: int | None) -> Ranges | None:
        """Who sees whom in packed documents, computed once: it is no part of a kernel."""
        if packed and (causal, window) not in documents:
            documents[causal, window] = ranges((ends, ends), T, T, causal, window)
        return documents.get((causal, window))

    def call(causal: bool, window: int | None, group: int) -> Results:
        seen = seen_by(causal, window)
        keys, values = k[:, : H // group], v[:, : H // group]
        options = (causal, D**-0.5, p, SEED, window)
        if case.kernel == "attention.forward":
            return [*attention.forward(q, keys, values, *options, seen)]
        out, lse = kept(causal, window, group, seen)
        needs = (True, False, False) if case.kernel == "attention.dq" else (False, True, True)
        tensors = (dout, q, keys, values, out, lse)
        return [*attention.backward(*tensors, *options, needs, ranges=seen)]

    forwards: dict[object, tuple[Tensor, Tensor]] = {}

    def kept(
        causal: bool, window: int | None, group: int, seen: Ranges | None
    ) -> tuple[Tensor, Tensor]:
        """The forward's results, computed once for all candidates."""
        key = (causal, window, group)
        if key not in forwards:
            keys, values = k[:, : H // group], v[:, : H // group]
            options = (causal, D**-0.5, p, SEED, window)
            forwards[key] = attention.forward(q, keys, values, *options, seen)
        return forwards[key]

    return Work(
        lambda: call(True, None, 1),
        lambda: [*call(False, None, 1), *call(True, T // 2, 2)],
    )


def _layer_norm(case: Case, device: str, M: int) -> Work:
    from gptk.ops.layer_norm import triton_impl as layer_norm

    N, dtype = case.width, case.dtype
    p = 0.1 if case.kind == "dropout" else 0.0
    x, residual, dy, dh = (torch.randn((M, N), device=device).to(dtype) for _ in range(4))
    w, b = torch.randn(N, device=device), torch.randn(N, device=device)

    if case.kernel == "layer_norm.forward":

        def forward(added: bool) -> Results:
            r = residual if added else None
            return [*layer_norm.forward(x, w, b, 1e-5, r, p if added else 0.0, SEED)]

        return Work(lambda: forward(True), lambda: [] if p else forward(False))
    h = x + residual
    mean = h.float().mean(1)
    rstd = (h.float().var(1, correction=0) + 1e-5).rsqrt()

    def backward(added: bool) -> Results:
        upstream, kind = (dh, dtype) if added else (None, None)
        needs = (True, added, True, True)
        statistics = (mean, rstd, dtype, kind)
        return [*layer_norm.backward(dy, upstream, h, w, *statistics, p, SEED, needs)]

    return Work(lambda: backward(True), lambda: [] if p else backward(False))


def _cross_entropy(case: Case, device: str, N: int) -> Work:
    from gptk.ops.cross_entropy import triton_impl as cross_entropy

    V, dtype = case.width, case.dtype
    logits = (8 * torch.randn((N, V), device=device)).to(dtype)  # a few classes hold most of it
    target = torch.randint(V, (N,), device=device)
    bias, dloss = torch.randn(V, device=device), torch.full((N,), 1 / N, device=device)
    cap = 30.0 if case.kind == "softcap" else None
    lse = torch.empty_like(dloss)

    def call(bias: Tensor | None, smoothing: float, z_loss: float) -> Results:
        options = (-100, smoothing, cap, z_loss)
        if case.kernel == "cross_entropy.forward":
            loss, sums = torch.empty_like(dloss), torch.empty_like(lse)
            cross_entropy.losses(loss, sums, logits, bias, target, *options)
            return [loss, sums]
        dlogits = torch.empty_like(logits)
        sums = kept(bias)
        cross_entropy.logit_gradients(dlogits, dloss, logits, bias, target, sums, *options)
        return [dlogits]

    forwards: dict[bool, Tensor] = {}

    def kept(bias: Tensor | None) -> Tensor:
        """The forward's lse, computed once for all candidates."""
        if (bias is None) not in forwards:
            sums = torch.empty_like(lse)
            cross_entropy.losses(lse, sums, logits, bias, target, -100, 0.0, cap, 0.0)
            forwards[bias is None] = sums
        return forwards[bias is None]

    return Work(lambda: call(None, 0.0, 0.0), lambda: call(bias, 0.1, 1e-4))


def _linear_cross_entropy(case: Case, device: str, tokens: int) -> Work:
    from gptk.ops.linear_cross_entropy import triton_dlogits, triton_losses
    from gptk.ops.linear_cross_entropy.triton_logits import Terms

    N, C, V = (tokens // 2, 768, 50304) if tokens >= 2048 else (tokens, 64, 300)
    x, weight = (torch.randn((rows, C), device=device).to(case.dtype) for rows in (N, V))
    bias, target = torch.randn(V, device=device), torch.randint(V, (N,), device=device)
    dloss, cap = torch.full((N,), 1 / N, device=device), 30.0 if case.kind == "softcap" else None
    classes = slice(0, V // 8 // 16 * 16)
    lse = torch.full_like(dloss, 40.0)

    def call(bias: Tensor | None, smoothing: float, z_loss: float) -> Results:
        terms = Terms(-100, smoothing, cap, z_loss)
        if case.kernel == "linear_cross_entropy.forward":
            loss, sums = torch.empty_like(dloss), torch.empty_like(dloss)
            triton_losses.losses(loss, sums, x, weight, bias, target, terms)
            return [loss, sums]
        dlogits = x.new_empty((N, classes.stop))
        found = triton_dlogits.logit_gradients(
            dlogits, dloss, lse, x, weight, bias, target, classes, terms, bias is not None
        )
        return [dlogits, None if found is None else found.sum(0)]

    usual = bias if case.kind == "extras" else None
    most = (None, 0.0, 1e-4) if case.kind == "plain" else (bias, 0.1, 1e-4)
    return Work(lambda: call(usual, 0.0, 0.0), lambda: call(*most))


def _gelu(case: Case, device: str, n: int) -> Work:
    from gptk.ops.gelu import triton_impl as gelu

    x, dy = (torch.randn(n, device=device).to(case.dtype) for _ in range(2))
    approximate = "tanh" if case.kind == "gelu_tanh" else "none"
    if case.kernel == "gelu.forward":
        return Work(lambda: [gelu.forward(x, approximate)], list)
    return Work(lambda: [gelu.backward(dy, x, approximate)], list)


def _epilogue(case: Case, device: str, M: int) -> Work:
    from gptk.ops.linear import triton_impl as linear

    dy, pre = (torch.randn((M, case.width), device=device).to(case.dtype) for _ in range(2))
    activation = None if case.kind == "none" else case.kind

    def call(need_y: bool) -> Results:
        return [*linear.activation_backward(dy, pre, activation, torch.float32, need_y)]

    return Work(lambda: call(False), lambda: call(True) if activation else [])
