"""What is measured of a point, on held-out tokens that are the same for all points.

Letters: K snapshots, F features, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.evaluation import evaluate
from crosscoder.model import Crosscoder
from crosscoder.sweep.methods import Part

BATCH = 512


def measure(
    models: list[Crosscoder], parts: list[Part], heldout: ActivationStore, device: torch.device
) -> dict[str, Any]:
    """The figures of a point, from the crosscoders of its parts: one over all snapshots, or SAEs of one snapshot each.

    `explained_variance` and `l0` are over all snapshots that the point reads (sums over them in scaled units; mean),
    `_last` those of the last snapshot. `dead` is the share of features that are off on every held-out token (at every
    snapshot; the mean over the SAEs of a chain). `by_snapshot` has a list for each of the same, and `cosine_previous`:
    the mean cosine between a feature's decoder direction there and in the snapshot before, over features alive in both.
    """
    models = [model.to(device) for model in models]
    names = [name for part in parts for name in part.snapshots]
    found = [
        evaluate(model, heldout.select(part.snapshots), BATCH, f"evaluation of {_title(part)}")
        for model, part in zip(models, parts, strict=True)
    ]
    explained_K = [value for one in found for value in one.explained_variance_K]
    deviation_K = [value for one in found for value in one.deviation_K]
    l0_K = [value for one in found for value in one.l0_K]
    known = [pair for pair in zip(explained_K, deviation_K, strict=True) if pair[0] is not None]
    error = sum((1 - share) * deviation for share, deviation in known if share is not None)
    fired = [one.firing_rate_F.to(device) > 0 for one in found]
    return {
        "n_heldout_tokens": found[-1].n_tokens,
        "explained_variance_last": explained_K[-1],
        "l0_last": l0_K[-1],
        "explained_variance": 1 - error / sum(deviation for _, deviation in known),
        "l0": sum(l0_K) / len(l0_K),
        "dead": sum(one.never_fired_fraction for one in found) / len(found),
        "by_snapshot": {
            "snapshot": names,
            "explained_variance": explained_K,
            "explained_variance_mean_of_ratios": [
                value for one in found for value in one.explained_variance_mean_of_ratios_K
            ],
            "l0": l0_K,
            "cosine_previous": continuity(models, fired),
        },
    }


def _title(part: Part) -> str:
    return part.snapshots[0] if len(part.snapshots) == 1 else f"{len(part.snapshots)} snapshots"


@torch.no_grad()
def continuity(models: list[Crosscoder], fired: list[Tensor], tau: float = 0.3) -> list[float | None]:
    """(K,): mean cosine of the same feature's decoder directions in a snapshot and the one before; None for the first.

    Over the features alive in both: those of an SAE that fired on held-out tokens (`fired`, (F,) bool for each model),
    those of a crosscoder whose norm there is above `tau` times their largest. None where there are none.
    """
    directions: list[Tensor] = []
    alive: list[Tensor] = []
    for model, fired_F in zip(models, fired, strict=True):
        norms_FK = model.decoder_norms()
        present_FK = norms_FK > tau * norms_FK.amax(dim=1, keepdim=True)
        for k in range(model.config.n_snapshots):
            directions.append(torch.nn.functional.normalize(model.W_dec[:, k].double(), dim=1))
            alive.append(present_FK[:, k] & fired_F)
    cosines: list[float | None] = [None]
    for k in range(1, len(directions)):
        both_F = alive[k - 1] & alive[k]
        cosine_F = (directions[k - 1] * directions[k]).sum(dim=1)[both_F]
        cosines.append(float(cosine_F.mean()) if len(cosine_F) else None)
    return cosines
