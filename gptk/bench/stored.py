"""A stored run made fit to be published: small, and without what names the machine.

`gptk bench --json` and pytest-benchmark read it as before.
"""

import json
from pathlib import Path
from typing import Any

DIGITS = 4
"""Significant digits of a number: timings are not exact to more."""
MACHINE = ("machine", "system", "python_implementation", "python_version", "gptk")
COMMIT = ("id", "time", "dirty")
BENCHMARK = ("group", "name", "fullname", "params", "param", "extra_info", "stats")
STATS = (
    *("min", "max", "mean", "stddev", "median", "iqr", "ops", "outliers", "rounds", "iterations"),
    *("q1", "q3", "ld15iqr", "hd15iqr", "data"),
)
"""What `pytest-benchmark compare` prints and draws, and the samples."""


def shrink(path: Path) -> None:
    """Rewrite a JSON file of pytest-benchmark in place."""
    run = json.loads(path.read_text("utf-8"))
    run["machine_info"] = _only(run["machine_info"], MACHINE)
    run["commit_info"] = _only(run["commit_info"], COMMIT)
    benchmarks = [_only(one, BENCHMARK) for one in run["benchmarks"]]
    for one in benchmarks:
        one["stats"] = _only(one["stats"], STATS)
    write({**run, "benchmarks": benchmarks}, "benchmarks", path)


def write(values: dict[str, Any], listed: str, path: Path) -> None:
    """Values as JSON, floats rounded; the list values[listed] comes last, an element per line."""
    head = json.dumps(rounded({k: v for k, v in values.items() if k != listed}), indent=1)
    rows = ",\n  ".join(json.dumps(rounded(one)) for one in values[listed])
    path.write_text(f'{head[:-2]},\n "{listed}": [\n  {rows}\n ]\n}}\n', "utf-8")


def _only(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def rounded(value: Any) -> Any:
    """The value with every float in it to DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value
