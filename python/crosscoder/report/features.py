"""What the page's feature browser shows, from the results of analyses."""

from __future__ import annotations

from collections.abc import Sequence

from crosscoder.common.byte_text import Vocabulary
from crosscoder.evolution.analyses.examples import ExamplesResult
from crosscoder.evolution.analyses.life import LifeResult
from crosscoder.evolution.neighbours import Neighbours
from crosscoder.evolution.strength import KIND_NAMES
from crosscoder.figures.results import Results
from crosscoder.report.data import Contexts, Features


def features_of(results: Results, documents: Sequence[str] = ()) -> Features | None:
    """The features, as far as lives and examples are known. `documents`: names of the texts of the contexts."""
    life, examples = results.of(LifeResult), results.of(ExamplesResult)
    if life is None or examples is None:
        return None
    neighbours, vocabulary, cycles = results.of(Neighbours), results.of(Vocabulary), life.cycles
    return Features(
        norms=cycles.relative,
        max_norm=life.norms.max(axis=1),
        kind=cycles.kind,
        kind_names=KIND_NAMES,
        emergence=cycles.emergence,
        peak=cycles.peak,
        lifetime=cycles.lifetime,
        firing_rate=examples.firing_rate,
        max_activation=examples.max_activation,
        neighbours=None if neighbours is None else neighbours.features,
        neighbour_cosines=None if neighbours is None else neighbours.cosines,
        neighbour_note="cosine of the decoder directions over all snapshots together",
        presence_threshold=cycles.threshold,
        contexts=None if vocabulary is None else Contexts(
            feature=examples.contexts.feature,
            tokens=examples.contexts.tokens,
            activations=examples.contexts.activations,
            vocabulary=vocabulary.texts,
            document=examples.contexts.document,
            documents=documents,
            position=examples.contexts.position,
        ),
    )  # fmt: skip
