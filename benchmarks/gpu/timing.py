"""The benchmarks stage: each op, forward and backward, ours and its rivals in turns.

A provider whose answer is wrong at a smaller size of the same case has no time, but a row that
says so; so has one that refuses to run.
"""

import functools
import importlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import clock, equivalence, rivals, shapes
from benchmarks.gpu.job import Job
from gptk.bench import gate
from gptk.ops.adamw.cases import inputs as draw_adamw
from gptk.optim import AdamW

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
        _attention(64, 4096),
        _attention(128, 1024),
        _attention(128, 4096),
        _attention(64, 8192),
        _attention(128, 8192),
        _attention(64, 2048),
        _attention(128, 2048),
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
}
MODES = ("forward", "forward+backward")
SECONDS = {"forward": 0.5, "forward+backward": 0.8, "backward": 0.8}


def run(job: Job) -> None:
    if job.part == "adamw":
        return run_adamw(job)
    op = job.part
    cases = CASES[op][:2] if job.dry else CASES[op]
    for number, case in enumerate(cases):
        if job.left() < 6:
            job.note(left_out_for_time=[c.name for c in cases[number:]])
            return
        _measure(job, op, case)


def _measure(job: Job, op: str, case: Case) -> None:
    dtype, device = shapes.DTYPES[case.dtype], job.device
    sizes = {**case.sizes, **shapes.TINY[op]} if job.dry else case.sizes
    module = importlib.import_module(f"gptk.ops.{op}.cases")
    checked = shapes.place(
        module.inputs(**({**sizes, **case.check} if not job.dry else sizes), dtype=dtype), device
    )
    known = equivalence.answers(op, checked)
    functions = {}
    for name, function in rivals.of(op, device).items():
        # the compiled one is PyTorch's own, and compiling it for another size takes long
        compiled = name == rivals.COMPILED
        ask = functools.partial(gate.answer, op, function, checked)
        found = "" if compiled else _judged(ask, known)
        if found:
            job.add(op=op, case=case.name, dtype=case.dtype, provider=name, refused=found)
        else:
            functions[name] = function
    del known, checked
    values = shapes.place(module.inputs(**sizes, dtype=dtype), device)
    modes = ("forward", "backward") if op == "attention" else MODES
    for mode in modes:
        calls = {}
        for name, function in functions.items():
            try:
                calls[name] = _call(op, function, values, mode)
                calls[name]()
                clock.synchronize(device)
            except Exception as error:  # out of memory, say: the others are timed all the same
                refused = f"{mode} does not run: {equivalence.first_line(error)}"
                job.add(op=op, case=case.name, dtype=case.dtype, provider=name, refused=refused)
                calls.pop(name, None)
        times = clock.samples(calls, device, SECONDS[mode]) if calls else {}
        for name, seconds in times.items():
            row = dict(op=op, case=case.name, dtype=case.dtype, mode=mode, provider=name)
            job.add(
                **row,
                **_spread(seconds),
                host_seconds=clock.host_seconds(calls[name], device),
                peak_bytes=clock.peak_bytes(calls[name], device),
                **_work(module, sizes, dtype, mode),
            )


def _judged(answer: Callable[[], list[torch.Tensor]], known: equivalence.Answers) -> str:
    """Why the provider is not timed; nothing if its answer is right."""
    try:
        found = equivalence.judge(known, answer())
    except Exception as error:  # whatever it is, the provider is not timed
        return f"it does not run: {equivalence.first_line(error)}"
    bad = [f"{one.name} is off by {one.error:.3g}" for one in found if not one.passed]
    return f"its answer is wrong: {', '.join(bad)}" if bad else ""


def _spread(seconds: list[float]) -> Values:
    ordered = sorted(seconds)
    low, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return dict(seconds=statistics.median(seconds), p20=low, p80=high, n=len(seconds))


def _work(module: Any, sizes: Values, dtype: torch.dtype, mode: str) -> Values:
    """Bytes that an ideal kernel moves, or operations of the products."""
    passes = {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}[mode]
    if hasattr(module, "flops"):
        return dict(flops=sum(module.flops(**sizes, backward=b) for b in passes))
    size = dtype.itemsize
    return dict(bytes=sum(module.traffic(**sizes, itemsize=size, backward=b) for b in passes))


def _call(op: str, function: Callable[..., Any], values: Values, mode: str) -> clock.Call:
    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                function(**values)

        return forward
    leaves = gate.leaves(op, values)
    given, inputs = {**values, **leaves}, list(leaves.values())

    def outputs() -> tuple[torch.Tensor, ...]:
        result = function(**given)
        return result if isinstance(result, tuple) else (result,)

    if mode == "backward":
        kept = outputs()
        ups = gate.upstream(kept)
        return lambda: torch.autograd.grad(kept, inputs, ups, retain_graph=True)
    ups = gate.upstream(outputs())
    return lambda: torch.autograd.grad(outputs(), inputs, ups)


def run_adamw(job: Job) -> None:
    """Clipping by the global norm and one update of all of GPT-2 124M's parameters, float32."""
    sizes = shapes.TINY["adamw"] if job.dry else dict(shapes=shapes.parameters(12))
    drawn = shapes.place(draw_adamw(**sizes, dtype=torch.float32), job.device)
    numbers = sum(p.numel() for p in drawn["params"])
    calls = {}
    for name in (rivals.OURS, rivals.EAGER, "torch foreach"):
        params = [torch.nn.Parameter(p.clone()) for p in drawn["params"]]
        for p, g in zip(params, drawn["grads"], strict=True):
            p.grad = g.clone()
        calls[name] = _stepper(name, params)
    # all start alike: the first update of each is held against float64 in the equivalence stage
    for name, seconds in clock.samples(calls, job.device, 3.0).items():
        job.add(
            op="adamw",
            case="gpt2 124M",
            dtype="float32",
            mode="clip+step",
            provider=name,
            **_spread(seconds),
            host_seconds=clock.host_seconds(calls[name], job.device),
            peak_bytes=clock.peak_bytes(calls[name], job.device),
            bytes=8 * 4 * numbers,  # gradients twice; parameters and both moments read and written
        )


def _stepper(name: str, params: list[torch.nn.Parameter]) -> clock.Call:
    if name == rivals.OURS:
        step = AdamW(params, lr=1e-3, weight_decay=0.1, max_grad_norm=1.0, backend="triton").step
        return step
    fused = name == rivals.EAGER
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=fused, foreach=not fused)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return clip_and_step
