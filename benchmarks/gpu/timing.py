"""The benchmarks stage: each op, forward and backward, ours and its rivals in turns.

A provider whose answer is wrong at a smaller size of the same case has no time, but a row that
says so; so has one that refuses to run. What moves bytes is timed beside a copy of as many.
"""

import functools
import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import clock, equivalence, rivals, shapes
from benchmarks.gpu.job import Job
from benchmarks.gpu.timing_cases import CASES, Case, Values, modes
from gptk.bench import gate
from gptk.optim import AdamW

SECONDS = {"forward": 0.5, "forward+backward": 0.8, "backward": 0.8, "clip+step": 3.0}
PASSES = {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}
"""Which of an op's passes are backward."""
Makers = dict[str, Callable[[], clock.Call]]
"""Provider -> what makes the call that is timed."""


def run(job: Job) -> None:
    op = job.part
    cases = CASES[op][:2] if job.dry else CASES[op]
    wanted = [dict(case=c.name, dtype=c.dtype, mode=mode) for c in cases for mode in modes(op)]
    job.note(wanted=wanted)
    for number, case in enumerate(cases):
        if job.left() < 6:
            job.note(left_out_for_time=[c.name for c in cases[number:]])
            return
        (_adamw if op == "adamw" else _measure)(job, op, case)


def _measure(job: Job, op: str, case: Case) -> None:
    dtype, device = shapes.DTYPES[case.dtype], job.device
    sizes = {**case.sizes, **shapes.TINY[op]} if job.dry else case.sizes
    functions = _right(job, op, case, sizes if job.dry else {**sizes, **case.check})
    values = as_in_a_model(op, shapes.draw(op, sizes, dtype, device))
    module = importlib.import_module(f"gptk.ops.{op}.cases")
    for mode in modes(op):
        makers: Makers = {
            name: functools.partial(call, op, function, values, mode)
            for name, function in functions.items()
        }
        work: Values
        if hasattr(module, "flops"):
            work = dict(flops=sum(module.flops(**sizes, backward=b) for b in PASSES[mode]))
        else:
            size = dtype.itemsize
            moved = [module.traffic(**sizes, itemsize=size, backward=b) for b in PASSES[mode]]
            work = dict(bytes=sum(moved))
            makers[rivals.COPY] = functools.partial(clock.copier, moved, device)
        row = dict(op=op, case=case.name, dtype=case.dtype, mode=mode)
        _time(job, row, makers, SECONDS[mode], work)


def _right(job: Job, op: str, case: Case, sizes: Values) -> dict[str, rivals.Provider]:
    """The providers whose answer is right at these sizes; of the others, a row says what is not."""
    values = as_in_a_model(op, shapes.draw(op, sizes, shapes.DTYPES[case.dtype], job.device))
    known = equivalence.answers(op, values)
    right = {}
    for name, function in rivals.of(op, job.device).items():
        # the compiled one is PyTorch's own, and compiling it for another size takes long
        compiled = name == rivals.COMPILED
        ask = functools.partial(gate.answer, op, function, values)
        if why := "" if compiled else _judged(ask, known):
            job.add(op=op, case=case.name, dtype=case.dtype, provider=name, refused=why)
        else:
            right[name] = function
    return right


def _judged(answer: Callable[[], list[Tensor]], known: equivalence.Answers) -> str:
    """Why the provider is not timed; nothing if its answer is right."""
    try:
        found = equivalence.judge(known, answer())
    except Exception as error:  # whatever it is, the provider is not timed
        return f"it does not run: {equivalence.first_line(error)}"
    bad = [f"{one.name} is off by {one.error:.3g}" for one in found if not one.passed]
    return f"its answer is wrong: {', '.join(bad)}" if bad else ""


def _time(job: Job, row: Values, makers: Makers, seconds: float, work: Values) -> None:
    """A row for each provider: its times in turns with the others, or why it has none."""
    calls: dict[str, clock.Call] = {}
    for name, make in makers.items():
        try:
            one = make()
            one()
            clock.synchronize(job.device)
            calls[name] = one
        except Exception as error:  # out of memory, say: the others are timed all the same
            why = f"{row['mode']} does not run: {equivalence.first_line(error)}"
            job.add(**row, provider=name, refused=why)
    times = clock.samples(calls, job.device, seconds) if calls else {}
    for name, found in times.items():
        job.add(
            **row,
            provider=name,
            **_spread(found),
            host_seconds=clock.host_seconds(calls[name], job.device),
            **clock.memory(calls[name], job.device),
            **work,
        )


def _spread(seconds: list[float]) -> Values:
    ordered = sorted(seconds)
    low, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return dict(seconds=statistics.median(seconds), p20=low, p80=high, n=len(seconds))


def as_in_a_model(op: str, values: Values) -> Values:
    """attention's q, k, v lie as (B, T, H, D): so a model's projection leaves them, and PyTorch's
    flash kernel copies what lies otherwise."""
    if op != "attention":
        return values
    return {**values, **{n: _heads_inside(values[n]) for n in ("query", "key", "value")}}


def _heads_inside(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def call(op: str, function: Callable[..., Any], values: Values, mode: str) -> clock.Call:
    """What is timed, of one provider."""
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(**values)

        return forward
    leaves = gate.leaves(op, values)
    given, inputs = {**values, **leaves}, list(leaves.values())

    def outputs() -> tuple[Tensor, ...]:
        result = function(**given)
        return result if isinstance(result, tuple) else (result,)

    if mode == "backward":
        kept = outputs()
        ups = _upstream(op, kept)
        return lambda: torch.autograd.grad(kept, inputs, ups, retain_graph=True)
    ups = _upstream(op, outputs())
    return lambda: torch.autograd.grad(outputs(), inputs, ups)


def _upstream(op: str, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    ups = gate.upstream(outputs)
    return [_heads_inside(up) for up in ups] if op == "attention" else ups


def _adamw(job: Job, op: str, case: Case) -> None:
    """Clipping by the global norm and one update of all parameters."""
    sizes = shapes.TINY[op] if job.dry else case.sizes
    drawn = shapes.draw(op, sizes, shapes.DTYPES[case.dtype], job.device)
    # gradients read twice; parameters and both moments read and written
    moved = 8 * 4 * sum(p.numel() for p in drawn["params"])
    # all start alike: the first update of each is held against float64 in the equivalence stage
    makers: Makers = {
        name: functools.partial(_stepper, name, drawn)
        for name in (rivals.OURS, rivals.EAGER, rivals.FOREACH)
    }
    makers[rivals.COPY] = functools.partial(clock.copier, [moved], job.device)
    (mode,) = modes(op)
    row = dict(op=op, case=case.name, dtype=case.dtype, mode=mode)
    _time(job, row, makers, SECONDS[mode], dict(bytes=moved))


def _stepper(name: str, drawn: Values) -> clock.Call:
    params = [torch.nn.Parameter(p.clone()) for p in drawn["params"]]
    for p, g in zip(params, drawn["grads"], strict=True):
        p.grad = g.clone()
    if name == rivals.OURS:
        step = AdamW(params, lr=1e-3, weight_decay=0.1, max_grad_norm=1.0, backend="triton").step
        return step
    fused = name == rivals.EAGER
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=fused, foreach=not fused)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return clip_and_step
