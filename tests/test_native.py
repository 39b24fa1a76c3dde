"""The native extension as a whole: instruction sets, symbols, threads, forks, memory, messages.

What each kernel computes is compared with its reference in test_equivalence.py.
"""

import importlib
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gptk import native
from gptk.random import keep_mask_definition

ROOT = Path(__file__).resolve().parent.parent
BUILT = native.available() is None
needs_extension = pytest.mark.skipif(not BUILT, reason=f"{native.available()}")
GUARD = 64  # elements before and after every output

# One call of every kernel that sums over something, printed as a hash and an error.
EVERY_KERNEL = """
import torch
from torch.nn import functional as F
from gptk import functional as G, native

torch.manual_seed(0)
x, w = torch.randn(40, 515, dtype=torch.float64), torch.randn(515, dtype=torch.float64)
for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
    a, b = x.to(dtype), w.to(dtype)
    wide, weight = a.double(), b.double()
    target = torch.arange(40)
    pairs = [
        (G.layer_norm(a, (515,), b, b, backend="cpp"), F.layer_norm(wide, (515,), weight, weight)),
        (G.gelu(a, backend="cpp"), F.gelu(wide)),
        (G.gelu(a, "tanh", backend="cpp"), F.gelu(wide, approximate="tanh")),
        (G.cross_entropy(a, target, backend="cpp"), F.cross_entropy(wide, target)),
    ]
    for ours, right in pairs:
        assert (ours.double() - right).abs().max() < bound, (native.isa(), dtype)
print(native.isa())
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "GPTK_ISA"} | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def op(name: str):
    return importlib.import_module(f"gptk.ops.{name}.cpp_impl")


# --- instruction sets -----------------------------------------------------------------------


@needs_extension
def test_instruction_sets_start_at_baseline_and_the_best_is_used():
    levels = native.isa_levels()
    known = ("baseline", "avx2", "avx512", "avx512_bf16")
    assert levels == tuple(name for name in known if name in levels)
    assert levels[0] == "baseline"
    done = python("from gptk import native; print(native.isa())")
    assert done.stdout.split() == [levels[-1]], done.stderr


@needs_extension
@pytest.mark.parametrize("isa", native.isa_levels() if BUILT else [])
def test_every_instruction_set_can_be_forced_and_is_right(isa):
    done = python(EVERY_KERNEL, GPTK_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


@needs_extension
def test_an_instruction_set_that_is_not_there_is_refused_by_name():
    missing = [name for name in ("avx512_bf16", "sse9") if name not in native.isa_levels()]
    for name in missing:
        for use in ("native.load()", "native.available()"):
            done = python(f"from gptk import native; {use}", GPTK_ISA=name)
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith(f"ValueError: GPTK_ISA='{name}'"), done.stderr
            assert last.endswith(", ".join(native.isa_levels()))


# --- symbols --------------------------------------------------------------------------------


def symbols(*arguments: str) -> list[list[str]]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    done = subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines() if line]


@needs_extension
def test_kernel_objects_share_no_code_between_instruction_sets():
    """A weak symbol exists once per program: one set's copy would run in another set's place."""
    objects = sorted(ROOT.glob("build/cmake-*/CMakeFiles/kernels_*.dir/**/*.o"))
    if not objects:
        pytest.skip("the build tree is not here (installed from elsewhere)")
    for path in objects:
        isa = re.search(r"kernels_(\w+)\.dir", str(path))[1]
        for *_, kind, name in symbols(str(path)):
            assert kind not in "WVuC", f"{path.name} of {isa}: weak {name}"
            if kind in "TBDR":
                assert f"4gptk{len(isa)}{isa}" in name, f"{path.name} of {isa} exports {name}"


@needs_extension
def test_the_extension_exports_its_init_function_only():
    names = [s[-1] for s in symbols("-D", "--defined-only", native.load().__file__) if s[-2] == "T"]
    assert names == ["PyInit__C"]


@needs_extension
def test_openmp_is_asked_for_nothing_newer_than_torch_has():
    versions = set()
    for entry in symbols("-D", "--undefined-only", native.load().__file__):
        if found := re.search(r"@((?:GOMP|OMP)_[\d.]+)", entry[-1]):
            versions.add(found[1])
    allowed = {"GOMP_1.0", "GOMP_2.0", "GOMP_3.0", "GOMP_4.0", "GOMP_4.5", "OMP_1.0", "OMP_3.0"}
    assert versions <= allowed | {"OMP_2.0", "OMP_4.0", "OMP_4.5"}


# --- threads and forks ----------------------------------------------------------------------


def results_of_every_kernel() -> list[torch.Tensor]:
    """Sizes above the threshold for threads, not multiples of any block."""
    random = torch.Generator().manual_seed(1)
    M, N = 419, 133
    x, dy, residual = (torch.randn(M, N, generator=random) for _ in range(3))
    w = torch.randn(N, generator=random)
    out = [native.keep_mask(7, M, N, 0.3)]
    y, h, mean, rstd = op("layer_norm").forward(x, w, w, 1e-5, residual, 0.3, 5)
    out += [y, h, mean, rstd]
    kinds = (torch.float32, torch.float32)
    out += op("layer_norm").backward(dy, dy, h, w, mean, rstd, *kinds, 0.3, 5, (True,) * 4)
    shared = importlib.import_module("gptk.ops.cpp_epilogue")
    out += shared.activate_backward(dy, x, "gelu", torch.float32, torch.float32, True)
    out += [op("gelu").forward(x, "tanh"), shared.sum_rows(dy, torch.float32)]
    target = torch.arange(M) % N
    loss, lse = op("cross_entropy").forward(x, target, -100, 0.1)
    out += [loss, lse, op("cross_entropy").backward(loss, x, target, lse, -100, 0.1)]
    state = [x.clone(), torch.zeros(M, N), torch.zeros(M, N), torch.zeros(())]
    p, m, v, step = ([t] for t in state)
    norm = op("adamw").norm([dy, x])
    op("adamw").update(p, [dy], m, v, [None], step, [1e-2], [0.1], 0.9, 0.999, 1e-8, 1 / norm, None)
    return [*out, norm, *state]


@needs_extension
def test_results_have_the_same_bits_for_any_number_of_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(results_of_every_kernel())
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*results, strict=True):
        assert not one.is_floating_point() or one.isfinite().all()
        assert all(torch.equal(one, other) for other in others)


@needs_extension
def test_python_threads_may_call_at_the_same_time():
    right = results_of_every_kernel()
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(5):
            for a, b in zip(right, results_of_every_kernel(), strict=True):
                if not torch.equal(a, b):
                    wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers)
    assert wrong == []


@needs_extension
def test_a_forked_child_runs_the_kernels():
    """The OpenMP runtime's threads do not survive fork; entering it in the child would hang."""
    done = python(
        """
import os, sys, warnings
import torch
from gptk import functional as G, native
warnings.simplefilter("ignore")
torch.set_num_threads(2)
x = torch.randn(500, 300)
right = G.gelu(x, backend="cpp").numpy().tobytes()
assert native.threads() == 2
child = os.fork()
if child == 0:  # compares bytes: torch's own threads would hang here
    assert native.threads() == 1
    os._exit(0 if G.gelu(x, backend="cpp").numpy().tobytes() == right else 3)
assert os.waitpid(child, 0)[1] == 0
assert G.gelu(x, backend="cpp").numpy().tobytes() == right
"""
    )
    assert done.returncode == 0, done.stderr


