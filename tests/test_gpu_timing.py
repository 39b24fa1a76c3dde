"""What `make gpu` times, on the CPU: the calls, their layouts, their ceilings, their inputs."""

import time

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks.gpu import clock, rivals, shapes, timing
from benchmarks.gpu.job import Job
from benchmarks.gpu.timing_cases import CASES, modes

SDPA = {"gptk triton", "SDPA flash", "torch.compile"}
PLAIN = {"gptk triton", "torch", "torch.compile"}


def dry(tmp_path, op):
    (tmp_path / "stages").mkdir()
    job = Job("benchmarks", op, tmp_path, True, time.monotonic() + 120)
    timing.run(job)
    return job


@pytest.mark.parametrize(
    "op, names",
    [
        ("attention", SDPA),
        ("linear_cross_entropy", PLAIN),
        ("adamw", {"gptk triton", "torch", "torch foreach", "copy"}),
    ],
)
def test_every_provider_is_timed_in_every_mode_of_what_is_wanted(op, names, tmp_path):
    job = dry(tmp_path, op)
    assert [row for row in job.rows if "refused" in row] == []
    found = {(r["case"], r["dtype"], r["mode"], r["provider"]) for r in job.rows}
    wanted = {tuple(case.values()) for case in job.facts["wanted"]}
    assert {case[2] for case in wanted} == set(modes(op))
    assert found == {(*case, name) for case in wanted for name in names}
    assert len(job.rows) == len(found)


def test_the_first_cases_of_attention_are_those_of_its_targets():
    first = [(c.sizes["D"], c.sizes["Tq"]) for c in CASES["attention"][:6]]
    assert sorted(first) == [(D, T) for D in (64, 128) for T in (1024, 2048, 4096)]
    assert all(c.sizes["causal"] for c in CASES["attention"][:8])


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_attention_is_timed_in_the_layout_of_a_model(mode):
    seen = {}

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            seen.update(q=q, k=k, v=v)
            return q.clone()

        @staticmethod
        def backward(ctx, up):
            seen.update(up=up)
            return up, up, up

    def provider(query, key, value, **_):
        return Kernel.apply(query, key, value)

    sizes = dict(B=2, H=3, Tq=5, Tk=5, D=4, causal=True)
    values = timing.as_in_a_model(
        "attention", shapes.draw("attention", sizes, torch.float32, "cpu")
    )
    timing.call("attention", provider, values, mode)()
    assert set(seen) == {"q", "k", "v"} | ({"up"} if mode == "backward" else set())
    for t in seen.values():
        assert t.shape == (2, 3, 5, 4)
        assert t.transpose(1, 2).is_contiguous()


def test_a_copy_moves_the_bytes_of_each_pass():
    class Copies(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.copy_:
                made.append(sum(t.numel() * t.itemsize for t in args))
            return function(*args, **(kwargs or {}))

    made = []
    copy = clock.copier([600, 400, 1000], "cpu")
    with Copies():
        copy()
    assert made == [600, 400, 1000]


def test_memory_is_the_peak_and_what_of_it_is_returned(monkeypatch):
    held = {"now": 70, "peak": 900}

    def call():
        held.update(now=70 + 50, peak=70 + 300)
        return "fifty bytes"

    monkeypatch.setattr(clock.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        clock.torch.cuda, "reset_peak_memory_stats", lambda: held.update(now=70, peak=70)
    )
    monkeypatch.setattr(clock.torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(clock.torch.cuda, "max_memory_allocated", lambda: held["peak"])
    assert clock.memory(call, "cuda") == dict(peak_bytes=300, returned_bytes=50)
    assert clock.memory(call, "cpu") == dict(peak_bytes=None, returned_bytes=None)


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_a_timed_call_returns_what_it_made(mode):
    """Its memory is told apart from what is needed on the way."""
    values = shapes.draw("gelu", dict(shape=(2, 3)), torch.float32, "cpu")
    made = timing.call("gelu", rivals.ours("gelu"), values, mode)()
    (tensor,) = made if isinstance(made, tuple) else (made,)
    assert tensor.shape == (2, 3)


DRAWN = [(op, next(iter(cases))) for op, cases in shapes.REAL.items()]


@pytest.mark.parametrize("op, case", [*DRAWN, ("cross_entropy", "gpt2_ignored")])
def test_all_random_numbers_are_drawn_on_the_device(op, case, monkeypatch):
    devices = []

    class Elsewhere(TorchFunctionMode):
        """Stands for the device: takes what is drawn there, and draws it here."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            options = dict(kwargs or {})
            if function in (torch.randn, torch.rand, torch.randint):
                devices.append(options.pop("device", "cpu"))
            return function(*args, **options)

    sizes = shapes.options(op, case, dry=True)
    here = shapes.draw(op, sizes, torch.bfloat16, "cpu")
    monkeypatch.setattr(shapes, "generator", lambda _, seed: torch.Generator().manual_seed(seed))
    monkeypatch.setattr(shapes, "place", lambda values, _: values)
    with Elsewhere():
        there = shapes.draw(op, sizes, torch.bfloat16, "a GPU")
    assert set(devices) == {"a GPU"}
    for name, value in here.items():  # the same seeds, so the same numbers
        pairs = zip(value, there[name], strict=True) if isinstance(value, list) else ()
        assert all(torch.equal(a, b) for a, b in pairs)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, there[name])
