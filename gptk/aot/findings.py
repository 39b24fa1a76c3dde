"""Why a kernel does more than it needs, or cannot come near a peak: the outliers, explained."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

OUTLIER = 1.1
"""A ratio of bytes or products above it has to be explained."""
FAR = 0.9
"""So has a bound that leaves less than this share of the memory's or of the products' peak."""


class Finding(NamedTuple):
    """Of a kernel's `bytes`, `products` or `bound`, in the cases whose names the pattern finds."""

    kernel: str
    of: str
    cases: str
    text: str


SHARED_ROWS = (
    "numbers that there is one of for each row (lse, delta, statistics) are asked for by every "
    "thread that holds the row; most are switched off or ask for the same sectors"
)
TWICE = (
    "eight warps share a tile that four fill, so the products whose result is not split over the "
    "head size (s, dp) and the exponential are computed twice; fewer warps or wider tiles would not"
)
FFMA = (
    "float32 products are exact, on FFMA (a tensor core would round to TF32): operands come from "
    "shared memory, and their addresses take instructions too"
)
PHILOX = (
    "a random word for each score: a quarter of the 20 wide products and 20 exclusive ors of "
    "Philox4x32-10, a comparison in 64 bits, and the words' way to the layout of the scores"
)

FINDINGS = (
    Finding("attention_delta_kernel", "bytes", "D 64 ", SHARED_ROWS),
    Finding("attention_dkdv_kernel", "bytes", "", SHARED_ROWS),
    Finding("attention_join_kernel", "bytes", "", SHARED_ROWS),
    Finding("layer_norm_columns_kernel", "bytes", "bf16", SHARED_ROWS),
    Finding(
        "layer_norm_forward_kernel",
        "bytes",
        "N 128 ",
        "several rows are in one program: weight and bias are asked for once for each (L1), and "
        + SHARED_ROWS,
    ),
    Finding(
        "layer_norm_forward_kernel",
        "bytes",
        "N 65536 ",
        "a row that does not fit the registers is swept three times: sum, deviations, output; the "
        "second and third reading come from L2 at best",
    ),
    Finding(
        "layer_norm_backward_kernel",
        "bytes",
        "N (65536|8192 residual)",
        "a row that does not fit the registers is swept twice: dy, h and weight are read again (dy "
        "and h a third time, by layer_norm_columns_kernel)",
    ),
    Finding(
        "layer_norm_backward_kernel",
        "bytes",
        "",
        "the weight is loaded again for each tile of rows, from L1 or L2; held in registers it "
        "would be loaded once",
    ),
    Finding(
        "cross_entropy_backward_kernel",
        "bytes",
        "fp32",
        "RESWEEP: for float32 gradients the row is read once more for its largest logit and its "
        "sum, since exp(z - lse) is not exact enough; mostly from L2",
    ),
    Finding("attention_dkdv_kernel", "products", "D (256|128 causal dropout) ?", TWICE),
    Finding(
        "attention_part_kernel",
        "products",
        "decode",
        "the queries of one step, one for each head of the group, are padded to the 64 rows of a "
        "wgmma, and two warpgroups share these: s is computed twice; memory is still the bound",
    ),
    *(
        Finding(f"attention_{name}_kernel", "bound", cases, text)
        for cases, text in (
            ("fp32", FFMA),
            ("dropout", PHILOX),
        )
        for name in ("forward", "dq", "dkdv")
    ),
    Finding("attention_dkdv_kernel", "bound", "D 256 (?!causal dropout)", TWICE),
    Finding(
        "attention_forward_kernel",
        "bound",
        "D 64 ",
        "10 instructions for a score (a multiply-add and MUFU for its exponential, the largest, "
        "the sum, the conversion) against 256 operations of its products: MUFU alone takes as "
        "long as these",
    ),
    Finding(
        "attention_join_kernel",
        "bound",
        "",
        "64 parts are held where a quarter is there, and a program has one row: small in all",
    ),
    Finding(
        "layer_norm_forward_kernel",
        "bound",
        "N 768 ",
        "a quarter of the 1024 lanes is switched off, yet takes instructions",
    ),
    Finding("gelu_forward_kernel", "bound", "none (bf16|fp16)", "erf takes 42 instructions"),
    Finding(
        "cross_entropy_forward_kernel",
        "bound",
        "V 256 bf16",
        "a row gives a thread two logits: two reductions over the program bound it",
    ),
    *(
        Finding(
            f"cross_entropy_{name}_kernel",
            "bound",
            "softcap",
            "tanh and its slope without cancellation: an exponential, a reciprocal, a continued "
            "fraction",
        )
        for name in ("forward", "backward")
    ),
    Finding(
        "norm_partial_kernel",
        "bound",
        "bf16",
        "a thread has eight numbers: finding the tensor and adding up take more than squaring",
    ),
)


def outliers(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """(row, "bytes" or "products") above OUTLIER times the need, (row, "bound") below FAR."""
    names = ("bytes", "products")
    found = [(row, of) for row in rows for of in names if (row[f"{of}_ratio"] or 0) > OUTLIER]
    return found + [(row, "bound") for row in rows if row["at_most"] < FAR]


def finding(row: dict[str, Any], of: str) -> Finding | None:
    """What is known of an outlier."""
    for one in FINDINGS:
        if (one.kernel, one.of) == (row["kernel"], of) and re.search(one.cases, row["case"]):
            return one
    return None


def explained(rows: Sequence[dict[str, Any]]) -> dict[Finding, list[dict[str, Any]]]:
    """The findings that apply to these rows, with their rows."""
    found: dict[Finding, list[dict[str, Any]]] = {}
    for row, of in outliers(rows):
        known = finding(row, of)
        if known is not None:
            found.setdefault(known, []).append(row)
    return found
