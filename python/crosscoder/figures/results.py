"""What a page is made from and what it is made of: results by type, and what each adds to the page.

Letters: K snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from crosscoder.figures.table import Column, FigureTable, plain_column

R = TypeVar("R")


class Results:
    """The results of a run as far as it has them, one of a type."""

    def __init__(self, steps: Iterable[int], found: Iterable[object]) -> None:
        """`steps`: (K,) training step of each snapshot."""
        self.steps = np.asarray(steps)
        self._found = {type(one): one for one in found}

    def of(self, kind: type[R]) -> R | None:
        """The result of that type, or None."""
        found = self._found.get(kind)
        assert found is None or isinstance(found, kind)
        return found

    @property
    def by_snapshot(self) -> dict[str, Column]:
        """The columns that every table over snapshots begins with."""
        return {"snapshot": list(range(len(self.steps))), "step": plain_column(self.steps)}


@dataclass(frozen=True)
class Fact:
    """One tile of the summary, for example ("Explained variance", "0.941", "mean over tokens ...")."""

    label: str
    value: str
    """The value as it is to be read, with its unit."""
    explanation: str
    """One line: what was computed, on what."""


Maker = Callable[[R, Results], FigureTable | None]
"""A figure of a result; None where it, or the other results, lack what the figure shows."""
Words = Callable[[R, Results], str | Iterable[str]]
"""A sentence or two, or "" where there is nothing to say; several such where there are several results of a kind."""


@dataclass(frozen=True)
class Part(Generic[R]):
    """What a result adds to the page. One whose result is not there adds nothing."""

    of: type[R] | R
    """The result, or its type where a page has one of it at the most."""
    section: str
    """The heading that its figures stand under. Parts of one section stand together, where the first of them is."""
    figures: tuple[Maker[R], ...] = ()
    sentences: tuple[Words[R], ...] = ()
    """What was found. They stand at the head of the page, and again at the head of the section."""
    facts: Callable[[R, Results], list[Fact]] | None = None
    """Tiles of the summary."""
    notes: tuple[Words[R], ...] = ()
    """What a reader must know to judge the figures."""

    def _result(self, results: Results) -> R | None:
        return results.of(self.of) if isinstance(self.of, type) else self.of

    def tables(self, results: Results) -> list[FigureTable]:
        """The figures that the results have the numbers for."""
        result = self._result(results)
        made = () if result is None else (make(result, results) for make in self.figures)
        return [replace(table, section=self.section) for table in made if table is not None]

    def tiles(self, results: Results) -> list[Fact]:
        """Its facts."""
        result = self._result(results)
        return [] if result is None or self.facts is None else self.facts(result, results)

    def found(self, results: Results) -> list[str]:
        """Its sentences."""
        return self._said(self.sentences, results)

    def caveats(self, results: Results) -> list[str]:
        """Its notes."""
        return self._said(self.notes, results)

    def _said(self, words: Iterable[Words[R]], results: Results) -> list[str]:
        result = self._result(results)
        said = () if result is None else (speak(result, results) for speak in words)
        return [one for some in said for one in ([some] if isinstance(some, str) else some) if one]
