"""The points of a sweep: a method at one lambda, one F and one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Method = Literal["crosscoder", "sae", "chain"]
Baseline = Literal["sae", "chain"]
METHODS: tuple[Method, ...] = ("crosscoder", "sae", "chain")


@dataclass(frozen=True)
class Point:
    """One training of a sweep (for the chain: one for each snapshot)."""

    method: Method
    n_features: int
    """F."""
    sparsity: float
    """lambda."""
    seed: int

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.method}-F{self.n_features}-lambda{self.sparsity!r}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.method}, F {self.n_features:,}, lambda {self.sparsity:g}, seed {self.seed}"


def grid(
    methods: Sequence[Method], n_features: Sequence[int], sparsity: Sequence[float], seeds: Sequence[int]
) -> list[Point]:
    """Every combination once; the methods of one (seed, F, lambda) follow each other."""
    points = (
        Point(method, F, float(coefficient), seed)
        for seed in seeds
        for F in n_features
        for coefficient in sparsity
        for method in methods
    )
    return list(dict.fromkeys(points))