@needs_extension
def test_torch_and_the_extension_share_one_openmp_runtime():
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    assert len(native.openmp_runtimes(maps.read_text())) <= 1


def test_two_openmp_runtimes_are_told_apart(monkeypatch):
    line = "7f0000000000-7f0000001000 r-xp 00000000 00:00 0 /{}/{}\n"
    same = line.format("lib", "libgomp.so.1") * 2 + line.format("lib", "libc.so.6")
    other = line.format("torch/lib", "libgomp-a34b3233.so.1")
    assert native.openmp_runtimes(same) == {"/lib/libgomp.so.1"}
    assert len(native.openmp_runtimes(same + other)) == 2
    monkeypatch.setattr(Path, "read_text", lambda self: same + other)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    with pytest.warns(RuntimeWarning, match=r"two OpenMP runtimes.*libgomp-a34b3233"):
        native._warn_of_two_openmp_runtimes()


# --- random numbers -------------------------------------------------------------------------


@needs_extension
def test_keep_mask_draws_the_published_philox_words():
    """Random123's known answer for key 0, counter 0; a threshold on either side of each word."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for column, word in enumerate(words):
        assert native.keep_mask(0, 1, 4, word / 2**32)[0, column]
        assert not native.keep_mask(0, 1, 4, (word + 1) / 2**32)[0, column]


@needs_extension
@pytest.mark.parametrize("p", [0.0, 1e-12, 2**-33, 0.1, 0.5, 1 - 2**-33, 1.0])
@pytest.mark.parametrize("seed", [0, 1, -5, 2**63 + 12345, 2**64 - 1])
def test_keep_mask_is_its_definition(seed, p):
    for rows, cols in ((1, 1), (3, 7), (5, 64), (2, 1023), (300, 65)):
        assert torch.equal(
            native.keep_mask(seed, rows, cols, p), keep_mask_definition(seed, rows, cols, p)
        )


# --- memory ---------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("dtype", list(native.DTYPE), ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 63), (2, 1023), (17, 8), (1, 65537)])
def test_every_output_element_is_written_and_nothing_beside_it(shape, dtype, monkeypatch):
    M, N = shape
    real_empty = torch.empty
    guarded: list[tuple[torch.Tensor, int]] = []

    def empty(*size, dtype=torch.float32, device=None):
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = torch.Size(size).numel()
        memory = real_empty(count + 2 * GUARD, dtype=dtype)
        memory.fill_(torch.nan if dtype.is_floating_point else 0)
        guarded.append((memory, count))
        return memory[GUARD : GUARD + count].view(size)

    native.release_workspaces()
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda t: empty(t.shape, dtype=t.dtype))
    x, dy, w = torch.randn(M, N).to(dtype), torch.randn(M, N).to(dtype), torch.ones(N, dtype=dtype)
    written: list[torch.Tensor | None] = []
    y, h, mean, rstd = op("layer_norm").forward(x, w, w, 1e-5, dy, 0.4, 1)
    written += [y, h, mean, rstd]
    kinds = (dtype, dtype)
    written += op("layer_norm").backward(dy, dy, h, w, mean, rstd, *kinds, 0.4, 1, (True,) * 4)
    written += [op("gelu").forward(x, "none"), op("gelu").backward(dy, x, "tanh")]
    shared = importlib.import_module("gptk.ops.cpp_epilogue")
    written += shared.activate(x, w, "gelu_tanh", dtype, keep_pre=False)
    written += shared.activate_backward(dy, x, "gelu", dtype, dtype, True)
    target = torch.zeros(M, dtype=torch.int64)
    loss, lse = op("cross_entropy").forward(x, target, -100, 0.0)
    written += [loss, lse, op("cross_entropy").backward(loss, x, target, lse, -100, 0.0)]
    written += [op("adamw").norm([x, dy])]
    assert all(t is None or t.isfinite().all() for t in written)
    for memory, count in guarded:
        assert memory[:GUARD].isnan().all()
        assert memory[GUARD + count :].isnan().all()
    native.release_workspaces()


@needs_extension
def test_adamw_changes_its_tensors_and_nothing_beside_them():
    memory = [torch.full((n + 2 * GUARD,), torch.nan) for n in (1, 7, 513, 8193) for _ in range(3)]
    inside = [t[GUARD:-GUARD].fill_(0.5) for t in memory]
    p, m, v = inside[::3], inside[1::3], inside[2::3]
    grads = [torch.ones_like(t) for t in p]
    steps = [torch.zeros(()) for _ in p]
    args = ([None] * 4, steps, [0.1] * 4, [0.0] * 4, 0.9, 0.999, 1e-8, 1.0)
    op("adamw").update(p, grads, m, v, *args, torch.tensor(True))
    assert all((t == 0.5).all() for t in inside)
    op("adamw").update(p, grads, m, v, *args, None)
    assert all((t != 0.5).all() and t.isfinite().all() for t in inside)
    assert [int(step) for step in steps] == [1] * 4
    for t in memory:
        assert t[:GUARD].isnan().all()
        assert t[-GUARD:].isnan().all()


@needs_extension
def test_the_adamw_table_has_the_layout_of_the_c_struct():
    table = op("adamw")._pack.__self__
    assert isinstance(table, struct.Struct)
    assert table.size == native.load().ADAMW_TENSOR_BYTES


# --- absence --------------------------------------------------------------------------------


def test_without_the_extension_one_sentence_says_so_and_the_rest_works():
    done = python(
        """
import sys

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "gptk._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing)
import torch
from gptk import functional as G, native, random
assert native.available() == native.NOT_BUILT
try:
    native.load()
except RuntimeError as error:
    assert str(error) == native.NOT_BUILT
else:
    raise AssertionError("load() found something")
assert random.keep_mask(1, 3, 5, 0.5).shape == (3, 5)
x = torch.randn(3, 5)
assert torch.equal(G.gelu(x), G.gelu(x, backend="torch"))
try:
    G.gelu(x, backend="cpp")
except RuntimeError as error:
    assert native.NOT_BUILT in str(error)
else:
    raise AssertionError("the missing backend ran")
"""
    )
    assert done.returncode == 0, done.stderr
