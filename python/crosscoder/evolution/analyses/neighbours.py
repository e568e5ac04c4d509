"""The features most similar to each, for the page's feature browser."""

from __future__ import annotations

from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.neighbours import Neighbours, nearest_neighbours
from crosscoder.evolution.study import Analysis, Study


def compute(study: Study) -> Neighbours:
    """Among the features that fired."""
    return nearest_neighbours(
        study.decoders,
        n_neighbours=study.settings.neighbours,
        scale_K=study.decoder_scale,
        alive_F=study.result(EXAMPLES).fired_any > 0,
    )


NEIGHBOURS = Analysis(
    "neighbours",
    version=1,
    definition="nearest features by cosine of decoders over all snapshots (ours)",
    result=Neighbours,
    compute=compute,
    settings=("neighbours",),
    needs=(EXAMPLES,),
    required=True,
)
