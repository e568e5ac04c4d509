"""Whether norms near 0 are artefacts of the sparsity penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.analyses.probes import SECTION
from crosscoder.evolution.latent_scaling import DECOUPLED, LOW_NORM, SHRUNK, LatentScaling, ScalingSums
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import finite
from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import SNAPSHOTS, Axis, Bars, Series
from crosscoder.figures.table import FigureTable, plain_column
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


def artefacts(found: LatentScaling, results: Results) -> FigureTable | None:
    """By snapshot: features whose norm near 0 is an artefact of the penalty."""
    flags = {"shrunk": found.shrunk, "decoupled": found.decoupled, "low": found.low}
    series = [Series("shrunk", "shrunk"), Series("decoupled", "decoupled")]
    return FigureTable(
        "latent_scaling",
        "Norms near 0 that are artefacts",
        "ours",
        f"Features with a relative norm of at most {LOW_NORM:g} at a snapshot that are there all the same, by latent "
        "scaling (Minder et al. 2025). Shrunk: what the crosscoder leaves out holds the feature (ν of the error at "
        f"least {SHRUNK:g}). Decoupled: other features stand in for it (ν of the reconstruction at least "
        f"{DECOUPLED:g}). Of {int(found.low.sum()):,} such pairs of a feature and a snapshot in all. The two can "
        "overlap.",
        results.by_snapshot | {name: plain_column(flag_FK.sum(axis=0)) for name, flag_FK in flags.items()},
        Bars("snapshot", SNAPSHOTS, Axis("features", "count"), series),
    )


def shares(found: LatentScaling, results: Results) -> str:
    """How many of the norms near 0 are artefacts."""
    if not np.isfinite(found.share_shrunk):
        return ""
    return (
        f"By latent scaling {found.share_shrunk:.1%} of the {int(found.low.sum()):,} norms near 0 are shrunk by the "
        f"penalty and {found.share_decoupled:.1%} taken over by other features."
    )


LATENT_SCALING = Analysis(
    "latent_scaling",
    version=1,
    definition="beta of each feature's activation in what the crosscoder leaves out (with the feature's own part) and "
    "in what it puts there, at every snapshot, along the decoder at the peak, the own one and another feature's (after "
    "Minder et al. 2025)",
    result=LatentScaling,
    compute=compute,
    summary=summary,
    settings=("seed",),
    needs=(EXAMPLES,),
    page=Part(LatentScaling, SECTION, (artefacts,), (shares,)),
)
