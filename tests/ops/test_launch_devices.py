"""Launches happen on the tensors' device and on the stream that is current there.

A child process, which compiles kernels where this one interprets them, calls every op on tensors of
the second of two GPUs that are not there (fake_cuda) and says what was launched, where.
"""

import ast
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fake_cuda import Made, Stream, fake_cuda

from gptk.ops.catalog import OPS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "gptk" / "ops").rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in FILES}
CALLS = [
    (path, node) for path in FILES for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)
]
KERNELS = {call.args[0].id for _, call in CALLS if getattr(call.func, "id", "") == "launch"}
"""Names of the kernels that are launched from anywhere."""

# --- the child --------------------------------------------------------------------------------


def call_ops(device):
    """Yields an op's name before each has launched all of its kernels, on tensors of `device`."""
    from gptk.ops.adamw import triton_impl as adamw
    from gptk.ops.adamw import triton_norm
    from gptk.ops.attention import triton_impl as attention
    from gptk.ops.attention.ranges import Ranges
    from gptk.ops.cross_entropy import triton_impl as cross_entropy
    from gptk.ops.gelu import triton_impl as gelu
    from gptk.ops.layer_norm import triton_impl as layer_norm
    from gptk.ops.linear import triton_impl as linear
    from gptk.ops.linear_cross_entropy import triton_impl as linear_cross_entropy
    from gptk.ops.mlp import triton_impl as mlp

    def ones(*shape, dtype=torch.bfloat16):
        return torch.ones(shape, dtype=dtype, device=device)

    f32, bf16 = torch.float32, torch.bfloat16
    yield "layer_norm"
    for N in (64, 20000):
        x, w = ones(3, N), ones(N, dtype=f32)
        y, h, mean, rstd = layer_norm.forward(x, w, w, 1e-5, x, 0.1, 7)
        options = (bf16, bf16, 0.1, 7, (True,) * 4)
        layer_norm.backward(y, y, h, w, mean, rstd, *options)
    yield "attention"
    q = ones(1, 2, 40, 64)
    limits = Ranges(*(ones(40, dtype=torch.int32) for _ in range(4)))
    for seen in (None, limits):
        options = (True, 0.125, 0.1, 7, None)
        out, lse = attention.forward(q, q, q, *options, seen)
        attention.backward(out, q, q, q, out, lse, *options, (True,) * 3, ranges=seen)
    cache = ones(1, 2, 4096, 64)
    attention.forward(ones(1, 2, 1, 64), cache, cache, *options)
    yield "gelu"
    x = ones(3, 64)
    gelu.backward(gelu.forward(x, "none"), x, "none")
    yield "linear"
    x, w, b = ones(3, 64), ones(64, 64), ones(64)
    y, pre = linear.forward(x, w, b, "gelu")
    linear.backward(y, x, w, pre, "gelu", f32, f32, (True,) * 3)
    yield "mlp"
    y, pre = mlp.forward(x, w, b, w, b, "gelu")
    mlp.backward(y, x, pre, w, w, "gelu", (f32,) * 4, (True,) * 5)
    yield "cross_entropy"
    target = torch.ones(3, dtype=torch.int64, device=device)
    loss, lse = cross_entropy.forward(x, target, -100, 0.1)
    cross_entropy.backward(loss, x, target, lse, -100, 0.1)
    yield "linear_cross_entropy"
    loss, lse = linear_cross_entropy.forward(x, w, b, target, -100, 0.1)
    options = (f32, f32, (True,) * 3, -100, 0.1)
    linear_cross_entropy.backward(loss, x, w, b, target, lse, *options)
    yield "adamw"
    x, step = ones(7, dtype=f32), torch.ones((), device=device)
    for module in (adamw, triton_norm):  # which sends an array from pinned memory
        module.send = lambda parts, to: [
            torch.empty(p.size, dtype=torch.int64, device=to) for p in parts
        ]
    norm = adamw.norm([x])
    _, skip, multiplier = adamw.factors(norm, True, step, step, 1.0)
    for factor in (multiplier, 0.5):
        lists = ([x], [x], [x], [x], [None], [step], [1e-2], [0.1])
        adamw.update(*lists, 0.9, 0.99, 1e-8, factor, skip)


