"""Where a step's time goes: calls and work counted right, and nothing left changed behind."""

import contextlib
import gc
import math
import os
import re
import time

import pytest
import torch
from equivalence import require

import gptk
import gptk.functional as GF
from gptk import cli, native
from gptk.bench import breakdown
from gptk.bench.breakdown import Breakdown, Part, measure, show
from gptk.flags import UsageError
from gptk.ops.attention import cases as attention_cases
from gptk.ops.cpp_product import owns, product
from gptk.train import breakdown as train_breakdown
from gptk.train import options, start
from gptk.train.loop import NonFinite, one_step, train
from gptk.train.stop import Stop


def kernels_of(step):
    return {part.name: part for part in measure(step, steps=2).kernels}


class SlowExtension:
    """Counts as gptk._C does; its only work is to wait 4 ms in gelu's forward."""

    def __init__(self):
        self.on, self.counts = False, {}

    def count(self, on):
        self.on, self.counts = on, {} if on else self.counts

    def counted(self):
        return self.counts

    def activation_forward(self):
        self.kernel("activation_forward", lambda: time.sleep(4e-3))

    def adamw_norm(self):
        self.kernel("adamw_norm", lambda: None)

    def kernel(self, name, work):
        start = time.perf_counter()
        work()
        if self.on:
            seconds, calls, flops = self.counts.get(name, (0.0, 0, 0.0))
            self.counts[name] = (seconds + time.perf_counter() - start, calls + 1, flops)


@pytest.fixture
def slow_kernel(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: None)
    monkeypatch.setattr(native, "_module", SlowExtension())


# ---- what is measured ----------------------------------------------------------------------


def test_calls_are_counted_per_step():
    require("cpp")
    x = torch.randn(6, 16)

    def step():
        for _ in range(2):
            GF.layer_norm(x, (16,), backend="cpp")
        GF.gelu(x, backend="cpp")

    found = measure(step, steps=3)
    calls = {part.name: part.calls for part in found.kernels}
    assert calls == {"layer_norm_forward": 2, "activation_forward": 1}
    assert found.kernel_calls == 3
    assert all(0 < part.seconds < found.timed_seconds for part in found.kernels)


def test_what_is_no_kernel_is_not_counted():
    require("cpp")
    assert kernels_of(lambda: native.load().isa_levels()) == {}


def test_a_step_runs_as_often_as_said():
    seen = []
    assert measure(lambda: seen.append(0), steps=5).steps == 5
    assert len(seen) == breakdown.WARM_STEPS + 2 * 5 + 1
    with pytest.raises(ValueError, match="steps 0"):
        measure(lambda: None, steps=0)


def test_a_product_is_2_m_n_k():
    require("cpp")
    a, b = torch.randn(7, 5), torch.randn(5, 3)
    found = kernels_of(lambda: (product(a, b), product(b.t(), a.t())))
    assert (found["gemm"].calls, found["gemm"].flops) == (2, 2 * (2 * 7 * 5 * 3))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_counted_as_in_the_suite(causal):
    require("cpp")
    sizes = {"B": 2, "H": 4, "Tq": 5, "Tk": 7, "D": 8}
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 7, 8, requires_grad=True) for _ in range(2))

    def step():
        GF.attention(q, k, v, causal=causal, enable_gqa=True, backend="cpp").sum().backward()

    found = kernels_of(step)
    for backward in (False, True):
        part = found["attention_backward" if backward else "attention_forward"]
        assert part.calls == 1
        assert part.flops == attention_cases.flops(**sizes, backward=backward, causal=causal)


def test_attention_of_narrow_values_is_less_work():
    require("cpp")
    q, k = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 2, 5, 4, requires_grad=True)
    found = kernels_of(lambda: GF.attention(q, k, v, backend="cpp").sum().backward())
    assert found["attention_forward"].flops == 2 * 2 * 5 * 5 * (8 + 4)
    assert found["attention_backward"].flops == 2 * 2 * 5 * 5 * (3 * 8 + 2 * 4)


@pytest.mark.usefixtures("slow_kernel")
def test_time_is_where_it_is_spent():
    def step():
        native.load().activation_forward()
        native.load().activation_forward()
        native.load().adamw_norm()
        time.sleep(6e-3)

    found = measure(step, steps=3)
    first, second = found.kernels
    assert [first.name, second.name] == ["activation_forward", "adamw_norm"]
    assert first.seconds >= 8e-3
    assert second.seconds < first.seconds
    assert found.rest >= 6e-3
    assert found.seconds >= 14e-3
    shares = [found.share(part.seconds) for part in found.kernels]
    assert sum(shares) <= 1 - found.share(6e-3)
    assert sum(shares) + found.share(found.rest) == pytest.approx(1.0)


