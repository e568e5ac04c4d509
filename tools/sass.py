"""What a GPU's machine code does: its instructions and its loops, from `cuobjdump -sass`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9]*)([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Program:
    """One kernel."""

    addresses: tuple[int, ...]
    """Of its instructions, without what pads the end."""
    names: Counter[str]
    """How often each instruction occurs, by its name before the first dot."""
    loops: tuple[tuple[int, int], ...]
    """(first, last) address of each loop: a jump back, and where it goes."""

    @classmethod
    def parse(cls, text: str) -> Program:
        """From the disassembly of one kernel."""
        found = [(int(at, 16), name, rest) for at, name, rest in _LINE.findall(text)]
        loops, kept = [], []
        for at, name, rest in found:
            target = _TARGET.search(rest) if name == "BRA" else None
            to = int(target[1], 16) if target else at + 1
            if name != "NOP" and to != at:  # a jump to itself ends the code
                kept.append((at, name))
            if to < at:
                loops.append((to, at))
        return cls(tuple(at for at, _ in kept), Counter(name for _, name in kept), tuple(loops))

    def _count(self, loop: tuple[int, int]) -> int:
        return sum(loop[0] <= at <= loop[1] for at in self.addresses)

    def outermost(self) -> list[tuple[int, int]]:
        """The loops that are in no other."""
        return [loop for loop in self.loops if not any(_within(loop, other) for other in self.loops)]

    def inside(self, outer: tuple[int, int]) -> list[tuple[int, int]]:
        """The outermost loops within `outer`."""
        found = [loop for loop in self.loops if _within(loop, outer)]
        return [loop for loop in found if not any(_within(loop, other) for other in found)]

    def straight(self) -> int:
        """Instructions outside all loops."""
        return len(self.addresses) - sum(map(self._count, self.outermost()))

    def body(self, loop: tuple[int, int]) -> int:
        """Instructions of one turn of a loop, without the loops in it."""
        return self._count(loop) - sum(map(self._count, self.inside(loop)))


def _within(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return loop != other and other[0] <= loop[0] and loop[1] <= other[1]
