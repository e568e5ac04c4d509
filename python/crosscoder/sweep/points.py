"""The points of a sweep: a method at one lambda, F, learning rate and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Method = Literal["crosscoder", "sae", "chain"]
Baseline = Literal["sae", "chain"]
METHODS: tuple[Method, ...] = ("crosscoder", "sae", "chain")
LABELS = {"crosscoder": "crosscoder", "sae": "SAE on the last snapshot", "chain": "chain of SAEs"}
"""What figures call them."""


@dataclass(frozen=True)
class Point:
    """One training of a sweep (for the chain: one for each snapshot)."""

    method: Method
    n_features: int
    """F."""
    sparsity: float
    """lambda."""
    lr: float
    """Adam's learning rate."""
    seed: int

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.method}-F{self.n_features}-lambda{self.sparsity!r}-lr{self.lr!r}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.method}, F {self.n_features:,}, lambda {self.sparsity:g}, lr {self.lr:g}, seed {self.seed}"


def grid(
    rates: Mapping[Method, Sequence[float]], n_features: Sequence[int], sparsity: Sequence[float], seeds: Sequence[int]
) -> list[Point]:
    """Every combination once, each method with its learning rates; the methods of one (seed, F, lambda) follow each
    other."""
    points = (
        Point(method, F, float(coefficient), float(lr), seed)
        for seed in seeds
        for F in n_features
        for coefficient in sparsity
        for method, of_method in rates.items()
        for lr in of_method
    )
    return list(dict.fromkeys(points))
