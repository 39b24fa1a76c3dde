"""SASS as a graph: instructions, basic blocks, loops, and the heaviest way through.

What `nvdisasm -c` prints is parsed line by line. A loop is a natural one: the blocks from which a
branch back to a block that dominates them can be reached. Code that is reached by CALL alone (the
slow paths of division and square root) and by BRA.DIV (warps that have diverged) is left out.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.?[\w$.]+):\s*$")
TARGET = re.compile(r"`\((\.?[\w$.]+)\)")
WEIGHT = tuple[int, ...]


class Instruction(NamedTuple):
    """One instruction; `opcode` with its suffixes, `guard` as printed ("!P0") or ""."""

    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


class Block(NamedTuple):
    """Instructions without a branch but the last, and the blocks that may come next."""

    code: tuple[Instruction, ...]
    next: tuple[int, ...]


class Graph(NamedTuple):
    """The blocks that can be reached from the first, which is entered first."""

    blocks: dict[int, Block]
    loops: dict[int, frozenset[int]]  # header -> the blocks of its loop, itself included

    def innermost(self) -> list[frozenset[int]]:
        """Loops that hold no other loop, in the order of the code; those in which a thread only
        waits for a copy or a product (a barrier is tried again) do not count."""
        working = {
            header: body
            for header, body in self.loops.items()
            if not any("TRYWAIT" in one.opcode for one in self.blocks[header].code) or len(body) > 1
        }
        return [
            body
            for header, body in sorted(working.items())
            if not any(other in body for other in working if other != header)
        ]

    def code(self, blocks: Iterable[int]) -> list[Instruction]:
        return [one for block in sorted(blocks) for one in self.blocks[block].code]


def parse(text: str) -> Graph:
    """The graph of the first function in the text, which for a Triton cubin is the kernel.

    Raises:
        ValueError: no instruction, or a branch whose target only the GPU knows.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := LINE.match(line):
            code.append(Instruction(found[2] or "", found[3], found[4]))
    if not code:
        raise ValueError("no SASS instruction in the text")
    ends = [_after(code, at, labels) for at in range(len(code))]
    starts = {0} | {to for end in ends if end is not None for to in end}
    starts |= {at + 1 for at, end in enumerate(ends) if end is not None}
    blocks: dict[int, Block] = {}
    pending = [0]
    while pending:
        start = pending.pop()
        if start in blocks or start >= len(code):
            continue
        at = start
        while ends[at] is None and at + 1 not in starts and at + 1 < len(code):
            at += 1
        after = ends[at]
        following = (at + 1,) if after is None else after
        following = tuple(to for to in following if to < len(code))
        blocks[start] = Block(tuple(code[start : at + 1]), following)
        pending += following
    return Graph(blocks, _loops(blocks))


def _after(code: Sequence[Instruction], at: int, labels: dict[str, int]) -> tuple[int, ...] | None:
    """Where control may go after instruction `at`; None: on to the next, which starts no block."""
    one = code[at]
    if one.name in ("BRX", "JMX", "BRXU", "JMXU"):
        raise ValueError(f"a branch to an address that is computed: {one.opcode} {one.operands}")
    if one.name in ("EXIT", "RET"):
        return (at + 1,) if one.guard else ()
    if one.name not in ("BRA", "JMP") or one.opcode.startswith("BRA.DIV"):
        return None
    target = TARGET.search(one.operands)
    if target is None:
        raise ValueError(f"a branch without a target: {one.operands}")
    to = labels[target[1]]
    conditional = one.guard or not one.operands.startswith("`")
    return (to, at + 1) if conditional else (to,)


def _loops(blocks: dict[int, Block]) -> dict[int, frozenset[int]]:
    before: dict[int, list[int]] = {at: [] for at in blocks}
    for at, block in blocks.items():
        for to in block.next:
            before[to].append(at)
    above = {at: set(blocks) for at in blocks} | {0: {0}}  # the dominators of each
    changed = True
    while changed:
        changed = False
        for at in sorted(blocks)[1:]:
            found = {at} | set.intersection(*(above[b] for b in before[at]))
            changed |= found != above[at]
            above[at] = found
    loops: dict[int, set[int]] = {}
    for at, block in blocks.items():
        for header in block.next:
            if header in above[at]:
                body = loops.setdefault(header, {header})
                pending = [at]
                while pending:
                    inside = pending.pop()
                    if inside not in body:
                        body.add(inside)
                        pending += before[inside]
    return {header: frozenset(body) for header, body in loops.items()}


def heaviest(
    graph: Graph, weigh: Callable[[Block], WEIGHT], within: frozenset[int] | None = None
) -> list[int]:
    """The blocks of the way with the largest weight from the first block to an exit, each loop
    passed once; `within` a loop: once around it. Weights add up and are compared in order."""
    inside = frozenset(graph.blocks) if within is None else within
    first = min(graph.blocks) if within is None else _header(graph, within)
    exits = {
        header: tuple({to for at in body for to in graph.blocks[at].next if to not in body})
        for header, body in graph.loops.items()
    }
    best: dict[int, tuple[WEIGHT, list[int]] | None] = {}

    def onward(at: int) -> list[int]:
        found, pending = set[int](), list(graph.blocks[at].next)
        while pending:
            to = pending.pop()
            if to not in graph.loops or at not in graph.loops[to]:
                found.add(to)
            elif to != first or within is None:  # a branch back: on to where the loop leads
                pending += exits[to]
        return sorted(found & inside)

    def is_end(at: int) -> bool:
        block = graph.blocks[at]
        if within is not None:
            return first in block.next
        return block.code[-1].name in ("EXIT", "RET")

    stack = [first]
    while stack:
        at = stack[-1]
        todo = [to for to in onward(at) if to not in best]
        if todo:
            stack += todo
            continue
        stack.pop()
        own = weigh(graph.blocks[at])
        ways = [way for to in onward(at) if (way := best[to]) is not None]
        if is_end(at):
            ways.append((tuple(0 for _ in own), []))
        if ways:
            weight, rest = max(ways, key=lambda way: way[0])
            best[at] = tuple(a + b for a, b in zip(own, weight, strict=True)), [at, *rest]
        else:
            best[at] = None
    way = best[first]
    if way is None:
        raise ValueError("no way through the code ends")
    return way[1]


def _header(graph: Graph, body: frozenset[int]) -> int:
    return next(header for header, blocks in graph.loops.items() if blocks == body)
