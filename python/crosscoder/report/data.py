"""What a page shows: plain dataclasses of numbers and text, filled by whoever computed them.

Letters: K snapshots, F features, N contexts, L tokens in a context, n neighbours.
Everything optional may be left out: the page shows what is there. Nothing here is computed, only checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.figures.results import Fact
from crosscoder.figures.table import FigureTable

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Contexts:
    """Windows of text where features are most active. A feature may have none, one or many."""

    feature: IntArray
    """(N,) the feature each context belongs to, in any order; within a feature the strongest first."""
    tokens: IntArray
    """(N, L) indices into `vocabulary`; -1 pads windows shorter than L."""
    activations: FloatArray
    """(N, L) >= 0, in the unit of `Features.max_activation`; ignored where tokens is -1."""
    vocabulary: Sequence[str]
    """Text of each token as it stands in a document, leading space included (see `byte_text.Vocabulary`)."""
    document: IntArray | None = None
    """(N,) index into `documents`, or -1."""
    documents: Sequence[str] = ()
    """Names of documents."""
    position: IntArray | None = None
    """(N,) position of the window's first token in its document, or -1."""


@dataclass(frozen=True)
class Features:
    """Everything known of each feature; row f is feature f."""

    norms: FloatArray
    """(F, K) decoder norm divided by the feature's own maximum, in [0, 1]; rows of a zero feature are 0."""
    max_norm: FloatArray
    """(F,) the maximum of the absolute decoder norm."""
    kind: IntArray
    """(F,) index into `kind_names`."""
    kind_names: Sequence[str]
    """For example ("initialization", "emergent", "dead", "other"). These four have their own colours."""
    emergence: IntArray
    """(F,) index of the snapshot of emergence, -1 where there is none."""
    peak: IntArray
    """(F,) index of the snapshot of the largest norm."""
    lifetime: FloatArray
    """(F,) share of the snapshots at which the feature is present, in [0, 1]."""
    firing_rate: FloatArray
    """(F, K) share of tokens with the feature active at each snapshot, in [0, 1]."""
    max_activation: FloatArray
    """(F,) the largest activation seen."""
    neighbours: IntArray | None = None
    """(F, n) ids of the features most similar by cosine, the nearest first; -1 where there are fewer."""
    neighbour_cosines: FloatArray | None = None
    """(F, n) in [-1, 1]."""
    neighbour_note: str = "cosine of the decoder directions"
    """Which cosine it is: shown above the neighbours."""
    presence_threshold: float | None = None
    """tau: a feature is present where its relative norm is above it; drawn in figures."""
    contexts: Contexts | None = None


@dataclass(frozen=True)
class StepMark:
    """A training step that figures mark because something else than features happens there."""

    step: float
    label: str
    """A few words, such as "warm-up ends"."""


@dataclass(frozen=True)
class PageData:
    """One page."""

    title: str
    sentences: Sequence[str]
    """What was found, computed from the results; about five."""
    steps: Sequence[int]
    """K training steps, strictly increasing, from 0."""
    facts: Sequence[Fact] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Nested mappings of plain values."""
    notes: Sequence[str] = ()
    """Caveats, each a sentence or two."""
    features: Features | None = None
    tables: Sequence[FigureTable] = ()
    """The figures, in the order of the page: those of one section one after the other."""
    leads: Mapping[str, str] = field(default_factory=dict)
    """Section of the page -> the sentence that it begins with."""
    marks: Sequence[StepMark] = ()
    """Drawn in every figure over training steps."""
    subtitle: str = ""
    """One line under the title: the model, the text, the date."""