def every_op(runtime):
    """op -> its launches, and the devices of what was made, with the other device current."""
    found, last = {}, None
    made = Made()
    device = torch.device("cuda", 1)
    with made:
        for op in itertools.chain(call_ops(device), [None]):
            if last is not None:
                found[last] = dict(launches=runtime.launched, current=runtime.device)
                found[last]["made"] = sorted(made.devices)
            made.devices.clear()
            runtime.launched, last = [], op
    return found


def one(runtime, device=1):
    from gptk.ops.gelu import triton_impl as gelu

    gelu.forward(torch.ones(9, device=torch.device("cuda", device)), "none")
    return runtime.launched.pop()


def scenes(runtime):
    from gptk.ops.gelu.triton_impl import _gelu_forward_kernel as kernel

    said = {"ops": every_op(runtime)}
    mine = Stream(torch.device("cuda", 1), 777)
    with torch.cuda.stream(mine):
        said["own stream"] = one(runtime)
        with torch.cuda.device(0):
            said["own stream, other device"] = one(runtime)
            said["other device's tensor"] = one(runtime, 0)
        said["within"] = runtime.device
    said["after"] = one(runtime)
    x = torch.ones(9, device="cuda:1")
    kernel[(1,)](x, x, 9, "gelu", 1, BLOCK=16)  # without `launch`
    said["bare"] = runtime.launched.pop()
    runtime.fails = True
    try:
        one(runtime)
    except RuntimeError as error:
        said["failed"] = [str(error), runtime.device]
    return said


if __name__ == "__main__":
    with fake_cuda() as cuda:
        print(json.dumps(scenes(cuda)))
    raise SystemExit

# --- the tests --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", OPS)
def test_an_op_launches_where_its_tensors_are(said, op):
    """Current is the other device, and stays it."""
    seen = said["ops"][op]
    assert seen["current"] == 0
    assert seen["launches"]
    for kernel, device, stream, tensors in seen["launches"]:
        assert (device, stream) == (1, 101), kernel
        assert set(tensors) <= {1}, kernel


@pytest.mark.parametrize("op", OPS)
def test_an_op_makes_tensors_where_its_own_are(said, op):
    assert said["ops"][op]["made"] == ["cuda:1"]


def test_every_kernel_was_launched(said):
    seen = {launch[0] for each in said["ops"].values() for launch in each["launches"]}
    assert seen == KERNELS


def test_a_launch_is_on_the_stream_that_the_caller_made_current(said):
    assert said["own stream"][1:3] == [1, 777]
    assert said["own stream, other device"][1:3] == [1, 777]
    assert said["other device's tensor"][1:3] == [0, 100]
    assert said["within"] == 1
    assert said["after"][1:3] == [1, 101]


def test_the_current_device_is_restored_after_an_error(said):
    assert said["failed"] == ["the launch failed", 0]


def test_a_kernel_that_is_launched_otherwise_is_seen_on_the_wrong_device(said):
    assert said["bare"][1:] == [0, 100, [1, 1]]


def test_kernels_are_launched_by_launch_alone():
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, call in CALLS
        if isinstance(call.func, ast.Subscript)
        or (isinstance(call.func, ast.Attribute) and call.func.attr in ("run", "warmup"))
    ]
    start = TREES[ROOT / "gptk" / "ops" / "triton_launch.py"]
    [own] = [n for n in ast.walk(start) if getattr(n, "name", "") == "launch"]
    allowed = range(own.lineno, own.end_lineno + 1)
    assert [place for place in found if "triton_launch.py" not in place] == []
    assert [int(place.rpartition(":")[2]) in allowed for place in found] == [True]
