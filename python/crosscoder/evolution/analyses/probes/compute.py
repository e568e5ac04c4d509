"""Whether a decoder norm says how separable a feature is in a snapshot's activations.

Letters: n probed features, K snapshots, B tokens in a batch, T held-out tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.analyses.life import LIFE
from crosscoder.evolution.probes import (
    Areas,
    NormHonesty,
    ProbeTrainer,
    norm_honesty,
    snapshot_areas,
    stratified_sample,
)
from crosscoder.evolution.study import Study
from crosscoder.evolution.summary import finite
from crosscoder.progress import Progress

PROBE_TOKENS, HELDOUT_TOKENS = 1 << 20, 1 << 17
"""Probes are trained on at most so many tokens, and tested on at most so many."""


@dataclass(frozen=True)
class ProbesResult:
    """Areas under the curve of every probe, and what they say of the norm."""

    features: NDArray[np.int32]
    """(n,) ids of the probed features."""
    weights: NDArray[np.float64]
    """(n,) features that each stands for."""
    n_active: NDArray[np.int64]
    """(n,) training tokens with the feature active."""
    n_active_heldout: NDArray[np.int64]
    """(n,) held-out tokens with the feature active."""
    n_tokens: int
    """Training tokens."""
    n_tokens_heldout: int
    relative: NDArray[np.float32]
    """(n, K) norm over the feature's maximum."""
    norms: NDArray[np.float64]
    """(n, K) decoder norms."""
    areas: Areas
    """Each (n, K)."""
    honesty: NormHonesty


def compute(study: Study) -> ProbesResult:
    """Probes are trained at all snapshots at once, and tested snapshot by snapshot."""
    life, n_snapshots = study.result(LIFE), study.model.config.n_snapshots
    seed = study.settings.seed
    ids, weights = stratified_sample(
        life.cycles.kind,
        life.cycles.emergence,
        study.settings.n_probed,
        alive_F=study.result(EXAMPLES).fired_any > 0,
        seed=seed,
    )
    ids_n = torch.from_numpy(ids).to(study.device)
    scale_K = study.folded.snapshot_scale
    mean_KD = torch.from_numpy(study.store.means()).float().to(study.device) * scale_K[:, None]
    trainer = ProbeTrainer(mean_KD, len(ids), seed=seed)
    n_train = min(study.store.n_tokens, PROBE_TOKENS)
    with Progress("probes", n_train, "tokens") as progress:
        for x_BKD in study.scaled(study.store, n_train, shuffle=True):
            trainer.add(x_BKD, _active(study.model.encode(x_BKD), ids_n))
            progress.advance(len(x_BKD))
    probes = trainer.probes()

    store = study.run.store("heldout")
    n_heldout = min(store.n_tokens, HELDOUT_TOKENS)
    W_nKD, b_n = study.model.W_enc.detach()[ids_n].float(), study.model.b_enc.detach()[ids_n].float()
    active, h, by_snapshot = [], [], list[Areas]()
    with Progress("probes, held out", n_heldout * (1 + n_snapshots), "tokens") as progress:
        for x_BKD in study.scaled(store, n_heldout):
            active.append(_active(study.model.encode(x_BKD), ids_n))
            h.append(x_BKD.flatten(1) @ W_nKD.flatten(1).T + b_n)
            progress.advance(len(x_BKD))
        active_Tn, h_Tn = torch.cat(active), torch.cat(h)
        for k in range(n_snapshots):
            x_TD = torch.cat([x_BKD[:, 0] for x_BKD in study.scaled(store, n_heldout, only=k)])
            by_snapshot.append(snapshot_areas(probes, k, x_TD, active_Tn, h_Tn - x_TD @ W_nKD[:, k].T))
            progress.advance(n_heldout)
    areas = Areas(
        **{name: np.stack([getattr(one, name) for one in by_snapshot], axis=1) for name in Areas.__dataclass_fields__}
    )
    relative_nK = life.cycles.relative[ids]
    return ProbesResult(
        features=ids.astype(np.int32),
        weights=weights,
        n_active=probes.n_active,
        n_active_heldout=active_Tn.sum(dim=0).cpu().numpy(),
        n_tokens=probes.n_tokens,
        n_tokens_heldout=n_heldout,
        relative=relative_nK,
        norms=life.norms[ids],
        areas=areas,
        honesty=norm_honesty(
            areas.auc, relative_nK, auc_without_nK=areas.without, features_n=ids, weights_n=weights, seed=seed
        ),
    )


def _active(code: SparseCode, ids_n: Tensor) -> Tensor:
    """(B, n) bool: whether the features of the given ids are on at one snapshot or more."""
    device = code.features.device
    column_F = torch.full((code.n_features,), -1, device=device)
    column_F[ids_n] = torch.arange(len(ids_n), device=device)
    column_N = column_F[code.features.long()]
    active_Bn = torch.zeros(code.n_tokens, len(ids_n), dtype=torch.bool, device=device)
    active_Bn[code.rows()[column_N >= 0], column_N[column_N >= 0]] = True
    return active_Bn


def summary(probes: ProbesResult, revisions: Sequence[str]) -> dict[str, Any]:
    """Whether norm and separability agree."""
    areas, honesty = probes.areas, probes.honesty
    peak_n = probes.relative.argmax(axis=1)
    at_peak = areas.auc[np.arange(len(peak_n)), peak_n]
    shares = ("correlation_overall", "correlation_median", "correlation_median_null", "share_hidden", "share_hollow")
    bins = [f"{low:g}-{high:g}" for low, high in zip(honesty.bins[:-1], honesty.bins[1:], strict=True)]
    return {
        "norm_honesty": {
            "n_probed": len(areas.auc),
            **{name: finite(getattr(honesty, name)) for name in shares},
            "n_hidden_pairs": len(honesty.hidden),
            "n_hollow_pairs": len(honesty.hollow),
            "median_auc_at_peak": finite(np.nanmedian(at_peak)) if np.isfinite(at_peak).any() else None,
            "mean_auc_by_relative_norm": dict(zip(bins, map(finite, honesty.bin_auc), strict=True)),
            "pairs_by_relative_norm": dict(zip(bins, map(int, honesty.bin_count), strict=True)),
            "mean_auc_shuffled": finite(_mean(areas.shuffled)),
            "mean_auc_random": finite(_mean(areas.random)),
        }
    }


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
