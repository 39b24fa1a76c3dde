"""What a kernel's SASS does in one unit of work: bytes, products, arithmetic, instructions."""

import collections
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gptk.aot.lanes import GLOBAL, differing
from gptk.aot.sass import Block, Graph, Instruction, heaviest

FP32 = {"FADD": 1, "FMUL": 1, "FFMA": 1, "FADD2": 2, "FMUL2": 2, "FFMA2": 2}
"""Arithmetic instructions -> numbers that each makes; FFMA2 is sm_100's, of two lanes."""
FP64 = frozenset(("DADD", "DMUL", "DFMA"))
CONVERSIONS = frozenset(("F2F", "F2FP", "F2I", "I2F", "I2FP", "F2IP"))
SHARED = frozenset(("LDS", "LDSM", "STS", "STSM"))
BULK = frozenset(("UTMALDG", "UTMASTG", "UBLKCP"))
"""Copies by a descriptor, which do not say how much they copy."""
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "884": (8, 8, 4)}
KINDS = (
    *("instructions", "fp32", "fma", "fp64", "mufu", "conversions"),
    *("shared", "shuffles", "bulk"),
)


class Work(NamedTuple):
    """Of one unit: bytes and operations of the whole program, instructions of one warp."""

    loaded: int
    stored: int
    products: int  # operations of tensor-core instructions
    counts: dict[str, int]  # of KINDS


def width(one: Instruction) -> int:
    """Bytes that one thread moves."""
    return next((WIDTHS[part] for part in one.opcode.split(".") if part in WIDTHS), 4)


def tensor_operations(one: Instruction) -> int:
    """Operations of one warp's tensor-core instruction, or of one warpgroup's (HGMMA).

    Raises:
        ValueError: the opcode does not say the shape (tcgen05).
    """
    if not re.fullmatch(r"[HIDQB]?G?MMA|UTC\w*MMA", one.name):
        return 0
    for part in one.opcode.split(".")[1:]:
        if named := re.fullmatch(r"(\d+)x(\d+)x(\d+)", part):
            return 2 * int(named[1]) * int(named[2]) * int(named[3])
        if part in SHAPES:
            m, n, k = SHAPES[part]
            return 2 * m * n * k
    raise ValueError(f"{one.opcode} does not say its shape")


def count(graph: Graph, blocks: Sequence[int], warps: int, own: frozenset[tuple[int, int]]) -> Work:
    """The work of passing the blocks once; `own`: the accesses with an address for each thread.

    Raises:
        ValueError: an instruction that does not say how much it multiplies.
    """
    moved = collections.Counter[str]()
    counts = dict.fromkeys(KINDS, 0)
    products = 0
    for at in blocks:
        for place, one in enumerate(graph.blocks[at].code):
            if one.name in GLOBAL:
                threads = 32 * warps if (at, place) in own else 1
                moved["store" if one.name == "STG" else "load"] += width(one) * threads
            groups = warps // 4 if one.name.endswith("GMMA") else warps
            products += tensor_operations(one) * groups
            counts["instructions"] += one.name != "NOP"
            counts["fp32"] += FP32.get(one.name, 0)
            counts["fma"] += FP32.get(one.name, 0) if one.name.startswith("FFMA") else 0
            counts["fp64"] += one.name in FP64
            counts["mufu"] += one.name == "MUFU"
            counts["conversions"] += one.name in CONVERSIONS or one.opcode.startswith("HADD2.F32")
            counts["shared"] += one.name in SHARED
            counts["shuffles"] += one.name == "SHFL"
            counts["bulk"] += one.name in BULK
    return Work(moved["load"], moved["store"], products, counts)


def unit_work(graph: Graph, unit: str, warps: int, step: int = 0) -> Work:
    """The work of one unit, by its name in a Need; `step`: by how much the counter of a loop grows
    in one iteration of the source.

    Raises:
        ValueError: as count; or no loop moves or multiplies anything.
    """
    own = differing(graph)
    weigh = _weigher(graph, warps, own)
    way = heaviest(graph, weigh)
    if unit == "program":
        return count(graph, way, warps, own)
    found = []
    for body in graph.innermost():
        if body & set(way):
            once = heaviest(graph, weigh, body)
            times = unrolled(graph.code(once), step)
            found.append(_divided(count(graph, once, warps, own), times))
    least = 32 * warps  # less are single numbers, such as a search in a table
    found = [
        one
        for one in found
        if one.loaded + one.stored >= least or one.products or one.counts["bulk"]
    ]
    if not found:
        raise ValueError("no loop moves or multiplies anything")
    if unit == "loop":
        return max(found, key=lambda one: (one.products, one.loaded + one.stored))
    return Work(
        sum(one.loaded for one in found),
        sum(one.stored for one in found),
        sum(one.products for one in found),
        {kind: sum(one.counts[kind] for one in found) for kind in KINDS},
    )


def _weigher(
    graph: Graph, warps: int, own: frozenset[tuple[int, int]]
) -> Callable[[Block], tuple[int, ...]]:
    """The weight of a block on a way: products, then bytes, then fewer instructions."""
    weights = {}
    for at, block in graph.blocks.items():
        work = count(graph, [at], warps, own)
        weights[id(block)] = (
            work.products,
            work.loaded + work.stored,
            -work.counts["instructions"],
        )
    return lambda block: weights[id(block)]


def _divided(work: Work, times: int) -> Work:
    counts = {kind: number // times for kind, number in work.counts.items()}
    return Work(work.loaded // times, work.stored // times, work.products // times, counts)


SELF = re.compile(r"(U?R\d+), (?:U?P\w+, )?\1, (0x[0-9a-f]+)(?:, U?RZ)?$")


def unrolled(code: Sequence[Instruction], step: int) -> int:
    """How many iterations of the source one of the code holds: by how much its counter grows."""
    for one in code:
        grown = SELF.match(one.operands)
        if step and grown and one.name in ("IADD3", "VIADD", "UIADD3"):
            size = int(grown[2], 16)
            if size and size % step == 0:
                return size // step
    return 1
