"""Whether norms near 0 are artefacts of the sparsity penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.latent_scaling import LatentScaling, ScalingSums
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import finite
from crosscoder.progress import Progress


def compute(study: Study) -> LatentScaling:
    """One pass over the training tokens."""
    alive_F = study.result(EXAMPLES).fired_any > 0
    sums = ScalingSums(study.model.W_dec.detach(), alive_F=alive_F, seed=study.settings.seed)
    with Progress("latent scaling", study.store.n_tokens, "tokens") as progress:
        for x_BKD in study.scaled(study.store, study.store.n_tokens):
            code = study.model.encode(x_BKD)
            reconstruction_BKD = study.model.decode(code)
            sums.add(code, x_BKD - reconstruction_BKD, reconstruction_BKD)
            progress.advance(len(x_BKD))
    return sums.result()


def summary(scaling: LatentScaling, revisions: Sequence[str]) -> dict[str, Any]:
    """How many norms near 0 there are, and how many of them are artefacts."""
    flags = {"low": scaling.low, "shrunk": scaling.shrunk, "decoupled": scaling.decoupled}
    shares = ("share_shrunk", "share_shrunk_null", "share_decoupled", "share_decoupled_null")
    return {
        "latent_scaling": {
            "pairs": {name: int(flag_FK.sum()) for name, flag_FK in flags.items()},
            "features": {name: int(flag_FK.any(axis=1).sum()) for name, flag_FK in flags.items()},
            **{name: finite(getattr(scaling, name)) for name in shares},
        }
    }


LATENT_SCALING = Analysis(
    "latent_scaling",
    version=1,
    section="Honesty of the norm",
    definition="beta of each feature's activation in what the crosscoder leaves out (with the feature's own part) and "
    "in what it puts there, at every snapshot, along the decoder at the peak, the own one and another feature's (after "
    "Minder et al. 2025)",
    result=LatentScaling,
    compute=compute,
    summary=summary,
    settings=("seed",),
    needs=(EXAMPLES,),
)
