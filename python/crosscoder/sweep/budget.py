"""What each method may use, so that the comparison is fair.

With S steps of B tokens (the run's own settings) over K snapshots, an **activation** being one token in one snapshot:

| method | steps | tokens in a step | activations | parameters of the matrices |
|---|---|---|---|---|
| `crosscoder` | S | B in all K snapshots | S B K | 2 F K D |
| `sae` | S | B in the last snapshot | S B | 2 F D |
| `chain` | S K over all its SAEs | B in one snapshot | S B K | 2 F K D |

So the chain sees exactly as many activations as the crosscoder, and its encoders' products cost the same FLOPs; the
SAE sees the same number of tokens in the same number of steps. The chain's first SAE begins with nothing and gets
twice the steps of each later one (SAE-Track gives its first SAE most of the training, too): 2 S K / (K + 1) and
S K / (K + 1), rounded so that the sum is exactly S K.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosscoder.errors import ConfigError
from crosscoder.sweep.points import Method

FIRST_FACTOR = 2
"""Steps of the chain's first SAE, as a multiple of a later one's."""


@dataclass(frozen=True)
class Budget:
    """What a method's training takes in all."""

    steps: int
    """Optimiser steps, over all trainings of the method."""
    tokens: int
    """Tokens in these steps: one in several snapshots counts once, one in several steps each time."""
    activations: int
    """Tokens times the snapshots in which each is read."""


def chain_steps(n_steps: int, n_snapshots: int) -> list[int]:
    """(K,): steps of each SAE of the chain, in all `n_steps` times K.

    Raises `ConfigError` if the later ones would have none.
    """
    total = n_steps * n_snapshots
    later = total // (n_snapshots - 1 + FIRST_FACTOR)
    if later < 1:
        raise ConfigError(f"n_steps = {n_steps} leaves no steps for the chain's later SAEs; train longer")
    return [total - (n_snapshots - 1) * later, *[later] * (n_snapshots - 1)]


def budget_of(method: Method, n_steps: int, batch_size: int, n_snapshots: int) -> Budget:
    """The table above."""
    if method == "chain":
        steps = sum(chain_steps(n_steps, n_snapshots))
        return Budget(steps, steps * batch_size, steps * batch_size)
    tokens = n_steps * batch_size
    return Budget(n_steps, tokens, tokens * (n_snapshots if method == "crosscoder" else 1))
