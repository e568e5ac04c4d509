"""Firing counts and contexts of each feature, in one pass over the training tokens that goes on after a kill.

Letters: F features, K snapshots, H bins of the histogram.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crosscoder.evolution.examples import ContextWindows, ExampleCollector, contexts, histogram_edges
from crosscoder.evolution.study import Analysis, Study
from crosscoder.progress import Progress

BATCH_TOKENS = 1024
"""Tokens that are encoded at a time."""


@dataclass(frozen=True)
class ExamplesResult:
    """What every feature fires on."""

    n_tokens: int
    """Tokens read."""
    fired: NDArray[np.int64]
    """(F, K) tokens at which the feature is active at a snapshot."""
    fired_any: NDArray[np.int64]
    """(F,) tokens at which it is active at one snapshot or more."""
    firing_rate: NDArray[np.float32]
    """(F, K) share of the tokens."""
    max_activation: NDArray[np.float32]
    """(F,)"""
    mean_activation: NDArray[np.float32]
    """(F,) over the tokens where it is active."""
    histogram: NDArray[np.int64]
    """(F, H) activations by size."""
    histogram_edges: NDArray[np.float32]
    """(H + 1,)"""
    before: int
    """Tokens of a context before the one that it is about."""
    contexts: ContextWindows
    """The strongest, one a sequence."""
    sampled: ContextWindows
    """A uniform sample of all tokens where the feature is active."""


def compute(study: Study) -> ExamplesResult:
    """One pass over the store."""
    store, model, settings = study.store, study.folded, study.settings
    collector = ExampleCollector(
        model.config.n_features,
        model.config.n_snapshots,
        n_examples=settings.contexts,
        n_samples=settings.samples,
        seed=settings.seed,
    )
    partial = study.partial(EXAMPLES, store.identity)
    if (state := partial.load()) is not None:
        collector.load_state(state)
    with Progress("examples", store.n_tokens, "tokens", done=collector.n_tokens) as progress:
        for x_BKD, sequence_B, position_B in store.whole_sequences(BATCH_TOKENS, skip=collector.n_tokens):
            collector.add(model.encode(x_BKD), sequence_B, position_B)
            partial.offer(collector.state)
            progress.advance(len(x_BKD))
    found = collector.result()
    return ExamplesResult(
        n_tokens=found.n_tokens,
        fired=found.fired,
        fired_any=found.fired_any,
        firing_rate=found.firing_rate,
        max_activation=found.max_activation,
        mean_activation=found.mean_activation,
        histogram=found.histogram,
        histogram_edges=histogram_edges(),
        before=found.strongest.before,
        contexts=contexts(found.strongest, study.train),
        sampled=contexts(found.sampled, study.train),
    )


EXAMPLES = Analysis(
    "examples",
    version=1,
    definition="on the training tokens, for each feature: firing counts by snapshot, a histogram of its activations, "
    "its strongest contexts, one a sequence, and contexts of a uniform sample of the tokens where it is active",
    result=ExamplesResult,
    compute=compute,
    settings=("contexts", "samples", "seed"),
    required=True,
)