@pytest.mark.usefixtures("slow_kernel")
def test_one_slow_step_is_not_the_breakdown():
    # the second step of the four, plain and timed
    durations = iter([0.0] * (breakdown.WARM_STEPS + 2) + [0.5, 0.5] + [0.0] * 5)

    def step():
        native.load().activation_forward()
        time.sleep(next(durations))

    found = measure(step, steps=4)
    assert found.seconds < 0.1
    assert found.rest < 0.1


def test_pytorchs_operators_and_allocations_are_counted():
    require("cpp")
    found = measure(lambda: [torch.ones(1000) for _ in range(3)], steps=2)
    assert found.kernels == ()
    calls = {part.name: part.calls for part in found.operators}
    assert calls["aten::ones"] == 3
    assert found.operator_calls == sum(calls.values())
    assert found.allocations == 3
    times = [part.seconds for part in found.operators]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(times) <= found.profiled_seconds


def test_without_the_extension_there_are_operators_only(monkeypatch, capsys):
    monkeypatch.setattr(native, "available", lambda: "not built")
    monkeypatch.setattr(native, "_module", None)
    x = torch.randn(6, 16)
    found = measure(lambda: GF.layer_norm(x, (16,), backend="torch"), steps=2)
    assert found.kernels == ()
    assert found.rest == found.timed_seconds
    show(found)
    said = capsys.readouterr().out
    assert "calls no kernel" in said
    assert "aten::" in said
    assert "GFLOP" not in said


# ---- what is left as it was ----------------------------------------------------------------


@pytest.mark.parametrize("failing", range(6))
def test_counting_ends_whichever_step_fails(failing):
    require("cpp")
    seen = []

    def counting():
        before = native.load().counted()
        GF.gelu(torch.ones(3), backend="cpp")
        return native.load().counted() != before

    def step():
        seen.append(counting())
        if len(seen) == breakdown.WARM_STEPS + failing:
            raise ArithmeticError("as asked")

    with contextlib.suppress(ArithmeticError):
        measure(step, steps=2)
    assert not counting()
    assert gc.isenabled()
    assert len(seen) == breakdown.WARM_STEPS + failing
    # warm-up, then plain and timed in turns, then the profiler
    whole = [False] * breakdown.WARM_STEPS + [False, True, False, True, False]
    assert seen == whole[: len(seen)]


def test_counting_starts_from_zero():
    require("cpp")
    for _ in range(2):
        with breakdown.timed_kernels() as tally:
            GF.gelu(torch.ones(3), backend="cpp")
        assert tally["activation_forward"][1] == 1


def test_the_kernels_of_a_block_are_counted_one_by_one():
    require("cpp")
    model = gptk.GPT(gptk.GPTConfig(8, 11, 2, 2, 16), backend="cpp")
    idx = torch.zeros(2, 8, dtype=torch.int64)
    calls = {name: part.calls for name, part in kernels_of(lambda: model(idx)).items()}
    # where the products are torch's, the MLP's activation is a pass of its own
    products = {"gemm": 2 * 4 + 1} if owns(torch.float32) else {"activation_forward": 2}
    assert calls == {"layer_norm_forward": 2 * 2 + 1, "attention_forward": 2, **products}


def test_what_the_profiler_writes_is_not_shown_and_what_comes_after_is(capfd):
    before = torch.ones(100_000)

    def step():
        os.write(2, b"within\n")
        before.resize_(0)

    measure(step, steps=1)
    os.write(2, b"after\n")
    said = capfd.readouterr().err
    assert said == "within\n" * (breakdown.WARM_STEPS + 2) + "after\n"


# ---- the table -----------------------------------------------------------------------------


def test_the_table_says_what_was_measured(capsys):
    kernels = (Part("gemm", 0.5, 3, 1e9), Part("adamw_update", 0.25, 1))
    operators = tuple(Part(f"aten::[op{n}]", 0.02 - n / 1000, n) for n in range(10))
    show(Breakdown(10, 0.9, 1.0, kernels, operators, 1.25, 77), peak=4e9)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["gemm", "500.000", "50.0%", "3", "1.000", "2.0", "50%"] in lines
    assert ["adamw_update", "250.000", "25.0%", "1"] in lines
    assert ["everything", "else", "250.000", "25.0%"] in lines
    assert ["aten::[op0]", "20.000", "1.6%", "0"] in lines
    assert ["2", "others", "23.000", "1.8%", "17"] in lines
    summary = " ".join(lines[-1])
    for part in ("1,000.00 ms", "900.00 ms", "250.00 ms", "4 kernel", "45 calls", "77 alloc"):
        assert part in summary


# ---- gptk train --breakdown ----------------------------------------------------------------

TINY = (
    "--tokenizer=char --n-layer=2 --n-head=2 --n-embd=16 --block-size=16 --batch-size=4 "
    "--max-steps=4 --save-interval=2 --eval-interval=100 --dropout=0.1 --grad-accum=2 "
    "--device=cpu --dtype=float32 --data=data.txt"
).split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with a text, to be in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("to be, or not to be: that is the question.\n\n" * 60)
    return tmp_path


