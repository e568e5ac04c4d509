"""What a page shows: plain dataclasses of numbers and text, filled by whoever computed them.

Letters: K snapshots, F features, N contexts, L tokens in a context, n neighbours, Q quantiles.
Everything optional may be left out: the page shows what is there. Nothing here is computed, only checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.figures.table import FigureTable

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Fact:
    """One tile of the summary, for example ("Explained variance", "0.941", "mean over tokens ...")."""

    label: str
    value: str
    """The value as it is to be read, with its unit."""
    explanation: str
    """One line: what was computed, on what."""


@dataclass(frozen=True)
class TurningPoint:
    """The best split of the snapshots by decoder directions: a training step and, if estimated, its interval."""

    step: float
    low: float | None = None
    high: float | None = None
    level: float | None = None
    """Coverage of the interval, for example 0.95."""
    sharp: bool = True
    """Whether it is a turning point; otherwise only where a split would be (see `turning.is_sharp`)."""


@dataclass(frozen=True)
class Cosines:
    """Cosine between a feature's decoder directions at two snapshots, summarised over features."""

    mean: FloatArray
    """(K, K), in [-1, 1]; NaN where no feature is alive at both ends."""
    quantiles: FloatArray | None = None
    """(Q, K, K)."""
    levels: Sequence[float] = ()
    """Q levels of the quantiles, for example (0.1, 0.5, 0.9)."""
    n_features: IntArray | None = None
    """(K, K): how many features each cell summarises."""
    null: FloatArray | None = None
    """(K, K): the spread of a mean cosine of random directions, shown in the tooltip."""
    by_kind: Mapping[str, FloatArray] = field(default_factory=dict)
    """Kind -> (K, K) mean over its features."""


@dataclass(frozen=True)
class Figures:
    """Curves over snapshots. Every (K,) array may hold NaN where a value is missing."""

    explained_variance: FloatArray | None = None
    """(K,) the paper's definition: mean over tokens of 1 - |x - x^|² / |x - mean|²."""
    explained_variance_total: FloatArray | None = None
    """(K,) 1 - sum of squared errors / sum of squares (ours)."""
    l0: FloatArray | None = None
    """(K,) mean number of active features a token."""
    cosines: Cosines | None = None
    turning_point: TurningPoint | None = None
    births: IntArray | None = None
    """(K,) features that become present at this snapshot."""
    deaths: IntArray | None = None
    """(K,) features that are no longer present from this snapshot on."""
    dimensionality: FloatArray | None = None
    """(K,) total feature dimensionality / D, in [0, 1]."""
    dimensionality_by_kind: Mapping[str, FloatArray] = field(default_factory=dict)
    """Kind -> (K,) its features' part of that."""
    kl_unigram: FloatArray | None = None
    """(K,) nats: KL(unigram ‖ mean prediction)."""
    kl_bigram: FloatArray | None = None
    """(K,) nats: mean over current tokens u of KL(p(·|u) ‖ mean prediction after u)."""
    kl_bigram_corrected: FloatArray | None = None
    """(K,) nats: `kl_bigram` less the estimated sampling bias of the counts."""
    kl_bigram_row: FloatArray | None = None
    """(K,) nats: mean KL of each single prediction to the bigram row."""
    model_loss: FloatArray | None = None
    """(K,) nats a token: the language model's loss on the evaluation text."""
    entropies: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines in the loss figure: label -> nats, such as {"uniform, ln V": 7.62, "unigram": 6.4}."""
    induction_gap: FloatArray | None = None
    """(K,) nats: loss on the first copy minus loss on the second of repeated random tokens."""
    norm_examples: Sequence[int] | None = None
    """Feature ids drawn in the figure of decoder norms; chosen from the data where None."""
    captions: Mapping[str, str] = field(default_factory=dict)
    """Figure key -> sentences that replace the default caption (keys: `tables.FIGURE_KEYS`)."""


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
    """Text of each token as it stands in a document, leading space included (see `text.byte_level_text`)."""
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
    revived: NDArray[np.bool_] | None = None
    """(F,) whether it is present, then absent, then present again."""
    contexts: Contexts | None = None


@dataclass(frozen=True)
class TaskResult:
    """What a task's attribution study found. Snapshots at chance hold 0 in the arrays of the n features."""

    name: str
    note: str
    """What the task is, in a sentence without its full stop."""
    metric: str
    """"logit-difference" or "probability-difference"."""
    n_prompts: int
    accuracy: FloatArray
    """(K,) share of prompts answered right."""
    clean: FloatArray
    """(K,) mean metric on the clean prompts."""
    corrupted: FloatArray
    """(K,) mean metric on the corrupted prompts."""
    above_chance: NDArray[np.bool_]
    """(K,)"""
    features: IntArray
    """(n,) the circuit, in order of emergence; empty where the task is at chance everywhere."""
    emergence: IntArray
    """(n,) index of the snapshot of birth, -1 where there is none."""
    attribution: FloatArray
    """(n, K) mean attribution by integrated gradients."""
    share: FloatArray
    """(n, K) share of the positive attribution of all features."""
    relative_effect: FloatArray
    """(n, K) RelIE."""
    relative_norm: FloatArray
    """(n, K) decoder norm over its sum over the snapshots."""
    dominant: IntArray
    """(K,) the feature with the largest attribution, -1 at chance."""
    fidelity: Mapping[str, float] = field(default_factory=dict)
    """Method -> rank correlation of its attributions with exact ablation."""
    n_exact: int = 0
    """Features that `fidelity` is over."""
    completeness_error: float | None = None
    """Of integrated gradients, a share."""
    curves: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Columns of the ablation curves, a row a (snapshot, ablation, set, k); "snapshot" is an index."""


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
    figures: Figures = field(default_factory=Figures)
    features: Features | None = None
    tables: Sequence[FigureTable] = ()
    """More figures, ready made (see `analysis_tables`)."""
    leads: Mapping[str, str] = field(default_factory=dict)
    """Section of the page -> the sentence that it begins with."""
    marks: Sequence[StepMark] = ()
    """Drawn in every figure over training steps."""
    tasks: Sequence[TaskResult] = ()
    subtitle: str = ""
    """One line under the title: the model, the text, the date."""
