"""The seam between processes: what a step sums over features that lie elsewhere.

The reconstruction is a sum over features, and the only thing of a step's middle that needs all of them. So on every
backend a step is: decode | sum over processes | residual and the pairs' products with it. With one process the sum is
its argument, and a backend may do both halves in one pass.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Sharding(Protocol):
    """Which part of the features this process has."""

    alone: bool
    """Does it have all of them?"""
    first: bool
    """Is it the one that adds b_dec and subtracts the activations?"""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same on each."""


class OneProcess:
    """All features are here."""

    alone = True
    first = True

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`."""
        return tensor


ONE_PROCESS: Sharding = OneProcess()
