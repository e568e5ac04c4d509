"""Tokens with huge norms (attention sinks, first positions): few, and most of what a pooled figure sees.

Letters: T tokens, K snapshots, D width, S sequences, C context.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.activations.tokens import TokenSet
from crosscoder.activations.trunk import Trunks
from crosscoder.progress import Progress, warn

HUGE = 4.0
"""A norm is huge from this many times the snapshot's median norm on."""
EDGES = (0.0, 0.5, 1.0, 2.0, HUGE)
"""Lower ends of the bands of norms, in median norms, in which figures are given; the last has no upper end."""
SAMPLE = 4096
"""Tokens of the first shard (they are in random order) that medians are taken of."""
_TELLING_SHARE = 0.1


def median_norms(store: ActivationStore) -> np.ndarray:
    """(K,) float64: median Euclidean norm of each snapshot's raw activations, from a sample."""
    medians: np.ndarray = store.read(0, slice(0, SAMPLE)).double().norm(dim=2).median(dim=0).values.numpy()
    return medians


def warn_huge(store: ActivationStore) -> None:
    """A line for the snapshots where few tokens of huge norm hold a good part of all variance (from a sample)."""
    x_TKD = store.read(0, slice(0, SAMPLE)).double()
    ratio_TK = x_TKD.norm(dim=2) / x_TKD.norm(dim=2).median(dim=0).values.clamp_min(1e-300)
    deviation_TK = (x_TKD - x_TKD.mean(dim=0)).square().sum(dim=2)
    huge_TK = ratio_TK >= HUGE
    share_K = (deviation_TK * huge_TK).sum(dim=0) / deviation_TK.sum(dim=0).clamp_min(1e-300)
    worst = int(share_K.argmax())
    if share_K[worst] < _TELLING_SHARE:
        return
    told = int((share_K >= _TELLING_SHARE).sum())
    warn(
        f"{store.path.name}: at {store.snapshot_names[worst]} {float(huge_TK[:, worst].double().mean()):.2%} of the "
        f"tokens have {HUGE:g} times the median norm or more, and hold {float(share_K[worst]):.0%} of the variance "
        f"(much of it at {told} of {store.n_snapshots} snapshots). Figures over all tokens then say little about the "
        "ordinary ones: look at the figures by norm that crosscoder eval prints, or leave such tokens out when the "
        "tokens are made (--leave-out-norm, --leave-out-positions, --leave-out-ids)"
    )


def token_norms(trunks: Trunks, tokens: TokenSet, batch_sequences: int, device: str) -> np.ndarray:
    """(S, C) float32: norm of the first snapshot's activation of every token."""
    parts: list[Tensor] = []
    with Progress("norms", tokens.n_tokens, "tokens") as progress:
        for start in range(0, tokens.n_sequences, batch_sequences):
            ids_SC = torch.from_numpy(tokens.ids[start : start + batch_sequences]).long().to(device)
            parts.append(trunks(ids_SC)[0].float().norm(dim=2).cpu())
            progress.advance(ids_SC.numel())
    norms: np.ndarray = torch.cat(parts).numpy()
    return norms
