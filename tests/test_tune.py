"""`gptk tune`: which configuration is chosen, what the file says, and that a row of it is used."""

import statistics

import pytest
import torch

pytest.importorskip("triton")

from mocked_runner import HEADER, Mocked, X, about
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from gptk.flags import Failure, UsageError
from gptk.ops import triton_launch, tuning, tuning_file
from gptk.tune import gpu as gpu_module
from gptk.tune import main as tune
from gptk.tune.cases import Work, candidates, cases, shipped, work
from gptk.tune.choose import Choice, Refused, beats, choose, differs

SHIPPED, A, B, C = (128, 4), (256, 4), (512, 8), (1024, 8)


def test_the_fastest_is_chosen_after_a_second_measurement():
    runner = Mocked({SHIPPED: about(1.0), A: about(0.8), B: about(0.7), C: about(0.9)})
    choice = choose(SHIPPED, [A, SHIPPED, B, B, C], runner)
    assert choice == Choice(SHIPPED, 1.0, B, 0.7, {})
    assert runner.timed == [[SHIPPED, A, B, C], [SHIPPED, B]]


@pytest.mark.parametrize(
    "times",
    [
        about(1.0),  # a tie
        about(0.99),  # less than 2 %
        about(0.9, 0.11),  # its own spread is wider than the gain
        about(1.2),
    ],
)
def test_the_shipped_one_is_kept_within_the_noise(times):
    choice = choose(SHIPPED, [A], Mocked({SHIPPED: about(1.0), A: times}))
    assert choice == Choice(SHIPPED, 1.0, SHIPPED, 1.0, {})


def test_the_shipped_one_is_kept_where_it_is_noisy():
    runner = Mocked({SHIPPED: about(1.0, 0.3), A: about(0.75), B: about(0.65)})
    assert choose(SHIPPED, [A], runner).config == SHIPPED
    assert choose(SHIPPED, [A, B], runner).config == B


def test_a_gain_that_does_not_repeat_is_none():
    twice = [about(0.5), about(1.0)]
    choice = choose(SHIPPED, [A], Mocked({SHIPPED: about(1.0), A: twice}))
    assert choice == Choice(SHIPPED, 1.0, SHIPPED, 1.0, {})


def test_a_noisy_leader_does_not_hide_a_sure_gain():
    times = {SHIPPED: about(1.0), A: about(0.6, 0.5), B: about(0.8)}
    assert choose(SHIPPED, [A, B], Mocked(times)).config == B


def test_beats_asks_for_more_than_the_noise():
    assert beats(about(0.97), about(1.0))
    assert not beats(about(0.981), about(1.0))
    assert beats(about(0.89, 0.1), about(1.0))
    assert not beats(about(0.9, 0.11), about(1.0))
    assert not beats(about(0.9), about(1.0, 0.11))


@pytest.mark.parametrize(
    "unusual, reason",
    [
        ({"spills": {A: 12}}, "k spills 12 registers"),
        ({"refused": {A: "OutOfResources: shared memory"}}, "OutOfResources: shared memory"),
        ({"results": {A: -X}}, "wrong result"),
        ({"results": {A: X[:-1]}}, "wrong result"),
        ({"results": {A: X.bfloat16()}}, "wrong result"),
        ({"results": {A: X.clone().index_fill_(0, torch.tensor(7), torch.nan)}}, "wrong result"),
        ({"again": {A: X * (1 + 2**-22)}}, "gives other bits the second time"),
    ],
)
def test_an_unfit_candidate_is_left_out_and_named(unusual, reason):
    runner = Mocked({SHIPPED: about(1.0), A: about(0.1), B: about(0.8)}, **unusual)
    choice = choose(SHIPPED, [A, B], runner)
    assert choice.config == B
    assert list(choice.left_out) == [A]
    assert reason in choice.left_out[A]
    assert all(A not in configs for configs in runner.timed), "it was timed"
    text = "\n".join(tune.described(("gelu.forward", 16, 0, "gelu"), choice))
    assert "gelu.forward, 16 bits, gelu: [128, 4] 1.0000 ms -> [512, 8] 0.8000 ms" in text
    assert f"left out [256, 4]: {choice.left_out[A]}" in text


