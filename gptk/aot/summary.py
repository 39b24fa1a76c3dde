"""One line for each kernel and dtype, from the stored table: its worst shipping case per GPU."""

from typing import Any

from gptk.aot.cubin import TENSOR

Row = dict[str, Any]
HEAD = "Registers per thread, occupancy and tensor-core instructions of every Triton kernel"


def dtype_of(row: Row) -> str:
    """fp32, bf16 or fp16: the last word of a case's name."""
    return str(row["case"].rpartition(" ")[2])


def worst(rows: list[Row]) -> Row:
    """The row of the lowest occupancy, then of the most registers."""
    return min(rows, key=lambda row: (row["occupancy"], -row["registers"]))


def cell(rows: list[Row]) -> str:
    """`168 regs, 25%, wgmma` for the worst of a kernel's rows for one GPU."""
    row = worst(rows)
    kinds = [kind for kind in TENSOR if row[kind]]
    return ", ".join([f"{row['registers']} regs", f"{row['occupancy']:.0%}", *kinds])


def table(stored: dict[str, Any]) -> str:
    """The Markdown table; dtypes with the same numbers share a line."""
    archs = list(dict.fromkeys(row["arch"] for row in stored["rows"]))
    groups: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in stored["rows"]:
        kind = (row["kernel"].removesuffix("_kernel"), dtype_of(row))
        groups.setdefault(kind, {}).setdefault(row["arch"], []).append(row)
    lines: dict[tuple[str, ...], list[str]] = {}
    for (kernel, dtype), by_arch in groups.items():
        cells = (cell(by_arch[arch]) if arch in by_arch else "-" for arch in archs)
        lines.setdefault((kernel, *cells), []).append(dtype)
    head = ["kernel", "dtype", *(f"sm_{arch}" for arch in archs)]
    order = list(dict.fromkeys(kernel for kernel, _ in groups))
    body = [
        [f"`{one[0]}`", " ".join(lines[one]), *one[1:]]
        for one in sorted(lines, key=lambda one: order.index(one[0]))
    ]
    text = "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *body])
    spilling = sum(1 for row in stored["rows"] if row["spills"])
    return (
        f"{HEAD}, each at its worst shipping case, compiled by Triton {stored['triton']} without "
        f"a GPU; {spilling} of {len(stored['rows'])} spill.\n\n{text}"
    )
