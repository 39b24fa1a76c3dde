"""The table of README.md that says which op runs where, made from gptk/ops/catalog.py.

python docs/support_table.py            prints it
python docs/support_table.py --write    puts it between the markers of README.md
"""

import sys
from pathlib import Path

from gptk.ops.catalog import BACKENDS, OPS, ROWS

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- support table: python docs/support_table.py --write -->\n"
END = "<!-- end of support table -->\n"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def cell(op: str, backend: str) -> str:
    row = ROWS.get((op, backend))
    if row is None:
        return "-"
    devices = ", ".join(row.devices) or "any device"
    dtypes = " ".join(SHORT[name] for name in row.dtypes)
    return f"{devices}: {dtypes}{' (mm)' if row.vendor else ''}"


def table() -> str:
    lines = [f"| op | {' | '.join(BACKENDS)} |", "|---" * (len(BACKENDS) + 1) + "|"]
    lines += [f"| `{op}` | {' | '.join(cell(op, name) for name in BACKENDS)} |" for op in OPS]
    notes = sorted({row.vendor for row in ROWS.values() if row.vendor})
    if notes:
        lines += ["", f"(mm): {'; '.join(notes)}."]
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """The text of README.md with the table between its markers made anew."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(with_table(README.read_text("utf-8")), "utf-8")
    else:
        print(table(), end="")