def test_a_shipped_one_that_does_not_run_is_no_choice():
    with pytest.raises(Refused, match="no memory"):
        choose(SHIPPED, [A], Mocked({}, refused={SHIPPED: "no memory"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference_but_a_wrong_row_is(dtype):
    x = torch.randn(64, 32).to(dtype)
    up = (x.double() * (1 + torch.finfo(dtype).eps)).to(dtype)
    assert not torch.equal(x, up)
    assert differs(up, x) is None
    for wrong in (-x, 2 * x, torch.zeros_like(x), x.flip(0), x * 1.1):
        assert "wrong" in differs(wrong, x)
    row = x.clone()
    row[5] = 0
    assert "wrong" in differs(row, x)
    assert differs(x[:0], x[:0]) is None


def test_the_measured_rows_are_in_turns_and_the_rest_stays(tmp_path):
    place = tmp_path / "new" / "own.json"
    gelu, norm = ("gelu.forward", 16, 0, "gelu"), ("layer_norm.forward", 16, 1024, "plain")
    first = tune.content(HEADER, None, {gelu: Choice((1024, 4), 2.0, (2048, 8), 1.5)})
    tune.write(place, first)
    assert tuning_file.read(place, 90) == first
    held = tune.before(place, HEADER)
    again = Choice((1, 1024, 4), 3.0, (1, 1024, 4), 3.0)
    tune.write(place, tune.content(HEADER | {"date": "later"}, held, {norm: again}))
    both = tuning_file.read(place, 90)
    assert both["date"] == "later"
    assert tuning_file.rows(both, place) == {gelu: (2048, 8), norm: (1, 1024, 4)}
    (row,) = both["kernels"]["gelu.forward"]["rows"]
    assert row["shipped"] == [1024, 4]
    assert (row["shipped_ms"], row["config_ms"]) == (2.0, 1.5)
    assert [p.name for p in place.parent.iterdir()] == ["own.json"], "a draft is left"
    newer = tune.content(HEADER, both, {gelu: Choice((1024, 4), 2.0, (512, 2), 1.0)})
    assert [row["config"] for row in newer["kernels"]["gelu.forward"]["rows"]] == [[512, 2]]


@pytest.mark.parametrize("name", ["gpu", "gptk", "torch", "triton"])
def test_rows_of_other_versions_are_not_mixed(tmp_path, name):
    place = tmp_path / "own.json"
    tune.write(place, tune.content(HEADER, None, {}))
    with pytest.raises(UsageError, match=rf"measured with {name} .*--out FILE"):
        tune.before(place, HEADER | {name: "another"})
    assert tune.before(tmp_path / "none.json", HEADER) is None


def test_every_case_is_a_row_of_the_file_and_has_candidates():
    found = cases(torch.bfloat16)
    assert len({case.key for case in found}) == len(found)
    assert {case.kernel for case in found} == set(tuning_file.KERNELS)
    assert {case.kernel for case in found if case.quick} == set(tuning_file.KERNELS)
    with tuning.trial({}):
        for case in found:
            configs = [shipped(case, 90), *candidates(case)]
            assert len(set(configs)) > 3
            for config in configs:
                choices = {case.key: Choice(configs[0], 1.0, config, 1.0)}
                read = tuning_file.rows(tune.content(HEADER, None, choices), "made here")
                assert read == {case.key: config}


@pytest.mark.skipif(not triton_launch.INTERPRETED.value, reason="on a GPU, gptk tune itself does")
@pytest.mark.parametrize("kernel", tuning_file.KERNELS)
def test_a_row_of_the_file_is_used_and_computes_the_same(kernel, tmp_path, monkeypatch):
    found = [case for case in cases(torch.float16) if case.kernel == kernel]
    case = min(found, key=lambda case: (case.width, case.kind not in ("plain", "none", "gelu")))
    launched = []

    def spy(kernel, grid, device, *args, **meta):
        launched.append(meta)
        triton_launch.launch(kernel, grid, device, *args, **meta)

    for name in MODULES[case.op]:
        monkeypatch.setattr(f"gptk.ops.{case.op}.{name}.launch", spy)
    with tuning.trial({}):
        here = work(case, "cpu", 10)
        calls = (here.timed,) if kernel in SLOW else (here.timed, here.also)
        expected = [x for call in calls for x in call()]
        first = shipped(case, 0)
        config = next(c for c in reversed(candidates(case)) if c[0] != first[0])
    place = tmp_path / "own.json"
    tune.write(place, tune.content(HEADER, None, {case.key: Choice(first, 1.0, config, 1.0)}))
    monkeypatch.setenv("GPTK_TUNING", str(place))
    tuning.forget()
    launched.clear()
    try:
        got = [x for call in calls for x in call()]
    finally:
        tuning.forget()
    own = dict(zip(tuning_file.KERNELS[kernel].parameters, config, strict=True))
    if own.get("maxnreg") == tuning_file.NO_LIMIT:
        del own["maxnreg"]  # it is not handed on
    assert any(own.items() <= meta.items() for meta in launched), (own, launched)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or differs(a, b) is None


SLOW = ("attention.dq", "attention.dkdv")
"""In the interpreter; the other flags of attention are those of its forward."""
MODULES = {
    "attention": ("triton_impl", "triton_backward"),
    "layer_norm": ("triton_impl", "triton_backward"),
    "cross_entropy": ("triton_impl",),
    "gelu": ("triton_impl",),
    "linear": ("triton_impl",),
    "linear_cross_entropy": ("triton_losses", "triton_dlogits"),
}


FREE = {"empty", "empty_like", "empty_strided", "new_empty", "promote_types"}
FREE |= {"alias", "select", "slice", "transpose", "view"}
"""Operations of torch that take no time on a GPU."""
ADDS_UP = ("linear_cross_entropy.backward",)
"""Leaves partial sums of the bias, as many as the configuration says: adding them counts."""
WIDEST = {(c.kernel, c.kind): c for c in sorted(cases(torch.float16), key=lambda c: c.width)}


class Operations(TorchDispatchMode):
    """Notes the names of torch's operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel, kind", WIDEST)
def test_what_is_timed_is_the_kernels_alone_and_needs_no_memory(kernel, kind, monkeypatch):
    case, launched = WIDEST[kernel, kind], []
    for name in MODULES[case.op]:
        path = f"gptk.ops.{case.op}.{name}.launch"
        monkeypatch.setattr(path, lambda kernel, *args, **meta: launched.append(kernel))
    with tuning.trial({}):
        here = work(case, "meta")
        here.timed()  # makes what all candidates share
        here.also()
        launched.clear()
        with Operations() as seen:
            here.timed()
    assert launched
    expected = {"sum"} if kernel in ADDS_UP else set()
    assert seen.names - FREE <= expected


class Clock:
    """torch.cuda.Event without a GPU: time goes on by what `ticks` says of each call."""

    now, ticks = 0.0, ()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def runner(monkeypatch):
    """A GpuRunner on the CPU: its work notes the row in use and takes BLOCK / 1024 ms."""
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_module, "FLUSH_BYTES", 64)
    case = next(case for case in cases(torch.float16) if case.kernel == "gelu.forward")
    used = []

    def timed():
        row = tuning.user_row("gelu.forward", 90, 16, 0, "gelu")
        used.append(row)
        Clock.now += row[0] / 1024
        if row[0] == 32:
            raise RuntimeError("does not fit\nsecond line")
        return [X, None]

    made = gpu_module.GpuRunner(case, Work(timed, lambda: [X + 1]), rounds=4, device="cpu")
    made.used = used
    return made


def test_times_are_taken_in_turns_with_each_one_in_front_once(runner):
    configs = [(1024, 4), (2048, 4), (4096, 4)]
    assert runner.times(configs) == [[1.0] * 4, [2.0] * 4, [4.0] * 4]
    warm, rounds = runner.used[:9], runner.used[9:]
    assert warm == [c for c in configs for _ in range(3)]
    assert [rounds[i][0] for i in (0, 3, 6, 9)] == [1024, 2048, 4096, 1024]
    assert all(set(rounds[i : i + 3]) == set(configs) for i in range(0, 12, 3))


def test_a_run_gives_all_results_twice_and_the_most_that_a_variant_spills(runner, monkeypatch):
    class Kernel:
        name = "k"

        def __init__(self, n_spills):
            self.n_spills = n_spills

    launched = iter([Kernel(0), Kernel(7), Kernel(2), Kernel(0)])
    monkeypatch.setattr(JITFunction, "run", lambda self, **meta: next(launched))
    kernel = object.__new__(JITFunction)

    def timed():
        kernel.run(grid=(1,))
        kernel.run(grid=(1,))
        return [X, None]

    runner.work = Work(timed, lambda: [X + 1])
    outcome = runner.run((512, 2))
    assert outcome.spills == {"k": 7}
    for results in (outcome.results, outcome.again):
        assert all(map(torch.equal, results, [X, X + 1]))
        assert len(results) == 2


def test_what_does_not_run_is_refused_unless_the_gpu_is_lost(runner, monkeypatch):
    monkeypatch.setattr(gpu_module, "_works", lambda: True)
    with pytest.raises(Refused, match=r"RuntimeError: does not fit$"):
        runner.run((32, 1))
    monkeypatch.setattr(gpu_module, "_works", lambda: False)
    with pytest.raises(Failure, match=r"gelu.forward with \[32, 1\] broke .*does not fit"):
        runner.run((32, 1))


def test_without_free_memory_the_gpu_is_not_lost(monkeypatch):
    def fails(error):
        def zeros(*args, **kwargs):
            raise error("no room")

        return zeros

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", fails(torch.OutOfMemoryError))
    assert gpu_module._works()
    monkeypatch.setattr(torch, "zeros", fails(RuntimeError))
    assert not gpu_module._works()


def test_the_mocked_times_have_the_median_and_range_that_they_name():
    times = about(1.0, 0.2)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    assert statistics.median(times) == 1.0
    assert high - low == pytest.approx(0.2)
