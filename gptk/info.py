"""`gptk info`: what is built, what this machine has, which backend each op would take and why."""

import importlib.metadata
import importlib.util
import os
import platform

import torch

import gptk
from gptk import native
from gptk.flags import UsageError
from gptk.ops import contract, cpp_product, tuning_file
from gptk.ops.catalog import BACKENDS, CROSSOVER, OPS, PREFERENCE, ROWS
from gptk.train import hardware

KERNELS = (
    "compiles the Triton kernels for sm_80, sm_90 and sm_100 (no GPU needed, minutes), and prints "
    "registers, spills, occupancy and tensor-core instructions; --case attention for some of them"
)


def main(argv: list[str]) -> int:
    """`gptk info [OP ...]`: prints; the named ops only, all by default. With --kernels instead:
    compiles the Triton kernels for GPUs and prints what each needs."""
    if any(word in ("-h", "--help") for word in argv):
        usage = "usage: gptk info [OP ...]\n       gptk info --kernels [FLAG ...]"
        print(f"{usage}\n\n{__doc__}\n")
        print(f"ops: {', '.join(OPS)}\n--kernels: {KERNELS}")
        return 0
    if argv and argv[0] == "--kernels":
        from gptk.aot.__main__ import main as aot

        return aot(argv[1:])
    unknown = [word for word in argv if word not in OPS]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is not an op; must be one of {', '.join(OPS)}")
    try:
        lines = [*machine(), *tuning(), "", *backends(), "", *ops(argv or OPS)]
    except ValueError as error:  # GPTK_ISA names what this CPU or build does not have
        raise UsageError(str(error)) from None
    print("\n".join(lines))
    return 0


def machine() -> list[str]:
    """Versions, CPU and GPU."""
    versions = {"gptk": gptk.__version__, "torch": torch.__version__}
    for name in ("triton", "numpy", "safetensors", "tokenizers"):
        versions[name] = _version(name)
    features = [name for name, here in hardware.cpu_features().items() if here]
    return [
        f"versions   python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"CPU        {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"threads, {', '.join(features) or 'none of AVX2, AVX-512, AMX'}",
        f"GPU        {_gpus()}",
    ]


def tuning() -> list[str]:
    """Which tuning file the Triton kernels take their launch configurations from."""
    archs = {0}
    if torch.cuda.is_available():
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        archs = {10 * major + minor for major, minor in capabilities}
    return [f"tuning     {_tuning(arch)}" for arch in sorted(archs)]


def _tuning(arch: int) -> str:
    path = tuning_file.in_use(arch)
    if path is None:
        reason = "no GPU"
        if os.environ.get(tuning_file.VARIABLE) == "":
            reason = f"{tuning_file.VARIABLE} is empty"
        elif arch:
            reason = f"no {tuning_file.default_place(arch)}; gptk tune makes it"
        return f"what ships ({reason})"
    try:
        content = tuning_file.read(path, arch)
    except tuning_file.TuningFileError as error:
        return f"refused: {error}"
    count = len(tuning_file.rows(content, path))
    line = f"{path}: {count} rows, {content['gpu']} (sm_{content['arch']}), {content['date']}"
    return "; ".join([line, *tuning_file.changes(content, arch).values()])


def backends() -> list[str]:
    """Each backend: usable or why not."""
    lines = []
    for backend in BACKENDS:
        reason = contract.availability(backend)
        state = "usable" if reason is None else f"not usable: {reason}"
        if backend == "cpp" and reason is None:
            levels = ", ".join(native.isa_levels())
            state += f"; runs {native.isa()} code (here: {levels}; GPTK_ISA= chooses)"
            lines.append(f"{backend:10} {state}")
            state = f"matrix products: {cpp_product.explain()}"
        if backend == "triton" and reason is None and os.environ.get("TRITON_INTERPRET") == "1":
            state += "; in the interpreter (slow), TRITON_INTERPRET=1"
        lines.append(f"{backend:10} {state}")
    return lines


def ops(names: list[str] | tuple[str, ...]) -> list[str]:
    """Each op on each device here: what auto takes, and why not the others."""
    lines = []
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        dtypes = (torch.float32, torch.bfloat16)
        for op in names:
            for dtype in dtypes:
                lines += _op(op, device, dtype)
    return lines


def _op(op: str, device: str, dtype: torch.dtype) -> list[str]:
    reasons = {b: contract.why_not(op, b, device, dtype) for b in BACKENDS}
    order = PREFERENCE.get(device, ("torch",))
    chosen = next((b for b in order if reasons[b] is None), "none")
    name = str(dtype).removeprefix("torch.")
    vendor = ROWS[op, chosen].vendor if (op, chosen) in ROWS else ""
    lines = [f"{op} on {device}, {name}: auto takes {chosen}" + (f" ({vendor})" if vendor else "")]
    least = CROSSOVER.get((op, chosen, device), 0)
    if least:
        lines.append(f"    torch below {least:,} elements of the input, where it is faster")
    for backend, reason in reasons.items():
        if backend != chosen:
            lines.append(f"    not {backend}: {reason or _passed_over(backend, order)}")
    return lines


def _passed_over(backend: str, order: tuple[str, ...]) -> str:
    if backend in order:
        return "it could, but comes after in auto's order"
    return "it could, if named; auto never takes it on this device"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)
