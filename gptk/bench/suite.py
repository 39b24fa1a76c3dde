"""The measurements: every benchmark case of every op, and the training steps."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptk.bench import breakdown, gate, generation, measure, models
from gptk.bench.plugin import DTYPES, REPLAY, chosen_backends, chosen_dtypes
from gptk.bench.providers import PYTORCH, TORCH, providers
from gptk.optim import AdamW

SETS = 3
"""Sets of inputs that a provider is given in turns."""
MODES = ("forward", "forward+backward")
PARTED_STEPS = 4
"""Training steps that are taken apart, each way (breakdown.measure)."""
_measured: dict[tuple[str, ...], dict[str, Any]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per op, case, dtype, mode and provider that was asked for."""
    config = metafunc.config
    wanted = config.getoption("op")
    only = config.getoption("bench_case")
    backends = chosen_backends(config)
    device = config.getoption("bench_device")
    rows: list[tuple[str, ...]] = []
    if "op_case" in metafunc.fixturenames:
        for op in TORCH:
            if wanted and op not in wanted:
                continue
            for case in importlib.import_module(f"gptk.ops.{op}.cases").BENCH:
                if only and case not in only:
                    continue
                for dtype in chosen_dtypes(config):
                    for mode in MODES:
                        for name in providers(op, device, DTYPES[dtype], backends):
                            rows.append((op, case, dtype, mode, name))
        metafunc.parametrize("op_case", rows, ids=["-".join(r) for r in rows])
    if "step_case" in metafunc.fixturenames:
        if not wanted or "model" in wanted:
            kinds = [models.NAMES[DTYPES[d]] for d in chosen_dtypes(config)]
            names = ["PyTorch", *("compile" if b == "compile" else f"gptk {b}" for b in backends)]
            for size in models.SIZES:
                if not only or size in only:
                    rows += [(size, f"{name} {kind}") for kind in kinds for name in names]
        metafunc.parametrize("step_case", rows, ids=["-".join(r) for r in rows])
    if "generate_case" in metafunc.fixturenames:
        if not wanted or "generate" in wanted:
            names = list(dict.fromkeys(["gptk torch", *(f"gptk {b}" for b in backends)]))
            if importlib.util.find_spec("transformers") is not None:
                names.insert(0, generation.TRANSFORMERS)
            rows = [
                (size, dtype, name)
                for size in generation.SIZES
                if not only or size in only
                for dtype in chosen_dtypes(config)
                for name in names
                if name != "gptk compile"
            ]
        metafunc.parametrize("generate_case", rows, ids=["-".join(r) for r in rows])
    if "adamw_case" in metafunc.fixturenames:
        if not wanted or "adamw" in wanted:
            cases = importlib.import_module("gptk.ops.adamw.cases").BENCH
            names = [PYTORCH, *(f"gptk {b}" for b in backends if b != "compile")]
            rows = [(c, name) for c in cases if not only or c in only for name in names]
        metafunc.parametrize("adamw_case", rows, ids=["-".join(r) for r in rows])


