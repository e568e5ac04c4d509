"""Which rows of an epoch go to which rank, B at a step; plain integers, no data.

An epoch is a row of windows, each a number of rows in a fixed order. A rank takes a whole window at a time and cuts
batches from it; when no window is left, it takes rows from the end of what another rank still holds. What is left can
be dealt to another number of ranks at any step: every row is dealt exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Piece = tuple[int, int, int]
"""Rows `begin` to `end` of a window: (window, begin, end)."""


@dataclass
class Dealer:
    """The state of an epoch: what each rank holds, and what nobody holds yet."""

    window_rows: Sequence[int]
    """Rows of each window of the epoch."""
    world_size: int
    next_window: int = 0
    """Windows from this one on are untouched."""
    loose: list[Piece] = field(default_factory=list)
    """Pieces of begun windows that go out before whole ones: what another number of ranks held."""
    held: list[list[Piece]] = field(default_factory=list)
    """For each rank its pieces, in order."""

    def __post_init__(self) -> None:
        if not self.held:
            self.held = [[] for _ in range(self.world_size)]
        untouched = sum(self.window_rows[self.next_window :])
        self.remaining = untouched + sum(e - b for pieces in (self.loose, *self.held) for _, b, e in pieces)
        """Rows that have not been dealt."""

    def copy(self) -> Dealer:
        held = [list(pieces) for pieces in self.held]
        return Dealer(self.window_rows, self.world_size, self.next_window, list(self.loose), held)

    def step(self, rows: Sequence[int]) -> list[list[Piece]]:
        """Deal `rows[r]` rows to each rank r: in all at least one, or an epoch would never end, at most `remaining`."""
        if not 0 < sum(rows) <= self.remaining or min(rows) < 0:
            raise ValueError(f"a step of {list(rows)} rows cannot be dealt from {self.remaining}")
        self.remaining -= sum(rows)
        return [self._draw(rank, count) for rank, count in enumerate(rows)]

    def holds(self, rank: int, window: int) -> bool:
        return any(piece[0] == window for piece in self.held[rank])

    def _draw(self, rank: int, count: int) -> list[Piece]:
        dealt: list[Piece] = []
        mine = self.held[rank]
        while count > 0:
            if not mine:
                if self.loose:
                    mine.append(self.loose.pop(0))
                elif self.next_window < len(self.window_rows):
                    mine.append((self.next_window, 0, self.window_rows[self.next_window]))
                    self.next_window += 1
                else:
                    dealt.append(self._take_over(count))
                    count -= dealt[-1][2] - dealt[-1][1]
                continue
            window, begin, end = mine[0]
            cut = min(begin + count, end)
            dealt.append((window, begin, cut))
            count -= cut - begin
            if cut == end:
                mine.pop(0)
            else:
                mine[0] = (window, cut, end)
        return dealt

    def _take_over(self, count: int) -> Piece:
        """At most `count` rows from the end of the largest piece that any rank holds."""
        size, rank, place = max(
            (end - begin, -rank, place)
            for rank, pieces in enumerate(self.held)
            for place, (_, begin, end) in enumerate(pieces)
        )
        pieces = self.held[-rank]
        window, begin, end = pieces[place]
        cut = end - min(count, size)
        if cut == begin:
            pieces.pop(place)
        else:
            pieces[place] = (window, begin, cut)
        return window, cut, end

    def state_dict(self) -> dict[str, Any]:
        """A few numbers a rank, the same on all ranks."""
        held = [[list(piece) for piece in pieces] for pieces in self.held]
        return {"next_window": self.next_window, "loose": [list(piece) for piece in self.loose], "held": held}

    @classmethod
    def restore(cls, window_rows: Sequence[int], world_size: int, state: dict[str, Any]) -> Dealer:
        """Go on from `state`, of any number of ranks."""
        held = [[(int(w), int(b), int(e)) for w, b, e in pieces] for pieces in state["held"]]
        loose = [(int(w), int(b), int(e)) for w, b, e in state["loose"]]
        if len(held) != world_size:
            loose = [piece for pieces in held for piece in pieces] + loose
            held = []
        return cls(window_rows, world_size, int(state["next_window"]), loose, held)
