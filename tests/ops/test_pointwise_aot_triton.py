"""The Triton kernels of gelu, linear, cross_entropy and adamw compile for GPUs, without a GPU.

The kernels of a process are either interpreted or compiled, so the compilation runs in a process of
its own: this file, as a script. A kernel must also keep its wide memory accesses: a mask of unknown
alignment, say, would turn them into single elements, and no result would show it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
KERNELS = (
    "gelu-forward",
    "gelu-backward",
    "linear-backward",
    "linear-sum",
    "cross_entropy-forward",
    "cross_entropy-backward",
    "cross_entropy-forward-softcap",
    "cross_entropy-backward-softcap",
    "adamw-prepare",
    "adamw-update",
    "adamw-stochastic",
    "adamw-norm_partial",
    "adamw-norm",
    "adamw-factors",
)
WIDE = (
    "gelu-forward",
    "gelu-backward",
    "linear-backward",
    "cross_entropy-backward",
    "cross_entropy-backward-softcap",
    "adamw-update",
    "adamw-stochastic",
    "adamw-norm_partial",
)


def launches(dtype):
    """name -> (kernel, argument types, constants, divisible by 16) as the launchers give them."""
    import torch

    from gptk.ops.adamw import triton_impl as adamw
    from gptk.ops.adamw import triton_norm
    from gptk.ops.cross_entropy import triton_impl as cross_entropy
    from gptk.ops.gelu import triton_impl as gelu
    from gptk.ops.linear import triton_impl as linear

    torch_dtype = getattr(torch, dtype)
    tl_dtype = gelu.TL[torch_dtype]
    acc = gelu.TL[gelu.ACC[torch_dtype]]
    x, a = "*" + NAMES[dtype], "*" + acc.name
    flat = dict(ACTIVATION="gelu_tanh", ACC=acc, **gelu.launch_config(torch_dtype))
    tile = dict(ACC=acc, **linear.launch_config(768))
    rows = dict(HAS_BIAS=True, ACC=acc, **cross_entropy.launch_config(50304))
    plain, both = (dict(HAS_SOFTCAP=has, HAS_Z_LOSS=has) for has in (False, True))
    half = torch_dtype.itemsize == 2
    moment = gelu.TL[torch.float32] if half else tl_dtype
    update = dict(
        GRAD=tl_dtype, PARAM=tl_dtype, EXP_AVG=moment, EXP_AVG_SQ=moment, HAS_MASTER=half,
        HAS_SKIP=True, STOCHASTIC=False, ACC=acc, COLUMNS=adamw.COLUMNS, **adamw.launch_config(),
    )  # fmt: skip
    single, small = gelu.TL[torch.float32], gelu.TL[torch.bfloat16]
    stochastic = update | dict(
        PARAM=small, EXP_AVG=single, EXP_AVG_SQ=single, HAS_MASTER=False, STOCHASTIC=True,
        ACC=single,
    )  # fmt: skip
    numbers = [*["i32"] * 4, *["fp64"] * 3]
    norm = dict(GRAD=tl_dtype, ACC=acc, COLUMNS=adamw.COLUMNS, **adamw.launch_config())
    table = ["*i64", "*fp64", "*fp64", "*fp32"]
    return {
        "gelu-forward": (gelu._gelu_forward_kernel, [x, x, "i32"], flat),
        "gelu-backward": (gelu._gelu_backward_kernel, [x, x, x, "i32"], flat),
        "linear-backward": (
            linear._activation_backward_kernel,
            [x, x, a, x, x, "i32", "i32"],
            dict(ACTIVATION="gelu", HAS_ACTIVATION=True, HAS_Y=True, HAS_SUM=True, ROWS=linear.ROWS)
            | tile,
        ),
        "linear-sum": (linear._sum_partials_kernel, [x, a, "i32", "i32"], tile),
        "cross_entropy-forward": (
            cross_entropy._cross_entropy_forward_kernel,
            [a, a, x, x, "*i64", "i32", "i32", "i32", "fp64", "fp64", "fp64"],
            dict(HAS_SMOOTHING=True, **rows, **plain),
        ),
        "cross_entropy-backward": (
            cross_entropy._cross_entropy_backward_kernel,
            [x, a, x, x, "*i64", a, "i32", "i32", "i32", "fp64", "fp64", "fp64", "fp64"],
            dict(RESWEEP=not half, **rows, **plain),
        ),
        "cross_entropy-forward-softcap": (
            cross_entropy._cross_entropy_forward_kernel,
            [a, a, x, x, "*i64", "i32", "i32", "i32", "fp64", "fp64", "fp64"],
            dict(HAS_SMOOTHING=True, **rows, **both),
        ),
        "cross_entropy-backward-softcap": (
            cross_entropy._cross_entropy_backward_kernel,
            [x, a, x, x, "*i64", a, "i32", "i32", "i32", "fp64", "fp64", "fp64", "fp64"],
            dict(RESWEEP=not half, **rows, **both),
        ),
        "adamw-prepare": (
            adamw._prepare_kernel,
            ["*fp64", "*i64", "*fp64", "*fp32", "i32", "fp64", "fp64"],
            dict(HAS_SKIP=True, BLOCK=128),
        ),
        "adamw-update": (adamw._update_kernel, [*table, *numbers], update),
        "adamw-stochastic": (adamw._update_kernel, [*table, *numbers], stochastic),
        "adamw-norm_partial": (
            triton_norm._norm_partial_kernel,
            ["*fp64", "*i64", "i32", "i32"],
            norm,
        ),
        "adamw-norm": (triton_norm._norm_kernel, ["*fp64", "*fp64", "i32"], dict(BLOCK=1024)),
        "adamw-factors": (
            triton_norm._factors_kernel,
            ["*fp64", "*i1", "*fp64", "*fp32", "*fp32", "fp64"],
            dict(HAS_NORM=True, SCALED=True, HAS_SCALE=True, HAS_FOUND=True),
        ),
    }


def compile_all(arch):
    """Print one JSON object: dtype -> kernel -> bits of the widest global load and store."""
    print(json.dumps({dtype: compiled(arch, dtype) for dtype in NAMES}))


def compiled(arch, dtype):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for name, (kernel, types, constants) in launches(dtype).items():
        options = {"num_warps": constants.pop("num_warps", 4)}
        names = kernel.arg_names
        typed = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
        assert set(typed) == set(names), (name, set(typed) ^ set(names))
        signature = {arg: typed[arg] for arg in names}
        fixed = {p.name for p in kernel.params if p.do_not_specialize}
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, arg in enumerate(names[: len(types)])
            if (types[i][0] == "*" or types[i] == "i32") and arg not in fixed
        }
        source = ASTSource(
            kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attrs
        )
        ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
        widths = {"ld": 0, "st": 0}
        pattern = r"(ld|st)\.global(?:\.\w+::\w+)*(?:\.L2::\w+)?(?:\.v(\d))?\.[bfsu](\d+)"
        for kind, count, bits in re.findall(pattern, ptx):
            widths[kind] = max(widths[kind], int(count or 1) * int(bits))
        found[name] = widths
    return found


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_with_wide_accesses(arch, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(NAMES)
    for dtype, kernels in found.items():
        assert tuple(kernels) == KERNELS
        for name in WIDE:
            stores = 64 if name == "adamw-norm_partial" else 128  # one number for each block
            assert kernels[name] == {"ld": 128, "st": stores}, (dtype, name, kernels[name])


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
