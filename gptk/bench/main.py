"""`gptk bench [OP ...]`: run the suite under pytest-benchmark, print, store, compare, draw.

`gptk bench curves` goes to gptk/bench/curves.py.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from gptk.flags import UsageError

SUITE = Path(__file__).with_name("suite.py")


def parser(ops: list[str]) -> argparse.ArgumentParser:
    """The flags of the verb."""
    made = argparse.ArgumentParser(
        prog="gptk bench",
        description="Time ops and training steps against PyTorch on this machine.",
        epilog="gptk bench curves measures how time and memory grow; it has its own --help.",
    )
    made.add_argument("ops", nargs="*", metavar="OP", help=f"default all: {', '.join(ops)}")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument(
        "--dtype",
        action="append",
        choices=("float32", "bfloat16", "float16"),
        help="default float32, and bfloat16 where the device is fast at it",
    )
    made.add_argument(
        "--backend",
        action="append",
        choices=("auto", "torch", "triton", "cpp", "compile"),
        help="more than once for several; compile is torch.compile",
    )
    made.add_argument("--case", action="append", help="nano, shakespeare, gpt2, char")
    made.add_argument("--json", type=Path, help="store the samples (pytest-benchmark's format)")
    made.add_argument("--compare", type=Path, help="a file of --json: a column against it")
    made.add_argument("--plot", type=Path, help="folder for bars.png and roofline.png")
    made.add_argument("--show", type=Path, help="print a stored file and measure nothing")
    return made


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    for name in ("pytest", "pytest_benchmark", "matplotlib", "rich"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"gptk bench needs {name}: pip install 'gptk[bench]'")
    import pytest

    from gptk.bench import curves, report, stored
    from gptk.bench.providers import TORCH

    if argv[:1] == ["curves"]:
        return curves.main(argv[1:])
    ops = [*TORCH, "adamw", "model", "generate"]
    options = parser(ops).parse_args(argv)
    for op in options.ops:
        if op not in ops:
            words = f"one of: {', '.join(ops)}; or curves, as the first word"
            raise UsageError(f"gptk bench {op}: there is no such op ({words})")
    before = None
    if options.compare is not None:
        before = {report.key(r): r["median"] for r in _stored(options.compare)}
    if options.show is not None:
        rows = _stored(options.show)
        report.show(rows, before)
        return _draw(rows, options.plot)
    arguments = [
        str(SUITE),
        "-q",
        f"--rootdir={SUITE.parent}",
        f"-c={SUITE.with_name('pytest.ini')}",
        "-p",
        "gptk.bench.plugin",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        "--benchmark-quiet",
        "--no-table",
        f"--device={options.device}",
    ]
    arguments += [f"--op={op}" for op in options.ops]
    for flag in ("dtype", "backend", "case"):
        arguments += [f"--{flag}={value}" for value in getattr(options, flag) or ()]
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        arguments += [f"--benchmark-json={options.json}", "--benchmark-save-data"]
    report.ROWS.clear()
    code = int(pytest.main(arguments))
    if not report.ROWS and code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise UsageError("gptk bench: nothing matches these ops, cases, dtypes and backends")
    if report.ROWS and options.json is not None:
        stored.shrink(options.json)
    report.show(report.ROWS, before)
    return _draw(report.ROWS, options.plot) or code


def _stored(path: Path) -> list[dict]:
    from gptk.bench import report

    try:
        return report.rows_of(path)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: cannot be read as a stored benchmark ({error})") from None


def _draw(rows: list[dict], folder: Path | None) -> int:
    from gptk.bench import report

    if folder is not None and rows:
        for path in report.plot(rows, folder, "gptk against PyTorch, one machine, one run"):
            print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
