"""Rows, the table in the terminal, comparison with an earlier run, pictures."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from gptk.bench.measure import quantiles

ROWS: list[dict[str, Any]] = []
"""What this process measured."""


def row(seconds: list[float], columns: dict[str, Any]) -> dict[str, Any]:
    """The columns of the table, in seconds, bytes and FLOP."""
    median, p20, p80 = quantiles(seconds)
    work = columns.get("flops") or columns.get("bytes")
    return {
        **columns,
        "median": median,
        "p20": p20,
        "p80": p80,
        "n": len(seconds),
        "rate": work / median if work else None,
        "share": work / median / columns["roof"] if work else None,
        "ratio": median / columns["baseline"],
    }


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON file that pytest-benchmark wrote."""
    stored = json.loads(Path(path).read_text())
    made = []
    for benchmark in stored["benchmarks"]:
        if "data" not in benchmark["stats"]:
            raise ValueError(f"{path}: holds no samples; write it with gptk bench --json")
        made.append(row(benchmark["stats"]["data"], benchmark["extra_info"]))
    return made


def show(rows: list[dict[str, Any]], before: dict[tuple[str, ...], float] | None = None) -> None:
    """Print the table; `before` holds earlier medians by key()."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in rows:
        groups[one["op"]].append(one)
    for op, members in groups.items():
        table = Table(title=op, title_justify="left", box=None, pad_edge=False)
        names = ["case", "dtype", "pass", "provider", "median", "p20", "p80", "n", "rate"]
        names += ["of roof", "host", "peak mem", "error", "time"]
        names += ["vs before"] if before else []
        for name in names:
            left = name in ("case", "dtype", "pass", "provider")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for one in members:
            table.add_row(*cells(one, before))
        console.print(table)
        for one in members:
            if one.get("parts"):
                console.print(parts_text(one), highlight=False)
        console.print()


def parts_text(one: dict[str, Any]) -> str:
    """Where the time of a training step goes: kernels of the extension, and all the rest."""
    parts = one["parts"]
    shares = {**parts["kernels"], "everything else": parts["rest"]}
    shown = ", ".join(
        f"{name} {seconds / parts['seconds']:.0%}"
        for name, seconds in sorted(shares.items(), key=lambda item: -item[1])
        if seconds >= 0.005 * parts["seconds"]
    )
    rest = time_text(parts["rest"])
    return (
        f"{one['case']}, {one['provider']}: {shown}. Everything else is {rest}: "
        f"{parts['kernel_calls']:.0f} kernel calls, {parts['operator_calls']:.0f} of PyTorch's "
        f"operators, {parts['allocations']} allocations."
    )


def key(one: dict[str, Any]) -> tuple[str, ...]:
    """What identifies a row between runs."""
    return tuple(str(one[name]) for name in ("op", "case", "dtype", "mode", "provider"))


def cells(one: dict[str, Any], before: dict[tuple[str, ...], float] | None) -> list[str]:
    """A row as text; where gptk is slower than PyTorch it is red, not left out."""
    error = one.get("error_ratio")
    slow = one["provider"].startswith("gptk") and one["ratio"] > 1.05
    ratio = f"{one['ratio']:.2f}x"
    made = [
        one["case"],
        one["dtype"],
        one["mode"],
        one["provider"],
        time_text(one["median"]),
        time_text(one["p20"]),
        time_text(one["p80"]),
        str(one["n"]),
        rate_text(one),
        f"{one['share']:.0%}" if one["share"] else "",
        time_text(one["host"]) if one.get("host") else "",
        f"{one['peak_bytes'] / 2**20:,.1f} MiB",
        "" if error is None or math.isnan(error) else f"{error:.2f}",
        f"[red]{ratio}[/red]" if slow else ratio,
    ]
    if before:
        old = before.get(key(one))
        made.append(f"{one['median'] / old:.2f}x" if old else "new")
    return made


def time_text(seconds: float) -> str:
    """Three digits with a unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def rate_text(one: dict[str, Any]) -> str:
    """Tokens/s, GFLOP/s or GB/s."""
    if one.get("tokens"):
        return f"{one['tokens'] / one['median']:,.0f} tok/s"
    if not one["rate"]:
        return ""
    return f"{one['rate'] / 1e9:,.0f} {'GFLOP/s' if one.get('flops') else 'GB/s'}"


# ---- pictures -------------------------------------------------------------------------------


def plot(rows: list[dict[str, Any]], folder: Path, title: str) -> list[Path]:
    """bars.png: time against PyTorch's; roofline.png: share of the machine's limit."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [_bars(rows, folder / "bars.png", title), _shares(rows, folder / "roofline.png", title)]


def _label(one: dict[str, Any]) -> str:
    mode = {"forward": "fwd", "forward+backward": "fwd+bwd"}.get(one["mode"], one["mode"])
    kind = {"float32": "", "bfloat16": " bf16"}.get(one["dtype"], one["dtype"])
    return f"{one['op']} {one['case']}{kind}, {mode}"


def _bars(rows: list[dict[str, Any]], path: Path, title: str) -> Path:
    import matplotlib.pyplot as plt

    ours = [r for r in rows if r["provider"].startswith("gptk")]
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(ours) + 1.2))
    places = range(len(ours))[::-1]
    colours = ["#2a6f97" if r["ratio"] <= 1 else "#c1666b" for r in ours]
    axes.barh(places, [r["ratio"] for r in ours], color=colours, height=0.7)
    for place, one in zip(places, ours, strict=True):
        axes.text(one["ratio"] + 0.02, place, f"{one['ratio']:.2f}", va="center", fontsize=7)
    axes.set_yticks(list(places), [f"{_label(r)} ({r['provider']})" for r in ours], fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time / time of PyTorch (shorter is better)")
    axes.set_title(title, fontsize=9, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def _shares(rows: list[dict[str, Any]], path: Path, title: str) -> Path:
    import matplotlib.pyplot as plt

    kept = [r for r in rows if r["share"]]
    labels = list(dict.fromkeys(_label(r) for r in kept))
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(labels) + 1.2))
    names = list(dict.fromkeys(r["provider"] for r in kept))
    palette = ["#8d99ae", "#2a6f97", "#e09f3e", "#6a994e", "#c1666b"]
    for name, colour in zip(names, palette * len(names), strict=False):
        points = [(r["share"], len(labels) - 1 - labels.index(_label(r)))
                  for r in kept if r["provider"] == name]  # fmt: skip
        shares, places = zip(*points, strict=True)
        axes.scatter(shares, places, label=name, color=colour, s=18)
    axes.set_yticks(range(len(labels)), labels[::-1], fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("share of the matrix-product peak or copy bandwidth of the same run")
    axes.legend(fontsize=7, frameon=False)
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path
