"""A circuit over training: which features carry the task at which snapshot, and who takes over from whom.

Letters: F features, K snapshots, n features of the circuit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crosscoder.evolution.strength import LifeCycles


@dataclass(frozen=True)
class Circuit:
    """The n features of a circuit in order of emergence (then of peak). Snapshots at chance hold 0."""

    features: np.ndarray
    """(n,)"""
    emergence: np.ndarray
    """(n,) index of the snapshot of birth, -1 where there is none."""
    attribution: np.ndarray
    """(n, K) mean attribution over prompts, in units of the metric."""
    share: np.ndarray
    """(n, K) share of the positive attribution of all features at the snapshot (ours)."""
    relative_effect: np.ndarray
    """(n, K) RelIE of Bayazit et al. (2025): |attribution| over its sum over the snapshots."""
    relative_norm: np.ndarray
    """(n, K) decoder norm over its sum over the snapshots."""
    dominant: np.ndarray
    """(K,) the feature with the largest attribution at each snapshot, -1 at chance (ours)."""

    @property
    def handovers(self) -> int:
        """How often the dominant feature changes from one snapshot above chance to the next."""
        known = self.dominant[self.dominant >= 0]
        return int((known[1:] != known[:-1]).sum())


def relative(values_FK: np.ndarray) -> np.ndarray:
    """|values| over their sum over the snapshots, row by row; 0 in rows of zeros."""
    size_FK = np.abs(values_FK)
    total_F = size_FK.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(size_FK, total_F, out=np.zeros_like(size_FK), where=total_F > 0))


def circuit(attribution_FK: np.ndarray, norms_FK: np.ndarray, cycles: LifeCycles, n: int) -> Circuit:
    """The `n` features whose share of the positive attribution, at the snapshot where it is largest, is largest."""
    positive_FK = attribution_FK.clip(min=0)
    total_K = positive_FK.sum(axis=0)
    share_FK = np.divide(positive_FK, total_K, out=np.zeros_like(positive_FK), where=total_K > 0)
    best_F = share_FK.max(axis=1)
    chosen = np.argsort(-best_F, kind="stable")[:n]
    chosen = chosen[best_F[chosen] > 0]
    born = np.where(cycles.emergence[chosen] < 0, len(total_K), cycles.emergence[chosen])
    chosen = chosen[np.lexsort((chosen, cycles.peak[chosen], born))]
    return Circuit(
        features=chosen,
        emergence=cycles.emergence[chosen],
        attribution=attribution_FK[chosen],
        share=share_FK[chosen],
        relative_effect=relative(attribution_FK[chosen]),
        relative_norm=relative(norms_FK[chosen]),
        dominant=np.where(total_K > 0, attribution_FK.argmax(axis=0), -1),
    )
