"""The command: python3 -m benchmarks.gpu --out DIR --minutes 9."""

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from benchmarks.gpu import report
from benchmarks.gpu.stages import OPS, PRELOAD, STAGES, Run, Stage, run_all

ROOT = Path(__file__).resolve().parents[2]
RESERVE_SECONDS = 15.0
"""Kept for the plots and the last report."""
ARCHIVE = "all.tar.gz"


def options() -> argparse.Namespace:
    names = list(dict.fromkeys(stage.name for stage in STAGES))
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="a new folder (default: below runs/, by the time)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for the whole run")
    parser.add_argument("--stage", action="append", choices=names, help="only these stages")
    parser.add_argument("--op", action="append", choices=OPS, help="only these ops")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="every stage at tiny sizes on the CPU, kernels interpreted: no time is a measurement",
    )
    return parser.parse_args()


def chosen(stages: tuple[Stage, ...], ops: list[str] | None) -> tuple[Stage, ...]:
    """The stages with only the parts of these ops; parts that belong to no op stay."""
    if ops is None:
        return stages
    return tuple(
        replace(s, parts=tuple(p for p in s.parts if p.split("/")[0] not in OPS or _op(p) in ops))
        for s in stages
    )


def _op(part: str) -> str:
    return part.split("/")[0]


def why_no_gpu() -> str | None:
    """Asked in another process: one that has used the GPU must not be forked from."""
    code = "import torch; print(torch.version.cuda, torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{sys.executable} cannot import torch; name a Python that can: make GPU_PYTHON=..."
    if not done.stdout.endswith("True\n"):
        return "torch sees no CUDA device here; --dry-run tries every stage on the CPU"
    return None


def name_tuning_file() -> None:
    """One for the whole run: what ships, unless GPTK_TUNING names a file. Never what `gptk tune`
    has left at its default place, which the tests would not take."""
    named = os.environ.get("GPTK_TUNING", "")
    if named and not Path(named).exists():
        sys.exit(f"GPTK_TUNING names {named}, which is not there; go without it: GPTK_TUNING=")
    os.environ["GPTK_TUNING"] = str(Path(named).resolve()) if named else ""


def archive(out: Path) -> None:
    """All that was found in one file, for machines that hand back only a few."""
    with tarfile.open(out / ARCHIVE, "w:gz") as tar:
        for path in sorted(out.rglob("*")):
            if path.suffix in (".json", ".log", ".md", ".png"):
                tar.add(path, path.relative_to(out.parent))


def _stopped(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def main() -> None:
    args = options()
    began = time.monotonic()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["GPTK_GPU_DRY_RUN"] = "1"
    else:
        for name in ("TRITON_INTERPRET", "GPTK_GPU_DRY_RUN"):
            os.environ.pop(name, None)
        if reason := why_no_gpu():
            sys.exit(reason)
    name_tuning_file()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = (
        ":4096:8"  # cuBLAS repeats its bits only with a fixed one
    )
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    out = (args.out or ROOT / "runs" / time.strftime("gpu-%Y%m%d-%H%M%S")).resolve()
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty; name a new folder with --out")
    (out / "stages").mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopped)
    run = Run(out, args.dry_run, began + 60 * args.minutes - RESERVE_SECONDS, began)
    stages = tuple(s for s in STAGES if args.stage is None or s.name in args.stage)
    # the compiler looks for a GPU when it is loaded, so only a dry run shares one
    preload = (*PRELOAD, "torch._dynamo") if args.dry_run else PRELOAD
    try:
        run_all(run, chosen(stages, args.op), preload)
        seconds = max(0.0, began + 60 * args.minutes - time.monotonic())
        plots = Stage("plots", "benchmarks.gpu.plots:run", seconds)
        run_all(replace(run, ends=began + 60 * args.minutes), (plots,))
    finally:
        print((out / "report.md").read_text() if (out / "report.md").exists() else "")
        archive(out)
        print(f"all of it: {out / ARCHIVE}", flush=True)
    sys.exit(0 if report.all_ran(out) else 1)


if __name__ == "__main__":
    main()
