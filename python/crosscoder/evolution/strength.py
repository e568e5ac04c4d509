"""When features are there: decoder norms turned into kinds, births, peaks, deaths and lifetimes.

Letters: F features, K snapshots, T thresholds.

The paper's (P, arXiv 2509.17196): a feature's strength at a snapshot is its decoder norm, shown divided by
the feature's own maximum; there are initialization and emergent features. Ours, because the paper has no
formal definition: everything that needs a threshold `tau` ("present"), and so every count, birth and lifetime
here. `threshold_sweep` shows how much the choice of tau matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.evolution.checks import checked_mask, checked_steps
from crosscoder.model import Crosscoder

KIND_NAMES = ("initialization", "emergent", "dead", "other")
"""Names of the codes in `LifeCycles.kind`."""
INITIALIZATION, EMERGENT, DEAD, OTHER = range(4)

DIP_STEP = 128


@dataclass(frozen=True)
class LifeCycles:
    """The life of every feature. Rows of dead features hold False, 0, -1 or NaN."""

    threshold: float
    """tau: present means a relative norm above it."""
    steps: NDArray[np.int64]
    """(K,) training step of each snapshot."""
    relative: NDArray[np.float32]
    """(F, K) n_fk / max_k n_fk, in [0, 1] (P)."""
    present: NDArray[np.bool_]
    """(F, K) whether the relative norm is above tau (ours)."""
    kind: NDArray[np.int8]
    """(F,) index into `KIND_NAMES` (ours): "initialization" is present at step 0, "emergent" has an emergence
    and is not that, "other" is present only at single snapshots before the last one, "dead" is not alive."""
    emergence: NDArray[np.int32]
    """(F,) index of the snapshot of birth, -1 where there is none (ours): 0 for an initialization feature, else the
    first snapshot at which it is present there and at the next; the last snapshot needs no next one. Without a snapshot
    of step 0, a feature present from the first snapshot on has 0 although it may be older."""
    peak: NDArray[np.int32]
    """(F,) index of the snapshot of the largest norm, the later of ties; also given for dead features."""
    death: NDArray[np.int32]
    """(F,) index of the first snapshot from which on it is never present again; -1 if present at the last (ours)."""
    revived: NDArray[np.bool_]
    """(F,) present, then absent, then present again (ours)."""
    lifetime: NDArray[np.float32]
    """(F,) share of the K snapshots at which it is present (ours)."""
    dip: NDArray[np.float32]
    """(F,) drop and recovery at step 128 (ours): 1 - n(128) / min(largest n before, largest n after), above 0
    only for a drop that is made good again, at least -1. NaN unless the feature is present before and after,
    and everywhere if there is no such snapshot between two others."""
    sharedness: NDArray[np.float32]
    """(F,) entropy of n_fk / sum_k n_fk over log K: 1 is equally strong everywhere, 0 one snapshot only; 1 if K = 1."""
    births: NDArray[np.int64]
    """(K,) emergent features born at each snapshot; initialization features are not born."""
    deaths: NDArray[np.int64]
    """(K,) features that are gone from each snapshot on."""
    births_per_log_step: NDArray[np.float64]
    """(K,) births between a snapshot and the one before it, per unit of log10(1 + step); NaN at index 0."""
    deaths_per_log_step: NDArray[np.float64]
    """(K,) the same for deaths."""

    @property
    def n_by_kind(self) -> dict[str, int]:
        """How many features are of each kind."""
        counts = np.bincount(self.kind, minlength=len(KIND_NAMES))
        return {name: int(count) for name, count in zip(KIND_NAMES, counts, strict=True)}

    @property
    def alive(self) -> NDArray[np.bool_]:
        """(F,) not dead."""
        return np.asarray(self.kind != DEAD)


@dataclass(frozen=True)
class ThresholdSweep:
    """What changes with tau."""

    thresholds: NDArray[np.float64]
    """(T,)"""
    n_by_kind: NDArray[np.int64]
    """(T, 4) columns as in `KIND_NAMES`."""
    births: NDArray[np.int64]
    """(T, K)"""
    deaths: NDArray[np.int64]
    """(T, K)"""
    median_lifetime: NDArray[np.float64]
    """(T,) over features that are not dead; NaN if there is none."""
    same_emergence: NDArray[np.float64]
    """(T,) share of the features not dead whose emergence is the one at `reference`."""
    reference: float
    """The tau that `same_emergence` compares with."""


def life_cycles(
    norms_FK: ArrayLike | Crosscoder, steps_K: ArrayLike, *, threshold: float = 0.3, alive_F: ArrayLike | None = None
) -> LifeCycles:
    """The life of every feature from its decoder norms (F, K), or a crosscoder's, at training steps (K,), strictly
    increasing.

    `alive_F` (F,) bool: features that count; the others, and those whose norms are all 0, are "dead".
    Raises `ConfigError` for a threshold outside [0, 1), `DataError` for shapes that do not match or steps out
    of order, `NonFiniteError` for norms that are NaN or infinite.
    """
    if not 0 <= threshold < 1:
        raise ConfigError(f"the presence threshold must lie in [0, 1), got {threshold:g}")
    norms, steps = _checked(norms_FK, steps_K)
    n_features, n_snapshots = norms.shape
    alive = checked_mask(alive_F, n_features)

    largest = norms.max(axis=1)
    alive = alive & (largest > 0)
    relative = np.divide(norms, largest[:, None], out=np.zeros_like(norms), where=largest[:, None] > 0)
    present = (relative > threshold) & alive[:, None]

    lasting = present.copy()
    lasting[:, :-1] &= present[:, 1:]
    at_start = present[:, 0] & (steps[0] == 0)
    emergence = np.where(at_start, 0, _first(lasting))
    kind = np.full(n_features, OTHER, dtype=np.int8)
    kind[emergence >= 0] = EMERGENT
    kind[at_start] = INITIALIZATION
    kind[~alive] = DEAD

    last = n_snapshots - 1 - _first(present[:, ::-1])
    death = np.where(present.any(axis=1) & (last < n_snapshots - 1), last + 1, -1)
    entries = present[:, :1].sum(axis=1) + (present[:, 1:] & ~present[:, :-1]).sum(axis=1)
    births = np.bincount(emergence[kind == EMERGENT], minlength=n_snapshots)
    deaths = np.bincount(death[death >= 0], minlength=n_snapshots)
    width = np.diff(np.log10(1.0 + steps), prepend=np.nan)
    return LifeCycles(
        threshold=threshold,
        steps=steps,
        relative=relative.astype(np.float32),
        present=present,
        kind=kind,
        emergence=emergence.astype(np.int32),
        peak=(n_snapshots - 1 - norms[:, ::-1].argmax(axis=1)).astype(np.int32),
        death=death.astype(np.int32),
        revived=entries > 1,
        lifetime=present.mean(axis=1, dtype=np.float64).astype(np.float32),
        dip=_dip(relative, steps, threshold),
        sharedness=_sharedness(norms, alive),
        births=births,
        deaths=deaths,
        births_per_log_step=births / width,
        deaths_per_log_step=deaths / width,
    )


def threshold_sweep(
    norms_FK: ArrayLike | Crosscoder,
    steps_K: ArrayLike,
    thresholds: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
    *,
    reference: float = 0.3,
    alive_F: ArrayLike | None = None,
) -> ThresholdSweep:
    """`life_cycles` at T thresholds. Raises as `life_cycles` does, and `ConfigError` if there is no threshold."""
    if not len(thresholds):
        raise ConfigError("a sweep over presence thresholds needs at least one")
    base = life_cycles(norms_FK, steps_K, threshold=reference, alive_F=alive_F)
    alive = base.alive
    runs = [life_cycles(norms_FK, steps_K, threshold=tau, alive_F=alive_F) for tau in thresholds]
    some = bool(alive.any())
    return ThresholdSweep(
        thresholds=np.asarray(thresholds, dtype=np.float64),
        n_by_kind=np.array([list(run.n_by_kind.values()) for run in runs]),
        births=np.array([run.births for run in runs]),
        deaths=np.array([run.deaths for run in runs]),
        median_lifetime=np.array([np.median(run.lifetime[alive]) if some else np.nan for run in runs]),
        same_emergence=np.array([(run.emergence == base.emergence)[alive].mean() if some else np.nan for run in runs]),
        reference=reference,
    )


def _checked(norms_FK: ArrayLike | Crosscoder, steps_K: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if isinstance(norms_FK, Crosscoder):
        norms_FK = norms_FK.decoder_norms().detach().cpu().numpy()
    norms = np.asarray(norms_FK, dtype=np.float64)
    steps = checked_steps(steps_K)
    if norms.ndim != 2 or norms.shape[1] != steps.size:
        raise DataError(f"norms of shape {norms.shape} do not match {steps.size} snapshots; expected (F, K)")
    if not np.isfinite(norms).all():
        feature, k = np.argwhere(~np.isfinite(norms))[0]
        raise NonFiniteError(f"the decoder norm of feature {feature} at step {steps[k]} is not finite")
    return norms, steps


def _first(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(F,) index of the first true column of (F, K), -1 where there is none."""
    return np.where(flags.any(axis=1), flags.argmax(axis=1), -1)


def _dip(relative: NDArray[Any], steps: NDArray[np.int64], threshold: float) -> NDArray[np.float32]:
    dip = np.full(relative.shape[0], np.nan, dtype=np.float32)
    at = int(np.searchsorted(steps, DIP_STEP))
    if at in (0, steps.size, steps.size - 1) or steps[at] != DIP_STEP:
        return dip
    around = np.minimum(relative[:, :at].max(axis=1), relative[:, at + 1 :].max(axis=1))
    known = around > threshold
    dip[known] = 1 - np.minimum(relative[known, at], 2 * around[known]) / around[known]
    return dip


def _sharedness(norms: NDArray[np.float64], alive: NDArray[np.bool_]) -> NDArray[np.float32]:
    share = np.full(norms.shape[0], np.nan, dtype=np.float32)
    n_snapshots = norms.shape[1]
    if n_snapshots == 1:
        share[alive] = 1
        return share
    # Divided by the maximum first: the sum of denormal norms would lose the proportions.
    weights = norms[alive] / norms[alive].max(axis=1, keepdims=True)
    weights /= weights.sum(axis=1, keepdims=True)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    share[alive] = np.maximum(-(weights * logs).sum(axis=1), 0) / np.log(n_snapshots)
    return share