def files(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def trained(*words):
    with start.opened(options.parse([*TINY, *words])) as run, Stop() as stop:
        train(run, stop)


def test_the_command_prints_the_table_and_makes_no_file(place, capsys):
    require("cpp")
    before = files(place)
    assert cli.main(["train", *TINY, "--backend=cpp", "--breakdown", "--out=run"]) == 0
    said = capsys.readouterr()
    assert files(place) == before
    assert said.err == ""
    first = said.out.index("measured ")
    assert re.search(r"measured +4 steps of 128 tokens, .* tokens/s, MFU \d+%\n", said.out)
    rows = said.out[first:].splitlines()
    calls = {row.split()[0]: row.split()[3] for row in rows if len(row.split()) > 3}
    assert calls["adamw_update"] == "1"
    assert calls["attention_forward"] == "4"  # 2 blocks, 2 micro-batches
    assert any(row.startswith("everything else ") for row in rows)
    assert "run folder     none" in said.out
    assert "--out has no effect" in said.out


def test_a_model_on_pytorch_has_its_operators_shown(place, capsys):
    before = files(place)
    assert cli.main(["train", *TINY, "--backend=torch", "--dropout=0", "--breakdown"]) == 0
    said = capsys.readouterr().out
    assert "aten::" in said
    assert "calls no kernel" in said
    assert files(place) == before


def test_a_measured_run_stays_as_it_is(place, capsys):
    trained("--backend=torch", "--out=run")
    run = place / "run"
    # what a resumed run clears up or writes anew
    (run / "checkpoints" / ".tmp-step-6-1").mkdir()
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 1.0}\n{"st')
    (run / "lock").write_text("process 1 on elsewhere\n")
    (run / "tokens-val.bin").unlink()
    before = files(place)
    capsys.readouterr()
    assert cli.main(["train", "--resume=run", "--breakdown"]) == 0
    assert files(place) == before
    said = capsys.readouterr().out
    assert "continuing from step-4" in said
    assert "aten::" in said
    with start.opened(options.parse(["--resume=run"])):
        pass
    assert files(place) != before


@pytest.mark.parametrize("resumed", [False, True])
def test_the_steps_are_those_of_the_run(place, resumed):
    words = [*TINY, "--backend=torch", "--out=run", *(["--resume"] if resumed else [])]
    if resumed:
        trained("--backend=torch", "--out=run")
    measured = start.in_memory(options.parse([*words, "--breakdown"]))
    with start.opened(options.parse(words)) as run:
        assert measured.at == run.at
        assert measured.at.step == (4 if resumed else 0)
        for _ in range(2):
            assert one_step(measured) == one_step(run)
        pairs = zip(measured.model.parameters(), run.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_step_that_is_not_finite_is_one_sentence(place, monkeypatch, capsys):
    def fails(training):
        raise NonFinite("step 1: the loss is nan")

    monkeypatch.setattr(train_breakdown, "one_step", fails)
    assert cli.main(["train", *TINY, "--backend=torch", "--breakdown"]) == 1
    assert capsys.readouterr().err == "gptk train: step 1: the loss is nan\n"


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--extend", "--out=run", "--resume"], ["--breakdown", "extend"]),
        (["--resume=absent"], ["--resume absent", "no run is there"]),
        (["--config=settings.json"], ["--breakdown belongs on the command line"]),
        (["--backend=triton"], ["--backend triton", "interpreter"]),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(place, monkeypatch, capsys, words, parts):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if "--backend=triton" in words:
        require("triton")
    (place / "settings.json").write_text('{"breakdown": true}')
    before = files(place)
    assert cli.main(["train", *TINY, "--breakdown", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert [part for part in parts if part not in said] == []
    assert files(place) == before


def test_a_gpus_kernels_are_refused():
    settings = options.parse(TINY).config
    with pytest.raises(UsageError, match=r"this run is on cuda:1.*--device cpu"):
        train_breakdown.check_measurable(settings, torch.device("cuda", 1))


def test_tokens_per_second_and_mfu_are_those_of_the_plain_steps(place, monkeypatch, capsys):
    training = start.in_memory(options.parse([*TINY, "--backend=torch", "--breakdown"]))
    flops = training.model.flops_per_token(16)
    training.peak = 4 * flops * 128 / 0.5
    given = Breakdown(4, 0.5, 1.0, (), (), 1.0, 0)

    def measured(step, steps):
        step()
        return given

    monkeypatch.setattr(breakdown, "measure", measured)
    capsys.readouterr()
    assert train_breakdown.measure_and_show(training) == 0
    assert "median 500.00 ms: 256 tokens/s, MFU 25%" in capsys.readouterr().out
    training.peak = flops * 128 / 0.5 / 2
    assert training.mfu(256.0) is None
    training.peak = None
    assert training.mfu(math.inf) is None
