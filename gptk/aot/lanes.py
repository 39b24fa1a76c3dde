"""Which accesses of global memory have an address of its own for each thread of a program.

A register differs between threads where it comes from the thread's index (SR_TID, SR_LANEID), from
memory at an address that differs, or from another register that differs. The rule is carried
through the graph to a fixed point. What is uniform by it is one address for the whole program: such
an access moves its bytes once, not once for each thread.
"""

import re
from collections.abc import Iterator

from gptk.aot.sass import Block, Graph, Instruction

GLOBAL = ("LDG", "STG", "LDGSTS")
REGISTER = re.compile(r"(?<![\w.])(R|P)(\d+)(\.64)?")
OF_A_THREAD = re.compile(r"SR_(TID|LANEID|\w\w_?MASK)")
PREDICATE = re.compile(r"!?U?P(?:T|\d+)$")
COMMA = re.compile(r",\s*(?![^\[]*\])")
WRITES_NOTHING = frozenset(
    "STG STS STL ST STSM RED BAR BRA EXIT NOP BSSY BSYNC BREAK DEPBAR LDGDEPBAR LDGSTS MEMBAR "
    "FENCE SYNCS WARPSYNC CALL RET WARPGROUP ARRIVES CCTL ERRBAR NANOSLEEP YIELD".split()
)
DOUBLES = frozenset(("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"))


def differing(graph: Graph) -> frozenset[tuple[int, int]]:
    """(block, place in it) of the accesses whose address differs between the threads."""
    entry: dict[int, int] = dict.fromkeys(graph.blocks, 0)
    pending = set(graph.blocks)
    while pending:
        at = min(pending)
        pending.remove(at)
        after = entry[at]
        for one in graph.blocks[at].code:
            after = step(one, after)
        for to in graph.blocks[at].next:
            if after & ~entry[to]:
                entry[to] |= after
                pending.add(to)
    return frozenset(
        (at, place)
        for at, block in graph.blocks.items()
        for place, one, state in _states(block, entry[at])
        if one.name in GLOBAL and _bits(_address(one)) & state
    )


def _states(block: Block, state: int) -> Iterator[tuple[int, Instruction, int]]:
    for place, one in enumerate(block.code):
        yield place, one, state
        state = step(one, state)


def _address(one: Instruction) -> str:
    """The global address among the operands: the last one in brackets."""
    return one.operands.rpartition("[")[2]


def _bits(text: str) -> int:
    """The registers and predicates of a text as bits: R0 is bit 0, P0 is bit 256."""
    bits = 0
    for kind, number, pair in REGISTER.findall(text):
        place = int(number) + (256 if kind == "P" else 0)
        bits |= (0b11 if pair else 1) << place
    return bits


def step(one: Instruction, state: int) -> int:
    """What differs after an instruction, `state` being what differs before it."""
    if one.name in WRITES_NOTHING:
        return state
    operands = COMMA.split(one.operands)
    count = 1
    while count < min(3, len(operands)) and PREDICATE.match(operands[count]):
        count += 1
    if one.name == "SHFL":  # its predicate comes first
        count = 2
    written = 0
    for operand in operands[:count]:
        for kind, number, _ in REGISTER.findall(operand):
            wide = (1 << _width(one)) - 1 if kind == "R" else 1
            written |= wide << (int(number) + (256 if kind == "P" else 0))
    read = _bits(" ".join([one.guard, *operands[count:]]))
    if read & state or OF_A_THREAD.search(one.operands) or one.name.startswith("ATOM"):
        return state | written
    return state if one.guard else state & ~written


def _width(one: Instruction) -> int:
    """32-bit registers that an instruction writes from its first operand on."""
    suffixes = one.opcode.split(".")
    if "128" in suffixes or one.name in ("HMMA", "DMMA", "IMMA"):
        return 4
    if one.name == "LDSM":
        return int(suffixes[-1]) if suffixes[-1].isdigit() else 1
    if "64" in suffixes or "WIDE" in suffixes or one.name in DOUBLES:
        return 2
    if one.name == "CS2R":
        return 1 if "32" in suffixes else 2
    return 2 if suffixes[:2] in (["F2F", "F64"], ["I2F", "F64"]) else 1
