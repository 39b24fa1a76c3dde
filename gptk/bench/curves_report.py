"""What `gptk bench curves` makes of its rows: local exponents, tables, a picture."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptk.bench.providers import PYTORCH
from gptk.bench.report import time_text
from gptk.flags import UsageError

STEEPER = 0.15
"""An exponent that exceeds the op's own by more is shown in red; timings are not exact."""
COLOURS = {PYTORCH: "#6c757d", "gptk cpp": "#2a6f97"}
Stored = dict[str, Any]


def lines(stored: Stored, name: str) -> dict[str, list[dict[str, Any]]]:
    """Provider -> its rows of a curve, by size."""
    made: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(stored["rows"], key=lambda r: r["size"]):
        if row["curve"] == name:
            made.setdefault(row["provider"], []).append(row)
    return made


def exponent(rows: list[dict[str, Any]], column: str) -> float:
    """log(cost_b / cost_a) / log(size_b / size_a) of the last two rows; NaN without them."""
    if len(rows) < 2 or not rows[-2][column] or not rows[-1][column]:
        return math.nan
    a, b = rows[-2:]
    return math.log(b[column] / a[column]) / math.log(b["size"] / a["size"])


def growth(stored: Stored) -> list[dict[str, Any]]:
    """Per curve and provider, between its last two sizes: how cost grows, how the op's own does."""
    made = []
    for name, curve in stored["curves"].items():
        for provider, rows in lines(stored, name).items():
            sizes = " to ".join(f"{row['size']:,}" for row in rows[-2:])
            one = {"curve": name, "provider": provider, "sizes": f"{curve['axis']} {sizes}"}
            one |= {"time": exponent(rows, "median"), "memory": exponent(rows, "peak_bytes")}
            one |= {f"own_{cost}": curve[f"{cost}_power"] for cost in ("time", "memory")}
            made.append(one)
    return made


def read(path: Path) -> Stored:
    """A file of `gptk bench curves --json`."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        growth(stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: cannot be read as stored curves ({error})") from None
    return stored


def show(stored: Stored) -> None:
    """Print a table per curve, then how each grows, then what was left out."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for name, curve in stored["curves"].items():
        table = Table(title=curve["title"], title_justify="left", box=None, pad_edge=False)
        for column in (curve["axis"], "dtype", "provider", "median", "p20", "p80", "n", "peak mem",
                       "error", "time"):  # fmt: skip
            table.add_column(column, justify="left" if column in ("dtype", "provider") else "right")
        held = lines(stored, name)
        baseline = {row["size"]: row["median"] for row in held.get(PYTORCH, ())}
        rows = [row for members in held.values() for row in members]
        for row in sorted(rows, key=lambda r: r["size"]):
            table.add_row(*cells(row, baseline.get(row["size"])))
        console.print(table, "", sep="\n")
    table = Table(title="how cost grows", title_justify="left", box=None, pad_edge=False)
    for column in ("curve", "provider", "between", "time", "of the op", "memory", "of the op"):
        table.add_column(column)
    for one in growth(stored):
        powers = [text for cost in ("time", "memory") for text in _powers(one, cost)]
        table.add_row(one["curve"], one["provider"], one["sizes"], *powers)
    console.print(table)
    for line in (*stored["wrong"], *stored["left_out"]):
        console.print(line, markup=False)


def cells(row: dict[str, Any], baseline: float | None) -> list[str]:
    """A row as text; a provider slower than PyTorch is red."""
    ratio = f"{row['median'] / baseline:.2f}x" if baseline else ""
    slow = baseline is not None and row["median"] > 1.05 * baseline
    return [
        f"{row['size']:,}",
        row["dtype"],
        row["provider"],
        *(time_text(row[name]) for name in ("median", "p20", "p80")),
        str(row["n"]),
        f"{row['peak_bytes'] / 2**20:,.1f} MiB",
        "" if row["error_ratio"] is None else f"{row['error_ratio']:.2f}",
        f"[red]{ratio}[/red]" if slow else ratio,
    ]


def _powers(one: dict[str, Any], cost: str) -> tuple[str, str]:
    axis = one["sizes"].split()[0]
    power, own = one[cost], one[f"own_{cost}"]
    text = "" if math.isnan(power) else f"{axis}^{power:.2f}"
    return f"[red]{text}[/red]" if power > own + STEEPER else text, f"{axis}^{own}"


# ---- the picture ----------------------------------------------------------------------------


def plot(stored: Stored, folder: Path) -> Path:
    """curves.png: time above, peak memory below, both axes logarithmic, a column per curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in stored["curves"] if lines(stored, name)]
    figure, grid = plt.subplots(
        2, len(names), figsize=(3.4 * len(names) + 0.6, 6), sharex="col", squeeze=False
    )
    for column, name in enumerate(names):
        curve, held = stored["curves"][name], lines(stored, name)
        grid[0, column].set_title(curve["title"].replace(", ", "\n", 1), fontsize=9)
        grid[1, column].set_xlabel(curve["axis"])
        _panel(grid[0, column], held, curve["time_power"], lambda row: row["median"] * 1e3)
        _panel(grid[1, column], held, curve["memory_power"], lambda row: row["peak_bytes"] / 2**20)
    grid[0, 0].set_ylabel("time (ms)")
    grid[1, 0].set_ylabel("peak memory (MiB)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    facts = stored["facts"]
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in stored["rows"]))
    machine = f"{facts['device']}, {facts['isa']}, threads: {facts['threads']}"
    figure.suptitle(f"{dtypes} on {machine}, torch {facts['torch']}", fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path = folder / "curves.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _panel(
    axes: Any,
    held: dict[str, list[dict[str, Any]]],
    power: int,
    cost: Callable[[dict[str, Any]], float],
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for provider, rows in held.items():
        sizes, costs = [row["size"] for row in rows], [cost(row) for row in rows]
        colour = COLOURS.get(provider)
        axes.plot(sizes, costs, "o-", ms=3, lw=1.5, color=colour, label=provider)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high / 4), high)  # room for labelled ticks
    rows = held[next(iter(held))]
    sizes = [row["size"] for row in rows]
    own = [cost(rows[-1]) * (size / sizes[-1]) ** power for size in sizes]
    axes.plot(sizes, own, ":", lw=1, color="black", scaley=False, label="the op's own growth")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45, fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.25, lw=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
