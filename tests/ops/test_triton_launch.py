"""Philox, rounding, overflow checks and GPU compilation: what every Triton kernel stands on."""
# ruff: noqa: E402 (where triton is missing, the imports below fail)

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl
from interpreter_checks import keep_rule, needs_interpreter, overflow_checks

from gptk.ops import triton_launch
from gptk.ops.philox_triton import keep_tile, philox4x32, philox_key
from gptk.ops.triton_launch import dropout_arguments, launch, narrow, split_seed, why_not, widen

ROOT = Path(__file__).resolve().parents[2]


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _mask_kernel(
    keep_ptr,
    seed_low,
    seed_high,
    threshold: tl.int64,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    key_low, key_high = philox_key(seed_low, seed_high)
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS
    keep = keep_tile(key_low, key_high, row.to(tl.int64), column, threshold, COLUMNS)
    at = row[:, None] * N + column + tl.arange(0, COLUMNS)[None, :]
    tl.store(keep_ptr + at, keep.to(tl.int8))


@triton.jit
def _words_kernel(words_ptr, counter_ptr, key_ptr):
    i = tl.arange(0, 1)
    c0, c1, c2, c3 = philox4x32(
        tl.load(key_ptr).to(tl.uint32, bitcast=True),
        tl.load(key_ptr + 1).to(tl.uint32, bitcast=True),
        tl.load(counter_ptr + i).to(tl.uint32, bitcast=True),
        tl.load(counter_ptr + i + 1).to(tl.uint32, bitcast=True),
        tl.load(counter_ptr + i + 2).to(tl.uint32, bitcast=True),
        tl.load(counter_ptr + i + 3).to(tl.uint32, bitcast=True),
    )
    tl.store(words_ptr + i, c0.to(tl.int32, bitcast=True))
    tl.store(words_ptr + i + 1, c1.to(tl.int32, bitcast=True))
    tl.store(words_ptr + i + 2, c2.to(tl.int32, bitcast=True))
    tl.store(words_ptr + i + 3, c3.to(tl.int32, bitcast=True))


@triton.jit
def _round_kernel(small_ptr, wide_ptr, x_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    small = narrow(tl.load(x_ptr + i, mask=i < N), small_ptr.dtype.element_ty)
    tl.store(small_ptr + i, small, mask=i < N)
    tl.store(wide_ptr + i, widen(small, wide_ptr.dtype.element_ty), mask=i < N)


@triton.jit
def _product_kernel(y_ptr, a, b):
    tl.store(y_ptr, a * b)


pytestmark = needs_interpreter


@pytest.fixture(autouse=True)
def _overflows_are_errors():
    with overflow_checks():
        yield


SEEDS = (0, 1, -1, 2**63 + 5, 0x123456789ABCDEF0, 2**64 - 1)


@pytest.mark.parametrize("p", [1e-10, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_keep_mask_is_the_numpy_rule(seed, p):
    keep = torch.empty(8, 48, dtype=torch.int8)
    arguments = (*split_seed(seed, keep.device), dropout_arguments(p)[0], 48)
    launch(_mask_kernel, (3,), keep.device, keep, *arguments, ROWS=8, COLUMNS=16)
    assert torch.equal(keep.bool(), keep_rule(seed % 2**64, 8, 48, p))


@pytest.mark.parametrize("seed", [5, -3])
def test_a_tensor_seed_draws_the_mask_of_its_value(seed):
    keep = torch.empty(8, 16, dtype=torch.int8)
    arguments = (*split_seed(torch.tensor(seed), keep.device), dropout_arguments(0.4)[0], 16)
    launch(_mask_kernel, (1,), keep.device, keep, *arguments, ROWS=8, COLUMNS=16)
    assert torch.equal(keep.bool(), keep_rule(seed % 2**64, 8, 16, 0.4))


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    # Random123 1.14, kat_vectors, philox4x32 with 10 rounds
    as_int32 = [torch.from_numpy(np.array(t, np.uint32).view(np.int32)) for t in (counter, key)]
    got = torch.empty(4, dtype=torch.int32)
    launch(_words_kernel, (1,), got.device, got, *as_int32)
    assert tuple(got.numpy().view(np.uint32).tolist()) == words


def test_every_seed_has_the_same_argument_types():
    for seed in SEEDS:
        halves = split_seed(seed, torch.device("cpu"))
        assert all(-(2**31) <= half < 2**31 for half in halves)
        assert (halves[0] % 2**32) | (halves[1] % 2**32) << 32 == seed % 2**64


def _floats():
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    ties = torch.tensor([1.00390625, 1.01171875, 1.005, -1.01171875, 3.4e38, -1e-40, 0.0, -0.0])
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return torch.cat([ties, odd, x])


def test_bfloat16_rounds_as_torch_does():
    x = _floats()
    small, wide = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x))
    launch(_round_kernel, (5,), x.device, small, wide, x, len(x), BLOCK=1024)
    want = x.bfloat16()
    number = ~x.isnan()
    assert torch.equal(small.isnan(), x.isnan())
    assert torch.equal(small.view(torch.int16)[number], want.view(torch.int16)[number])
    assert torch.equal(wide.view(torch.int32)[number], want.float().view(torch.int32)[number])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # to inf, as torch
def test_float16_rounds_as_torch_does():
    x = _floats()
    small, wide = torch.empty(len(x), dtype=torch.float16), torch.empty(len(x))
    launch(_round_kernel, (5,), x.device, small, wide, x, len(x), BLOCK=1024)
    torch.testing.assert_close(small, x.half(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, x.half().float(), rtol=0, atol=0, equal_nan=True)


def test_the_overflow_check_sees_an_overflow():
    from triton.runtime.interpreter import InterpreterError

    y = torch.zeros(1, dtype=torch.int64)
    launch(_product_kernel, (1,), y.device, y, 2**15, 2**15)
    assert y.item() == 2**30
    with pytest.raises(InterpreterError, match="overflow"):
        launch(_product_kernel, (1,), y.device, y, 2**16, 2**15)


def test_says_why_not(monkeypatch):
    assert why_not("cpu") is None
    monkeypatch.setattr(triton_launch, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in why_not("cuda")
    assert "TRITON_INTERPRET=1" in why_not("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "device cpu" in why_not("cpu")
    assert why_not("cuda") is None


def compile_launches(arch):
    """Print, for each kernel that the ops launch, what it needs of an `arch` GPU, as JSON lines.

    The ops run on CPU tensors, with a driver that names a GPU and `launch` compiling only: so the
    signatures are those of real launches.
    """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from gptk.ops.attention import triton_backward, triton_decode, triton_impl
    from gptk.ops.attention.ranges import ranges
    from gptk.ops.layer_norm import triton_backward as norm_backward
    from gptk.ops.layer_norm import triton_impl as norm

    class NamesAGpu:
        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    def compile_only(kernel, grid, device, *args, **meta):
        compiled = kernel.warmup(*args, grid=grid, **meta)
        dots = compiled.asm["ptx"].count("mma.sync") + compiled.asm["ptx"].count("wgmma.mma_async")
        found = dict(name=kernel.fn.__name__, shared=compiled.metadata.shared, dots=dots)
        print(json.dumps(found))

    driver.set_active(NamesAGpu())
    for module in (triton_impl, triton_backward, triton_decode, norm, norm_backward):
        module.launch = compile_only
    qkv = torch.zeros(1, 40, 3, 2, 64, dtype=torch.bfloat16)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    # with and without dropout in turn: the mask doubles the time to compile
    options = (True, 0.125, 0.1 if arch == 90 else 0.0, torch.tensor(7), None)
    out, lse = triton_impl.forward(q, k, v, *options)
    triton_backward.backward(out, q, k, v, out, lse, *options, (True, True, True))
    packed = ranges((torch.tensor([0, 9, 40]),) * 2, 40, 40, True, None)
    out, lse = triton_impl.forward(q, k, v, *options, packed)
    triton_backward.backward(out, q, k, v, out, lse, *options, (True,) * 3, ranges=packed)
    triton_impl.forward(*(t.double() for t in (q, k, v)), *options, packed)
    cache = torch.zeros(1, 1, 4096, 64, dtype=torch.bfloat16)
    triton_impl.forward(q[:, :, :1], cache, cache, *options)
    for N in (768, 20000):
        x, w = torch.zeros(2, N, dtype=torch.bfloat16), torch.ones(N)
        y, h, mean, rstd = norm.forward(x, w, w, 1e-5, x, 0.1, 7)
        norm_backward.backward(
            y, y, h, w, mean, rstd, x.dtype, x.dtype, 0.1, 7, (True, True, True, True)
        )


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_for_a_gpu(arch, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    command = [sys.executable, __file__, str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    names = [kernel["name"] for kernel in found]
    attention = [
        "_attention_forward_kernel",
        "attention_delta_kernel",
        "attention_dq_kernel",
        "attention_dkdv_kernel",
    ]
    assert names == [
        *attention,
        *attention,  # of packed documents
        "_attention_forward_kernel",
        "_attention_part_kernel",
        "_attention_join_kernel",
        "_layer_norm_forward_kernel",
        "_layer_norm_backward_kernel",
        "_layer_norm_reduce_kernel",
        "_layer_norm_forward_kernel",
        "_layer_norm_backward_kernel",
        "_layer_norm_columns_kernel",
        "_layer_norm_reduce_kernel",
    ]
    for kernel in found:
        assert kernel["shared"] <= 99 * 1024, kernel
        uses_tensor_cores = kernel["dots"] > 0
        is_product = kernel["name"] in {*attention, "_attention_part_kernel"}
        is_product &= kernel["name"] != "attention_delta_kernel"
        assert uses_tensor_cores == is_product, kernel


if __name__ == "__main__":
    compile_launches(int(sys.argv[1]))
