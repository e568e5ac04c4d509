"""Checks of a `PageData` before anything is written; every message names the field and what it must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from crosscoder.errors import DataError
from crosscoder.figures.table import FigureTable
from crosscoder.report.data import Contexts, Features, PageData


def _shape(name: str, array: Any, shape: tuple[int | None, ...], meaning: str) -> None:
    actual = np.shape(array)
    fits = len(actual) == len(shape) and all(
        want is None or have == want for have, want in zip(actual, shape, strict=True)
    )
    if not fits:
        raise DataError(f"page: {name} has shape {actual}, expected {meaning}")


def _kind(name: str, array: Any, kinds: str, what: str) -> None:
    dtype = np.asarray(array).dtype
    if dtype.kind not in kinds:
        raise DataError(f"page: {name} has dtype {dtype}, expected {what}")


def _range(name: str, array: Any, low: float, high: float, slack: float = 0.0) -> None:
    values = np.asarray(array)
    if values.size == 0:
        return
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"page: {name} holds NaN or infinity")
    smallest, largest = values.min(), values.max()
    if smallest < low - slack or largest > high + slack:
        raise DataError(f"page: {name} must lie in [{low:g}, {high:g}], but spans [{smallest:g}, {largest:g}]")


def _texts(name: str, values: Sequence[str]) -> None:
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise DataError(f"page: {name} must be a list of strings")


def _check_table(table: FigureTable) -> None:
    if len({len(column) for column in table.columns.values()}) != 1:
        raise DataError(f"page: the columns of the figure {table.key!r} have different lengths")
    for name, column in table.columns.items():
        if any(isinstance(value, float) and not math.isfinite(value) for value in column):
            raise DataError(f"page: the column {name!r} of the figure {table.key!r} holds NaN or infinity")


def _check_contexts(contexts: Contexts, n_features: int) -> None:
    _kind("contexts.tokens", contexts.tokens, "iu", "integers")
    _shape("contexts.tokens", contexts.tokens, (None, None), "(N, L)")
    n_contexts, length = np.shape(contexts.tokens)
    _kind("contexts.feature", contexts.feature, "iu", "integers")
    _shape("contexts.feature", contexts.feature, (n_contexts,), f"({n_contexts},)")
    _range("contexts.feature", contexts.feature, 0, n_features - 1)
    _shape("contexts.activations", contexts.activations, (n_contexts, length), f"({n_contexts}, {length})")
    _range("contexts.activations", contexts.activations, 0, np.inf)
    _texts("contexts.vocabulary", contexts.vocabulary)
    _texts("contexts.documents", contexts.documents)
    _range("contexts.tokens", contexts.tokens, -1, len(contexts.vocabulary) - 1)
    if contexts.document is not None:
        _kind("contexts.document", contexts.document, "iu", "integers")
        _shape("contexts.document", contexts.document, (n_contexts,), f"({n_contexts},)")
        _range("contexts.document", contexts.document, -1, len(contexts.documents) - 1)
    if contexts.position is not None:
        _kind("contexts.position", contexts.position, "iu", "integers")
        _shape("contexts.position", contexts.position, (n_contexts,), f"({n_contexts},)")


def _check_maximum(contexts: Contexts, max_activation: Any) -> None:
    """A context stronger than its feature's maximum would be shown clipped."""
    if np.size(contexts.activations) == 0:
        return
    inside = np.where(np.asarray(contexts.tokens) >= 0, np.asarray(contexts.activations), 0)
    largest = np.asarray(max_activation)[np.asarray(contexts.feature)]
    excess = np.flatnonzero(inside.max(axis=1) > largest * 1.01 + 1e-6)
    if excess.size:
        feature = int(np.asarray(contexts.feature)[excess[0]])
        raise DataError(f"page: a context of feature {feature} is stronger than its features.max_activation")


def _check_features(features: Features, n_snapshots: int) -> None:
    _shape("features.norms", features.norms, (None, n_snapshots), f"(F, {n_snapshots})")
    n_features = np.shape(features.norms)[0]
    if n_features == 0:
        raise DataError("page: features has no rows; leave it None instead")
    _range("features.norms", features.norms, 0, 1, slack=1e-4)
    _shape(
        "features.firing_rate",
        features.firing_rate,
        (n_features, n_snapshots),
        f"({n_features}, {n_snapshots})",
    )
    _range("features.firing_rate", features.firing_rate, 0, 1, slack=1e-6)
    one_each = f"({n_features},), one value a feature"
    for name in ("max_norm", "lifetime", "max_activation", "kind", "emergence", "peak"):
        _shape(f"features.{name}", getattr(features, name), (n_features,), one_each)
    for name in ("kind", "emergence", "peak"):
        _kind(f"features.{name}", getattr(features, name), "iu", "integers")
    _range("features.max_norm", features.max_norm, 0, np.inf)
    _range("features.max_activation", features.max_activation, 0, np.inf)
    _range("features.lifetime", features.lifetime, 0, 1, slack=1e-6)
    _texts("features.kind_names", features.kind_names)
    _range("features.kind", features.kind, 0, len(features.kind_names) - 1)
    _range("features.emergence", features.emergence, -1, n_snapshots - 1)
    _range("features.peak", features.peak, 0, n_snapshots - 1)
    if (features.neighbours is None) != (features.neighbour_cosines is None):
        raise DataError("page: features.neighbours and features.neighbour_cosines must be given together")
    if features.neighbours is not None:
        _kind("features.neighbours", features.neighbours, "iu", "integers")
        _shape("features.neighbours", features.neighbours, (n_features, None), f"({n_features}, n)")
        _shape(
            "features.neighbour_cosines",
            features.neighbour_cosines,
            np.shape(features.neighbours),
            "the shape of features.neighbours",
        )
        _range("features.neighbours", features.neighbours, -1, n_features - 1)
        _range("features.neighbour_cosines", features.neighbour_cosines, -1, 1, slack=1e-3)
    if features.contexts is not None:
        _check_contexts(features.contexts, n_features)
        _check_maximum(features.contexts, features.max_activation)


def check(data: PageData) -> None:
    """Raise `DataError` with one line naming the field where `data` does not fit together."""
    _texts("sentences", data.sentences)
    _texts("notes", data.notes)
    steps = np.asarray(data.steps)
    if steps.ndim != 1 or steps.size == 0 or steps.dtype.kind not in "iu":
        raise DataError("page: steps must be a list of at least one integer")
    if steps[0] < 0 or (np.diff(steps) <= 0).any():
        raise DataError("page: steps must increase strictly from 0 or more")
    if data.features is not None:
        _check_features(data.features, steps.size)
    for table in data.tables:
        _check_table(table)
    if len({table.key for table in data.tables}) < len(data.tables):
        raise DataError("page: two figures have one key")