def once(key: tuple[str, ...], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """All providers of a case are measured together, when the first of their tests runs."""
    if key not in _measured:
        _measured[key] = work()
    return _measured[key]


@pytest.mark.benchmark(timer=REPLAY)
def test_op(
    op_case: tuple[str, ...], roofline: dict[str, float], record: Any, request: Any
) -> None:
    op, case, dtype, mode, name = op_case
    device = request.config.getoption("bench_device")
    backends = chosen_backends(request.config)
    found = once(op_case[:4], lambda: measure_op(op, case, dtype, mode, device, backends))
    timed(found, name)
    module = importlib.import_module(f"gptk.ops.{op}.cases")
    passes = (False, True) if mode == MODES[1] else (False,)
    flops = bytes_moved = None
    if hasattr(module, "flops"):
        flops = sum(module.flops(**module.BENCH[case], backward=b) for b in passes)
    else:
        size = DTYPES[dtype].itemsize
        bytes_moved = sum(
            module.traffic(**module.BENCH[case], itemsize=size, backward=b) for b in passes
        )
    record(
        found["seconds"][name],
        op=op,
        case=case,
        dtype=dtype,
        mode=mode,
        provider=name,
        flops=flops,
        bytes=bytes_moved,
        roof=roofline[dtype] if flops else roofline["copy"],
        peak_bytes=found["memory"][name],
        error_ratio=found["verdicts"][name].ratio,
        host=found["host"].get(name),
        baseline=measure.quantiles(found["seconds"][PYTORCH])[0],
    )


def timed(found: dict[str, Any], name: str) -> None:
    """Fail unless the provider passed its gate."""
    if name not in found["seconds"]:
        pytest.fail(f"{name}: its answer is wrong, so it is not timed ({found['verdicts'][name]})")


def measure_op(
    op: str, case: str, dtype: str, mode: str, device: str, backends: list[str]
) -> dict[str, Any]:
    """Verdicts, seconds and memory of every provider; wrong ones have a verdict only."""
    module = importlib.import_module(f"gptk.ops.{op}.cases")
    kind = DTYPES[dtype]
    values = [
        _to(module.inputs(**module.BENCH[case], dtype=kind, seed=s), device) for s in range(SETS)
    ]
    functions = providers(op, device, kind, backends)
    verdicts = {n: gate.judge(op, f, values[0], n) for n, f in functions.items()}
    calls: dict[str, list[measure.Call]] = {
        name: [_call(op, function, v, mode == MODES[1]) for v in values]
        for name, function in functions.items()
        if verdicts[name].passed
    }
    memory = {name: measure.peak_memory(c[0], device) for name, c in calls.items()}
    host = {
        name: breakdown.host_seconds(c[0]) if device == "cpu" else measure.host_seconds(c[0])
        for name, c in calls.items()
        if name.startswith("gptk") or device != "cpu"
    }
    return {
        "verdicts": verdicts,
        "memory": memory,
        "host": {name: seconds for name, seconds in host.items() if seconds is not None},
        "seconds": measure.interleaved(calls, device),
    }


def _to(values: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def _call(
    op: str, function: Callable[..., Any], values: dict[str, Any], backward: bool
) -> measure.Call:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                function(**values)

        return forward
    inputs = gate.leaves(op, values)
    given = {**values, **inputs}
    first = function(**given)
    ups = gate.upstream(first if isinstance(first, tuple) else (first,))

    def both() -> None:
        result = function(**given)
        torch.autograd.grad(
            result if isinstance(result, tuple) else (result,), list(inputs.values()), ups
        )

    return both


@pytest.mark.benchmark(timer=REPLAY)
def test_adamw(adamw_case: tuple[str, str], roofline: Any, record: Any, request: Any) -> None:
    case, name = adamw_case
    device = request.config.getoption("bench_device")
    backends = [b for b in chosen_backends(request.config) if b != "compile"]
    found = once(("adamw", case), lambda: measure_adamw(case, device, backends))
    timed(found, name)
    module = importlib.import_module("gptk.ops.adamw.cases")
    numbers = sum(torch.Size(s).numel() for s in module.BENCH[case]["shapes"])
    record(
        found["seconds"][name],
        op="adamw",
        case=case,
        dtype="float32",
        mode="clip+step",
        provider=name,
        flops=None,
        bytes=8 * 4 * numbers,  # g twice; p, m, v read and written
        roof=roofline["copy"],
        peak_bytes=found["memory"][name],
        error_ratio=found["verdicts"][name].ratio,
        baseline=measure.quantiles(found["seconds"][PYTORCH])[0],
    )


def measure_adamw(case: str, device: str, backends: list[str]) -> dict[str, Any]:
    """Clipping by the global norm and one update of every parameter, float32."""
    module = importlib.import_module("gptk.ops.adamw.cases")
    values = module.inputs(**module.BENCH[case], dtype=torch.float32)

    def fresh(kind: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(p.to(device, kind, copy=True)) for p in values["params"]]
        for p, g in zip(made, values["grads"], strict=True):
            p.grad = g.to(device, kind, copy=True)
        return made

    def theirs(params: list[torch.nn.Parameter]) -> tuple[measure.Call, torch.optim.Optimizer]:
        optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=True)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        return step, optimizer

    def ours(
        params: list[torch.nn.Parameter], backend: str
    ) -> tuple[measure.Call, torch.optim.Optimizer]:
        optimizer = AdamW(params, lr=1e-3, weight_decay=0.1, max_grad_norm=1.0, backend=backend)
        return optimizer.step, optimizer

    truth = fresh(torch.float64)
    exact = _after_a_step(truth, *theirs(truth))
    calls: dict[str, list[measure.Call]] = {}
    own: list[torch.Tensor] = []
    verdicts: dict[str, gate.Verdict] = {}
    for name in (PYTORCH, *(f"gptk {b}" for b in backends)):
        params = fresh()
        step, optimizer = theirs(params) if name == PYTORCH else ours(params, name[5:])
        found = _after_a_step(params, step, optimizer)
        own = own or found
        rows = list(zip(found, exact, own, strict=True))
        passed = all(gate.accepted(f, t, o, gate.FORWARD) for f, t, o in rows)
        ratios = [gate.error(f, t) / gate.error(o, t) for f, t, o in rows if gate.error(o, t)]
        verdicts[name] = gate.Verdict(passed, max(ratios, default=float("nan")))
        if passed:
            calls[name] = [step]
    return {
        "verdicts": verdicts,
        "memory": {n: measure.peak_memory(c[0], device) for n, c in calls.items()},
        "seconds": measure.interleaved(calls, device),
    }


def _after_a_step(
    params: list[torch.nn.Parameter], step: measure.Call, optimizer: torch.optim.Optimizer
) -> list[torch.Tensor]:
    """Parameters and first moments: Adam's first update does not depend on the gradient's size, so
    the moments are what shows whether it was clipped."""
    step()
    return [t.detach().clone() for p in params for t in (p, optimizer.state[p]["exp_avg"])]


@pytest.mark.benchmark(timer=REPLAY)
def test_step(step_case: tuple[str, str], roofline: Any, record: Any, request: Any) -> None:
    size, name = step_case
    config = request.config
    kind = "float32" if name.endswith("fp32") else "bfloat16"
    found = once(("step", size), lambda: measure_steps(size, config))
    timed(found, name)
    theirs = [s for n, s in found["seconds"].items() if n.startswith(("PyTorch", "compile"))]
    record(
        found["seconds"][name],
        op="step",
        case=size,
        dtype=kind,
        mode="train",
        provider=name,
        flops=models.flops(size),
        bytes=None,
        roof=roofline[kind],
        peak_bytes=found["memory"][name],
        error_ratio=found["verdicts"][name].ratio,
        tokens=models.SIZES[size].batch_size * models.SIZES[size].config.block_size,
        parts=found["parts"].get(name),
        baseline=min(measure.quantiles(s)[0] for s in theirs),
    )


def measure_steps(size: str, config: pytest.Config) -> dict[str, Any]:
    """Every provider's step, in turns; a provider whose losses are wrong has a verdict only."""
    device = config.getoption("bench_device")
    dtypes = [DTYPES[d] for d in chosen_dtypes(config)]
    found = models.providers(size, dtypes, chosen_backends(config), device)
    verdicts = models.verdicts(found)
    steps = {name: found[name].step for name, verdict in verdicts.items() if verdict.passed}
    memory = {}
    for name, step in steps.items():
        step()  # the optimizer's state, equal for all, is there from here on and does not count
        found[name].forget()
        memory[name] = measure.peak_memory(step, device)
        found[name].forget()
    parts = {
        name: breakdown.facts(breakdown.measure(step, PARTED_STEPS))
        for name, step in steps.items()
        if name.startswith("gptk") and device == "cpu"
    }
    return {
        "verdicts": verdicts,
        "memory": memory,
        "parts": parts,
        "seconds": measure.interleaved({name: [step] for name, step in steps.items()}, device),
    }


@pytest.mark.benchmark(timer=REPLAY)
def test_generate(
    generate_case: tuple[str, str, str], roofline: Any, record: Any, request: Any
) -> None:
    size, dtype, name = generate_case
    config = request.config
    found = once(("generate", size, dtype), lambda: measure_generation(size, dtype, config))
    timed(found, name)
    per_token = {n: [s / generation.TOKENS for s in v] for n, v in found["seconds"].items()}
    theirs = next(iter(per_token))  # transformers, or plain PyTorch
    record(
        per_token[name],
        op="generate",
        case=size,
        dtype=dtype,
        mode="token",
        provider=name,
        flops=None,
        bytes=generation.weight_bytes(size, DTYPES[dtype]),
        roof=roofline["read"],
        peak_bytes=found["memory"][name],
        error_ratio=found["verdicts"][name].ratio,
        tokens=1,
        baseline=measure.quantiles(per_token[theirs])[0],
    )


def measure_generation(size: str, dtype: str, config: pytest.Config) -> dict[str, Any]:
    """Every provider's generation, in turns; the seconds are those of generation.TOKENS tokens."""
    device = config.getoption("bench_device")
    found = generation.providers(size, DTYPES[dtype], chosen_backends(config), device)
    verdicts = generation.verdicts(size, found, device)
    runs = {name: found[name].run for name, verdict in verdicts.items() if verdict.passed}
    return {
        "verdicts": verdicts,
        "memory": {name: measure.peak_memory(run, device) for name, run in runs.items()},
        "seconds": measure.interleaved({name: [run] for name, run in runs.items()}, device),
    }
