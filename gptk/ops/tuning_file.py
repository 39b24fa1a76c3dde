"""The user's tuning file: what `gptk tune` writes, and every process reads at most once per GPU.

    {"format": 1, "gpu": "NVIDIA ...", "arch": 90, "gptk": ..., "torch": ..., "triton": ...,
     "date": ..., "kernels": {"gelu.forward": {"parameters": ["BLOCK", "num_warps"], "rows": [
        {"bits": 16, "size": 0, "kind": "gelu", "config": [2048, 8], "config_ms": ...,
         "shipped": [1024, 4], "shipped_ms": ...}]}}}

It lies where GPTK_TUNING says, or at the default place, which has the GPU's architecture in its
name. A file that cannot be used as a whole is refused: no launch goes on without it in silence.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Config = tuple[int, ...]
Key = tuple[str, int, int, str]
"""(kernel, bits of the inputs' dtype, size, kind): the calls that share a configuration."""
Content = dict[str, Any]

NO_LIMIT = 256
"""A maxnreg (most registers of a thread) above what there are: the compiler chooses."""
FORMAT = 1
VARIABLE = "GPTK_TUNING"
REMEDY = f"remove it and run gptk tune again, or go without it: {VARIABLE}="
STRINGS = ("gpu", "gptk", "torch", "triton", "date")


class TuningFileError(ValueError):
    """A tuning file that cannot be used, in one sentence."""


@dataclass(frozen=True)
class Kernel:
    """What a configuration of a kernel is: `parameters` are powers of two (num_stages and maxnreg:
    any number) from the first to the second; sizes are powers of two from `least` to `largest`, or
    0 alone."""

    parameters: dict[str, tuple[int, int]]
    kinds: tuple[str, ...]
    largest: int
    least: int = 16


_PIPELINE = {"num_warps": (1, 16), "num_stages": (1, 8), "maxnreg": (32, NO_LIMIT)}
_ATTENTION = Kernel(
    {"BLOCK_Q": (16, 256), "BLOCK_K": (16, 256), **_PIPELINE},
    ("plain", "packed", "dropout"),
    256,
    least=64,
)
_WARPS = {"num_warps": (1, 32)}
_NORM = Kernel({"BLOCK_M": (1, 32), "BLOCK_N": (16, 32768), **_WARPS}, ("plain", "dropout"), 65536)
_LOSS = Kernel({"BLOCK_V": (32, 65536), **_WARPS}, ("plain", "softcap"), 262144)
_GELU = Kernel({"BLOCK": (32, 65536), **_WARPS}, ("gelu", "gelu_tanh"), 0)
# a program of linear's epilogue adds 64 rows: a higher tile would reach into the next one's
_EPILOGUE = {"BLOCK_M": (1, 64), "BLOCK_N": (16, 4096), **_WARPS}
_LOGITS = Kernel(
    {"BLOCK_M": (16, 256), "BLOCK_V": (16, 256), "BLOCK_C": (16, 128), **_PIPELINE},
    ("plain", "extras", "softcap"),
    0,
)

KERNELS = {
    "attention.forward": _ATTENTION,
    "attention.dq": _ATTENTION,
    "attention.dkdv": _ATTENTION,
    "layer_norm.forward": _NORM,
    "layer_norm.backward": _NORM,
    "cross_entropy.forward": _LOSS,
    "cross_entropy.backward": _LOSS,
    "gelu.forward": _GELU,
    "gelu.backward": _GELU,
    "linear_cross_entropy.forward": _LOGITS,
    "linear_cross_entropy.backward": _LOGITS,
    "linear.epilogue": Kernel(_EPILOGUE, ("none", "gelu", "gelu_tanh"), 65536),
}
"""The kernels that a tuning file may configure."""


def bucket(kernel: str, size: int) -> int:
    """The size of the row that a call of `size` takes: the next power of two, from the kernel's
    least to its largest; 0 for a kernel whose configuration has nothing to do with a size."""
    known = KERNELS[kernel]
    return min(known.largest, max(known.least, 1 << max(size - 1, 0).bit_length()))


def default_place(arch: int) -> Path:
    """Where `gptk tune` writes and a process looks if GPTK_TUNING is not set."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(folder) / "gptk" / f"tuning-sm_{arch}.json"


def in_use(arch: int) -> Path | None:
    """The file for this GPU, None where there is none or GPTK_TUNING is empty.

    arch 0, the interpreter, has no default place: it takes the file that is named, of any GPU.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    place = default_place(arch)
    return place if arch and os.path.exists(place) else None  # False, too, where none may look


def read(path: Path, arch: int) -> Content:
    """The file's content, every part of it checked; for the interpreter, arch 0, of any GPU.

    Raises:
        TuningFileError: it is missing, malformed, of another format or another GPU's.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        remedy = f"make it: gptk tune --out {path}; or go without it: {VARIABLE}="
        raise TuningFileError(f"there is no tuning file {path}; {remedy}") from None
    except IsADirectoryError:
        remedy = f"name a file: {VARIABLE}=FILE; or go without one: {VARIABLE}="
        raise TuningFileError(f"{path} is a folder, not a tuning file; {remedy}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise _refused(path, f"cannot be read ({reason})") from None
    if not isinstance(content, dict) or "format" not in content:
        raise _refused(path, "is not a tuning file (it names no format)")
    if content["format"] != FORMAT:
        form = content["format"]
        raise _refused(path, f"is of format {form!r}, and this gptk reads format {FORMAT}")
    for name in (*STRINGS, "arch", "kernels"):
        kind = {"arch": int, "kernels": dict}.get(name, str)
        if not isinstance(content.get(name), kind):
            raise _refused(path, f"is malformed ({name!r} is missing or of the wrong type)")
    if arch and content["arch"] != arch:
        of = f"{content['gpu']} (sm_{content['arch']})"
        raise _refused(path, f"was measured on {of}, and this GPU is sm_{arch}")
    unknown = sorted(set(content["kernels"]) - set(KERNELS))
    if unknown:
        raise _refused(path, f"names kernels that this gptk has not: {', '.join(unknown)}")
    rows(content, path)
    return content


def rows(content: Content, path: Path) -> dict[Key, Config]:
    """Key -> configuration, of all rows."""
    found: dict[Key, Config] = {}
    for kernel, part in content["kernels"].items():
        names = list(KERNELS[kernel].parameters)
        if not isinstance(part, dict) or not isinstance(part.get("rows"), list):
            raise _refused(path, f"is malformed ({kernel} has no rows)")
        if part.get("parameters") != names:
            theirs = f"{part.get('parameters')!r}, and this gptk takes {names!r}"
            raise _refused(path, f"gives {kernel} the parameters {theirs}")
        for row in part["rows"]:
            wrong = _wrong(kernel, row)
            if wrong:
                raise _refused(path, f"has a wrong row for {kernel} ({wrong})")
            key = (kernel, row["bits"], row["size"], row["kind"])
            if key in found:
                raise _refused(path, f"has two rows for {shown(key)}")
            found[key] = tuple(row["config"])
    return found


def versions() -> dict[str, str]:
    """Those that a file names, of this process."""
    try:
        import triton
    except ImportError:
        compiler = "not installed"
    else:
        compiler = triton.__version__
    gptk = sys.modules["gptk"].__version__  # an import would be one of what is built from ops
    return {"gptk": gptk, "torch": str(torch.__version__), "triton": compiler}


def changes(content: Content, arch: int) -> dict[str, str]:
    """In words, by name, what the file was measured with ("gpu" and versions) and is other here.

    A GPU is compared by its name with all those of its architecture, which take the same file;
    the interpreter, arch 0, takes it of any.
    """
    here = {"gpu": _gpus(arch)} | {name: [now] for name, now in versions().items()}
    found = {}
    for name, now in here.items():
        others = [other for other in now if other != content[name]]
        if others:
            found[name] = f"{name} {content[name]} then, {' and '.join(others)} now"
    return found


def _gpus(arch: int) -> list[str]:
    """The names of the GPUs of an architecture."""
    if not arch or not torch.cuda.is_available():
        return []
    every = range(torch.cuda.device_count())
    own = [i for i in every if torch.cuda.get_device_capability(i) == divmod(arch, 10)]
    return sorted({torch.cuda.get_device_name(i) for i in own})


def _wrong(kernel: str, row: Any) -> str | None:
    """What is wrong with a row, None if nothing."""
    known = KERNELS[kernel]
    if not isinstance(row, dict) or not {"bits", "size", "kind", "config"} <= set(row):
        return f"not a row with bits, size, kind and config: {row!r}"
    if row["bits"] not in (16, 32):
        return f"bits {row['bits']!r}, which are not 16 or 32"
    if not _whole(row["size"]) or row["size"] != bucket(kernel, row["size"]):
        return f"size {row['size']!r}, which no call takes"
    if row["kind"] not in known.kinds:
        return f"kind {row['kind']!r}, which is not one of {', '.join(known.kinds)}"
    config = row["config"]
    if not isinstance(config, list) or len(config) != len(known.parameters):
        return f"config {config!r}, which is not {', '.join(known.parameters)}"
    for value, (name, (least, most)) in zip(config, known.parameters.items(), strict=True):
        power = name not in ("num_stages", "maxnreg")
        if not _whole(value) or not least <= value <= most or (power and value & (value - 1)):
            what = "a power of two" if power else "a number"
            return f"{name} {value!r}, which is not {what} from {least} to {most}"
    return None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(key: Key) -> str:
    """A key in words."""
    kernel, bits, size, kind = key
    return f"{kernel}, {bits} bits, " + (f"size {size}, " if size else "") + kind


def _refused(path: Path, reason: str) -> TuningFileError:
    return TuningFileError(f"the tuning file {path} {reason}; {REMEDY}")
