# SPDX-License-Identifier: Apache-2.0
"""The main loop of a kernel in its SASS (as nvdisasm prints it), and what it spends.

Loops are natural loops: the blocks from which a jump back to a block that dominates them is
reached. So code that ptxas moves out of line (waiting for a barrier) belongs to its loop.
"""

import heapq
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Matrix products, then what stands in for them in float32; the first one found is the kernel's.
PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "FFMA")
_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)([^;]*);")
_LABEL = re.compile(r"^([.$]\S+):")
_TARGET = re.compile(r"`\(([^)]+)\)")


@dataclass(frozen=True)
class Loop:
    """opcodes: of all instructions, by name up to the first dot. shortest: the number of
    instructions of the shortest way round, which leaves out what seldom runs."""

    opcodes: Counter
    shortest: int

    @property
    def length(self) -> int:
        return self.opcodes.total()


@dataclass
class _Block:
    opcodes: list[str]
    next: list[int]


def _blocks(sass: str) -> list[_Block]:
    """Basic blocks of the first function, in order."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, bool]] = []  # (opcode, target of a jump, may go on)
    for text in sass.splitlines():
        if label := _LABEL.match(text):
            labels[label[1]] = len(lines)
        elif found := _LINE.match(text):
            guard, opcode, rest = found.groups()
            target = _TARGET.search(rest) if opcode in ("BRA", "JMP") else None
            # A register decides on `BRA.U UP0, label` as well as on `@P0 BRA label`.
            perhaps = guard or (target and "," in rest[: target.start()])
            ends = opcode in ("BRA", "JMP", "BRX", "EXIT", "RET", "KILL")
            lines.append((opcode, target[1] if target else "", bool(perhaps or not ends)))
    starts = {0, *labels.values()}
    starts |= {i + 1 for i, (_, target, on) in enumerate(lines) if target or not on}
    order = sorted(start for start in starts if start < len(lines))
    number = {start: index for index, start in enumerate(order)}
    blocks = []
    for index, start in enumerate(order):
        stop = order[index + 1] if index + 1 < len(order) else len(lines)
        _, target, on = lines[stop - 1]
        following = [index + 1] if on and stop < len(lines) else []
        if target and labels.get(target, len(lines)) < len(lines):
            following.append(number[labels[target]])
        blocks.append(_Block([opcode for opcode, _, _ in lines[start:stop]], following))
    return blocks


def _loops(blocks: list[_Block]) -> dict[int, set[int]]:
    """Header -> blocks of its loop."""
    before: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for after in block.next:
            before[after].append(index)
    # Sets of blocks as bits. What no jump reaches is dominated by everything.
    every = (1 << len(blocks)) - 1
    dominators = [1] + [every] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for index in range(1, len(blocks)):
            common = every
            for earlier in before[index]:
                common &= dominators[earlier]
            common |= 1 << index
            changed |= common != dominators[index]
            dominators[index] = common
    loops: dict[int, set[int]] = {}
    for index, block in enumerate(blocks):
        for header in block.next:
            if dominators[index] != every and dominators[index] >> header & 1:
                body = loops.setdefault(header, {header})
                waiting = [index]
                while waiting:
                    found = waiting.pop()
                    if found not in body:
                        body.add(found)
                        waiting += before[found]
    return loops


def _shortest(blocks: list[_Block], header: int, body: set[int]) -> int:
    """Instructions of the shortest way from the header back to it."""
    ways = [(len(blocks[header].opcodes), header)]
    best: dict[int, int] = {}
    while ways:
        length, index = heapq.heappop(ways)
        if index in best:
            continue
        best[index] = length
        for after in blocks[index].next:
            if after == header:
                return length
            if after in body:
                heapq.heappush(ways, (length + len(blocks[after].opcodes), after))
    raise AssertionError("the header is not reached again")


def main_loop(sass: str) -> Loop:
    """The innermost loop with the matrix products; of several, and where there are no products, the
    one with the most instructions; without any loop the whole kernel."""
    blocks = _blocks(sass)
    loops = _loops(blocks)

    def count(body: Iterable[int]) -> Counter:
        return Counter(name for index in body for name in blocks[index].opcodes)

    whole = count(range(len(blocks)))
    opcodes = {header: count(body) for header, body in loops.items()}
    product = next((name for name in PRODUCTS if whole[name]), None)
    candidates = [header for header in loops if product and opcodes[header][product]] or list(loops)
    candidates = [
        header
        for header in candidates
        if not any(other != header and other in loops[header] for other in candidates)
    ]
    # `BRA` to itself: the padding after a kernel's end is no loop of it.
    candidates = [header for header in candidates if opcodes[header].total() > 1]
    if not candidates:
        return Loop(whole, whole.total())
    header = max(candidates, key=lambda header: opcodes[header].total())
    return Loop(opcodes[header], _shortest(blocks, header, loops[header]))
